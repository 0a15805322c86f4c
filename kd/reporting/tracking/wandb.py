"""Weights & Biases: each job is one run. A training that is resumed continues its run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from kd.core.spec import Frozen, KnownError, explain, tilde
from kd.reporting.tracking import Opening, Page, TrackingSpec
from kd.store import Metrics

if TYPE_CHECKING:
    from wandb import Run

# wandb's own settings, unless the user has set them. Its service would send reports of its errors, even offline.
_DEFAULTS = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
_PATIENCE = 5.0  # seconds for a server to answer in tracking.mode=auto, unless WANDB_INIT_TIMEOUT says otherwise
# No metadata of the process: paths, arguments, host, user, e-mail, git remote, code.
_PRIVATE: dict[str, Any] = {"x_disable_meta": True, "disable_git": True, "disable_code": True, "host": ""}


class _Record(Frozen):
    id: str
    run: str  # the run that has the id


class RunId:
    """The id under which `run` goes on, kept in `folder`/wandb.json and held by one process at a time.

    The id is new where another process holds the one in the file, or the file is another run's.
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
            kept = _Record.model_validate_json(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            kept = None
        if kept is not None and kept.run == run:
            self.value = kept.id
        else:
            path.write_text(_Record(id=self.value, run=run).model_dump_json(), encoding="utf-8")

    def release(self) -> None:
        """Let another process have the id."""
        self._lock.release()


class WandbPage(Page):
    """A run at W&B: online, or in files that `wandb sync` sends. Raises KnownError if it cannot start."""

    unreachable: ClassVar[str] = ""  # why auto became offline in this process: each job of a sweep would wait again

    def __init__(self, spec: TrackingSpec, opening: Opening) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        os.environ.pop("WANDB_SERVICE", None)  # the service of a parent process, which a teardown here cannot end
        import wandb

        mode, reason = _mode(spec.mode)
        self._folder, self._id = opening.folder, None
        if opening.keep is not None and mode != "disabled":
            self._id = RunId(opening.keep, f"{spec.entity or ''}/{spec.project}/{opening.name}")
        try:
            self._run = self._start(spec, opening, mode)
        except (wandb.Error, OSError) as error:
            problem = f"W&B did not start ({' '.join(str(error).partition('Consider increasing')[0].split())})"
            wandb.teardown()  # its service still holds the run's id
            if mode != "auto":
                self._leave()
                raise KnownError(f"tracking: {problem}; tracking.mode=offline needs no server") from error
            reason = WandbPage.unreachable = problem
            self._run = self._start(spec, opening, "offline")
        if reason:
            sync = f"wandb sync {opening.folder}/wandb/offline-run-*"
            print(tilde(f"tracking: offline, because {reason}; `{sync}` sends this run later"), flush=True)
        for axis in opening.axes:
            self._run.define_metric(f"{axis}/*", step_metric=f"{axis}/epoch")

    def _start(self, spec: TrackingSpec, opening: Opening, mode: Any) -> Run:
        import wandb

        settings: dict[str, Any] = {"console": "off", "x_disable_stats": True, **_PRIVATE}
        if mode == "auto" and "WANDB_INIT_TIMEOUT" not in os.environ:
            settings["init_timeout"] = _PATIENCE
        return wandb.init(
            project=spec.project,
            entity=spec.entity,
            group=opening.group,
            job_type=opening.job_type,
            tags=list(spec.tags),
            name=opening.name,
            config=opening.config,
            dir=opening.folder,
            mode="online" if mode == "auto" else mode,
            id=self._id.value if self._id else None,
            resume="allow" if self._id else None,
            settings=wandb.Settings(**settings),
        )

    def _leave(self) -> None:
        for log in self._folder.glob("wandb/*/logs/*.log"):  # they contain the home folder
            log.write_text(tilde(log.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
        if self._id is not None:
            self._id.release()

    def log(self, axis: str, step: int, metrics: Metrics) -> None:
        # The server has the earlier epochs of a continued run. Offline this is unknown, so they are logged again, with
        # the same values.
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
        self._leave()


def _mode(asked: str) -> tuple[str, str]:
    """W&B's mode, and why `auto` became offline. It stays `auto` if a key is configured: then online is tried first.

    Raises KnownError if wandb's own settings are wrong.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        settings = wandb.setup().settings
        if asked != "auto":
            return asked, ""
        if "WANDB_MODE" in os.environ or settings.mode != "online":
            return settings.mode, ""
        if WandbPage.unreachable:
            return "offline", WandbPage.unreachable
        if wbauth.authenticate_session(host=settings.base_url, source="kd", prompt=False, update_session=False):
            return "auto", ""
    except (wandb.Error, ValueError) as error:
        problems = explain(error, "wandb") if isinstance(error, ValidationError) else [str(error)]
        raise KnownError(f"tracking: W&B's settings are wrong ({'; '.join(problems)})") from error
    return "offline", "no key is configured (`wandb login`)"
