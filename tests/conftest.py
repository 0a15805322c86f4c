"""Shared by all tests: the composed configuration, jobs in this process, and temporary folders for store and data."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from kd.app.options import register

ROOT = Path(__file__).resolve().parent.parent
_PARSED: dict[str, Any] = {}  # what OmegaConf makes of a text
_load = OmegaConf.load


def _load_once(file: Any) -> Any:
    """OmegaConf.load, which parses each text once. In Hydra it is a fifth of the time of each composition."""
    if not hasattr(file, "read"):
        return _load(file)
    if (text := file.read()) not in _PARSED:
        file.seek(0)
        _PARSED[text] = _load(file)
    return deepcopy(_PARSED[text])


OmegaConf.load = staticmethod(_load_once)  # type: ignore[method-assign,assignment]

# Hydra composes the same options three times in a command, and most tests run a command. This took 27 of the 43 seconds
# of tests/test_search.py. Here each choice of options is composed once. The values of a command line are set each time.
_LISTED: dict[str, DefaultsList] = {}  # which files and tables Hydra chose for the same options
_MERGED: dict[str, DictConfig] = {}  # and what it made of them
_list = config_loader_impl.create_defaults_list
_merge = ConfigLoaderImpl._compose_config_from_defaults_list


def _is_ours(repo: IConfigRepository) -> bool:
    """Whether there are no options but the repository's and Hydra's, which no test changes."""
    own = [source.path for source in repo.get_sources() if source.provider not in ("hydra", "schema")]
    return own == [str(ROOT / "conf")]


def _list_once(
    repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **how: bool
) -> DefaultsList:
    if not _is_ours(repo):
        return _list(repo, config_name, overrides_list, **how)
    typed = Overrides(repo, overrides_list)  # tells options from values
    key = repr((config_name, typed.override_choices, typed.append_group_defaults, typed.deletions, how))
    if key not in _LISTED:
        _LISTED[key] = _list(repo, config_name, overrides_list, **how)
    return replace(_LISTED[key], config_overrides=typed.config_overrides)


def _merge_once(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
    if not _is_ours(repo):
        return _merge(self, defaults, repo)
    if (key := repr(defaults)) not in _MERGED:
        _MERGED[key] = _merge(self, defaults, repo)
    return deepcopy(_MERGED[key])


config_loader_impl.create_defaults_list = _list_once  # type: ignore[attr-defined]
ConfigLoaderImpl._compose_config_from_defaults_list = _merge_once  # type: ignore[method-assign]

# A job of about a second: tiny networks, two epochs, fp32 so that no key depends on the CPU.
QUICK = (
    "model=plane2",
    "teacher=plane4",
    "train.epochs=2",
    "train.precision=fp32",
    "runtime.threads=1",
    "runtime.processes=1",  # in this process, where a test can change what it does
    "tracking=none",
)


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test touches the repository's store or data, the network, or the tester's W&B account."""
    monkeypatch.setenv("KD_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("KD_DATA", str(tmp_path / "data"))
    proxies = (f"{kind}_proxy" for kind in ("http", "https", "all", "no"))
    wandb = [name for name in os.environ if name.startswith("WANDB_")]
    for name in (*wandb, *(case for p in proxies for case in (p, p.upper()))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    yield
    GlobalHydra.instance().clear()


@pytest.fixture
def signals() -> Iterator[None]:
    """SIGINT is handled, also if pytest runs in the background. Handlers are restored afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def composed(*overrides: str) -> DictConfig:
    """The configuration as run.py would get it."""
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture
def figures() -> None:
    """For tests of curves.png and summary.png, which jobs in this process do not draw otherwise, to save time."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, signals: None, request: pytest.FixtureRequest) -> Callable[..., int]:
    """Runs run.py with these arguments in this process, which is fast. Returns its exit status."""
    from kd.app.multirun import Multirun

    if "figures" not in request.fixturenames and request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("kd.app.jobs.draw_curves", lambda folder, result: None)
        monkeypatch.setattr("kd.reporting.summary.draw_summary", lambda *_: None)

    def start(*arguments: str) -> int:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(Multirun, "folder", None)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return start


@pytest.fixture
def job(tmp_path: Path, command: Callable[..., int]) -> Callable[..., Any]:
    """Runs a quick job in this process. Returns result.json; of a multirun, a list with each job's."""

    def start(*overrides: str, multirun: bool = False, folder: str = "out", code: int = 0) -> Any:
        place = tmp_path / folder
        where = ["-m", f"hydra.sweep.dir={place}"] if multirun else [f"hydra.run.dir={place}"]
        assert command(*where, *QUICK, *overrides) == code
        if code and not multirun:
            return None
        if not multirun:
            return json.loads((place / "result.json").read_text())
        results = sorted(place.glob("*/result.json"), key=lambda path: int(path.parent.name))
        return [json.loads(path.read_text()) for path in results]

    return start


def own_option(folder: Path, option: str, text: str) -> None:
    """Write an option of one's own below a folder for --config-dir or hydra.searchpath: `sweep/mine`."""
    path = folder / f"{option}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package _global_\n{text}")


def run_py(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """run.py in a new process, started in `cwd`."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=280
    )
