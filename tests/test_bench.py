"""The benchmark runs; what it says is for quiet machines."""

from __future__ import annotations

import pytest

from bench import speed


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one processor
def test_a_round_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    work = {"kd plane4 → plane2": speed.Workload("plane2", "plane4", 1, 4)}
    monkeypatch.setattr(speed, "WORKLOADS", {**work, "scratch resnet8": speed.Workload("resnet8", None, 1, 2)})
    monkeypatch.setattr(speed, "matrix_peak", lambda dtype: 100.0)
    found = speed.summary(speed.measure(1))
    assert found["ratios"].keys() == {"kd plane4 → plane2", "scratch resnet8"}
    assert found["ratios"]["kd plane4 → plane2"].keys() == {"cold", "warm"}
    assert found["share_of_bf16_peak_resnet8"] > 0
