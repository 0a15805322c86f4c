"""`python -m kd.store`: lists, shows, checks and cleans the stages in the store."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from pydantic import ValidationError

from kd.core.spec import KnownError, explain
from kd.reporting.console import in_bytes
from kd.store import Store, place
from kd.store.housekeeping import collect, remove
from kd.tools.listing import print_list, print_stage
from kd.training.workplace import RuntimeSpec


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.store", description=__doc__)
    parser.add_argument("--store", help="folder of the store; default: $KD_STORE, or store/ in the repository")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="every stage: its chain, accuracies, size and age")
    listing.add_argument("--json", action="store_true", help="print JSON, for scripts")
    evaluating = commands.add_parser("eval", help="evaluate a stored network again")
    removing = commands.add_parser("rm", help="remove a finished stage")
    removing.add_argument("--with-dependents", action="store_true", help="also remove the stages that depend on it")
    showing = commands.add_parser("show", help="everything about a stage")
    verifying = commands.add_parser("verify", help="compare files with their checksums; exit code 1 if any differs")
    for command in (evaluating, removing, showing):
        command.add_argument("key", help="the stage's key, or a beginning of it that is unique")
    verifying.add_argument("key", nargs="?", help="key of one stage; default: all stages")
    evaluating.add_argument("--data", help="folder of the data sets; default: $KD_DATA, or data/ in the repository")
    evaluating.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<number> or mps")
    cleaning = commands.add_parser("gc", help="remove leftovers; finished stages and files in use stay")
    cleaning.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    cleaning.add_argument(
        "--older-than",
        type=float,
        default=30,
        metavar="DAYS",
        help="remove checkpoints and damaged stages that are older; default: 30",
    )
    cleaning.add_argument(
        "--banks",
        type=float,
        nargs="?",
        const=0.0,
        metavar="DAYS",
        help="also remove cached logits and features of guides: all, or those not written for this many days",
    )
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns the exit code."""
    arguments = _arguments(given)
    store = Store.at(arguments.store)
    beginning = getattr(arguments, "key", None)
    key = None if beginning is None else store.complete(beginning)
    match arguments.command:
        case "list":
            print_list(store, arguments.json)
        case "verify":
            return _verify(store, [key] if key else list(store))
        case "gc":
            _clean(store, arguments.older_than, arguments.dry_run, arguments.banks)
        case "show":
            print_stage(store, str(key))
        case "eval":
            _evaluate(store, str(key), arguments.data, arguments.device)
        case "rm":
            removed = remove(store, str(key), arguments.with_dependents)
            print(f"removed {', '.join(removed)}")
    return 0


def _verify(store: Store, keys: Sequence[str]) -> int:
    problems = {key: problem for key in keys if (problem := store.problem(key))}
    for key, problem in problems.items():
        print(f"stage {key} is damaged ({problem})")
    print(f"{len(keys) - len(problems)} of {len(keys)} stages match their checksums")
    return 1 if problems else 0


def _clean(store: Store, days: float, dry: bool, banks: float | None) -> None:
    total = count = 0
    for leftover in collect(store, days, dry, banks=banks):
        print(f"{in_bytes(leftover.size):>7}  {leftover.path.relative_to(store.root)}: {leftover.reason}")
        total, count = total + leftover.size, count + 1
    print(f"leftovers: {count}, {in_bytes(total)}, {'to be removed' if dry else 'removed'} from {store.root}")


def _evaluate(store: Store, key: str, data_root: str | None, device: str) -> None:
    from torch import channels_last

    from kd.training.step import evaluate
    from kd.training.workplace import Workplace

    try:
        runtime = RuntimeSpec.model_validate({"device": device})
    except ValidationError as error:
        raise KnownError("\n".join(explain(error))) from error
    source, recorded = store.source(key), store.result(key)
    workplace = Workplace(store, place(data_root or os.environ.get("KD_DATA"), "data"), runtime)
    precision = store.precision(key)
    data = workplace.data(source)
    network = store.network(key).to(memory_format=channels_last).to(workplace.device)
    tested = {"test": (data.batches("test"), data.test_labels, recorded.test_acc)}
    if recorded.val_acc is not None:
        tested["validation"] = data.batches("val"), data.val_labels, recorded.val_acc
    print(f"{source.role} {source.model} on {source.dataset.name}, {precision} on {workplace.device}")
    for name, (batches, labels, before) in tested.items():
        print(f"{name}: {evaluate(network, batches, labels, precision):.4f} % (recorded: {before:.4f} %)")
