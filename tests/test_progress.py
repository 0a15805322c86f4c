"""Progress: a line before long stages, plain lines without a terminal, a bar on a terminal."""

from __future__ import annotations

import io
from itertools import count
from typing import Any

import pytest
from rich.console import Console

from kd.reporting import console as progress
from kd.reporting.console import StageProgress
from tests.test_stage import TRAIN, stage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that the test sets."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def watched(epochs: int, samples: int, augment: str = "crop_flip") -> StageProgress:
    train = type(TRAIN)(**{**TRAIN.model_dump(), "epochs": epochs})
    planned = stage(train=train)
    dataset = planned.dataset.model_copy(update={"augment": augment})
    return StageProgress(planned.model_copy(update={"dataset": dataset}), samples, lambda stage, row: None)


def row(epoch: int) -> dict[str, float | int | None]:
    return {"epoch": epoch, "loss": 0.5, "val_acc": 90.0}


def test_a_long_stage_is_announced(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with watched(epochs=100, samples=45_000) as watch:
        watch.guided(22_500)
        clock.now += 45  # the guide: 1,000 images/s
        watch.guided(22_500)
        for _ in range(40):
            clock.now += 0.1  # 1,280 images/s
            watch.stepped(128)
    said = " ".join(capsys.readouterr().out.split())
    # 100 · 45,000/1,280 s, and 45,000/1,000 s for each of the 75 views of 162 that an image has in 100 epochs: 1.9 h
    assert "student resnet8 s0: 100 epochs of 45,000 images" in said
    assert "train 1,280 images/s and the guide 1,000" in said
    assert "about 1.9 h" in said


def test_views_that_the_guide_has_seen_take_no_time(clock: Any) -> None:
    with watched(epochs=100, samples=100, augment="none") as watch:
        watch.guided(50)
        clock.now += 30
        watch.guided(50)
        clock.now += 10  # 10 images/s
        watch.stepped(100)
        watch.epoch_ended(row(1))
        assert watch._pace() == (2.5, pytest.approx(990))
        clock.now += 10
        watch.stepped(100)
        watch.epoch_ended(row(2))
        assert watch._pace() == (4, pytest.approx(980))


def test_a_short_stage_is_not(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with watched(epochs=10, samples=5000) as watch:
        for _ in range(40):
            clock.now += 0.1
            watch.stepped(128)
    assert capsys.readouterr().out == ""


def test_plain_lines_are_rare_and_the_last_epoch_is_always_told(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with watched(epochs=30, samples=100) as watch:
        for epoch in range(1, 31):
            clock.now += 1
            watch.stepped(100)
            watch.epoch_ended(row(epoch))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "student resnet8 s0  epoch 11/30  loss 0.5000  val 90.00 %  100 images/s  19 s left",
        "student resnet8 s0  epoch 22/30  loss 0.5000  val 90.00 %  100 images/s  8 s left",
        "student resnet8 s0  epoch 30/30  loss 0.5000  val 90.00 %  100 images/s",
    ]


def test_a_resumed_stage_counts_only_its_own_time(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[Any] = []
    train = type(TRAIN)(**{**TRAIN.model_dump(), "epochs": 4})
    with StageProgress(stage(train=train), 100, lambda stage, row: logged.append(row["epoch"])) as watch:
        watch.resumed([row(1), row(2)], 0)
        clock.now += 20
        watch.stepped(100)
        watch.epoch_ended(row(3))
    assert logged == [1, 2, 3]
    assert capsys.readouterr().out.endswith("epoch 3/4  loss 0.5000  val 90.00 %  5 images/s  20 s left\n")


def test_the_bar_on_a_terminal(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(progress, "console", lambda: screen)
    ticks = count()
    with watched(epochs=4, samples=200) as watch:
        for epoch in (1, 2):
            watch.guided(100)
            for _ in range(2):
                clock.now = next(ticks)
                watch.stepped(100)
            watch.epoch_ended(row(epoch))
        watch._bar.refresh()
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "student resnet8" in shown
    assert "epoch 3/4" in shown
    assert "val 90.00 %" in shown
    assert "left" in shown


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(("width", "told"), [(80, ("val 90.00 %", "left")), (160, ("loss 0.5000", "images/s", "left"))])
def test_the_bar_fits_the_terminal(
    clock: Any, monkeypatch: pytest.MonkeyPatch, width: int, told: tuple[str, ...]
) -> None:
    """Nothing is cut off: in a narrow terminal less is said."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "console", lambda: screen)
    lines = list[str]()
    with watched(epochs=240, samples=45_000) as watch:
        for epoch in range(1, 3):
            watch.guided(22_500)
            lines.append(watch._bar.tasks[0].fields["status"])
            clock.now += 100
            for _ in range(2):
                watch.stepped(22_500)
                clock.now += 1000
                lines.append(watch._bar.tasks[0].fields["status"])
            watch.epoch_ended(row(epoch) | {"test_acc": 71.25})
            lines.append(watch._bar.tasks[0].fields["status"])
    beside = len("student resnet8 s0") + 1 + (30 if width > 110 else 10) + 1
    assert max(map(len, lines)) <= width - beside
    assert all(part in lines[-1] for part in told), lines[-1]
    assert lines[0] == "epoch 1/240  logits of the guide: 50 %"
    assert any("logits of the guide" in line for line in lines[4:])
