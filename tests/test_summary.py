"""The summary of a multirun: settings over their seeds, the best setting, and all failures."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from kd.reporting import summary
from kd.reporting.results import Job, Replicate, ReplicatedResult, RunResult, student_rows
from kd.reporting.summary_figure import varying_numbers
from tests.test_stage import TEACHER, distilled

RunJob = Callable[..., Any]


def a_job(number: int, *overrides: str, val: float | None = 90.0, test: float = 80.0, reason: str = "") -> Job:
    """A job of one student, at the seed and by the method of its overrides."""
    if reason:
        return Job(str(number), list(overrides), None, reason)
    told = dict(override.split("=", 1) for override in overrides)
    outcome = {
        "role": "student", "model": told.get("model", "plane2"), "key": f"{number:016x}",
        "seed": int(told.get("seed", 0)), "loss": distilled().loss.dump(), "params": 1, "val_acc": val,
        "test_acc": test, "epochs": int(told.get("train.epochs", 1)), "seconds": 1.0, "select": "best_val",
        "reused": False,
    }  # fmt: skip
    teacher = {
        **outcome,
        "role": "teacher",
        "key": "7eac4e5000000000",
        "model": "plane4",
        "loss": TEACHER.loss.dump(),
        "test_acc": 85.0,
    }
    method = told.get("method", "kd")
    chain = [outcome] if method == "scratch" else [teacher, outcome]
    common = {"objective": val, "mode": "paper", "method": method, "dataset": told.get("dataset", "digits")}
    return Job(str(number), list(overrides), RunResult.model_validate({"chain": chain, **common}), "")


@pytest.mark.slow
def test_a_run_names_several_guides_their_weights_and_the_loss(job: RunJob, capsys: pytest.CaptureFixture[str]) -> None:
    several = "method=multi_teacher", "method.teachers=[plane4,plane6]", "train.epochs=1"
    with pytest.raises(FileNotFoundError):  # a dry run has no result
        job(*several, "method.weights=[2,1]", "dry_run=true")
    line = "student plane2 learns from teacher plane4 and teacher plane6"
    assert f"{line}, with weights 0.667 and 0.333\n" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        job(*several, "dry_run=true")
    assert f"{line}\n" in capsys.readouterr().out
    result = job(*several)
    assert [len(stage["guides"]) for stage in result["chain"]] == [0, 0, 2]
    assert "\nstudent plane2 learns from plane4 + plane6\n" in capsys.readouterr().out
    job(*several, "loss=dkd")
    assert "\nstudent plane2 learns from plane4 + plane6 by dkd T=4 " in capsys.readouterr().out
    job("loss=pkt", "train.epochs=1")
    assert "\nstudent plane2 learns by pkt " in capsys.readouterr().out
    job("train.epochs=1")
    assert "learns" not in capsys.readouterr().out


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """matplotlib's objects of the written figure."""
    drawn, really = [], Figure.savefig

    def savefig(self: Figure, *arguments: Any, **settings: Any) -> None:
        really(self, *arguments, **settings)
        drawn.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def legend(axes: Any) -> set[str]:
    return set(axes.get_legend_handles_labels()[1])


def test_seeds_are_pooled_and_the_luckiest_one_does_not_win(tmp_path: Path) -> None:
    jobs = [
        a_job(0, "method.T=1", "seed=0", val=99.0, test=70.0),  # lucky once
        a_job(1, "method.T=1", "seed=1", val=80.0, test=71.0),
        a_job(2, "method.T=5", "seed=0", val=91.0, test=75.0),
        a_job(3, "method.T=5", "seed=1", val=92.0, test=77.0),
    ]
    lines = summary.write_summary(tmp_path, jobs, "val_acc")
    assert lines[-2] == "best setting, chosen on validation: method.T=5: validation 91.50 %, test 76.00 %, 2 students"
    assert lines[-1] == "again: python run.py -m method.T=5 seed=0,1"
    assert (tmp_path / "best.sh").read_text().splitlines()[-1] == "python run.py -m method.T=5 seed=0,1"
    text = (tmp_path / "summary.md").read_text()
    chain = "plane4 → plane2 (T=4 lambda=0.5)"
    assert f"| method.T=5 | {chain} | 91.50 | 76.00 ± 1.41 | 2 | 63.29 to 88.71 |" in text
    assert (tmp_path / "summary.png").stat().st_size > 5000


def test_the_order_of_a_grid_breaks_no_tie(tmp_path: Path) -> None:
    jobs = [a_job(0, "method.T=1", test=70.0), a_job(1, "method.T=5", test=80.0), a_job(2, "method.T=9", val=80.0)]
    lines = summary.write_summary(tmp_path, jobs, "val_acc")
    assert lines == summary.write_summary(tmp_path, jobs[::-1], "val_acc")
    assert lines[0].endswith("1 student; 2 settings are equal, and this is the first by name")


def test_a_choice_by_the_test_set_is_in_the_files(tmp_path: Path) -> None:
    job = a_job(0, "method.T=1")
    assert job.result is not None
    chain = [outcome.model_copy(update={"select": "best_test"}) for outcome in job.result.chain]
    summary.write_summary(
        tmp_path, [job._replace(result=job.result.model_copy(update={"chain": tuple(chain)}))], "val_acc"
    )
    assert "Mode paper; EPOCH CHOSEN ON THE TEST SET" in (tmp_path / "summary.md").read_text()
    assert "EPOCH CHOSEN ON THE TEST SET" in (tmp_path / "summary.csv").read_text()


def test_by_the_test_set_the_best_is_one_job_and_it_says_so(tmp_path: Path) -> None:
    jobs = [
        a_job(0, "method.T=1", "seed=0", test=70.0, val=None),
        a_job(1, "method.T=5", "seed=0", test=75.0, val=None),
    ]
    jobs.append(a_job(2, "method.T=1", "seed=1", test=78.0, val=None))
    lines = summary.write_summary(tmp_path, jobs, "test_acc")
    assert lines[0].startswith("best setting, CHOSEN ON THE TEST SET, as in the paper: method.T=1: ")
    assert lines[1] == "again: python run.py method.T=1 seed=1"
    assert summary.write_summary(tmp_path / ".", jobs, "val_acc")[0].startswith("no best setting: ")


def test_failed_and_unfinished_jobs_are_in_every_part(tmp_path: Path) -> None:
    jobs = [
        a_job(0, "method.T=1"),
        a_job(1, "method.T=-1", reason="method.T: too small"),
        a_job(2, "method.T=5", reason="unfinished"),
    ]
    summary.write_summary(tmp_path, jobs, "val_acc")
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [row["failure"] for row in rows] == [
        "",
        "method.T: too small",
        "unfinished: python run.py method.T=5 goes on with it",
    ]
    assert [row["method.T"] for row in rows] == ["1", "-1", "5"]
    assert rows[0]["test_acc"] == "80.0"
    text = (tmp_path / "summary.md").read_text()
    assert "- job 1 (method.T=-1): method.T: too small" in text
    assert "- job 2 (method.T=5): unfinished" in text


def test_the_table_has_a_row_a_student(tmp_path: Path) -> None:
    """With its own seed, chain and accuracies, whatever its job trained."""
    students = [Replicate(seed=4 + i, key=f"{i:016x}", val_acc=90.0 - i, test_acc=80.0 + i) for i in range(2)]
    one = a_job(0, "method.T=1", "seed=4", "replicates=2")
    assert one.result is not None
    both = {"replicates": students, "mean": 80.5, "std": 0.7, "n": 2, "ci95": (70.0, 90.0)}
    job = one._replace(result=ReplicatedResult(**{**dict(one.result), **both}))
    summary.write_summary(tmp_path, [job, a_job(1, "method.T=-1", "seed=4", reason="too small")], "val_acc")
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(row["job"], row["seed"], row["val_acc"], row["test_acc"], row["student"]) for row in rows] == [
        ("0", "4", "90.0", "80.0", "0000000000000000"),
        ("0", "5", "89.0", "81.0", "0000000000000001"),
        ("1", "4", "", "", ""),
    ]
    assert [row["chain"] for row in rows] == ["plane4 → plane2", "plane4 → plane2", ""]
    assert [row["failure"] for row in rows] == ["", "", "too small"]


def test_when_every_job_failed(tmp_path: Path) -> None:
    assert summary.write_summary(tmp_path, [a_job(0, "method.T=-1", reason="no")], "val_acc") == []
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
    assert varying_numbers(summary.settings(jobs)) == numbers
    summary.write_summary(tmp_path, jobs, "val_acc")  # and each can be drawn
    assert (tmp_path / "summary.png").exists()


# figures ----------------------------------------------------------------------------------------------------------


def test_a_grid_of_numbers_is_drawn_as_a_curve_for_each_other_choice(tmp_path: Path, figures: list[Figure]) -> None:
    told = [(t, method) for t in (1, 5, 20) for method in ("kd", "ta")]
    jobs = [
        a_job(number, f"method.T={t}", f"method={method}", val=80.0 + number) for number, (t, method) in enumerate(told)
    ]
    summary.write_summary(tmp_path, jobs, "val_acc")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "method.T"
    assert axes.get_ylabel() == "test accuracy (×: on validation), %\non digits, mode paper"
    assert legend(axes) == {"method=kd", "method=ta", "best setting, by validation"}
    (best,) = [line for line in axes.lines if line.get_label() == "best setting, by validation"]
    assert [*best.get_ydata()] == [85.0]  # the highest on validation; all have 80 % on test
    (curve,) = [line for line in axes.lines if line.get_label() == "method=kd"]
    assert [round(x) for x in curve.get_xdata()] == [1, 5, 20]


def test_names_with_dollars_are_drawn_as_they_are(tmp_path: Path, figures: list[Figure]) -> None:
    names = ["a$x_$", "b$\\frac$"]
    jobs = [a_job(i, f"dataset={name}", f"dataset.label={name}") for i, name in enumerate(names)]
    summary.write_summary(tmp_path, jobs, "val_acc")
    assert (tmp_path / "summary.png").exists()
    assert (tmp_path / "best.sh").exists()
    assert "a$x_$" in figures[0].axes[0].get_yticklabels()[0].get_text().replace(r"\$", "$")


def test_other_images_are_another_setting(tmp_path: Path) -> None:
    jobs = [
        a_job(0, "runtime.data=a", "seed=0", val=90.0, test=100.0),
        a_job(1, "runtime.data=b", "seed=0", val=50.0, test=50.0),
    ]
    lines = summary.write_summary(tmp_path, jobs, "val_acc")
    assert lines[-1] == "again: python run.py runtime.data=a seed=0"
    assert lines[-2].startswith("best setting, chosen on validation: runtime.data=a: ")
    (one,) = summary.settings([jobs[0], a_job(1, "runtime.data=b", "seed=1")])  # the same images, in two places
    assert len(one.test) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-0.5", -0.5),
        ("1e-3", 0.001),
        ("007", "007"),
        ("2024_01", "2024_01"),
        ("nan", "nan"),
        ("1e999", "1e999"),
    ],
)
def test_only_what_is_written_like_a_number_is_one(text: str, value: Any) -> None:
    (row,) = student_rows([a_job(0, f"dataset.label={text}")])
    assert row["dataset.label"] == value
    assert type(row["dataset.label"]) is type(value)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("train.lr=0.123456789", "train.lr=0.1235"),
        ("train.lr=1.234567e-05", "train.lr=1.235e-05"),
        ("train.lr=0.10001", "train.lr=0.10001"),
        ("train.lr=1e-3", "train.lr=1e-3"),
        ("dataset.label=1e999", "dataset.label=1e999"),
        ("seed=1000001", "seed=1000001"),
        ("dataset.label=2024_01", "dataset.label=2024_01"),
        ("runtime.trial=3", ""),
    ],
)
def test_only_long_fractions_are_shortened(override: str, shown: str) -> None:
    assert summary.short(override) == shown


def test_a_student_of_two_jobs_counts_once_on_validation_too(job: RunJob) -> None:
    results = job("method=scratch", "seed=0,1", "replicates=2", "train.epochs=1", multirun=True)
    known = {each["key"]: each["val_acc"] for result in results for each in result["replicates"]}
    assert len(known) == 3
    jobs = [
        Job(str(i), ["method=scratch"], ReplicatedResult.model_validate(each), "") for i, each in enumerate(results)
    ]
    (setting,) = summary.settings(jobs)
    assert setting.val == pytest.approx(sum(known.values()) / 3)


@pytest.mark.parametrize("swept", ["method.T", "method"])
def test_a_choice_by_the_test_set_is_circled_there(tmp_path: Path, figures: list[Figure], swept: str) -> None:
    """Without marks of validation, which decided nothing. The circle is around the one job that won."""
    told = (1, 5) if swept == "method.T" else ("kd", "ta")
    tests = ((70.0, 90.0), (81.0, 82.0))
    jobs = [
        a_job(2 * i + s, f"{swept}={each}", f"seed={s}", test=tests[i][s])
        for i, each in enumerate(told)
        for s in (0, 1)
    ]
    summary.write_summary(tmp_path, jobs, "test_acc")
    (axes,) = figures[0].axes
    circle = next(line for line in axes.lines if line.get_label() == "best setting, by test")
    assert 90.0 in (*circle.get_xdata(), *circle.get_ydata())
    assert "mean on validation" not in legend(axes)
    assert "×" not in axes.get_xlabel().splitlines()[0] + axes.get_ylabel()


def test_a_search_is_drawn_as_dots(tmp_path: Path, figures: list[Figure]) -> None:
    """All trials differ in all numbers, so no points are joined."""
    jobs = [a_job(n, f"method.T={n}.5", f"method.lambda=0.{n}", test=70.0 + n) for n in range(1, 10)]
    summary.write_summary(tmp_path, jobs, "val_acc")
    assert [axes.get_xlabel() for axes in figures[0].axes] == ["method.T", "method.lambda"]
    for axes in figures[0].axes:
        assert {len(line.get_xdata()) for line in axes.lines} == {1}
        assert sum(line.get_marker() == "x" for line in axes.lines) == 9  # on validation, which chose the best
        assert legend(axes) == {"best setting, by validation"}


def test_settings_without_numbers_are_drawn_as_lines(tmp_path: Path, figures: list[Figure]) -> None:
    """Each with its chain, its students, their interval and its teacher."""
    jobs = [
        a_job(2 * number + seed, f"method={method}", f"seed={seed}", test=60.0 + 35 * seed, val=90.0 - number)
        for number, method in enumerate(("scratch", "kd"))
        for seed in (0, 1)
    ]
    summary.write_summary(tmp_path, jobs, "val_acc")
    (axes,) = figures[0].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["method=scratch\nplane2", "method=kd\nplane4 → plane2"]
    students = {"a student", "mean, 95 % interval", "its teacher"}
    assert legend(axes) == {*students, "mean on validation", "best setting, by validation"}
    points = {(line.get_label(), *line.get_xdata()) for line in axes.lines}
    assert {("a student", 60.0, 95.0), ("its teacher", 85.0), ("mean on validation", 89.0)} <= points
    assert ("best setting, by validation", 90.0) in points  # where it was chosen, and not its 77.5 % on test
    assert axes.get_xlim() == (0, 100.4)  # whatever an interval of two students says


# what distillation adds -------------------------------------------------------------------------------------------

SCRATCH = [a_job(seed, "method=scratch", f"seed={seed}", test=test) for seed, test in enumerate((90.0, 91.0, 92.0))]


def differences(*jobs: Job) -> list[str]:
    return summary.differences(summary.settings(jobs))[1]


def test_a_setting_is_compared_to_its_student_from_scratch(tmp_path: Path) -> None:
    kd = [a_job(3 + seed, "method=kd", f"seed={seed}", test=test) for seed, test in enumerate((91.0, 93.0, 92.5))]
    # 1, 2 and 0.5: mean 7/6, standard deviation 0.7638, and Student's t at .975 with two degrees of freedom is 4.3027
    line = "method=kd: +1.17 (-0.73 to +3.06) over 3 seeds"
    assert differences(*SCRATCH, *kd) == [line]
    assert differences(*kd[::-1], *SCRATCH) == [line]  # the order of jobs decides nothing
    assert summary.write_summary(tmp_path, [*SCRATCH, *kd], "val_acc")[:2] == [
        "difference to method=scratch in test accuracy, paired by the student's seed, 95 % interval:",
        f"  {line}",
    ]
    text = (tmp_path / "summary.md").read_text()
    assert (
        f"Difference to method=scratch in test accuracy, paired by the student's seed, 95 % interval:\n\n- {line}\n"
        in text
    )


def test_differences_that_have_no_interval() -> None:
    one = a_job(3, "method=kd", "seed=1", test=92.39)
    assert differences(*SCRATCH, one) == ["method=kd: +1.39, one seed"]
    same = [a_job(3 + seed, "method=kd", f"seed={seed}", test=89.5 + seed) for seed in range(3)]
    assert differences(*SCRATCH, *same) == ["method=kd: -0.50 at every seed, 3 seeds"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=kd", "seed=7"),
        ("method=kd", "seed=0", "model=plane4"),
        ("method=kd", "seed=0", "dataset=pets"),
        ("method=kd", "seed=0", "train.epochs=2"),
        ("method=kd", "seed=0", "train.lr=0.3"),
        ("method=scratch", "seed=0", "train.lr=0.3"),
    ],
)
def test_without_the_same_student_from_scratch_nothing_is_compared(overrides: tuple[str, ...]) -> None:
    assert differences(*SCRATCH, a_job(3, *overrides)) == []


def test_of_several_baselines_each_setting_has_its_own() -> None:
    told = [("scratch", 1, 80.0), ("scratch", 2, 90.0), ("kd", 1, 85.0), ("kd", 2, 91.0)]
    jobs = [
        a_job(number, f"method={method}", f"train.epochs={epochs}", test=test)
        for number, (method, epochs, test) in enumerate(told)
    ]
    assert differences(*jobs) == [
        "method=kd train.epochs=1: +5.00, one seed",
        "method=kd train.epochs=2: +1.00, one seed",
    ]


def test_without_a_student_from_scratch_settings_are_compared_to_the_first(tmp_path: Path) -> None:
    """Over common seeds, if there are two or more."""
    rows = [("kd", (90.0, 91.0, 92.0)), ("dkd", (91.0, 93.0, 92.5)), ("pkt", (95.0,))]
    jobs = [
        a_job(3 * number + seed, "method=kd", f"loss={loss}", f"seed={seed}", test=test)
        for number, (loss, tests) in enumerate(rows)
        for seed, test in enumerate(tests)
    ]
    assert summary.write_summary(tmp_path, jobs, "val_acc")[:2] == [
        "difference to loss=kd in test accuracy, paired by the student's seed, 95 % interval:",
        "  loss=dkd: +1.17 (-0.73 to +3.06) over 3 seeds",
    ]
    assert "\nDifference to loss=kd in test accuracy" in (tmp_path / "summary.md").read_text()
    others = [a_job(9 + seed, "loss=kd", "model=plane4", f"seed={seed}") for seed in range(3)]
    assert differences(*jobs[:3], *others) == []  # another student
    trials = [job._replace(overrides=[*job.overrides, f"runtime.trial={job.number}"]) for job in jobs[:6]]
    assert differences(*trials) == []  # a search's first setting is drawn at random


def test_of_many_differences_the_terminal_has_ten(tmp_path: Path) -> None:
    jobs = [
        a_job(2 * T + seed, "method=kd", f"method.T={T}", f"seed={seed}", test=90.0 + seed)
        for T in range(1, 14)
        for seed in range(2)
    ]
    lines = summary.write_summary(tmp_path, jobs, "val_acc")
    assert lines[10:12] == ["  method.T=11: +0.00 at every seed, 2 seeds", "  and 2 more differences, in summary.md"]
    assert "- method.T=13: +0.00 at every seed, 2 seeds\n" in (tmp_path / "summary.md").read_text()


def test_a_multirun_says_what_distillation_adds(
    job: RunJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch, kd = job("method=scratch,kd", "replicates=3", "train.epochs=1", multirun=True)
    printed = capsys.readouterr().out
    pairs = zip(kd["replicates"], scratch["replicates"], strict=True)
    each = [round(one["test_acc"] - other["test_acc"], 3) for one, other in pairs]  # an interval may end in .005
    low, high = ttest_1samp(each, 0).confidence_interval()
    line = f"method=kd: {kd['mean'] - scratch['mean']:+.2f} ({low:+.2f} to {high:+.2f}) over 3 seeds"
    assert printed.index("method=kd      ") < printed.index(f"  {line}\n") < printed.index("best setting")
    text = (tmp_path / "out" / "summary.md").read_text()
    assert f"- {line}\n" in text
    assert "| method=kd | plane4 → plane2 (T=4 lambda=0.5) |" in text


def test_a_grid_leaves_its_summary(job: RunJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job("method.T=1,5", "seed=0,1", "train.epochs=1", multirun=True)
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").read_text().splitlines()))
    assert {(row["method.T"], row["seed"]) for row in rows} == {("1", "0"), ("1", "1"), ("5", "0"), ("5", "1")}
    said = capsys.readouterr().out
    assert "again: python run.py -m " in said
    (line,) = [line for line in said.splitlines() if line.startswith("job 2: ")]
    assert re.fullmatch(r"job 2: method\.T=5 seed=0: validation \d+\.\d\d %, test \d+\.\d\d %", line)
    assert "the student: kd.load" not in said
    job("method.T=1,5", "seed=0,1", "train.epochs=1", "runtime.tables=true", multirun=True)
    said = capsys.readouterr().out
    assert said.count("the student: kd.load") == 4
    assert "job 2: " not in said


@pytest.mark.parametrize(
    ("swept", "setting"), [((), "plane4 → plane2"), (("method.T=5", "runtime.trial=3"), "method.T=5")]
)
def test_the_line_of_a_job(swept: tuple[str, ...], setting: str) -> None:
    """What was swept, without what a search adds; the networks where the multirun has one job."""
    result = a_job(0, "method.T=5", test=80.0).result
    assert result is not None
    assert summary.job_line(3, swept, result) == f"job 3: {setting}: validation 90.00 %, test 80.00 %"
    unvalidated = a_job(0, test=80.0, val=None).result
    assert unvalidated is not None
    assert summary.job_line(3, swept, unvalidated) == f"job 3: {setting}: test 80.00 %"
    several = {"replicates": (), "mean": 80.5, "std": 0.7, "n": 2, "ci95": (70.0, 90.0)}
    both = ReplicatedResult(**{**dict(result), **several})
    assert summary.job_line(3, swept, both) == f"job 3: {setting}: validation 90.00 %, test 80.50 ± 0.70 %, 2 students"


def alarming(number: int, *overrides: str, said: tuple[str, ...]) -> Job:
    """A job whose student has these alarms."""
    job = a_job(number, *overrides)
    assert job.result is not None
    teacher, student = job.result.chain
    chain = (teacher, student.model_copy(update={"alarms": said}))
    return job._replace(result=job.result.model_copy(update={"chain": chain}))


def test_a_summary_tells_the_alarms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [alarming(number, f"method.T={number}", said=said) for number, said in enumerate((("a", "b"), (), ("a",)))]
    summary.write_summary(tmp_path, jobs, "val_acc")
    assert "\n- alarm in jobs 0, 2: a\n- alarm in job 0: b\n\n" in (tmp_path / "summary.md").read_text()
    assert [row["alarms"] for row in csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())] == [
        "2",
        "0",
        "1",
    ]
    summary.print_jobs(jobs)
    assert "\nalarm in jobs 0, 2: a\nalarm in job 0: b\n" in capsys.readouterr().out
    assert jobs[0].result is not None
    assert summary.job_line(0, (), jobs[0].result).endswith(": validation 90.00 %, test 80.00 %, 2 alarms")
    many = [alarming(0, "method.T=1", said=tuple(str(number) for number in range(11)))]
    summary.print_jobs(many)
    assert "alarm in job 0: 9\nand 1 more alarm, in summary.md\n" in capsys.readouterr().out
    summary.write_summary(tmp_path, [a_job(0)], "val_acc")
    assert "alarm" not in (tmp_path / "summary.md").read_text()


def test_a_student_that_two_trials_found_is_one(tmp_path: Path) -> None:
    """A search may draw a setting twice. The second is loaded, and n does not change."""
    jobs = [a_job(0, "method.T=1", test=70.0), a_job(1, "method.T=5", test=75.0)]
    again = jobs[1]._replace(number="2")
    lines = summary.write_summary(tmp_path, [*jobs, again], "val_acc")
    assert re.search(r"\| method.T=5 \| .* \| 90.00 \| 75.00 \| 1 \|  \|", (tmp_path / "summary.md").read_text())
    assert lines[1] == "again: python run.py method.T=1"
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 4  # every job has its row


def test_jobs_that_do_not_say_what_they_were_told_are_not_pooled(tmp_path: Path) -> None:
    assert summary.write_summary(tmp_path, [a_job(0, test=70.0), a_job(1, test=75.0)], "val_acc") == []
    assert not (tmp_path / "best.sh").exists()


def test_the_command_keeps_what_all_jobs_were_told(tmp_path: Path) -> None:
    told = ("tracking=none", "runtime.store=a store")
    jobs = [
        a_job(0, "method.T=1", *told, "runtime.trial=0"),
        a_job(1, "method.T=5", *told, "runtime.trial=1", val=80.0),
    ]
    lines = summary.write_summary(tmp_path, jobs, "val_acc")
    assert lines[1] == "again: python run.py method.T=1 tracking=none 'runtime.store=a store'"
