"""Records of a run while it goes: always a local metrics.jsonl, Weights & Biases when asked."""

from __future__ import annotations

import json
import netrc
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from kd.spec import Frozen, KnownError
from kd.stage import Source, Stage
from kd.store import Metrics

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

_PROBE_SECONDS = 3.0


class TrackingSpec(Frozen):
    """The `tracking` section of the configuration."""

    name: Literal["wandb", "none"]
    project: str
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline"] = "auto"


class Tracker:
    """Takes each epoch of each stage that is trained, and how the run ended."""

    def __init__(self, folder: Path, sources: Sequence[Source], run: Run | None) -> None:
        self._file, self._run = folder / "metrics.jsonl", run
        self._axes = axes(sources)
        self._file.write_text("")
        if run is not None:
            for axis in self._axes.values():
                run.define_metric(f"{axis}/*", step_metric=f"{axis}/epoch")

    def log(self, stage: Stage, metrics: Metrics) -> None:
        """One epoch of a stage."""
        with self._file.open("a") as file:
            file.write(json.dumps({"role": stage.role, "key": stage.key, **metrics}) + "\n")
        if self._run is not None:
            axis = self._axes[stage.key]
            self._run.log({f"{axis}/{name}": value for name, value in metrics.items() if value is not None})

    def summarize(self, values: dict[str, Any]) -> None:
        """What the run comes to."""
        if self._run is not None:
            self._run.summary.update(values)

    def finished(self, source: Source, values: dict[str, Any]) -> None:
        """What one stage came to, trained now or before."""
        self.summarize({f"{self._axes[source.key]}/{name}": value for name, value in values.items()})


def axes(sources: Sequence[Source]) -> dict[str, str]:
    """A name for each stage's key, unique in the run: its role, with network, seed or key only where needed."""
    unique = {source.key: source for source in sources}
    names = {key: _candidates(source) for key, source in unique.items()}
    taken = Counter(name for candidates in names.values() for name in candidates)
    return {key: next(name for name in candidates if taken[name] == 1) for key, candidates in names.items()}


def _described(sources: Sequence[Source]) -> dict[str, Any]:
    """Each stage with everything resolved, under its name."""
    names = axes(sources)
    return {names[s.key]: {"key": s.key, **{k: v for k, v in s.dump().items() if k != "guide"}} for s in sources}


def _candidates(source: Source) -> list[str]:
    role = source.role
    seed = [f"{role}-s{source.seed}"] if isinstance(source, Stage) else []
    return [role, f"{role}-{source.model}", *seed, f"{role}-{source.key}"]


@contextmanager
def track(spec: TrackingSpec, folder: Path, sources: Sequence[Source], config: dict[str, Any]) -> Iterator[Tracker]:
    """A tracker for one run. An error that leaves the block ends its W&B run as failed."""
    if spec.name == "none":
        yield Tracker(folder, sources, None)
        return
    run = _start_wandb(spec, folder, sources, config)
    try:
        yield Tracker(folder, sources, run)
    except BaseException:
        run.finish(exit_code=1)  # not `with run`, which prints a traceback of its own
        raise
    run.finish()


def _start_wandb(spec: TrackingSpec, folder: Path, sources: Sequence[Source], config: dict[str, Any]) -> Run:
    # Before wandb's service starts, which _decide() does: it reports its own errors over the network, even offline.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    mode, reason = _decide(spec.mode)
    if reason:
        print(f"W&B: {reason}: offline; `wandb sync {folder}/wandb/offline-run-*` sends this run later", flush=True)
    import wandb

    student = sources[-1]
    seed = f" · s{student.seed}" if isinstance(student, Stage) else ""
    try:
        return wandb.init(
            project=spec.project,
            entity=spec.entity,
            group=spec.group,
            job_type=str(config["method"]["name"]),
            tags=list(spec.tags),
            name=" ← ".join(stage.model for stage in reversed(student.chain)) + seed,
            config={**config, "stages": _described(sources)},
            dir=folder,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
    except (wandb.Error, OSError) as error:
        said = str(error).splitlines()[0]
        raise KnownError(f"tracking: W&B did not start ({said}); tracking.mode=offline needs no server") from error


@cache
def _decide(mode: str) -> tuple[Literal["online", "offline", "disabled"], str]:
    """W&B's mode, and why `auto` became offline; decided once a process.

    `auto` is online where a key is configured and the server can be reached. Raises KnownError where online is
    demanded of a server that cannot.
    """
    asked = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    match asked:
        case "offline" | "disabled":
            return asked, ""
        case "auto" | "online":
            return _probe(demanded=asked == "online")
        case _:
            raise KnownError(f"WANDB_MODE: should be online, offline or disabled (got {asked!r})")


def _probe(demanded: bool) -> tuple[Literal["online", "offline"], str]:
    import wandb

    try:
        url = wandb.setup().settings.base_url
    except (wandb.Error, ValueError) as error:
        raise KnownError(f"tracking: W&B's settings are wrong ({' '.join(str(error).split())})") from error
    server = urlsplit(url)
    if not demanded and not _has_key(server.netloc):
        return "offline", "no key is configured (`wandb login`)"
    # Behind a proxy it is the proxy that must answer.
    proxy = "" if proxy_bypass(server.hostname or "") else getproxies().get(server.scheme, "")
    asked = urlsplit(proxy) if proxy else server
    host, port = asked.hostname or "", asked.port or (443 if asked.scheme == "https" else 80)
    if _answers(host, port):
        return "online", ""
    if demanded:
        raise KnownError(f"tracking: online was asked for and {host}:{port} cannot be reached; offline needs no server")
    return "offline", f"{host}:{port} cannot be reached"


def _has_key(netloc: str) -> bool:
    """Whether there is a key for the server in the environment or, as `wandb login` leaves it, in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    names = [netloc, "api.wandb.ai"] if netloc == "api.forge.coreweave.com" else [netloc]  # the same service, renamed
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(name) for name in names)


def _answers(host: str, port: int) -> bool:
    answered = []

    def probe() -> None:
        try:
            socket.create_connection((host, port), _PROBE_SECONDS).close()
            answered.append(True)
        except OSError:
            pass

    # In a thread, because no timeout bounds the look-up of a name.
    thread = Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(answered)
