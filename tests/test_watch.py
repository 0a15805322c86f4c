"""`python -m kd.sweep watch`: what each job of a sweep does, read from the files that jobs write."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import kd
from kd.core.spec import KnownError
from kd.reporting import status as statuses
from kd.reporting.board import Line, Overview, board, has_ended, headline_of, plain_line, shared_by, was_killed
from kd.reporting.results import RunResult, record_failed, write_result
from kd.reporting.status import PROCESS, Advance, Process, Status, StatusFile, read_process, read_status
from kd.tools.watch import main
from tests.conftest import ROOT

ADVANCE = Advance(stage="student plane2 s0", epoch=3, epochs=60, val_acc=91.5, speed=1234.5, left=95.0)


def begin(folder: Path, number: int, *overrides: str, **status: Any) -> Path:
    """A job as Hydra begins it, with a status if it trains."""
    place = folder / str(number)
    (place / ".hydra").mkdir(parents=True)
    (place / ".hydra" / "config.yaml").write_text("dry_run: false\n")
    (place / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    if status:
        own = {**ADVANCE.model_dump(), "pid": os.getpid(), "host": platform.node(), "at": time.time(), **status}
        (place / "status.json").write_text(Status(**own).model_dump_json())
    return place


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two jobs train, of which one is killed, one has failed, and one has not begun to train."""
    begin(tmp_path, 0, "method=kd", "method.T=1", epoch=3)
    begin(tmp_path, 1, "method=kd", "method.T=2", pid=2**22 - 7)  # above what Linux gives here
    record_failed(begin(tmp_path, 2, "method=kd", "method.T=-1"), "method.T: should be above 0 (got -1)")
    begin(tmp_path, 10, "method=kd", "method.T=5")
    return tmp_path


def lines_of(folder: Path) -> list[Line]:
    return Overview(folder).lines()


def screen(folder: Path, width: int) -> list[str]:
    out = Console(width=width, record=True, file=io.StringIO())
    out.print(board(lines := lines_of(folder), shared_by(lines)))
    return [line.rstrip() for line in out.export_text().splitlines()]


@pytest.mark.parametrize("width", [80, 160])
def test_the_table(sweep: Path, width: int) -> None:
    lines = screen(sweep, width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert lines[0].split() == ["job", "setting", "stage", "epoch", "val", "%", "images/s", "left,", "or", "result"]
    assert "student plane2 s0" in text
    assert "3/60" in text
    assert "91.50" in text
    assert "1,234" in text
    assert "95 s" in text
    assert [line.split()[:2] for line in lines[2:6]] == [
        ["0", "method.T=1"],
        ["1", "method.T=2"],
        ["2", "method.T=-1"],
        ["10", "method.T=5"],
    ]
    assert [line.split()[2] for line in lines[3:6]] == ["stopped", "failed", "not"]
    assert "job 1 (method.T=2): killed in epoch 3/60 of student plane2 s0" in lines
    assert lines[-1] == "job 2 (method.T=-1): method.T: should be above 0 (got -1)"


def test_a_job_that_is_done_tells_its_result_and_its_alarms(tmp_path: Path) -> None:
    outcome = {"role": "student", "model": "plane2", "key": "k", "seed": 0, "loss": None, "params": 1, "val_acc": 90}
    outcome |= {"test_acc": 80, "epochs": 2, "seconds": 1, "select": "last", "reused": False}
    tree = {"objective": 90, "mode": "paper", "method": "kd", "dataset": "digits"}
    for number, alarms in enumerate(((), ("a",), ("a", "b"))):
        result = RunResult.model_validate({**tree, "chain": [{**outcome, "alarms": alarms}]})
        write_result(result, begin(tmp_path, number))
    ends = ["test 80.00", "test 80.00, 1 alarm", "test 80.00, 2 alarms"]
    assert [line.cells[-1] for line in lines_of(tmp_path)] == ends


def test_plain_lines(sweep: Path) -> None:
    lines = lines_of(sweep)
    shared = shared_by(lines)
    assert [plain_line(line, shared) for line in lines] == [
        "job 0 (method.T=1): student plane2 s0  epoch 3/60  val 91.50 %  1,234 images/s  95 s left",
        "job 1 (method.T=2): killed in epoch 3/60 of student plane2 s0",
        "job 2 (method.T=-1): method.T: should be above 0 (got -1)",
        "job 10 (method.T=5): not training",
    ]
    assert headline_of(sweep, lines, 12) == f"{sweep}: 0 of 12 jobs done, 1 running, 2 failed"


@pytest.mark.parametrize(("seconds", "runs"), [(10, True), (1200, False)])
def test_a_job_of_another_machine_is_silent(tmp_path: Path, seconds: float, runs: bool) -> None:
    begin(tmp_path, 0, "seed=0", host="elsewhere", pid=1, at=time.time() - seconds)
    (line,) = lines_of(tmp_path)
    assert line.runs == runs
    assert runs or line.gone == "no news for 20 min, from elsewhere"


def test_a_damaged_status_is_none(tmp_path: Path) -> None:
    (begin(tmp_path, 0, "seed=0") / "status.json").write_text('{"stage": "stu')
    (line,) = lines_of(tmp_path)
    assert (line.status, line.runs) == (None, False)


def test_the_end_is_the_summary_after_the_last_job(sweep: Path) -> None:
    (sweep / "summary.md").write_text("of an earlier start of the same command\n")
    os.utime(sweep / "summary.md", (1, 1))
    assert not has_ended(sweep, lines_of(sweep))
    (sweep / "summary.md").write_text("the end\n")
    assert not has_ended(sweep, lines_of(sweep))  # a job runs
    (sweep / "0" / "status.json").unlink()
    assert has_ended(sweep, lines_of(sweep))
    for config in sweep.glob("*/.hydra/config.yaml"):  # hydra.output_subdir=null
        config.unlink()
    assert has_ended(sweep, lines_of(sweep))


def test_a_status_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((1000.0, 1001.9, 1002.1))
    monkeypatch.setattr(statuses.time, "time", lambda: next(times))
    file, asked = StatusFile(tmp_path), list[int]()

    def advance() -> Advance:
        asked.append(len(asked))
        return ADVANCE

    for _ in range(3):
        file.report(advance)
    assert asked == [0, 1]
    found = read_status(tmp_path)
    assert found is not None
    assert (found.epoch, found.pid, found.at) == (3, os.getpid(), 1002.1)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    file.close()
    file.close()
    assert read_status(tmp_path) is None
    monkeypatch.undo()
    StatusFile(tmp_path / "nowhere").report(advance)  # a folder that is gone stops no training


def test_a_run_reports_and_leaves_no_status(
    job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Advance] = []
    monkeypatch.setattr(StatusFile, "report", lambda self, advance: said.append(advance()))
    job("method=scratch")
    assert {(each.stage, each.epochs) for each in said} == {("student plane2 s0", 2)}
    assert [each.epoch for each in said] == sorted(each.epoch for each in said)
    assert said[0].val_acc is None
    assert said[-1].val_acc is not None
    monkeypatch.undo()
    assert not (tmp_path / "out" / "status.json").exists()


def test_the_command(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(sweep), "--once"]) == 1
    assert "1 running, 2 failed" in " ".join(capsys.readouterr().out.split())
    (sweep / "0" / "status.json").unlink()
    (sweep / "summary.md").write_text("the end\n")
    assert main(["watch", str(sweep), "--every", "0.01"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "job 0 (method.T=1): not training"
    assert len(said) == 5
    command = [sys.executable, "-m", "kd.sweep", "watch", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "nowhere is not a folder; a sweep's is multirun/<date>/<time>\n")


def test_a_sweep_that_was_killed_is_over(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not when a job was killed: the sweep may go on. Not while a job of its runs."""
    dead = Process(pid=2**22 - 7, host=platform.node())
    (sweep / PROCESS).write_text(dead.model_dump_json())
    assert not was_killed(sweep, lines_of(sweep))
    (sweep / "0" / "status.json").unlink()
    assert was_killed(sweep, lines_of(sweep))
    for other in (dead.model_copy(update={"host": "elsewhere"}), dead.model_copy(update={"pid": os.getpid()})):
        (sweep / PROCESS).write_text(other.model_dump_json())
        assert not was_killed(sweep, lines_of(sweep))
    (sweep / PROCESS).unlink()
    assert not was_killed(sweep, lines_of(sweep))
    (sweep / PROCESS).write_text(dead.model_dump_json())
    assert main(["watch", str(sweep), "--every", "0.01"]) == 1
    told = f"{sweep}: the sweep's process has ended before its last job, and no job runs"
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_a_sweep_that_was_killed_before_a_job_trained_is_told_by_one_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path, 0, "method=kd")
    (tmp_path / PROCESS).write_text(Process(pid=2**22 - 7, host=platform.node()).model_dump_json())
    assert main(["watch", str(tmp_path), "--once", "--every", "3"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "--every has no effect: --once looks once"
    assert said[-1] == f"{tmp_path}: the sweep's process has ended before its last job, and no job runs"


def test_a_grid_that_lacks_a_result_failed_and_a_search_may_go_on_elsewhere(tmp_path: Path) -> None:
    begin(tmp_path, 0, "method=kd")
    (tmp_path / "summary.md").write_text("the end\\n")
    assert main(["watch", str(tmp_path), "--every", "0.01"]) == 1
    (tmp_path / "study.db").touch()
    assert main(["watch", str(tmp_path), "--every", "0.01"]) == 0


def test_a_sweep_names_its_process(job: Callable[..., Any], tmp_path: Path) -> None:
    job("method=scratch", "seed=0,1", "train.epochs=1", multirun=True)
    process = read_process(tmp_path / "out")
    assert process is not None
    assert (process.pid, process.has_ended) == (os.getpid(), False)


def test_what_cannot_be_watched_is_one_line(
    sweep: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path_factory.mktemp("pictures")
    with pytest.raises(KnownError, match=r"has no sweep: neither multirun\.yaml nor jobs"):
        main(["watch", str(pictures)])
    (sweep / "multirun.yaml").write_text("a: [b")
    with pytest.raises(KnownError, match=r"multirun\.yaml cannot be read"):
        main(["watch", str(sweep)])
    for every in ("0", "-1", "inf", "x"):
        with pytest.raises(SystemExit):
            main(["watch", str(sweep), "--every", every])
        assert f"argument --every: should be a number of seconds above 0 (got {every})" in capsys.readouterr().err


def test_the_folder_of_a_run_has_no_end_to_wait_for(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KnownError, match=r"has runs, but no sweep: --once tells what they do$"):
        main(["watch", str(sweep / "0")])
    assert main(["watch", str(sweep / "0"), "--once"]) == 0
    assert "1 running" in " ".join(capsys.readouterr().out.split())


def test_overrides_that_are_not_utf8_are_unknown(sweep: Path) -> None:
    (sweep / "0" / ".hydra" / "overrides.yaml").write_bytes(b"- dataset.label=\xff\n")
    assert lines_of(sweep)[0].job.overrides == []


def test_the_function_stays_the_function() -> None:
    with pytest.raises(ImportError, match=r"kd\.sweep is a function"):
        __import__("kd.sweep")
    assert callable(kd.sweep)
