"""What `kd.store list` and `kd.store show` print: a line per stage, and everything about one stage."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kd.core.files import size_of
from kd.core.spec import KnownError
from kd.core.stage import Stage, joined
from kd.reporting.console import console, in_bytes
from kd.store import Store
from kd.store.housekeeping import dependents


@dataclass(frozen=True)
class StageRow:
    """A row of the list: a finished stage, with accuracies in percent, size in bytes and age in seconds."""

    key: str
    role: str
    model: str
    dataset: str
    guides: tuple[str, ...]  # keys, the nearest first
    chain: str
    val_acc: float | None
    test_acc: float
    epochs: int
    size: int
    age: float


def row(store: Store, key: str) -> StageRow:
    """A stage's row. Raises KnownError if the stage is damaged; its weights are not checked."""
    source, result = store.source(key), store.result(key)
    below = source.chain[::-1]
    return StageRow(
        key=key,
        role=source.role if isinstance(source, Stage) else f"{source.role}, given",
        model=source.model,
        dataset=source.dataset.name,
        guides=tuple(guide.key for guide in below[1:]),
        chain=joined(source.chain, student_first=True),
        val_acc=result.val_acc,
        test_acc=result.test_acc,
        epochs=result.epochs,
        size=size_of(store.root / key),
        age=time.time() - (store.root / key / "result.json").stat().st_mtime,
    )


def print_list(store: Store, as_json: bool) -> None:
    """Print all stages: finished ones in a table, unfinished and damaged ones in lines below it."""
    rows, damaged = [], []
    for key in store:
        try:
            rows.append(row(store, key))
        except (KnownError, FileNotFoundError) as error:
            if store.has(key):  # otherwise it has just been removed
                damaged.append(str(error))
    damaged += [f"{path} is a damaged stage that was moved there" for path in _folders(store, "damaged")]
    # Without a checkpoint there is nothing to go on with: an aborted training has left the id of its W&B run, at most.
    checkpoints = {path.name: [*path.rglob("state")] for path in _folders(store, "partial")}
    unfinished = dict[str, float]()
    for key, found in checkpoints.items():
        with suppress(FileNotFoundError, ValueError):  # its stage has just been finished; or it has no checkpoint
            unfinished[key] = time.time() - max(path.stat().st_mtime for path in found)
    if as_json:
        told = {"finished": [vars(each) for each in rows], "unfinished": list(unfinished), "damaged": damaged}
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in ("stage", "role", "data set", "network ← its guides"):
        table.add_column(name, overflow="fold", min_width=16 if name == "stage" else None)
    for name in ("val %", "test %", "epochs", "size", "age"):
        table.add_column(name, justify="right", overflow="fold")
    for each in rows:
        accuracies = ("–" if acc is None else f"{acc:.2f}" for acc in (each.val_acc, each.test_acc))
        measures = str(each.epochs), in_bytes(each.size), _ago(each.age)
        table.add_row(each.key, *map(escape, (each.role, each.dataset, each.chain)), *accuracies, *measures)
    out = console()
    out.print(table)
    total = in_bytes(sum(each.size for each in rows))
    out.print(f"{len(rows)} finished stages, {total}, in {store.root}", highlight=False, markup=False, soft_wrap=True)
    for key, age in unfinished.items():
        goes_on = "the command that began it goes on"
        out.print(f"{key} is unfinished, last written {_ago(age)} ago: {goes_on}", highlight=False)
    for line in damaged:
        out.print(line, style="red", highlight=False, markup=False, soft_wrap=True)


def print_stage(store: Store, key: str) -> None:
    """Print everything about a finished stage. Raises KnownError if it is damaged."""
    told: dict[str, Any] = {**store.record(key), "result": store.result(key).dump()}
    print(json.dumps(told, indent=2, ensure_ascii=False))
    needed = dependents(store, key)
    print(f"network and guides: {row(store, key).chain}")
    print(f"stages that depend on it: {', '.join(needed) or 'none'}")
    print(f"path: {store.root / key}")
    print(store.loading(key))


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _folders(store: Store, name: str) -> list[Any]:
    place = store.root / name
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
