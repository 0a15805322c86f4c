"""vary=student|chain: which seeds replicates have, and what every interval says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.app.config import plan, seed_keys
from kd.app.parsing import parse
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.datasets import resolve
from kd.reporting import summary
from kd.reporting.results import Job, ReplicatedResult, what_varied, whose_seeds
from tests.conftest import QUICK, composed
from tests.test_summary import a_job

RunJob = Callable[..., Any]


def students(*overrides: str) -> list[Stage]:
    config = parse(composed(*QUICK, *overrides))
    return plan(config, resolve(config.dataset, config.data_root))


def seeds(*overrides: str) -> list[list[int]]:
    """The seeds of each student's chain, in the order of training."""
    return [[each.seed for each in student.chain if isinstance(each, Stage)] for student in students(*overrides)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("method=kd",), [[0, 0], [0, 1]]),
        (("method=kd", "vary=student"), [[0, 0], [0, 1]]),
        (("method=kd", "vary=chain"), [[0, 0], [1, 1]]),
        (("method=kd", "vary=chain", "seed=7", "teacher.seed=3"), [[3, 7], [4, 8]]),
        (("method=ta", "vary=chain", "method.assistant.seed=5"), [[0, 5, 0], [1, 6, 1]]),
        (("method=trained_teacher", "vary=chain"), [[0, 0, 0], [1, 1, 1]]),
        (("method=trained_teacher", "vary=student"), [[0, 0, 0], [0, 0, 1]]),
        (("method=dgkd", "vary=chain"), [[0, 0, 0], [1, 1, 1]]),
        (("method=multi_teacher", "method.teachers=[plane4,plane6]", "vary=chain"), [[0, 0, 0], [1, 1, 1]]),
        (("method=scratch", "vary=chain"), [[0], [1]]),
    ],
    ids=lambda each: " ".join(map(str, each)),
)
def test_the_seeds_of_two_students(overrides: tuple[str, ...], expected: list[list[int]]) -> None:
    assert seeds(*overrides, "replicates=2") == expected


def test_the_first_chain_is_the_same_either_way() -> None:
    one, other = (students("method=ta", "replicates=3", f"vary={vary}") for vary in ("student", "chain"))
    assert one[0].key == other[0].key
    assert one[1].key != other[1].key


def test_the_tables_vary_the_same_seeds() -> None:
    assert seed_keys("student", assisted=True) == ["seed"]
    assert seed_keys("chain", assisted=False) == ["seed", "teacher.seed"]
    assert seed_keys("chain", assisted=True) == ["seed", "teacher.seed", "method.assistant.seed"]


@pytest.mark.parametrize("value", ["teacher", "3", "null", "true"])
def test_another_value_is_one_line(value: str) -> None:
    with pytest.raises(KnownError, match=r"^vary: should be (one of )?.?student.?,? (or )?.?chain") as problem:
        parse(composed(f"vary={value}"))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("method=kd",), "vary=chain has no effect: replicates=1 has one student\n"),
        (
            ("method=scratch", "replicates=2"),
            "vary=chain has no effect: method=scratch, and no network but the student is trained\n",
        ),
        (("method=kd", "replicates=2"), ""),
    ],
    ids=["one student", "scratch", "kd"],
)
def test_a_line_says_where_it_has_no_effect(
    job: RunJob, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], line: str
) -> None:
    with pytest.raises(FileNotFoundError):  # a dry run has no result
        job(*overrides, "vary=chain", "dry_run=true")
    said = capsys.readouterr().out
    assert line in said
    assert said.count("vary=chain has no effect") == bool(line)


def test_a_run_says_what_its_interval_is_over(job: RunJob, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("model=plane2", "teacher=plane2", "train.epochs=1", "replicates=2")
    whole = job(*quick, "vary=chain", "baseline=true")
    said = capsys.readouterr().out
    assert whole["varied"] == "the whole chain"
    assert "2 students, each with its own chain, seeds 0–1: test " in said
    assert "2 seeds of the whole chain\n" in said
    assert said.count("teacher plane2 s") == 2
    student = job(*quick)
    assert student["varied"] == "the student's seed, over one chain"
    assert "2 students over one chain, seeds 0–1: test " in capsys.readouterr().out
    assert job("method=scratch", *quick)["varied"] == "the student's seed, with nothing above it"
    assert "2 students, seeds 0–1: test " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chains", "varied", "whose"),
    [
        ([["t", "a"], ["t", "b"]], "the student's seed, over one chain", "of the student"),
        ([["a"], ["b"]], "the student's seed, with nothing above it", "of the student"),
        ([["s", "a"], ["t", "b"]], "the whole chain", "of the whole chain"),
        ([["t", "u", "a"], ["t", "v", "b"]], "a part of the chain", "of a part of the chain"),
        ([["s", "t", "a"], ["t", "u", "b"]], "a part of the chain", "of a part of the chain"),  # they share a teacher
    ],
)
def test_what_varied_is_read_from_the_chains(chains: list[list[str]], varied: str, whose: str) -> None:
    assert what_varied(chains) == varied
    assert whose_seeds(varied) == whose


def test_a_sweep_says_it_of_each_setting(tmp_path: Path) -> None:
    """Of jobs with several students, and of single students whose teachers differ."""
    jobs = [a_job(i, "method=scratch", f"seed={i}", test=80.0 + i) for i in range(3)]
    jobs += [a_job(3 + i, "method=kd", f"seed={i}", test=81.0 + 3 * i) for i in range(3)]
    _, lines = summary.differences(summary.settings(jobs))
    assert lines[0].endswith(" over 3 seeds")
    moved = [with_teacher(job, f"{i}") if i > 2 else job for i, job in enumerate(jobs)]
    assert summary.differences(summary.settings(moved))[1] == [f"{lines[0]} of the whole chain"]
    kd = jobs[3].result
    assert kd is not None
    several = ReplicatedResult.model_validate(
        {**kd.model_dump(by_alias=True), "mean": 1, "std": 1, "n": 2, "ci95": (0, 1), "varied": "the whole chain"}
        | {"replicates": [{**student.model_dump(), "seed": i} for i, student in enumerate(kd.students * 2)]}
    )
    pool = summary.settings([jobs[3]._replace(result=several)])
    assert [each.whose for each in pool] == ["of the whole chain"]
    summary.write_summary(tmp_path, moved, "val_acc")
    text = (tmp_path / "summary.md").read_text()
    assert "It is over the students' seeds.\nOf method=kd it is over seeds of the whole chain.\n" in text
    assert several.columns["test_acc/varied"] == "the whole chain"


def with_teacher(job: Job, key: str) -> Job:
    assert job.result is not None
    teacher, student = job.result.chain
    chain = (teacher.model_copy(update={"key": key}), student)
    return job._replace(result=job.result.model_copy(update={"chain": chain}))
