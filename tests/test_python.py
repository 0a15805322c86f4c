"""kd.run, kd.sweep, kd.results and kd.load from Python: as the command line, and the process stays as it was."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image

import kd
from kd.app.command_line import read_command
from kd.app.options import register
from kd.core import hardware
from kd.core.spec import KnownError
from tests.conftest import QUICK, ROOT, own_option
from tests.test_hardware import HERE

FAST = [*QUICK, "method=scratch", "train.epochs=1"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def state() -> dict[str, Any]:
    """What a call must not change."""
    root = logging.getLogger()  # KMP_: set where scikit-learn is imported
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    return {
        "argv": [*sys.argv],
        "folder": os.getcwd(),
        "processors": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "handlers": [*root.handlers],
        "level": root.level,
        "signals": [signal.getsignal(number) for number in numbers],
        "hydra": (GlobalHydra.instance().hydra, HydraConfig.instance().cfg),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST" and not k.startswith("KMP_")},
        "streams": (sys.stdout, sys.stderr),
    }


@pytest.fixture
def unchanged() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    before = state()
    yield
    assert state() == before


@pytest.mark.usefixtures("unchanged")
def test_a_run_is_that_of_the_command_line(tmp_path: Path) -> None:
    result = kd.run([*FAST, "hydra.run.dir=mine"])
    assert result.method == "scratch"
    assert not result.chain[-1].reused
    written = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert written["chain"][0]["key"] == result.chain[-1].key
    again = kd.run(FAST)  # in a folder of its own, and from the store
    assert again.chain[-1].reused
    assert again.chain[-1].key == result.chain[-1].key
    (folder,) = tmp_path.glob("outputs/*/*")
    assert {"result.json", "metrics.jsonl", ".hydra"} <= {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("unchanged")
def test_a_sweep_gives_a_row_a_student(capsys: pytest.CaptureFixture[str]) -> None:
    rows = kd.sweep([*FAST, "method=scratch", "seed=0,3", "replicates=2"])
    assert [(row["job"], row["seed"]) for row in rows] == [("0", 0), ("0", 1), ("1", 3), ("1", 4)]
    assert {row["chain"] for row in rows} == {"plane2"}
    assert all(0 < row["test_acc"] <= 100 and row["failure"] is None for row in rows)
    assert "\njob 1: seed=3: validation " in capsys.readouterr().out  # what was swept, and nothing else
    assert rows[0]["train.epochs"] == 1
    assert len({row["student"] for row in rows}) == 4
    assert len({tuple(row) for row in rows}) == 1  # the same columns, so that any table takes them
    assert all(isinstance(value, (str, int, float, type(None))) for row in rows for value in row.values())
    (folder,) = Path().glob("multirun/*/*")
    assert kd.results(folder) == rows
    assert (folder / "summary.md").exists()
    (alone,) = kd.results(folder)[:1]
    assert kd.results(folder / "0")[0]["student"] == alone["student"]


@pytest.mark.usefixtures("unchanged")
def test_the_best_command_of_a_sweep_finds_ones_own_options(tmp_path: Path) -> None:
    own_option(tmp_path / "own", "experiment/mine", "seed: 4\n")
    kd.sweep(
        [*FAST, "method=scratch", f"hydra.searchpath=[file://{tmp_path}/own]", "experiment=mine", "train.lr=0.1,0.05"]
    )
    (best,) = tmp_path.glob("multirun/*/*/best.sh")
    assert re.search(rf"'hydra\.searchpath=\[file\\?://{tmp_path}/own\]' .*experiment=mine", best.read_text())


@pytest.mark.usefixtures("unchanged")
def test_a_job_that_fails_is_a_row_with_the_reason() -> None:
    rows = kd.sweep([*FAST, "train.lr=0.1,-1", "seed=2"])
    assert [row["failure"] for row in rows] == [None, "train.lr: should be above 0 (got -1)"]
    assert (rows[1]["train.lr"], rows[1]["seed"], rows[1]["test_acc"]) == (-1, 2, None)
    with pytest.raises(KnownError):
        kd.run([*FAST, "train.lr=-1", "hydra.run.dir=alone"])
    assert [row["failure"] for row in kd.results("alone")] == ["train.lr: should be above 0 (got -1)"]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.T=-1", "method.lambda=2"], "method.T: should be above 0.*\nmethod.lambda: should be at most 1"),
        (["metod=kd"], r"^metod: unknown key; did you mean method, [^\n]*$"),
        (["model=resnet9"], r"^model=resnet9: there is no such option; did you mean resnet8, [^\n]*$"),
        (["model=[resnet8,resnet14]"], r"^model: takes one option, not a list; a run for each: kd.sweep\(\['model="),
        (["seed=0,1"], r"^seed: several values need kd.sweep: kd.sweep\(\['seed=0,1'\]\)$"),
        (["metod=kd", "model=resnet9"], r"^model=resnet9: [^\n]*\nmetod: unknown key; [^\n]*$"),
        (["method.T="], "method.T"),
        (["method.T=1,2"], r"^method.T: several values need kd.sweep: kd.sweep\(\['method.T=1,2'\]\)$"),
        (["seed"], "^seed: should be key=value$"),
        (
            ["dataset.root=/tmp/a=b (1)"],
            r"^dataset.root: is only for dataset=folder [^\n]*got '/tmp/a=b \(1\)' [^\n]*$",
        ),
        (["hydra.mode=MULTIRUN"], "^hydra.mode: kd.run does one run, kd.sweep several$"),
        (["dry_run=true"], "dry_run and why print, and have no result"),
        (["why=method.T"], "dry_run and why print, and have no result"),
        (["teacher.checkpoint=nowhere.pt"], "nowhere.pt"),
        (["sweep=tpe"], "a search needs -m"),
        (["hydra.run.dir=/proc/nowhere"], "/proc/nowhere cannot be written"),
    ],
)
def test_problems_are_one_exception(overrides: list[str], said: str) -> None:
    with pytest.raises(KnownError, match=said):
        kd.run([*QUICK, *overrides])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):  # Hydra is free for others
        assert compose("config", ["seed=3"]).seed == 3


@pytest.mark.parametrize("words", [["metod=kd"], ["model=resnet9"], ["seed"], ["method.T=='a"], ["metod=1", "model=x"]])
def test_a_mistake_is_told_as_on_the_command_line(words: list[str]) -> None:
    register()
    with pytest.raises(KnownError) as at_the_command_line:
        read_command(words)
    for function in (kd.run, kd.sweep):
        with pytest.raises(KnownError) as here:
            function(words)
        assert str(here.value) == str(at_the_command_line.value)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("function", [kd.run, kd.sweep])
def test_what_is_no_list_of_overrides_is_one_line(function: Callable[..., object]) -> None:
    for flags in (["-m"], ["-m", "seed=0,1"], ["--why", "method.T"], ["--cfg", "job"]):
        refused = f"kd.{function.__name__}: takes key=value; {flags[0]} is for the command line"
        with pytest.raises(KnownError, match=f"^{refused}$"):
            function(flags)
    with pytest.raises(
        KnownError, match=rf"^kd.{function.__name__}: takes a list: kd.{function.__name__}\(\['seed=1'\]\)$"
    ):
        function("seed=1")
    with pytest.raises(KnownError, match=r"^model: takes one option, not a list; [^\n]*$"):
        function(["model=[resnet8,resnet14]"])


@pytest.mark.usefixtures("unchanged")
def test_texts_mean_what_is_typed() -> None:
    typed = Path("a=b (1)").absolute()
    kd.run([*FAST, f"runtime.data={typed}", "hydra.run.dir=c=d (2)"])
    saved = OmegaConf.load("c=d (2)/.hydra/config.yaml")
    assert saved.runtime.data == str(typed)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("plugin", ["hydra/launcher=joblib", "sweep=tpe"])
def test_searches_and_launchers_need_the_command_line(plugin: str) -> None:
    with pytest.raises(KnownError, match=r"python run\.py -m"):
        kd.sweep([*FAST, "method=kd", plugin])


def test_a_call_inside_of_another_hydra(tmp_path: Path) -> None:
    """As in an application of the reader's own."""
    (tmp_path / "own.yaml").write_text("mine: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        before = GlobalHydra.instance().hydra
        kd.run(FAST)
        assert GlobalHydra.instance().hydra is before
        assert compose("own", ["mine=2"]) == {"mine": 2}


PROCESSORS = """
import os, subprocess, sys
import kd
from kd.core.spec import KnownError

before, variables = os.sched_getaffinity(0), dict(os.environ)

def check(when):
    count = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
    child = subprocess.run(count, capture_output=True, text=True).stdout
    now = {name: value for name, value in os.environ.items() if not name.startswith("KMP_")}
    print(when, os.sched_getaffinity(0) == before, int(child) == len(before), now == variables)

try:
    kd.run([*sys.argv[1:], "hydra.run.dir=/proc/nowhere"])
except KnownError:
    check("error")
kd.run(sys.argv[1:])
check("run")
"""


@pytest.mark.skipif(HERE < 2, reason="needs two processors that a process may use")
@pytest.mark.slow
def test_the_caller_keeps_its_processors() -> None:
    """OpenMP leaves the main thread one of them where torch is imported, with OMP_PROC_BIND."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROCESSORS, *FAST, "runtime.threads=null", "runtime.device=cpu"],
        env={**environment, "OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(("error ", "run "))] == [
        "error True True True",
        "run True True True",
    ]
    assert any(line.startswith("device: cpu (") and f", {hardware.cpu_count()} threads)" in line for line in lines)


def test_importing_kd_is_cheap() -> None:
    code = "import kd, sys; print([name for name in ('torch', 'hydra', 'pydantic', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_results_of_what_is_no_folder() -> None:
    with pytest.raises(KnownError, match="nowhere is not a folder"):
        kd.results("nowhere")
    Path("empty").mkdir()
    assert kd.results("empty") == []


def test_a_network_comes_with_pictures_as_it_takes_them(tmp_path: Path) -> None:
    key = kd.run(FAST).chain[-1].key
    Image.new("RGB", (40, 20), (255, 0, 0)).save("red.png")
    Image.new("L", (16, 16), 7).save("grey.png")
    network, batch = kd.load(key[:10], images=["red.png", Path("grey.png")])
    assert (batch.shape, batch.dtype) == ((2, 3, 16, 16), torch.uint8)
    assert batch[0, :, 8, 8].tolist() == [255, 0, 0]
    assert batch[1].unique().tolist() == [7]
    assert network(batch).shape == (2, 10)
    assert kd.load(key, images=[])[1].shape == (0, 3, 16, 16)
    Path("text.png").write_text("no picture")
    with pytest.raises(KnownError, match=r"text.png: .*\nnone.png: does not exist"):
        kd.load(key, images=["text.png", "red.png", "none.png"])


@pytest.mark.slow
def test_the_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells run one after another, and end as its text says."""
    book = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    said = capsys.readouterr().out
    assert "[True, True]" in said
    assert "method.T: should be above 0 (got -1)\ntrain.epochs: should be at least 1 (got 0)" in said
    found = [(row["method"], row["seed"]) for row in names["rows"]]
    assert found == [("scratch", 0), ("scratch", 1), ("kd", 0), ("kd", 1)]
    assert names["rows"][2]["student"] == names["student"].key
