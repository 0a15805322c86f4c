"""What a multirun leaves: settings over their seeds, the best one, and nothing that failed left unsaid."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd import summary
from kd.pipeline import RunResult
from kd.records import Job
from tests.test_stage import distilled

RunJob = Callable[..., Any]


def a_job(number: int, *overrides: str, val: float | None = 90.0, test: float = 80.0, reason: str = "") -> Job:
    if reason:
        return Job(str(number), list(overrides), None, reason)
    outcome = {
        "role": "student", "model": "plane2", "key": f"{number:016x}", "seed": 0, "loss": distilled().loss.dump(),
        "params": 1, "val_acc": val, "test_acc": test, "epochs": 1, "seconds": 1.0, "select": "best_val",
        "reused": False,
    }  # fmt: skip
    common = {"objective": val, "mode": "paper", "method": "kd", "dataset": "digits"}
    return Job(str(number), list(overrides), RunResult.model_validate({"chain": [outcome], **common}), "")


def test_seeds_are_pooled_and_the_luckiest_one_does_not_win(tmp_path: Path) -> None:
    jobs = [
        a_job(0, "method.T=1", "seed=0", val=99.0, test=70.0),  # lucky once
        a_job(1, "method.T=1", "seed=1", val=80.0, test=71.0),
        a_job(2, "method.T=5", "seed=0", val=91.0, test=75.0),
        a_job(3, "method.T=5", "seed=1", val=92.0, test=77.0),
    ]
    lines = summary.write(tmp_path, jobs, "val_acc")
    assert lines[0] == "best setting, chosen on validation: method.T=5: validation 91.50 %, test 76.00 %, 2 students"
    assert lines[1] == "again: python run.py -m method.T=5 seed=0,1"
    assert (tmp_path / "best.sh").read_text().splitlines()[-1] == "python run.py -m method.T=5 seed=0,1"
    text = (tmp_path / "summary.md").read_text()
    assert "| method.T=5 | 91.50 | 76.00 ± 1.41 | 2 | 63.29 to 88.71 |" in text
    assert (tmp_path / "summary.png").stat().st_size > 5000


def test_the_order_of_a_grid_breaks_no_tie(tmp_path: Path) -> None:
    jobs = [a_job(0, "method.T=1", test=70.0), a_job(1, "method.T=5", test=80.0), a_job(2, "method.T=9", val=80.0)]
    lines = summary.write(tmp_path, jobs, "val_acc")
    assert lines == summary.write(tmp_path, jobs[::-1], "val_acc")
    assert lines[0].endswith("1 student; 2 settings are equal there, and it is the first of them by name")


def test_a_choice_by_the_test_set_is_in_the_files(tmp_path: Path) -> None:
    job = a_job(0, "method.T=1")
    assert job.result is not None
    chain = [outcome.model_copy(update={"select": "best_test"}) for outcome in job.result.chain]
    summary.write(tmp_path, [job._replace(result=job.result.model_copy(update={"chain": tuple(chain)}))], "val_acc")
    assert "Mode paper; EPOCH CHOSEN ON THE TEST SET" in (tmp_path / "summary.md").read_text()
    assert "EPOCH CHOSEN ON THE TEST SET" in (tmp_path / "summary.csv").read_text()


def test_by_the_test_set_the_best_is_one_job_and_it_says_so(tmp_path: Path) -> None:
    jobs = [
        a_job(0, "method.T=1", "seed=0", test=70.0, val=None),
        a_job(1, "method.T=5", "seed=0", test=75.0, val=None),
    ]
    jobs.append(a_job(2, "method.T=1", "seed=1", test=78.0, val=None))
    lines = summary.write(tmp_path, jobs, "test_acc")
    assert lines[0].startswith("best setting, CHOSEN ON THE TEST SET, as the paper had it: method.T=1: ")
    assert lines[1] == "again: python run.py method.T=1 seed=1"
    assert summary.write(tmp_path / ".", jobs, "val_acc")[0].startswith("no best setting is named")


def test_failed_and_unfinished_jobs_are_in_every_part(tmp_path: Path) -> None:
    jobs = [
        a_job(0, "method.T=1"),
        a_job(1, "method.T=-1", reason="method.T: too small"),
        a_job(2, "method.T=5", reason="unfinished"),
    ]
    summary.write(tmp_path, jobs, "val_acc")
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [row["failure"] for row in rows] == ["", "method.T: too small", "unfinished"]
    assert [row["method.T"] for row in rows] == ["1", "-1", "5"]
    assert rows[0]["test_acc"] == "80.0"
    text = (tmp_path / "summary.md").read_text()
    assert "- job 1 (method.T=-1): method.T: too small" in text
    assert "- job 2 (method.T=5): unfinished" in text


def test_when_every_job_failed(tmp_path: Path) -> None:
    assert summary.write(tmp_path, [a_job(0, "method.T=-1", reason="no")], "val_acc") == []
    assert "job 0 (method.T=-1): no" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "best.sh").exists()


@pytest.mark.parametrize(
    ("told", "numbers"),
    [
        ((("method.T=1", "method.lambda=0.1"), ("method.T=5", "method.lambda=0.1")), {"method.T": [1, 5]}),
        ((("method=kd",), ("method=ta",)), {}),
        ((("method=kd", "method.T=1"), ("method=scratch",)), {}),  # one of them has no T
    ],
)
def test_what_varies(told: tuple[tuple[str, ...], ...], numbers: dict[str, list[float]], tmp_path: Path) -> None:
    jobs = [a_job(number, *each) for number, each in enumerate(told)]
    assert summary.varied(summary.settings(jobs)) == numbers
    summary.write(tmp_path, jobs, "val_acc")  # and each can be drawn
    assert (tmp_path / "summary.png").exists()


def test_a_grid_leaves_its_summary(job: RunJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job("method.T=1,5", "seed=0,1", "train.epochs=1", multirun=True)
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").read_text().splitlines()))
    assert {(row["method.T"], row["seed"]) for row in rows} == {("1", "0"), ("1", "1"), ("5", "0"), ("5", "1")}
    assert "again: python run.py -m " in capsys.readouterr().out


def test_a_student_that_two_trials_found_is_one(tmp_path: Path) -> None:
    """A search may draw a setting again; it is loaded, and adds nothing to n."""
    jobs = [a_job(0, "method.T=1", test=70.0), a_job(1, "method.T=5", test=75.0)]
    again = jobs[1]._replace(number="2")
    lines = summary.write(tmp_path, [*jobs, again], "val_acc")
    assert "| method.T=5 | 90.00 | 75.00 | 1 |  |" in (tmp_path / "summary.md").read_text()
    assert lines[1] == "again: python run.py method.T=1"
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 4  # every job has its row


def test_jobs_that_do_not_say_what_they_were_told_are_not_pooled(tmp_path: Path) -> None:
    assert summary.write(tmp_path, [a_job(0, test=70.0), a_job(1, test=75.0)], "val_acc") == []
    assert not (tmp_path / "best.sh").exists()


def test_the_command_keeps_what_all_jobs_were_told(tmp_path: Path) -> None:
    told = ("tracking=none", "runtime.store=a store")
    jobs = [
        a_job(0, "method.T=1", *told, "runtime.trial=0"),
        a_job(1, "method.T=5", *told, "runtime.trial=1", val=80.0),
    ]
    lines = summary.write(tmp_path, jobs, "val_acc")
    assert lines[1] == "again: python run.py method.T=1 tracking=none 'runtime.store=a store'"
