"""Weights & Biases: one job is one run, and the run of an unfinished training goes on with it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kd.spec import Frozen, KnownError, tilde
from kd.store import Metrics
from kd.tracking.base import Opening, Page, TrackingSpec
from kd.tracking.probe import decide

# No metadata of the process: its paths, arguments, host, user and e-mail, git's remote, the code.
_PRIVATE: dict[str, Any] = {"x_disable_meta": True, "disable_git": True, "disable_code": True, "host": ""}


class _Record(Frozen):
    id: str
    run: str  # whose it is


class RunId:
    """`folder`/wandb.json: the id under which `run` may go on, for one process at a time.

    Where another process holds it, or it is another run's, there is a new one.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.value = secrets.token_hex(4)
        path = folder / "wandb.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "wandb.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return
        try:
            kept = _Record.model_validate_json(path.read_text())
        except (FileNotFoundError, ValueError):
            kept = None
        if kept is not None and kept.run == run:
            self.value = kept.id
        else:
            path.write_text(_Record(id=self.value, run=run).model_dump_json())

    def release(self) -> None:
        """Let another process go on."""
        self._lock.release()


class WandbPage(Page):
    """A run at W&B, online or in files that `wandb sync` sends. Raises KnownError where it cannot start."""

    def __init__(self, spec: TrackingSpec, opening: Opening) -> None:
        # Before wandb's service starts, which decide() does: it reports its own errors over the network, even offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode, reason = decide(spec.mode)
        if reason:
            sync = f"wandb sync {opening.folder}/wandb/offline-run-*"
            print(tilde(f"W&B: {reason}: offline; `{sync}` sends this run later"), flush=True)
        import wandb

        self._id = None
        if opening.keep is not None and mode != "disabled":
            self._id = RunId(opening.keep, f"{spec.entity or ''}/{spec.project}/{opening.name}")
        try:
            self._run = wandb.init(
                project=spec.project,
                entity=spec.entity,
                group=opening.group,
                job_type=opening.job_type,
                tags=list(spec.tags),
                name=opening.name,
                config=opening.config,
                dir=opening.folder,
                mode=mode,
                id=self._id.value if self._id else None,
                resume="allow" if self._id else None,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, **_PRIVATE),
            )
        except (wandb.Error, OSError) as error:
            said = str(error).splitlines()[0]
            if self._id is not None:
                self._id.release()
            raise KnownError(f"tracking: W&B did not start ({said}); tracking.mode=offline needs no server") from error
        for axis in opening.axes:
            self._run.define_metric(f"{axis}/*", step_metric=f"{axis}/epoch")

    def log(self, axis: str, step: int, metrics: Metrics) -> None:
        # A run that goes on has its earlier epochs on the server. Offline nobody knows, and they are logged again:
        # the same values at the same epochs.
        if step >= self._run.starting_step:
            row = {f"{axis}/{name}": value for name, value in metrics.items() if value is not None}
            self._run.log(row, step=step)

    def summarize(self, values: dict[str, Any]) -> None:
        self._run.summary.update(values)

    def show(self, table: Sequence[Mapping[str, Any]], figures: Sequence[Path]) -> None:
        import wandb

        columns: list[str | int] = list(dict.fromkeys(name for row in table for name in row))
        rows = [[row.get(str(name)) for name in columns] for row in table]
        jobs = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        self._run.log({"jobs": jobs, **{figure.stem: wandb.Image(str(figure)) for figure in figures}})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))  # not `with run`, which prints a traceback of its own
        for log in (Path(self._run.dir).parent / "logs").glob("*.log"):  # they name the folder
            log.write_text(tilde(log.read_text(errors="replace")))
        if self._id is not None:
            self._id.release()
