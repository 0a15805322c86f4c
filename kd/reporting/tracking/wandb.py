"""Weights & Biases: each job is one run. A training that is resumed continues its run."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from multiprocessing import parent_process
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, ClassVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from kd.core.spec import Frozen, KnownError, explain, tilde
from kd.reporting.tracking import LONGEST, Opening, Page, TrackingSpec, shortened
from kd.store import Metrics

if TYPE_CHECKING:
    from wandb import Run

# wandb's own settings, unless the user has set them. Its service would send reports of its errors, even offline.
_DEFAULTS = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
_PROJECT = "distillation"  # where neither the user nor wandb's settings name one
_PATIENCE = 5.0  # seconds for a server to answer in tracking.mode=auto, unless WANDB_INIT_TIMEOUT says otherwise
_OLD_MODES = {"dryrun": "offline", "run": "online"}  # wandb still takes these names
_IDENTIFIED = {"run_id", "fork_from", "resume_from"}  # settings by which the user says which run goes on
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
    """A run at W&B: online, or in files that `wandb sync` sends. Raises KnownError if it cannot start.

    What is typed as tracking.… wins; then come WANDB_ variables and wandb's files of settings, then our defaults.
    """

    unreachable: ClassVar[str] = ""  # why auto became offline in this process: each job of a sweep would wait again
    told: ClassVar[str | None] = None  # the multirun of which this process has said that it is offline

    def __init__(self, spec: TrackingSpec, opening: Opening) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        os.environ.pop("WANDB_SERVICE", None)  # the service of a parent process, which a teardown here cannot end
        import wandb

        mode, reason = _mode(spec.mode)
        users = _users(opening)
        self._id = None
        if opening.keep is not None and mode != "disabled" and not users.keys() & _IDENTIFIED:
            project = spec.project or users.get("project", _PROJECT)
            self._id = RunId(opening.keep, f"{spec.entity or users.get('entity', '')}/{project}/{opening.name}")
        settings = {**_ours(opening, self._id, users), **_typed(spec)}
        self._logs = Path(settings.get("root_dir") or users["root_dir"]), self._id.value if self._id else "*"
        try:
            self._run = _start(settings, opening, mode)
        except (wandb.Error, OSError) as error:
            problem = f"W&B did not start ({' '.join(str(error).partition('Consider increasing')[0].split())})"
            wandb.teardown()  # its service still holds the run's id
            if mode != "auto":
                self._leave()
                raise KnownError(f"tracking: {problem}; tracking.mode=offline needs no server") from error
            reason = WandbPage.unreachable = problem
            self._run = _start(settings, opening, "offline")
        if reason:
            self._tell(opening, reason)
        for axis in opening.axes:
            self.add_axis(axis)

    def _tell(self, opening: Opening, reason: str) -> None:
        """Say that a run is offline. Of a multirun it is said once: by the process that writes the summary."""
        place = str(self._run.settings.sync_dir)
        if opening.multirun is None:
            print(tilde(f"tracking: offline, because {reason}; `wandb sync {place}` sends this run later"), flush=True)
        elif parent_process() is None and WandbPage.told != opening.multirun:
            WandbPage.told = opening.multirun
            print(tilde(_hint(opening, reason, place)), flush=True)

    def _leave(self) -> None:
        folder, run = self._logs
        for log in folder.glob(f"wandb/*-{run}/logs/*.log"):  # they contain the home folder
            log.write_text(tilde(log.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
        if self._id is not None:
            self._id.release()

    def log(self, axis: str, step: int, metrics: Metrics) -> None:
        # The server has the earlier epochs of a continued run. Offline this is unknown, so they are logged again, with
        # the same values.
        if step >= self._run.starting_step:
            row = {f"{axis}/{name}": value for name, value in metrics.items() if value is not None}
            self._run.log(row, step=step)

    def add_axis(self, axis: str) -> None:
        self._run.define_metric(f"{axis}/*", step_metric=f"{axis}/epoch")

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


def _hint(opening: Opening, reason: str, place: str) -> str:
    """How to send all runs of a multirun, in lines of 80 columns; the command is a line of its own."""
    multirun = (opening.folder if opening.summary else opening.folder.parent).absolute()
    if Path(place).is_relative_to(multirun):
        inside = multirun.relative_to(Path.cwd()) if multirun.is_relative_to(Path.cwd()) else multirun
        every = f"{shlex.quote(str(inside))}/{{.,*}}/wandb/offline-*"
    else:  # WANDB_DIR: all runs are side by side
        every = f"{shlex.quote(str(Path(place).parent))}/offline-*"
    told = fill(f"tracking: offline, because {reason}; send it later:", 80, break_long_words=False)
    return f"{told}\n  wandb sync {every}"


def _typed(spec: TrackingSpec) -> dict[str, Any]:
    """wandb's settings that `tracking` sets."""
    named = {"project": spec.project, "entity": spec.entity, "run_group": spec.group, "run_tags": spec.tags}
    return {name: value for name, value in named.items() if value}


def _ours(opening: Opening, kept: RunId | None, users: Mapping[str, Any]) -> dict[str, Any]:
    """Our defaults of wandb's settings, without those that the user set elsewhere."""
    ours = {
        "project": _PROJECT,
        "run_group": opening.multirun,
        "run_job_type": opening.job_type,
        "run_name": opening.name,
        "root_dir": str(opening.folder),
        "run_id": kept.value if kept else None,
        "resume": "allow" if kept or "run_id" in users else None,
        "console": "off",
        "x_disable_stats": True,
        **_PRIVATE,
    }
    left = {name: value for name, value in ours.items() if value is not None and name not in users}
    return left | {name: shortened(name, left[name], LONGEST[name]) for name in left.keys() & LONGEST.keys()}


def _users(opening: Opening) -> dict[str, Any]:
    """What the user set by WANDB_ variables, or in wandb's own files, by the names of wandb's settings.

    A multirun has several runs, so no variable can be the id of each; and the run of its summary has its own name.
    Raises KnownError for a name that is too long for W&B's server.
    """
    import wandb

    settings = wandb.setup().settings
    found = {name: getattr(settings, name) for name in settings.model_fields_set}
    found = {name: value for name, value in found.items() if value not in (None, "")}
    if "WANDB_HOST" not in os.environ:  # wandb fills it in
        found.pop("host", None)
    if opening.multirun is not None and found.pop("run_id", None) is not None and not opening.summary:
        print("tracking: WANDB_RUN_ID has no effect: a multirun has several runs", flush=True)
    if opening.summary:
        found = {name: value for name, value in found.items() if name not in ("run_name", "run_job_type")}
    for name in found.keys() & LONGEST.keys():
        if len(found[name]) > LONGEST[name]:
            raise KnownError(f"tracking: W&B takes at most {LONGEST[name]} characters for {name} (got {found[name]!r})")
    return found


def _start(settings: Mapping[str, Any], opening: Opening, mode: str) -> Run:
    import wandb

    patience = {} if mode != "auto" or "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": _PATIENCE}
    told = wandb.Settings(**{**settings, **patience, "mode": "online" if mode == "auto" else mode})
    return wandb.init(config=opening.config, settings=told)


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
            return _OLD_MODES.get(settings.mode, settings.mode), ""
        if WandbPage.unreachable:
            return "offline", WandbPage.unreachable
        if wbauth.authenticate_session(host=settings.base_url, source="kd", prompt=False, update_session=False):
            return "auto", ""
    except (wandb.Error, ValueError) as error:
        problems = explain(error, "wandb") if isinstance(error, ValidationError) else [str(error)]
        raise KnownError(f"tracking: W&B's settings are wrong ({'; '.join(problems)})") from error
    return "offline", "no key is configured (`wandb login`)"
