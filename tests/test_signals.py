"""Signals that ask for an end: they wait while a stage is trained, then their handlers are called."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.training.checkpoint import Deferred, Terminated, exit_code, raise_on_sigterm
from tests.conftest import QUICK, ROOT, run_py

pytestmark = pytest.mark.usefixtures("signals")


def test_a_signal_waits_for_its_delivery(capfd: pytest.CaptureFixture[str]) -> None:
    with Deferred() as signals:
        assert not signals.asked
        signals.deliver()  # nothing is waiting
        signal.raise_signal(signal.SIGINT)
        assert signals.asked
        with pytest.raises(KeyboardInterrupt):
            signals.deliver()
        assert not signals.asked
    assert "asked to end: writing a checkpoint first" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_was_not_delivered_is_at_the_end_of_the_block() -> None:
    raise_on_sigterm()
    done = []

    def work(number: signal.Signals, error: Exception | None) -> None:
        with Deferred():
            signal.raise_signal(number)
            done.append(number)
            if error is not None:
                raise error

    with pytest.raises(Terminated):
        work(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        work(signal.SIGINT, ValueError())  # which does not swallow it
    assert done == [signal.SIGTERM, signal.SIGINT]


def test_a_second_signal_is_not_kept() -> None:
    with Deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)])
def test_a_pre_emption_may_send_two(order: tuple[signal.Signals, signal.Signals]) -> None:
    """SLURM's two signals: submitit ignores one, and queues the job again for the other."""
    heard: list[int] = []
    for number in order:
        signal.signal(number, lambda number, frame: heard.append(number))
    with Deferred() as signals:
        for number in order:
            signal.raise_signal(number)
        assert heard == []
        signals.deliver()
        assert heard == list(order)
        assert not signals.asked


def test_a_schedulers_handler_may_let_the_process_go_on() -> None:
    """As under submitit. Signals without a handler, and ignored ones, are not changed."""
    heard: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with Deferred() as signals:
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        assert not signals.asked
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR2)
            assert signals.asked
            signals.deliver()
    assert heard == [signal.SIGUSR2] * 2


@pytest.mark.parametrize("active", [True, False])
def test_where_no_signal_comes_the_block_does_nothing(active: bool) -> None:
    def block() -> None:
        with Deferred(active) as signals:
            assert not signals.asked
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    thread = threading.Thread(target=block)
    thread.start() if active else block()
    if active:
        thread.join()


def test_exit_codes_are_those_of_the_shell() -> None:
    assert (exit_code(KeyboardInterrupt()), exit_code(Terminated())) == (130, 143)


# run.py ------------------------------------------------------------------------------------------------------------


def interrupted(folder: Path, number: int, *arguments: str, after: Callable[[], bool]) -> tuple[int, str, str]:
    """run.py, sent a signal once `after` holds."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, **pipes)
    while not after():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    time.sleep(0.05)  # into an epoch
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_at_its_step(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without checkpoints of epochs: the checkpoint was written for the signal."""
    run = (*QUICK, "method=scratch", "train.epochs=15", "runtime.checkpoint_every=1000", "hydra.run.dir=out")
    rows = tmp_path / "out" / "metrics.jsonl"
    begun = lambda: rows.exists() and rows.read_text().count("\n") > 1  # noqa: E731
    code, _, err = interrupted(tmp_path, number, *run, after=begun)
    assert code == 128 + number
    assert err.splitlines()[-1] == "interrupted: start the same command again to continue"
    assert "Traceback" not in err
    again = run_py(*run, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "student plane2: resuming after epoch" in again.stdout
    key = json.loads((tmp_path / "out" / "result.json").read_text())["chain"][0]["key"]
    monkeypatch.setenv("KD_STORE", str(tmp_path / "unbroken"))
    assert run_py(*run, cwd=tmp_path).returncode == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "store" / key / name).read_bytes() == (tmp_path / "unbroken" / key / name).read_bytes()
    assert not list((tmp_path / "store" / "partial").glob("*/state"))


@pytest.mark.slow
def test_an_interrupted_multirun_is_summarized(tmp_path: Path) -> None:
    jobs = ("-m", *QUICK, "method=scratch", "train.epochs=15", "seed=0,1,2", "hydra.sweep.dir=sweep")
    second = tmp_path / "sweep" / "1" / "metrics.jsonl"
    code, out, err = interrupted(
        tmp_path, signal.SIGTERM, *jobs, after=lambda: second.exists() and bool(second.read_text())
    )
    assert code == 143
    assert "Traceback" not in err
    assert "1 of 3 jobs left no folder: killed, or never started" in out
    assert "job 1 (" in (tmp_path / "sweep" / "summary.md").read_text()
    assert os.path.exists(tmp_path / "sweep" / "0" / "result.json")
