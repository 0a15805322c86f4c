"""Statistics against scipy's."""

import json
import re

import pytest
import torch
from scipy import stats
from torch import nn

from kd.core.statistics import near_chance, paired, spread, told
from kd.training.step import evaluate
from tests.conftest import ROOT

ONES, OTHERS = [70.1, 71.4, 69.9, 72.3], [69.0, 70.9, 69.8, 70.2]


@pytest.mark.parametrize(
    ("classes", "near", "above"),
    [
        (2, (50, 60), (60.5, 75)),  # with 20 images, a guess has 60 % or more in one case of four
        (10, (10, 24.72, 28), (28.1, 60)),
        (100, (1, 3, 5), (5.1, 20)),
        (1000, (0.1, 0.5), (0.6, 15)),
    ],
)
def test_near_chance(classes: int, near: tuple[float, ...], above: tuple[float, ...]) -> None:
    assert all(near_chance(accuracy, classes) for accuracy in near)
    assert not any(near_chance(accuracy, classes) for accuracy in above)


def test_spread() -> None:
    found = spread(ONES)
    low, high = stats.t.interval(0.95, 3, sum(ONES) / 4, stats.sem(ONES))
    assert found.ci95 == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    with pytest.raises(ValueError, match="two values or more"):
        spread([1.0])


def test_paired_is_the_paired_t_test() -> None:
    found, known = paired(ONES, OTHERS), stats.ttest_rel(ONES, OTHERS)
    interval = known.confidence_interval(0.95)
    assert found.mean == pytest.approx(0.95)
    assert found.p == pytest.approx(known.pvalue, abs=1e-6)
    assert found.ci95 == (pytest.approx(interval.low, abs=1e-4), pytest.approx(interval.high, abs=1e-4))
    assert not found.told_apart
    assert paired(OTHERS, ONES).mean == -found.mean


def test_the_interval_and_the_test_agree() -> None:
    apart = paired(ONES, [value - 1 - 0.1 * value % 0.2 for value in ONES])
    assert apart.told_apart
    assert apart.p is not None
    assert apart.p < 0.05


def test_equal_differences_allow_no_test() -> None:
    found = paired([91.1111, 90.5556], [90.0, 89.4444])  # of 360 images, four more each time
    assert (found.mean, found.std, found.p, found.told_apart) == (1.11115, 0, None, False)


def test_pairs_are_pairs() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        paired([1.0, 2.0], [1.0])


# rounded once ------------------------------------------------------------------------------------------------------


def test_an_interval_is_rounded_once() -> None:
    """By hand: 69.26667 − 4.30265 · 0.64073 / √3 = 67.675008, which was 67.675 and then 67.67."""
    low, high = spread([69.98, 69.08, 68.74]).ci95
    assert (f"{low:.2f}", f"{high:.2f}") == ("67.68", "70.86")


def test_a_mean_and_a_difference_are_rounded_once() -> None:
    """The exact means are 80.374993 and 0.274997: with four and three digits they were 80.38 and 0.28."""
    values, others = [80.0, 80.37498, 80.75], [79.725, 80.09999, 80.475]
    assert f"{spread(values).mean:.2f}" == "80.37"
    assert told(values, others).startswith("+0.27 at every seed")
    assert f"{paired(values, others).mean:.2f}" == "0.27"


def test_an_accuracy_is_rounded_once() -> None:
    """50 of 101 are 49.50495 %, which was 49.505 and then 49.51."""
    hits = torch.arange(101) < 50
    logits = torch.stack([hits, ~hits], 1).float()
    found = evaluate(nn.Identity(), [logits], torch.zeros(101, dtype=torch.long), "fp32")
    assert f"{found:.2f}" == "49.50"


def test_the_p_of_a_difference_is_not_rounded() -> None:
    assert paired([1.0, 2.0, 3.001], [0.0, 1.0, 2.0]).p == pytest.approx(
        stats.ttest_rel([1.0, 2.0, 3.001], [0.0, 1.0, 2.0]).pvalue, rel=1e-3
    )


@pytest.mark.parametrize("name", ["takd_plain_cifar10", "teachers_cifar10", "losses_cifar10"])
def test_the_pages_of_results_say_what_their_recorded_accuracies_give(name: str) -> None:
    """Each row of each table: mean, deviation, interval and difference, computed from the accuracies of its stages."""
    report = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    lines = (ROOT / "results" / f"{name}.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if re.match(r"\| [^|]+ \|.* ± ", line)]
    found_cells = list[tuple[str, list[float], list[float]]]()
    for row in (row for table in report["tables"] for row in table["rows"]):
        accuracies = {
            cell["label"]: [report["stages"][draw["chain"][-1]]["test_acc"] for draw in cell["draws"]]
            for cell in row["cells"]
        }
        found_cells += [(label, values, accuracies[row["baseline"]]) for label, values in accuracies.items()]
    assert len(lines) == len(found_cells) > 2
    for line, (label, values, base) in zip(lines, found_cells, strict=True):
        found = spread(values)
        assert line.startswith(f"| {label} |")
        assert f"| {found.mean:.2f} ± {found.std:.2f} | {found.ci95[0]:.2f} to {found.ci95[1]:.2f} |" in line
        if values != base:
            known = paired(values, base)
            assert f"{known.mean:+.2f}, {known.ci95[0]:+.2f} to {known.ci95[1]:+.2f}, p " in line
