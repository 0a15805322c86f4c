"""The live table of a sweep in the terminal that runs it: below the lines of the jobs, and gone at the end."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kd.app.jobs import interrupted
from kd.reporting import summary
from kd.reporting.board import Overview, Sweep, screen
from kd.reporting.live import has_terminal
from kd.reporting.results import record_failed
from tests.conftest import QUICK, ROOT, run_py
from tests.terminal import Terminal, in_terminal
from tests.test_watch import begin

# What prints beside the table: this process, its standard error, a signal's handler, and a process below it
PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from kd.reporting.board import Sweep
from kd.reporting.console import console
from kd.reporting.live import LiveTable, has_terminal
from kd.reporting.status import beside_table
assert has_terminal() and not beside_table()
table = LiveTable(Sweep(Path("."), 12), 0.0)
table.start()
assert beside_table() and not console().is_terminal and not has_terminal()
print("a line of a job", flush=True)
time.sleep(0.3)
print("a warning of a job that is " + "long " * 30, file=sys.stderr)
os.write(2, b"asked to end: writing a checkpoint first\\n")
subprocess.run(["printf", "10 %%\\\\r20 %%\\\\n\\\\033[31mred\\\\033[0m and without an end"], check=True)
time.sleep(1.2)
table.stop()
assert has_terminal() and not beside_table()
print("the summary")
"""


def jobs(folder: Path) -> None:
    begin(folder, 0, "method=kd", "method.T=1", "seed=0", epoch=3)
    record_failed(begin(folder, 1, "method=kd", "method.T=-1", "seed=0"), "method.T: should be above 0 (got -1)")


@pytest.mark.parametrize("columns", [80, pytest.param(160, marks=pytest.mark.slow)])
def test_what_is_printed_stays_above_the_table(tmp_path: Path, columns: int) -> None:
    jobs(tmp_path)
    terminal, shown, code = in_terminal([sys.executable, "-c", PROGRAM], tmp_path, columns)
    assert code == 0, terminal.text
    long = "a warning of a job that is " + "long " * 30
    lines = [
        "a line of a job",
        *(long[start : start + columns].rstrip() for start in range(0, len(long), columns)),
        "asked to end: writing a checkpoint first",
        "20 %",
        "red and without an end",
    ]
    assert terminal.text.splitlines() == [*lines, "the summary"]
    assert terminal.cursor_shown
    whole = next(text for text in shown if "got -1" in text).splitlines()
    head = whole.index(".: 0 of 12 jobs done, 1 running, 1 failed")
    above, table = whole[:head], whole[head + 1 :]
    assert above == lines[:head]  # as much as was printed when the table was drawn
    assert table[0].split() == ["job", "setting", "stage", "epoch", "val", "%", "images/s", "left,", "or", "result"]
    assert re.fullmatch(r"0 +method\.T=1 +student plane2 s0 +3/60 +91\.50 +1,234 +95 s", table[2])
    assert re.fullmatch(r"1 +method\.T=-1 +failed", table[3])
    assert table[4:] == ["job 1 (method.T=-1): method.T: should be above 0 (got -1)"]
    last = next(text for text in reversed(shown) if "images/s" in text).splitlines()
    assert last[: len(lines) - 1] == lines[:-1]
    assert all(len(line) <= columns for text in shown for line in text.splitlines())


def test_a_table_higher_than_the_terminal_has_the_jobs_that_run(tmp_path: Path) -> None:
    for number in range(30):
        if number == 3:
            begin(tmp_path, number, f"seed={number}", epoch=7)
        else:
            record_failed(begin(tmp_path, number, f"seed={number}"), "a reason")
    out = Console(width=80, file=io.StringIO())
    lines = Overview(tmp_path).lines()
    for room in (12, 20, 200):
        assert len(out.render_lines(screen(Sweep(tmp_path, 40), lines, out, room), pad=False)) <= room
    out.print(screen(Sweep(tmp_path, 40), lines, out, 12))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"^3 +seed=3", text, re.MULTILINE)
    assert re.search(r"^29 +seed=29", text, re.MULTILINE)
    assert not re.search(r"^0 +seed=0", text, re.MULTILINE)


def test_a_look_reads_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs(tmp_path)
    overview = Overview(tmp_path)
    first = overview.lines()
    read = list[Path]()
    from kd.reporting import results

    own = results._read_job
    monkeypatch.setattr(results, "_read_job", lambda place, number: read.append(place) or own(place, number))
    assert overview.lines() == first
    assert read == []
    (tmp_path / "1" / "error.json").write_text(json.dumps({"error": ["another reason"]}))
    assert overview.lines()[1].problem == "another reason"
    assert read == [tmp_path / "1"]
    assert Overview(tmp_path, since=2e9 * 2).lines() == []  # of an earlier start in the same folder


SWEEP = (*QUICK, "method=scratch", "hydra.sweep.dir=sweep")


@pytest.mark.slow
@pytest.mark.parametrize("live", [True, False])
def test_the_table_is_there_until_the_summary(
    job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    """In a terminal, unless it is not wanted, or nothing is trained."""
    done = list[object]()

    class Noted:
        def __init__(self, sweep: Sweep, since: float) -> None:
            done.append((sweep.folder, sweep.expected, "method=scratch" in sweep.fixed, "seed=0,1" in sweep.fixed))

        def start(self) -> None:
            done.append("start")

        def stop(self) -> None:
            done.append("stop")

    monkeypatch.setattr("kd.reporting.live.has_terminal", lambda: True)
    monkeypatch.setattr("kd.reporting.live.LiveTable", Noted)
    own = summary.print_jobs
    monkeypatch.setattr(summary, "print_jobs", lambda jobs: done.append(len(jobs)) or own(jobs))
    job("method=scratch", "seed=0,1", "dry_run=true", multirun=True)
    assert done == []
    job("method=scratch", "seed=0,1", "train.epochs=1", f"runtime.live={live}", multirun=True)
    assert done == ([(tmp_path / "out", 2, True, False), "start", "stop", 2] if live else [2])


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 160])
def test_a_sweep_in_a_terminal(tmp_path: Path, columns: int) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "-m", *SWEEP, "seed=0,1", "train.epochs=30", "train.lr=0.02"]
    terminal, shown, code = in_terminal(command, tmp_path, columns)
    assert code == 0, terminal.text
    table = next(text for text in shown if re.search(r"student plane2 s\d +\d+/30 ", text))
    assert re.search(r"^sweep: \d of 2 jobs done, 1 running$", table, re.MULTILINE)
    assert "images/s  left" in table
    final = terminal.text
    assert "images/s  left" not in final
    assert all(len(line) <= columns for line in final.splitlines())
    assert [line[:6] for line in final.splitlines() if re.match(r"job \d:", line)] == ["job 0:", "job 1:"]
    assert final.index("job 1:") < final.index("2 jobs, mode paper, all with ")
    assert terminal.cursor_shown
    assert re.search(r"^0 +seed=0 +student plane2", table, re.MULTILINE)  # without what the sweep does not vary
    assert not any("━" in text for text in shown)  # of a bar


@pytest.mark.slow
def test_a_sweep_without_a_terminal_or_without_the_table(tmp_path: Path) -> None:
    """One line a job says the rest."""
    plain = run_py("-m", *SWEEP, "seed=0,1", "runtime.live=true", cwd=tmp_path)
    assert plain.returncode == 0
    assert "runtime.live=true has no effect: the output is no terminal" in plain.stdout
    assert "running" not in plain.stdout
    command = [sys.executable, str(ROOT / "run.py"), "-m", *SWEEP, "seed=0,1", "runtime.live=false"]
    terminal, shown, code = in_terminal(command, tmp_path, 80)
    assert code == 0
    assert not any("running" in text for text in shown)
    assert "job 1: seed=1" in terminal.text


@pytest.mark.slow
def test_ctrl_c_beside_the_table(tmp_path: Path) -> None:
    """The checkpoint's line, the hint and the summary are there, and the terminal is as before."""
    command = [sys.executable, str(ROOT / "run.py"), "-m", *SWEEP, "seed=0,1", "train.epochs=2000"]
    typed = list[str]()

    def act(shown: str) -> bytes:
        if typed or not re.search(r"student plane2 s0 +\d+/2000 +\d", shown):
            return b""
        typed.append(shown)
        return b"\x03"

    terminal, _, code = in_terminal(command, tmp_path, 80, act=act)
    assert code == 130
    lines = terminal.text.splitlines()
    assert any(line.startswith("asked to end: writing a checkpoint first") for line in lines)
    assert "interrupted: start the same command again to continue" in lines
    assert "1 of 2 jobs left no folder: killed, or never started" in lines
    assert "job 0: unfinished" in lines
    assert "images/s  left" not in terminal.text
    assert terminal.cursor_shown


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_parallel_sweep_in_a_terminal(tmp_path: Path, launcher: str) -> None:
    parallel = [f"hydra/launcher={launcher}"] + ["hydra.launcher.n_jobs=2"] * (launcher == "joblib")
    command = [sys.executable, str(ROOT / "run.py"), "-m", *SWEEP, *parallel, "seed=0,1,2", "train.epochs=60"]
    terminal, shown, code = in_terminal(command, tmp_path, 80)
    assert code == 0, terminal.text
    assert any(re.search(r"student plane2 s\d +\d+/60 ", text) for text in shown)
    assert any(re.search(r"of 3 jobs done, [23] running", text) for text in shown)
    assert "3 jobs, mode paper" in terminal.text
    assert terminal.cursor_shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=kd"], True),
        (["-m", "seed=0,1", "dry_run=false"], True),
        (["dry_run=true"], False),
        (["-m", "++dry_run=True"], False),
        (["why=method.T"], False),
        (["--why", "method.T"], False),
        (["--why=method.T"], False),
        (["--cfg", "job"], False),
    ],
)
def test_only_what_trains_is_resumed(words: list[str], told: bool) -> None:
    again = ": start the same command again to continue"
    assert interrupted(words) == f"interrupted{again if told else ''}"


def test_the_tests_have_no_terminal() -> None:
    assert not has_terminal()


def test_the_terminal_of_these_tests() -> None:
    terminal = Terminal(4, 2)
    terminal.write("abcdef\r\ngh\r\n\x1b")
    terminal.write("[1A\x1b[2Kx\x1b[?25l")
    assert (terminal.text, terminal.cursor_shown) == ("abcd\nef\nx", False)
    terminal.write("\x1b[9Ay\x1b[?25h")  # not above the screen
    assert (terminal.text, terminal.cursor_shown) == ("abcd\nef\nxy", True)


@pytest.mark.slow
@pytest.mark.parametrize("tracking", ["none", "wandb"])
def test_a_search_in_a_terminal(tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's line and its row have what the search chose, without what all trials share. W&B's hint is above."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where no key of W&B is
    own = ["sweep=tpe", "method=kd", "teacher=plane4", "hydra.sweeper.n_trials=2", f"tracking={tracking}"]
    command = [sys.executable, str(ROOT / "run.py"), "-m", *SWEEP, *own, "train.epochs=60"]
    terminal, shown, code = in_terminal(command, tmp_path, 100)
    assert code == 0, terminal.text
    lines, chosen = terminal.text.splitlines(), r"method\.T=[\d.]+ method\.lambda=[\d.]+"
    told = rf"job \d: {chosen}: validation [\d.]+ %, test [\d.]+ %"
    assert sum(re.fullmatch(told, line) is not None for line in lines) == 2
    assert any(re.search(rf"^1 +{chosen} +student plane2 s0 +\d+/60 ", text, re.MULTILINE) for text in shown)
    assert sum("wandb sync" in line for line in lines) == (tracking == "wandb")
    assert "images/s  left" not in terminal.text
    assert terminal.cursor_shown
