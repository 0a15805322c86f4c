"""No API key, environment variable or home folder is in anything that a run writes, prints or sends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kd.models import build
from tests.conftest import QUICK, run_py
from tests.test_datasets import write_folder
from tests.wandb_server import Server

KEY = "5ec7e7" * 7  # of W&B; real ones are hex digits too
EXPERIMENT = ("dataset=folder", "train=cifar10", "dataset.val_fraction=0.5")
VARIABLE = "variable-canary-77"
HOME = "home-canary"


class Listening(Server):
    """The stand-in server, which keeps every byte that it is sent."""

    def __init__(self) -> None:
        self.heard = b""
        super().__init__()

    def answer(self, path: str, data: bytes) -> dict[str, object]:
        self.heard += path.encode() + data
        return super().answer(path, data)


def told(content: bytes) -> set[str]:
    return {canary for canary in (KEY, VARIABLE, HOME) if canary.encode() in content}


def found(folder: Path) -> dict[str, set[str]]:
    """The files below a folder that contain a secret, with the secret."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): seen for path in files if (seen := told(path.read_bytes()))}


def is_hydras(name: str) -> bool:
    """Files that Hydra writes itself: they contain the working directory and the command."""
    return "/.hydra/" in f"/{name}" or name.endswith("/multirun.yaml")


def is_staging(name: str, seen: set[str]) -> bool:
    """The offline summary of a multirun contains the path of its table file. `wandb sync` does not send this path."""
    return name.endswith(".wandb") and seen == {HOME}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    place = tmp_path / HOME
    write_folder(place / "pets", size=(16, 16))
    torch.save(build("plane4", num_classes=2, image_size=16).state_dict(), place / "plane4.pt")
    return place


@pytest.fixture
def start(home: Path) -> Callable[..., bytes]:
    """Run run.py with this home folder. Returns everything that it prints."""

    def run(*arguments: str, code: int = 0, **environment: str) -> bytes:
        (home / "work").mkdir(exist_ok=True)
        mine = {
            "HOME": str(home),
            "WANDB_API_KEY": KEY,
            "SECRET": VARIABLE,
            "KD_STORE": str(home / "store"),
            "KD_DATA": str(home / "data"),
            **environment,
        }
        done = run_py(*QUICK, *EXPERIMENT, f"dataset.root={home}/pets", *arguments, cwd=home / "work", **mine)
        assert done.returncode == code, done.stdout + done.stderr
        return (done.stdout + done.stderr).encode()

    return run


GIVEN = "teacher.checkpoint=${oc.env:HOME}/plane4.pt"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["wandb", "tensorboard"])
def test_a_run_tells_no_secret(start: Callable[..., bytes], home: Path, page: str) -> None:
    printed = start(f"tracking={page}", "tracking.mode=offline", GIVEN, "runtime.data=${oc.env:HOME}/data")
    assert not told(b"\n".join(line for line in printed.splitlines() if b"[HYDRA]" not in line))  # what was typed
    assert {name: seen for name, seen in found(home).items() if not is_hydras(name)} == {}


def test_nothing_secret_is_sent(start: Callable[..., bytes], home: Path) -> None:
    server = Listening()
    try:
        printed = start("tracking=wandb", GIVEN, **{**server.account, "WANDB_API_KEY": KEY})
    finally:
        server.close()
    assert server.runs
    assert not told(printed + server.heard)
    assert os.uname().nodename.encode() not in server.heard
    assert {name: seen for name, seen in found(home).items() if not is_hydras(name)} == {}


@pytest.mark.slow
def test_failures_and_summaries_tell_no_secret(start: Callable[..., bytes], home: Path) -> None:
    odd = f"method.T=1,${{oc.env:SECRET}} teacher.checkpoint={home}/plane4.pt,{home}/nowhere.pt"
    printed = start("tracking=wandb", "tracking.mode=offline", *odd.split(), "--multirun", code=1)
    assert b"nowhere.pt cannot be read" in printed
    assert not told(b"\n".join(line for line in printed.splitlines() if b"[HYDRA]" not in line))  # what was typed
    left = {name: seen for name, seen in found(home).items() if not is_hydras(name)}
    assert [name for name, seen in left.items() if not is_staging(name, seen)] == []
