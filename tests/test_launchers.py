"""Parallel jobs: the same bits with every launcher, separate failures, and each job's share of the machine."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from kd.app import parallel
from kd.app.jobs import processors_of_a_job, why_ended, with_share
from kd.app.multirun import Multirun
from kd.app.options import register
from kd.core import hardware
from kd.core.stage import Stage
from kd.reporting import console
from kd.training.forecast import room_for
from kd.training.workplace import RuntimeSpec
from tests.conftest import QUICK, ROOT, run_py

# A bug that only one job meets, in whatever process it runs; its exception cannot be unpickled.
BUG = """
import kd.reporting.results

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def write(result, folder, really=kd.reporting.results.write_result):
    if result.chain[-1].loss.T == 2:
        raise Odd("bug", "no reason")
    really(result, folder)

kd.reporting.results.write_result = write
"""
GRID = "method.T=1,-1,2,5"  # of which one value is bad, and one meets the bug


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """A folder for multiruns. All their processes contain the bug."""
    (tmp_path / "bug").mkdir()
    (tmp_path / "bug" / "sitecustomize.py").write_text(BUG)
    return tmp_path


def launch(jobs: Path, name: str, *overrides: str, path: Sequence[Path] = ()) -> str:
    """Run the grid into `jobs`/<name>, with its own store. Returns its output. `path`: folders of commands."""
    place = jobs / name
    place.mkdir()
    own = (f"hydra.sweep.dir={place / 'sweep'}", f"runtime.store={place / 'store'}", f"hydra/launcher={name}")
    quick = [override for override in QUICK if "threads" not in override]
    done = run_py(
        *("-m", *quick, GRID, *own, *overrides),
        cwd=place,
        COLUMNS="200",
        HOME=str(place),
        PYTHONPATH=f"{jobs / 'bug'}:{ROOT}",
        PATH=":".join([*map(str, path), os.environ["PATH"]]),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout[done.stdout.rindex("4 jobs") :]


def check(jobs: Path, name: str, summary: str) -> dict[str, bytes]:
    """Two jobs failed and are named, the others ran, one teacher was trained. Returns the stored weights by key."""
    assert re.search(r"job 1 \(.*method.T=-1.*\): method.T: should be above 0 \(got -1\)\n", summary)
    assert re.search(r"job 2 \(.*method.T=2.*\): Odd: bug and no reason\n", summary)
    sweep = jobs / name / "sweep"
    assert {path.parent.name for path in sweep.glob("*/result.json")} == {"0", "3"}
    rows = [json.loads(line) for path in sweep.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["role"] == "teacher"] == [1, 2]
    assert not [path for path in (jobs / name).rglob("*") if "%" in path.name]
    stages = list((jobs / name / "store").glob("*/stage.json"))
    assert {json.loads(path.read_text())["made_with"]["threads"] for path in stages} == {1}
    return {path.parent.name: (path.parent / "model.safetensors").read_bytes() for path in stages}


@pytest.mark.slow
def test_the_same_bits_by_basic_joblib_and_submitit(jobs: Path) -> None:
    """With the preset `local` a job gets one thread by default."""
    one = "runtime.threads=1"
    found = {}
    for name, *overrides in (("basic", one), ("joblib", one, "hydra.launcher.n_jobs=2"), ("local",)):
        found[name] = check(jobs, name, launch(jobs, name, *overrides))
    assert len(found["basic"]) == 4
    assert found["joblib"] == found["basic"] == found["local"]


# SLURM's commands, on this machine: enough of them for submitit to run an array of jobs.
COMMANDS = {
    "sbatch": """
cp "$1" script.sh
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' script.sh)
for i in $(seq 0 "$last"); do
  SLURM_JOB_ID=8$i SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i bash script.sh > /dev/null 2>&1 &
done
echo "Submitted batch job 7"
""",
    "srun": """
while [[ $1 == -* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@"
""",
    "sacct": "",
}


@pytest.mark.slow
def test_slurm(jobs: Path) -> None:
    """The preset as an sbatch script; its jobs run by a stand-in for SLURM."""
    commands = jobs / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}")
        (commands / name).chmod(0o755)
    own = ("partition=gpu", "cpus_per_task=1", "setup=['module load cuda']")
    summary = launch(jobs, "slurm", *(f"hydra.launcher.{setting}" for setting in own), path=[commands])
    assert len(check(jobs, "slurm", summary)) == 4
    script = (jobs / "slurm" / "script.sh").read_text().splitlines()
    asked = {"partition=gpu", "array=0-3%4", "cpus-per-task=1", "gpus-per-node=1", "mem=16GB", "time=720", "requeue"}
    assert {f"#SBATCH --{line}" for line in asked} <= set(script)
    assert "module load cuda" in script


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None, reason="the extra `ray` is not installed"
)
def test_ray(jobs: Path) -> None:
    own = ("+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false")
    assert len(check(jobs, "ray", launch(jobs, "ray", *own))) == 4


# how launchers end ---------------------------------------------------------------------------------------------------


def raised(name: str, *arguments: str) -> Exception:
    """An error of a package that need not be installed."""
    error: Exception = type(name, (RuntimeError,), {})(*arguments)
    return error


def test_what_ends_a_launcher_is_a_line() -> None:
    lines = {
        raised("TerminatedWorkerError"): "a worker was killed, perhaps for its memory: the same command trains what",
        raised("BrokenProcessPool"): "a worker was killed",
        raised("UncompletedJobError", "no\nfile"): "a job ended without a result, and its output is in .submitit/",
        raised("FailedJobError"): "a job ended without a result",
        OSError(errno.ENOSPC, "No space left on device", "sweep/0/.hydra"): "[Errno 28] No space left on device: 'sw",
        ConfigCompositionException("Could not override 'x'"): "Could not override 'x'",
    }
    for error, line in lines.items():
        said = why_ended(error)
        assert said is not None
        assert said.startswith(line)
        assert "\n" not in said
    assert why_ended(RuntimeError("a bug")) is None


BROKEN = """
from hydra._internal.hydra import Hydra
class TerminatedWorkerError(RuntimeError): pass
def multirun(self, *args, **kwargs): raise {error}
Hydra.multirun = multirun
"""


@pytest.mark.parametrize(
    ("error", "last", "traceback"),
    [
        ("TerminatedWorkerError('long')", "a worker was killed, perhaps for its memory: the same command", False),
        ("OSError(28, 'No space left on device', 'sweep/0')", "[Errno 28] No space left on device: 'sweep/0'", False),
        ("RuntimeError('a bug')", "RuntimeError: a bug", True),
    ],
)
def test_a_launcher_that_fails_prints_its_reason(tmp_path: Path, error: str, last: str, traceback: bool) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN.format(error=error))
    jobs = ("-m", *QUICK, "method=scratch", "seed=0,1", "hydra.sweep.dir=sweep")
    done = run_py(*jobs, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}", HYDRA_FULL_ERROR="0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(last)
    assert ("Traceback" in done.stderr) == traceback
    assert traceback or done.stderr.count("\n") == 1


# a job's share of the machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "processors", "threads"),
    [
        ({"n_jobs": -1}, 8, 1),
        ({"n_jobs": -2}, 8, 1),
        ({"n_jobs": 2}, 8, 4),
        ({"n_jobs": 3}, 8, 2),
        ({"n_jobs": 4}, 2, 1),
        ({"cpus_per_task": 6}, 2, 6),  # on a node of the cluster
        ({"cpus_per_task": None}, 8, 1),
        ({"ray": {"remote": {"num_cpus": 3}}}, 8, 3),
        ({"ray": {"remote": {"num_cpus": 0.5}}}, 8, 1),
        ({"ray": {"remote": {}}}, 8, 1),
    ],
)
def test_processors_of_a_job(launcher: dict[str, object], processors: int, threads: int) -> None:
    assert processors_of_a_job(OmegaConf.create(launcher), processors) == threads


def in_job(number: int, launcher: str, mode: RunMode = RunMode.MULTIRUN) -> DictConfig:
    """Hydra's configuration in a job of a sweep by joblib's launcher, two at a time."""
    choices = {"hydra/launcher": launcher}
    return OmegaConf.create(
        {"hydra": {"mode": mode, "job": {"num": number}, "runtime": {"choices": choices}, "launcher": {"n_jobs": 2}}}
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve processors and three GPUs."""
    monkeypatch.setattr("kd.app.jobs.cpu_count", lambda: 12)
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: True)
    monkeypatch.setattr(hardware, "_gpus", lambda: 3)


@pytest.mark.parametrize(
    ("hydra_job", "given", "expected"),
    [
        (in_job(4, "joblib"), RuntimeSpec(), ("cuda:1", 6)),
        (in_job(3, "joblib"), RuntimeSpec(threads=5), ("cuda:0", 5)),
        (in_job(4, "joblib"), RuntimeSpec(device="cpu"), ("cpu", 6)),
        (in_job(4, "joblib"), RuntimeSpec(device="cuda:2"), ("cuda:2", 6)),
        (in_job(4, "basic"), RuntimeSpec(), ("auto", None)),
        (in_job(0, "joblib", mode=RunMode.RUN), RuntimeSpec(), ("auto", None)),
    ],
)
@pytest.mark.usefixtures("machine")
def test_share(
    hydra_job: DictConfig, given: RuntimeSpec, expected: tuple[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra_job.hydra)
    shared = with_share(given)
    assert (shared.device, shared.threads) == expected
    own = {name: getattr(given, name) for name in ("device", "threads", "processes")}
    assert RuntimeSpec(**{**shared.model_dump(), **own}) == given


def test_jobs_that_share_a_terminal_write_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their live bars would overwrite each other."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert console.console().is_terminal
    monkeypatch.setattr(console, "parent_process", object)
    assert not console.console().is_terminal


def test_of_one_gpu_or_none_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: True)
    for gpus, device in ((0, "cpu"), (1, "cuda"), (2, "cuda:1")):
        monkeypatch.setattr(hardware, "_gpus", lambda gpus=gpus: gpus)
        assert hardware.resolve_device("auto", job=3) == device


# how many jobs at a time ---------------------------------------------------------------------------------------------


SMALL = ("dataset=digits", "model=plane2", "method=scratch", "train.epochs=1", "tracking=none", "hydra/launcher=joblib")


@dataclass
class Choice:
    """What a multirun by joblib chooses on a machine of eight processors without a GPU."""

    room: int | None = 100  # jobs that fit into the memory
    asked: list[str] = field(default_factory=list)  # the networks for which memory was asked

    def number(self, words: Sequence[str], swept: Sequence[str]) -> object:
        """The number of jobs at a time. `words` are the overrides that all jobs share, `swept` the others."""
        GlobalHydra.instance().clear()
        register()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", [*SMALL, *words], return_hydra_config=True)
            with open_dict(cfg):
                cfg.hydra.overrides.task = [each for each in (*SMALL, *words, *swept) if not each.startswith("hydra")]
            Multirun().on_multirun_start(cfg, config_name="config")
        return cfg.hydra.launcher.n_jobs


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Choice:
    """Its multiruns begin in the test's folder."""
    found = Choice()

    def room_for(stages: Sequence[Stage]) -> int | None:
        found.asked += [stage.model for stage in stages]
        return found.room

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "cpu_count", lambda: 8)
    monkeypatch.setattr(hardware, "_gpus", lambda: 0)
    monkeypatch.setattr("kd.training.forecast.room_for", room_for)
    for name in ("folder", "began", "expected"):  # of the class, which a test must leave as it was
        monkeypatch.setattr(Multirun, name, getattr(Multirun, name))
    return found


@pytest.mark.parametrize(
    ("words", "swept", "room", "said"),
    [
        ([], "seed=range(20)", 100, "8: as many as processors"),
        ([], "seed=0,1,2", 100, "3: as many as jobs"),
        (["runtime.threads=3"], "seed=range(20)", 100, "2: each has 3 of 8 processors"),
        ([], "seed=range(20)", 5, "5: more do not fit into the memory"),
        ([], "seed=range(20)", 0, "1: the memory is short even for one"),
        ([], "seed=range(20)", None, "8: as many as processors"),
        ([], "train.epochs=0,1", 100, "2: as many as jobs"),  # the bad job says so itself
        (["runtime.processes=4", "replicates=4"], "seed=range(20)", 100, "2: each has 4 of 8 processors"),
        (["hydra.sweeper.max_batch_size=3"], "seed=range(20)", 100, "3: as many as hydra.sweeper.max_batch_size"),
        (["hydra.launcher.n_jobs=2"], "seed=0,1,2", 100, "2"),
        (["hydra.launcher.n_jobs=-1"], "seed=0,1,2", 100, "-1"),
        (["dry_run=true"], "seed=0,1,2", 100, "-1"),
    ],
)
def test_joblib_does_as_many_jobs_as_the_machine_can(
    words: list[str], swept: str, room: int | None, said: str, choice: Choice, capsys: pytest.CaptureFixture[str]
) -> None:
    choice.room = room
    assert str(choice.number(words, [swept])) == said.partition(":")[0]
    assert (f"hydra.launcher.n_jobs={said}\n" in capsys.readouterr().out) == (":" in said)


@pytest.mark.parametrize(
    ("words", "swept", "asked"),
    [
        (["teacher=plane8", "method=kd"], ["model=plane2,plane4", "seed=0,1", "method.T=1,4"], "8284"),
        (["method=trained_teacher", "teacher=plane4"], ["method.reference=plane2,plane6", "seed=0,1"], "242642"),
        (["method=multi_teacher"], ["method.teachers=[plane4,plane6],[plane8]"], "46282"),
    ],
)
def test_memory_is_asked_for_the_networks_of_all_jobs(
    words: list[str], swept: list[str], asked: str, choice: Choice
) -> None:
    """Not again for other seeds and temperatures."""
    choice.number(words, swept)
    assert [name.removeprefix("plane") for name in choice.asked] == [*asked]


def test_memory_is_asked_for_the_networks_of_a_search(choice: Choice) -> None:
    swept = ["model=choice(plane2,plane4)", "train.lr=interval(0.01,0.1)"]
    told = {"hydra": {"sweeper": {"params": {"method.T": "1,2"}}, "overrides": {"task": ["method=kd", *swept]}}}
    assert parallel.searched_of(OmegaConf.create(told)) == [["method=kd", f"model=plane{depth}"] for depth in (2, 4)]


def test_a_network_that_cannot_be_built_is_told_by_its_job(
    choice: Choice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs more pixels than digits have. The multirun begins all the same."""
    monkeypatch.setattr("kd.training.forecast.room_for", room_for)
    assert choice.number(["model=torchvision", "model.arch=inception_v3"], ["seed=0,1"]) == 2
    assert Multirun.expected == 2
    assert "hydra.launcher.n_jobs=2: as many as jobs" in capsys.readouterr().out


def test_a_plan_by_force_has_no_jobs() -> None:
    sweeper = {"_target_": "x.BasicSweeper", "params": None}
    for word in ("dry_run=true", "++dry_run=true", "why=method.T"):
        told = {"hydra": {"sweeper": sweeper, "overrides": {"task": [word, "seed=0,1"]}}}
        assert parallel.jobs_of(OmegaConf.create(told)) == []


@pytest.mark.usefixtures("machine")
def test_each_gpu_does_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.app.parallel.cpu_count", lambda: 12)
    gpus = "as many as GPUs"
    assert parallel._of_machine([RuntimeSpec()]) == {gpus: 3}
    assert parallel._of_machine([RuntimeSpec(threads=6)]) == {gpus: 3, "each has 6 of 12 processors": 2}
    assert parallel._of_machine([RuntimeSpec(device=name) for name in ("cuda", "cuda:0", "cuda:1")]) == {gpus: 2}
    assert parallel._of_machine([RuntimeSpec(device="cpu")]) == {"as many as processors": 12}
    assert parallel._of_machine([]) == {gpus: 3}
