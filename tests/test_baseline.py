"""baseline=true: the same student alone beside a run, its stages, what is printed and what is recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.app.config import plan, plan_alone
from kd.app.parsing import parse
from kd.core.spec import KnownError
from kd.core.stage import Source, Stage
from kd.core.statistics import Paired, paired, seeds_needed
from kd.datasets import resolve
from kd.reporting import summary
from kd.reporting.baseline import baseline_lines, compare_alone
from kd.reporting.results import Job, Outcome, Replicate, ReplicatedResult, RunResult, student_rows
from kd.reporting.tracking import axes
from tests.conftest import QUICK, composed
from tests.test_tracking import summary as wandb_summary

RunJob = Callable[..., Any]


def planned(*overrides: str) -> tuple[list[Stage], list[Stage]]:
    """The students of a run, and those of its baseline."""
    config = parse(composed(*QUICK, *overrides))
    dataset = resolve(config.dataset, config.data_root)
    students = plan(config, dataset)
    return students, plan_alone(config, dataset, students)


def keys(sources: list[Stage]) -> list[str]:
    return [source.key for source in sources]


# its stages -------------------------------------------------------------------------------------------------------


OTHERS = ["kd", "trained_teacher", "dgkd", "multi_teacher"]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("replicates=3", "seed=5"),
        ("model.train.lr=0.02", "train.select=last"),
        ("train.label_smoothing=0.1",),
        ("dataset.val_fraction=0", "train.select=best_test"),
        ("model.init={weights}", "model.freeze=backbone"),
        ("+init={{plane4: {weights}}}", "model.init={weights}"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("method", ["ta", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_they_are_those_of_scratch(method: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    (weights := tmp_path / "plane.pt").write_bytes(b"weights")
    told = [override.format(weights=weights) for override in overrides]
    alone = planned(f"method={method}", "baseline=true", *told)[1]
    scratch = planned("method=scratch", *told)[0]
    assert keys(alone) == keys(scratch)
    assert [student.seed for student in alone] == [student.seed for student in scratch]
    assert not any(student.guides for student in alone)


def test_they_are_those_of_scratch_with_the_released_code_and_with_another_loss() -> None:
    reference = ("mode=reference", "dataset=cifar10", "train=cifar10", "dataset.val_fraction=0", "dataset.augment=null")
    config = parse(composed("model=resnet8", "teacher=resnet20", *reference, "baseline=true"))
    alone = config.model_copy(update={"method": parse(composed("model=resnet8", *reference, "method=scratch")).method})
    dataset = resolve(parse(composed()).dataset, config.data_root)  # digits stand in: nothing is downloaded
    assert keys(plan_alone(config, dataset, plan(config, dataset))) == keys(plan(alone, dataset))
    # A loss without a guide is the student's own, and the baseline of the assistants' run has it too.
    assert keys(planned("loss=dkd", "baseline=true")[1]) == keys(planned("method=scratch")[0])


def test_there_is_none_unless_it_is_asked_for() -> None:
    assert planned("method=kd")[1] == []
    assert planned("method=scratch", "baseline=true")[1] == []
    assert planned("method=kd", "loss=label_smoothing", "baseline=true")[1] == []


@pytest.mark.parametrize("told", [("method=scratch",), ("method=ta", "loss=label_smoothing")], ids=" ".join)
def test_without_a_guide_a_line_says_that_it_has_no_effect(
    job: RunJob, capsys: pytest.CaptureFixture[str], told: tuple[str, ...]
) -> None:
    with pytest.raises(FileNotFoundError):  # a dry run has no result
        job(*told, "baseline=true", "dry_run=true")
    said = capsys.readouterr().out
    line = f"baseline=true has no effect: {told[0]}, and no network teaches the student\n"
    assert said.count(line) == 1
    assert "alone" not in said


def test_a_dry_run_lists_them(job: RunJob, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError):
        job("baseline=true", "replicates=2", "dry_run=true")
    said = capsys.readouterr().out
    alone = keys(planned("method=scratch", "replicates=2")[0])
    rows = [line.split() for line in said.splitlines() if line.startswith("alone")]
    assert rows == [
        ["alone", "plane2", str(s), "cross_entropy", "2", key, "to", "train"] for s, key in enumerate(alone)
    ]
    assert "5 of 5 stages to train" in said


def test_a_stage_of_the_run_itself_is_there_once(job: RunJob, capsys: pytest.CaptureFixture[str]) -> None:
    """trained_teacher's reference is the student alone, if their seeds are equal."""
    with pytest.raises(FileNotFoundError):
        job("method=trained_teacher", "baseline=true", "dry_run=true")
    said = capsys.readouterr().out
    assert "3 of 3 stages to train" in said
    students, alone = planned("method=trained_teacher", "baseline=true")
    assert alone[0].key == students[0].chain[0].key
    assert re.search(f"reference plane2 .*{alone[0].key}", said)
    assert [*axes(students[0].chain, alone).values()] == ["reference", "teacher", "student"]


def test_records_call_them_baseline() -> None:
    students, alone = planned("baseline=true", "replicates=2")
    sources: list[Source] = [source for student in students for source in student.chain]
    names = axes(sources, alone)
    assert [names[key] for key in keys(alone)] == ["baseline-s0", "baseline-s1"]
    assert [names[source.key] for source in sources] == ["teacher", "student-s0", "teacher", "student-s1"]


def test_a_pruned_search_has_none() -> None:
    with pytest.raises(KnownError, match=r"^sweep.prune: works with one student per trial \(got baseline=true\)$"):
        parse(composed(*QUICK, "sweep.prune=true", "baseline=true"))


# a run ------------------------------------------------------------------------------------------------------------


def test_a_run_beside_its_baseline(job: RunJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = job("method=scratch", folder="scratch")  # of the first seed
    capsys.readouterr()
    result = job("replicates=2", "baseline=true", "tracking=wandb", "tracking.mode=offline")
    said, found = capsys.readouterr().out, result["baseline"]
    assert found["student"]["reused"]
    assert [each["key"] for each in found["replicates"]] == keys(planned("method=scratch", "replicates=2")[0])
    assert found["replicates"][0]["test_acc"] == scratch["chain"][0]["test_acc"]
    taught, alone = ([each["test_acc"] for each in group] for group in (result["replicates"], found["replicates"]))
    known = paired(taught, alone)
    assert found["difference"] == known.mean
    assert found["ci95"] == [*known.ci95]
    assert found["taught_seconds"] > found["seconds"] > 0
    assert (
        f"2 students alone, at the same seeds: test {alone[0]:.2f}, {alone[1]:.2f}, mean {sum(alone) / 2:.2f} %" in said
    )
    assert re.search(
        r"difference to the student alone in test accuracy.*: [+-]\d+\.\d\d .* 2 seeds of the student\n", said
    )
    assert re.search(rf"\nalone +plane2 +5,402 {found['student']['key']} .* reused *\n", said)
    assert "baseline: the student alone, 2 seeds\n" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["role"] for row in rows if row["key"] == found["replicates"][1]["key"]] == ["baseline"] * 2
    recorded = wandb_summary(tmp_path / "out")["summary"]
    assert recorded["baseline/difference"] == known.mean
    assert recorded["baseline-s1/test_acc"] == alone[1]
    assert recorded["test_acc"] == result["mean"]


# what is said -----------------------------------------------------------------------------------------------------


def outcome(key: str, test: float, seconds: float, role: str = "student", seed: int = 0) -> Outcome:
    loss = {"name": "cross_entropy"}
    fields = {"val_acc": None, "select": "last", "reused": False, "params": 1, "epochs": 1, "model": "plane2"}
    known = {"role": role, "key": key, "test_acc": test, "seconds": seconds, "seed": seed, "loss": loss}
    return Outcome.model_validate({**fields, **known})


def compared(taught: list[float], alone: list[float]) -> RunResult:
    """A run of these students, each trained for 10 seconds, with one teacher of 100 seconds and a given one."""
    teacher, given = outcome("t", 99, 100, "teacher"), outcome("g", 99, 3, "teacher").model_copy(update={"loss": None})
    chains = [[given, teacher, outcome(f"s{i}", test, 10, seed=i)] for i, test in enumerate(taught)]
    baseline = compare_alone(chains, [outcome(f"a{i}", test, 4, seed=i) for i, test in enumerate(alone)])
    common = {"chain": chains[0], "objective": None, "mode": "paper", "method": "kd", "dataset": "digits"}
    if len(taught) == 1:
        return RunResult.model_validate({**common, "baseline": baseline})
    each = [Replicate(seed=i, key=f"s{i}", val_acc=None, test_acc=test) for i, test in enumerate(taught)]
    spread = {"mean": sum(taught) / len(taught), "std": 1, "n": len(taught), "ci95": (0, 1)}
    return ReplicatedResult.model_validate({**common, **spread, "baseline": baseline, "replicates": each})


def test_three_seeds_have_an_interval_and_say_how_many_they_need() -> None:
    result = compared([71.0, 72.0, 74.0], [70.0, 70.0, 71.0])
    assert [*baseline_lines(result)] == [
        "3 students alone, at the same seeds: test 70.00, 70.00, 71.00, mean 70.33 %",
        # mean 2, deviation 1, half an interval: 4.302653/√3
        "difference to the student alone in test accuracy, 95 % interval: +2.00 (-0.48 to +4.48) over 3 seeds "
        "of the student",
        "a paired t-test at 5 % finds an effect of this size with 5 seeds (power 80 %)",
        "training took 130 s with the chain, 12 s alone",
    ]
    assert result.baseline is not None
    assert result.columns["baseline/ci95_low"] == pytest.approx(-0.484138, abs=1e-6)
    assert result.columns["baseline/seeds_needed"] == 5
    assert (result.columns["baseline/seconds"], result.columns["baseline/taught_seconds"]) == (12, 130)
    assert RunResult.model_validate_json(result.model_dump_json(include={*RunResult.model_fields})).baseline


def test_no_number_of_seeds_finds_a_difference_of_zero() -> None:
    lines = "\n".join(baseline_lines(compared([71.0, 70.0, 72.0], [70.0, 71.0, 72.0])))
    assert "+0.00 (-2.48 to +2.48) over 3 seeds" in lines
    assert "paired t-test" not in lines


def test_one_seed_has_no_interval() -> None:
    assert [*baseline_lines(compared([71.0], [72.5]))] == [
        "difference to the student alone in test accuracy: -1.50, one seed; replicates=3 gives an interval",
        "training took 110 s with the chain, 4 s alone",
    ]


def test_equal_differences_have_none_either() -> None:
    assert [*baseline_lines(compared([71.0, 73.0], [70.0, 72.0]))][1:] == [
        "difference to the student alone in test accuracy: +1.00 at every seed, 2 seeds of the student",
        "training took 120 s with the chain, 8 s alone",
    ]


def test_without_a_baseline_nothing_is_said() -> None:
    result = compared([71.0], [72.5]).model_copy(update={"baseline": None})
    assert [*baseline_lines(result)] == []
    assert not [name for name in result.columns if name.startswith("baseline")]


@pytest.mark.parametrize(
    ("effect", "seeds"),
    [(0.2, 199), (0.5, 34), (-0.5, 34), (0.8, 15), (1.0, 10), (12.0, 2), (20.0, 2), (1e-3, None), (0.0, None)],
)
def test_seeds_for_a_power_of_80_percent(effect: float, seeds: int | None) -> None:
    """As the usual tables have it, for a paired t-test, two-sided at 5 %."""
    assert seeds_needed(Paired(mean=effect, std=1.0, n=3, ci95=(0, 0), p=0.5)) == seeds


def test_without_deviation_the_seeds_cannot_be_told() -> None:
    assert seeds_needed(paired([2.0, 3.0], [1.0, 2.0])) is None


def test_a_sweep_takes_the_baselines_of_its_jobs() -> None:
    first, second = compared([71.0], [70.0]), compared([74.0], [71.0])
    chain = (*second.chain[:-1], second.chain[-1].model_copy(update={"seed": 1, "key": "s1"}))
    assert second.baseline is not None
    single = second.baseline.replicates[0].model_copy(update={"seed": 1})
    beside = second.baseline.model_copy(update={"replicates": (single,)})
    second = second.model_copy(update={"chain": chain, "baseline": beside})
    jobs = [Job(str(i), ["baseline=true", f"seed={i}"], result, "") for i, result in enumerate((first, second))]
    half = 12.706205  # times the deviation √2 of differences 1 and 3, by √2
    line = f"method=kd: +2.00 ({2 - half:+.2f} to {2 + half:+.2f}) over 2 seeds"
    assert summary.differences(summary.settings(jobs)) == ("method=scratch", [line])
    rows = [(row["job"], row["seed"], row["test_acc"], row["difference to scratch"]) for row in student_rows(jobs)]
    assert rows == [("0", 0, 71.0, 1.0), ("1", 1, 74.0, 3.0)]
