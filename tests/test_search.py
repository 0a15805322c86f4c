"""Searches: a study reaches its number of trials after any interruption, and does not choose by lucky seeds."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf

from kd.app.config import plan
from kd.app.parsing import parse
from kd.app.search import ORDINAL, Locks, hand_over, ordinal, study_name
from kd.app.search.space import as_overrides
from kd.app.search.study import _missing
from kd.datasets import resolve
from tests.conftest import QUICK, ROOT, composed, own_option, run_py

Job = Callable[..., Any]

SEARCH = ("-m", *QUICK, "method=kd", "sweep=tpe", "train.epochs=1", "hydra.sweeper.sampler.n_startup_trials=3")
TRIALS = "hydra.sweeper.n_trials=7"


def trials(folder: Path) -> list[tuple[int, dict[str, float], float | None]]:
    """Each trial that counts: its ordinal, parameters and value."""
    storage = f"sqlite:///{folder / 'study.db'}"
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    kept = [trial for trial in study.trials if not trial.user_attrs.get("lost")]
    assert all(trial.state.is_finished() for trial in kept)
    return [
        (ordinal(study, trial.number), {k: v for k, v in trial.params.items() if k != ORDINAL}, trial.value)
        for trial in kept
    ]


def search(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run_py(*SEARCH, f"hydra.sweep.dir={folder}", *overrides, cwd=folder.parent)


@pytest.mark.slow
def test_a_killed_search_ends_with_the_trials_of_an_unbroken_one(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", TRIALS)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, str(ROOT / "run.py"), *SEARCH, TRIALS, f"hydra.sweep.dir={tmp_path / 'broken'}"]
    # A student's training is waited for, so that it is killed in the middle of a trial.
    environment = {**os.environ, "KD_STORE": str(tmp_path / "other")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "broken" / "4" / ".hydra").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = search(tmp_path / "broken", TRIALS)
    assert again.returncode == 0, again.stderr
    assert "4 trials done, 3 to go" in again.stdout
    assert trials(tmp_path / "broken") == trials(tmp_path / "whole")
    assert {place.name for place in (tmp_path / "broken").glob("[0-9]*")} == {str(number) for number in range(7)}
    third = search(tmp_path / "broken", TRIALS)
    assert "7 trials done, 0 to go" in third.stdout
    assert "7 jobs" in third.stdout
    more = search(tmp_path / "broken", "hydra.sweeper.n_trials=8")
    assert "7 trials done, 1 to go" in more.stdout
    assert len(trials(tmp_path / "broken")) == 8


@pytest.mark.slow
def test_a_failed_trial_is_named_and_counts_as_done(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("sweep=tpe", "hydra.sweeper.n_trials=6", "method.T=choice(1,-1)", "train.epochs=1")
    results = job(*overrides, multirun=True, code=1)
    failed = len(list((tmp_path / "out").glob("*/error.json")))
    assert 0 < failed < 6
    assert len(results) == 6 - failed
    printed = capsys.readouterr()
    assert "method.T: should be" in printed.out
    assert "(got -1)" in printed.out
    assert "best setting, chosen on validation" in printed.out
    job(*overrides, multirun=True, code=1)
    assert f"6 trials done, {failed} of them failed, 0 to go; a larger hydra.sweeper" in capsys.readouterr().out


@pytest.mark.slow
def test_a_search_of_failures_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    overrides = ("hydra.sweeper.n_trials=2", "train.lr=1e30", "method=kd")
    done = search(tmp_path / "out", *overrides)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line][-1].endswith(
        "every trial has failed, so there is no best one"
    )
    assert "job 1 (" in done.stdout  # the summary is there
    again = search(tmp_path / "out", *overrides)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].endswith("no best one; a larger hydra.sweeper.n_trials adds more")


@pytest.mark.slow
def test_one_process_searches_and_others_join(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("sweep=tpe", "hydra.sweeper.n_trials=2", "train.epochs=1")
    job(*overrides, multirun=True)
    (place,) = (tmp_path / "store" / "search").iterdir()
    owner = Locks(place)
    owner.enter("this", join=False)
    capsys.readouterr()
    job(*overrides, multirun=True, code=2)
    said = capsys.readouterr().err
    assert f"is being searched by another process (pid {os.getpid()} on" in said
    assert "sweep.join=true adds trials" in said
    # The other process is at a trial: that is neither ours to begin again nor a failure of this multirun.
    storage = f"sqlite:///{tmp_path / 'out' / 'study.db'}"
    study = optuna.load_study(study_name=place.name, storage=storage)
    trial = study.ask()
    hand_over(OmegaConf.create(), trial)
    (tmp_path / "out" / "2" / ".hydra").mkdir(parents=True)
    (tmp_path / "out" / "2" / ".hydra" / "config.yaml").write_text("seed: 0\n")
    job(*overrides, "sweep.join=true", multirun=True, folder="elsewhere")
    said = capsys.readouterr().out
    assert f"hydra.sweep.dir has no effect: sweep.join=true joins the search in {tmp_path / 'out'}\n" in said
    assert "unfinished" not in said
    assert "sweep.join" not in said.rpartition(" jobs, ")[2]  # the table and what follows
    study.tell(trial, 1.0)
    assert [number for number, *_ in trials(tmp_path / "out")] == [0, 1, 2, 3, 4]
    owner.leave()


def test_trials_of_a_process_that_lives_are_left_alone(tmp_path: Path) -> None:
    one, other = Locks(tmp_path), Locks(tmp_path)
    one.enter("study", join=False)
    alive = Locks.process
    other.enter("study", join=True)
    assert other.alive(alive)
    one.leave()
    assert not other.alive(alive)
    assert not other.alive(None)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_retry_of_a_lost_trial_has_its_ordinal_and_no_other_trial_moves(tmp_path: Path) -> None:
    """The ordinal names the trial's folder. A second process may run trials while the first one is started again."""
    study, locks = optuna.create_study(), Locks(tmp_path)
    locks.enter("study", join=False)
    for process in (locks.process, "one that has ended", locks.process, locks.process):
        hand_over(OmegaConf.create(), trial := study.ask())
        trial.set_user_attr("process", process)
    before = [trial.params[ORDINAL] for trial in study.trials]
    study.tell(0, 1.0)
    assert _missing(study, locks, 6) == 3
    assert [ordinal(study, number) for number in range(4)] == before == [0, 1, 2, 3]
    for _ in range(2):
        hand_over(OmegaConf.create(), study.ask())
    assert [trial.params[ORDINAL] for trial in study.trials[4:]] == [1, 4]  # the retry, and the next new one
    locks.leave()


def test_lost_trials_of_studies_of_an_earlier_version_do_not_count() -> None:
    study = optuna.create_study()
    for lost in (False, True, False):
        study.ask().set_user_attr("lost", lost)
    assert [ordinal(study, number) for number in range(3)] == [0, 1, 1]


def named(*overrides: str, space: dict[str, str] | None = None, sampler: Any = None) -> str:
    config = parse(composed(*QUICK, "method=kd", *overrides), [*overrides])
    students = plan(config, resolve(config.dataset, config.data_root))
    sampler = {"_target_": "kd.app.search.ByTrial", **(sampler or {})}
    return study_name(config, students, space or {"method.T": "interval(1,20)"}, sampler, overrides)


def test_a_study_is_named_by_what_makes_it_this_search() -> None:
    name = named()
    assert name.startswith("kd-plane4-plane2-digits-")
    others = ("replicates=2", "method.lambda=0.3", "teacher.seed=4", "train.epochs=3", "sweep.objective=test_acc")
    names = [name, *map(named, others), named(space={"method.T": "interval(1,10)"}), named(sampler={"seed": 2})]
    assert len(set(names)) == len(names)
    for same in ("tracking=wandb", "tracking.group=a", "runtime.threads=2", "sweep.join=true", "runtime.bank=false"):
        assert named(same) == name


def test_searches_that_differ_in_what_only_some_trials_read_are_two() -> None:
    options = {"method": "kd,ta"}
    assistants = "method.assistants=[resnet14]", "method.assistants=[resnet26]"
    assert len({named(f"+{each}", space=options) for each in assistants}) == 2
    assert named("runtime.threads=1", space=options) == named("runtime.threads=2", space=options)
    chosen = {"method.assistants": "choice([resnet14],[resnet20])"}
    own = "+init.resnet20=pretrained", "freeze=[resnet20]"
    assert len({named(*each, space=chosen) for each in ((), own[:1], own[1:])}) == 3
    assert named(own[0]) == named()
    assert named("seed=0") != named("seed=${replicates}")
    assert named("seed=0") == named()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("method=kd", "seed=20,31,55"),
            "seed: cannot be searched, because the luckiest seed would win; with replicates=3",
        ),
        (("method=kd", "dataset.split_seed=0,1"), "dataset.split_seed: cannot be searched, because the luckiest seed"),
        (
            ("method=kd", "dataset.val_fraction=0", "train.select=last"),
            "sweep.objective: val_acc needs a validation split, dataset.val_fraction above 0",
        ),
        (("method=scratch",), "method.T: cannot be searched, method=scratch has no such key"),
        (("method=kd", "method.lambda=7"), "method.lambda: should be at most 1 (got 7)"),
        (("loss.beta=interval(1,8)",), "loss.beta: cannot be searched, loss=kd has no such key"),
        (
            ("loss=kd,dkd", "loss.gamma=interval(1,8)"),
            "loss.gamma: cannot be searched, loss=kd and loss=dkd have no such key",
        ),
        (
            ("dry_run=true", "method.T=interval(5,1)", "method.lambda=tag(log,interval(0,1))"),
            "method.T: interval(5,1) cannot be searched; the smaller end is first: interval(1,5)\n"
            "method.lambda: tag(log,interval(0,1)) cannot be searched; a log scale begins above 0\n",
        ),
        (("train.batch_size=range(64,16,-16)",), "the smaller end is first: range(16,64,16)"),
        (("train.lr=interval(0.1,inf)",), "train.lr: interval(0.1,inf) cannot be searched; both ends should be finite"),
        (("why=method.T",), "why: does not go with a search"),
        (
            ("method.T=4", "method.lambda=0.5"),
            "nothing is left to search, because each has one value: method.T, method.lambda",
        ),
        (("hydra.sweeper.n_trials=0",), "hydra.sweeper.n_trials: should be at least 1 (got 0)"),
        (("hydra.sweeper.n_jobs=-1",), "hydra.sweeper.n_jobs: should be at least 1 (got -1)"),
    ],
)
def test_searches_that_cannot_be(
    job: Job, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    job("sweep=tpe", *overrides, multirun=True, code=2)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_over_options_searches_their_keys(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("sweep=tpe", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1", "train.epochs=1")
    found = job(*common, "loss=kd,dkd", "loss.beta=interval(1,8)", "loss.warmup=0", multirun=True)
    assert ["beta" in result["chain"][-1]["loss"] for result in found] == [False, True]
    assert capsys.readouterr().out.count("loss.beta has no effect: loss=kd does not read it") == 1
    shutil.rmtree(tmp_path / "out")
    found = job(*common, "method=scratch,kd", "method.lambda=0.3", multirun=True)  # T is the search's own
    assert {result["method"] for result in found} == {"scratch", "kd"}
    assert {name for _, params, _ in trials(tmp_path / "out") for name in params} == {"method", "++method.T"}


def test_a_name_is_forced_only_where_a_trial_lacks_the_key() -> None:
    space = {"method": "kd,ta", "method.assistant.T": "interval(1,8)", "method.T": "1,2", "model.args.drop": "0,0.5"}
    names = as_overrides(space, {"model.args.drop"}, composed)
    assert [*names.values()] == ["method", "++method.assistant.T", "method.T", "++model.args.drop"]


@pytest.mark.slow
def test_another_sampler_draws_other_trials_when_it_goes_on(job: Job, tmp_path: Path) -> None:
    own = "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=1"
    for number in (2, 4):
        job("sweep=tpe", *own, f"hydra.sweeper.n_trials={number}", "train.epochs=1", multirun=True)
    drawn = [tuple(sorted(params.items())) for _, params, _ in trials(tmp_path / "out")]
    assert len(set(drawn)) == len(drawn) == 4


def test_what_only_some_trials_read_is_in_the_name(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    names = set[str]()
    for milestones in ("[0.25]", "[0.75]"):
        searched = "hydra.sweeper.params=null", "train.schedule=choice(constant,step)"
        job("sweep=tpe", *searched, f"train.milestones={milestones}", "dry_run=true", multirun=True)
        names |= {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("study ")}
    assert len(names) == 2


def test_the_networks_of_a_library_may_be_searched(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("sweep=tpe", "model=torchvision", "model.arch=resnet18,resnet34", "dry_run=true", multirun=True)
    told = capsys.readouterr().out
    assert "model.arch: resnet18,resnet34\n" in told
    assert "torchvision/resnet18" in told


def test_what_a_search_decides_itself_is_said(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder may stand in a file, but its name and its jobs' folders may not."""
    own_option(tmp_path / "own", "sweep/mine", f"defaults: [tpe]\nhydra: {{sweep: {{dir: {tmp_path / 'there'}}}}}\n")
    told = "hydra.sweeper.study_name=x", f"hydra.searchpath=[file://{tmp_path}/own]"
    assert command("-m", *QUICK, "sweep=mine", "dry_run=true", *told) == 0
    said = capsys.readouterr().out
    assert f"in {tmp_path / 'there'}: 30 trials" in said
    assert "hydra.sweeper.study_name has no effect: a search names its study by what is searched" in said


def test_a_grid_of_searches_is_refused(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("sweep=tpe,takd", multirun=True, code=1)
    assert "sweep: a grid cannot have a search as one of its values" in capsys.readouterr().err


def test_the_search_of_an_experiment_is_left_out_without_m(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the command that a search prints for its best setting runs."""
    sweeper = "{n_trials: 2, custom_search_space: kd.app.search.hand_over, params: {method.T: 'choice(2,3)'}}"
    own_option(
        tmp_path / "own",
        "experiment/mine",
        f"defaults: [override /hydra/sweeper: optuna]\nhydra: {{sweeper: {sweeper}}}\nsweep: {{prune: true}}\n",
    )
    job("experiment=mine", f"--config-dir={tmp_path}/own", "method=scratch", "train.epochs=1")
    assert "the search of this configuration is left out: without -m this is one run" in capsys.readouterr().out


def test_a_mistake_in_an_option_of_ones_own_folder_is_told(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_option(tmp_path / "own", "experiment/mine", "defaults: [/sweep: tpe]\n")
    job("experiment=mine", f"hydra.searchpath=[file://{tmp_path}/own]", code=2)
    assert capsys.readouterr().err.startswith("Multiple values for sweep.")


def test_a_search_of_ones_own_folder(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_option(tmp_path / "own", "sweep/mine", "defaults: [tpe]\nhydra: {sweeper: {n_trials: 5}}\n")
    job("sweep=mine", f"hydra.searchpath=[file://{tmp_path}/own]", "dry_run=true", multirun=True)
    assert "5 trials in all" in capsys.readouterr().out


def test_a_dry_run_tells_what_would_be_searched(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job("sweep=tpe", "dry_run=true", multirun=True)
    printed = capsys.readouterr().out
    assert "30 trials in all, over\n  method.T: tag(log,interval(1,20))\n  method.lambda: interval(0.05,1)" in printed
    assert "2 of 2 stages to train" in printed
    assert not (tmp_path / "store").exists()


def test_takd_searches_as_its_authors_did(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweeper = OmegaConf.load(ROOT / "conf" / "sweep" / "takd.yaml").hydra.sweeper
    assert sweeper.n_trials == 120
    lambdas = [float(value) for value in sweeper.params["method.lambda"].removeprefix("choice(").rstrip(")").split(",")]
    assert lambdas == pytest.approx([0.05 * step for step in range(1, 21)])
    results = job("sweep=takd", "train=cifar10", "hydra.sweeper.n_trials=2", "train.epochs=1", multirun=True)
    assert all(result["mode"] == "reference" and result["objective"] is None for result in results)
    assert [value for *_, value in trials(tmp_path / "out")] == [result["chain"][-1]["test_acc"] for result in results]
    printed = capsys.readouterr().out
    assert "best setting, CHOSEN ON THE TEST SET, as in the paper" in printed
    assert "mode=reference" in (tmp_path / "out" / "best.sh").read_text()


@pytest.mark.slow
def test_the_numbers_of_a_loss_are_swept_and_searched(job: Job, tmp_path: Path) -> None:
    swept = job("loss=dkd", "loss.beta=2,8", "loss.warmup=0", "train.epochs=1", multirun=True)
    assert [result["chain"][-1]["loss"]["beta"] for result in swept] == [2, 8]
    assert len({result["chain"][0]["key"] for result in swept}) == 1
    assert len({result["chain"][-1]["key"] for result in swept}) == 2
    shutil.rmtree(tmp_path / "out")
    space = ("loss=dkd", "loss.warmup=0", "loss.beta=interval(1,9)")
    found = job("sweep=tpe", "hydra.sweeper.n_trials=3", "train.epochs=1", *space, multirun=True)
    betas = {result["chain"][-1]["loss"]["beta"] for result in found}
    assert len(betas) == 3
    assert all(1 <= beta <= 9 for beta in betas)
    assert "loss.beta=" in (tmp_path / "out" / "best.sh").read_text()


@pytest.mark.slow
def test_the_best_command_trains_the_best_student(job: Job, tmp_path: Path) -> None:
    results = job("sweep=tpe", "hydra.sweeper.n_trials=3", "train.epochs=1", "replicates=2", multirun=True)
    best = max(results, key=lambda result: result["objective"])
    words = shlex.split((tmp_path / "out" / "best.sh").read_text().splitlines()[-1])
    assert words[:2] == ["python", "run.py"]
    config = parse(composed(*QUICK, *words[2:]))
    keys = [stage.key for stage in plan(config, resolve(config.dataset, config.data_root))]
    assert keys == [replicate["key"] for replicate in best["replicates"]]
    assert json.loads((tmp_path / "out" / "0" / "result.json").read_text())["n"] == 2


@pytest.mark.slow
def test_hopeless_trials_end_early_and_can_be_gone_on_with(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (
        "sweep=tpe",
        "sweep.prune=true",
        "hydra.sweeper.n_trials=8",
        "train.epochs=8",
        "runtime.checkpoint_every=100",
    )
    finished = job(*common, "model.train.lr=choice(0.05,0.000001)", multirun=True)
    marks = sorted((tmp_path / "out").glob("*/pruned.json"))
    assert marks
    assert len(finished) + len(marks) == 8
    for mark in marks:
        pruned = json.loads(mark.read_text())
        assert pruned["epoch"] in (1, 2, 4)
        rows = [json.loads(line) for line in (mark.parent / "metrics.jsonl").read_text().splitlines()]
        values = [row["val_acc"] for row in rows if row["role"] == "student"]
        assert len(values) == pruned["epoch"]
        assert values[-1] == pruned["val_acc"]
    told = trials(tmp_path / "out")
    assert {told[int(mark.parent.name)][2] for mark in marks} == {json.loads(m.read_text())["val_acc"] for m in marks}
    # Its checkpoint is there, and a run that is not pruned goes on from it.
    words = OmegaConf.load(marks[0].parent / ".hydra" / "overrides.yaml")
    overrides = [str(word) for word in words if not str(word).startswith(("sweep", "runtime.trial", "hydra"))]
    capsys.readouterr()
    job(*overrides, folder="alone")
    epoch = json.loads(marks[0].read_text())["epoch"]
    assert f"student plane2: resuming after epoch {epoch}" in capsys.readouterr().out


def test_pruning_is_for_searches_of_single_students(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("sweep.prune=true", code=2)
    assert "sweep.prune: works only in a search" in capsys.readouterr().err
    job("sweep.prune=true", "replicates=2", code=2)
    assert "sweep.prune: works with one student per trial (got replicates=2)" in capsys.readouterr().err
    job("sweep.prune=true", "dataset.val_fraction=0", "train.select=last", code=2)
    assert "sweep.prune: compares validation accuracies" in capsys.readouterr().err


def test_what_a_search_needs(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    for dry in ((), ("dry_run=true",)):
        job("sweep=tpe", *dry, code=2)
        assert "sweep: a search needs -m: python run.py -m sweep=" in capsys.readouterr().err
    job("sweep=tpe", "why=method.T", multirun=True, code=2)
    assert "why: does not go with a search; without -m it says" in capsys.readouterr().err
    job("sweep=tpe", "hydra.sweeper.storage=sqlite:////nowhere/at/all.db", multirun=True, code=2)
    assert "hydra.sweeper.storage: sqlite:////nowhere/at/all.db cannot be opened" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_goes_on_from_another_working_directory(tmp_path: Path) -> None:
    for place, said in (("one", "0 trials done, 1 to go"), ("two", "1 trials done, 0 to go")):
        (tmp_path / place).mkdir()
        done = run_py(*SEARCH, "hydra.sweeper.n_trials=1", cwd=tmp_path / place)
        assert said in done.stdout
    assert not (tmp_path / "two" / "multirun").exists()


def test_a_fixed_setting_is_not_searched(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("sweep=tpe", "method.T=5", "dry_run=true", multirun=True)
    printed = capsys.readouterr().out
    assert "method.lambda: interval" in printed
    assert "method.T: " not in printed
