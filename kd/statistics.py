"""What several seeds say together."""

from collections.abc import Sequence
from math import sqrt

from kd.spec import Frozen


class Spread(Frozen):
    """Mean, standard deviation (n − 1 in its divisor) and 95 % interval of the mean (Student's t)."""

    mean: float
    std: float
    n: int
    ci95: tuple[float, float]


def spread(values: Sequence[float]) -> Spread:
    """The spread of two or more values; ValueError for fewer, which have none."""
    n = len(values)
    if n < 2:
        raise ValueError(f"a spread needs two values or more (got {n})")
    from scipy.special import stdtrit

    mean = sum(values) / n
    std = sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * std / sqrt(n)
    return Spread(mean=round(mean, 4), std=round(std, 4), n=n, ci95=(round(mean - half, 4), round(mean + half, 4)))
