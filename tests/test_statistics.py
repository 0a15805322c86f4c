"""Statistics against scipy's."""

import pytest
from scipy import stats

from kd.core.statistics import paired, spread

ONES, OTHERS = [70.1, 71.4, 69.9, 72.3], [69.0, 70.9, 69.8, 70.2]


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
    assert (found.mean, found.p, found.told_apart) == (1.111, None, False)


def test_pairs_are_pairs() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        paired([1.0, 2.0], [1.0])
