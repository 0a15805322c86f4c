"""Statistics over seeds: means, intervals, paired differences, and how many seeds a difference needs."""

from collections.abc import Sequence
from math import sqrt

from kd.core.spec import Frozen

_LEVEL, _POWER = 0.05, 0.8  # of a planned test: how often it may find a difference that is none, and should find one
_MOST = 10_000  # seeds; more are not counted
_SLIGHT = 0.2  # of the way from chance to 100 %
_TIMES = 5  # chance


class Spread(Frozen):
    """Mean, standard deviation (divisor n − 1) and 95 % interval of the mean (Student's t)."""

    mean: float
    std: float
    n: int
    ci95: tuple[float, float]


class Paired(Spread):
    """Paired differences over the same seeds. `p` is two-sided, of a paired t-test that their mean is zero."""

    p: float | None  # null if all differences are equal: then no test is possible

    @property
    def told_apart(self) -> bool:
        """Whether the interval excludes zero; False if all differences are equal."""
        low, high = self.ci95
        return self.p is not None and (low > 0 or high < 0)


def trim(value: float) -> float:
    """A number as records keep it, without the noise of floating point. It is rounded once, where it is printed."""
    return round(value, 10)


def near_chance(accuracy: float, classes: int) -> bool:
    """Whether an accuracy in percent is at most a fifth of the way from chance to 100 %, and at most five times chance.

    A network that knows a share k of the images and guesses the rest is right for chance + k · (100 − chance). On
    balanced classes k is Cohen's kappa, and up to 0.2 it is "slight" (Landis & Koch, Biometrics 1977). Of many classes
    that is far above chance, so a multiple of it is a second limit. The bar is 60 % for 2 classes, 28 % for 10, 5 % for
    100 and 0.5 % for 1,000.
    """
    chance = 100 / classes
    return accuracy <= min(chance + _SLIGHT * (100 - chance), _TIMES * chance)


def spread(values: Sequence[float]) -> Spread:
    """The spread of two or more values. Raises ValueError for fewer."""
    n = len(values)
    if n < 2:
        raise ValueError(f"a spread needs two values or more (got {n})")
    from scipy.special import stdtrit

    mean = sum(values) / n
    std = sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * std / sqrt(n)
    return Spread(mean=trim(mean), std=trim(std), n=n, ci95=(trim(mean - half), trim(mean + half)))


def paired(values: Sequence[float], others: Sequence[float]) -> Paired:
    """Each value minus its counterpart in `others`. Raises ValueError for fewer than two pairs or unequal lengths."""
    known = spread([a - b for a, b in zip(values, others, strict=True)])
    # Stages of before have accuracies of four digits, so equal differences may differ by one in the last digit.
    if len({round(a - b, 3) for a, b in zip(values, others, strict=True)}) == 1:
        return Paired(mean=known.mean, std=0, n=known.n, ci95=(known.mean, known.mean), p=None)
    from scipy.special import stdtr

    p = 2 * float(stdtr(known.n - 1, -abs(known.mean) * sqrt(known.n) / known.std))
    return Paired(**known.model_dump(), p=p)


def told(values: Sequence[float], others: Sequence[float], whose: str = "") -> str:
    """The paired difference in words: "+1.39 (-0.44 to +3.21) over 3 seeds", and `whose` seeds.

    Raises ValueError for unequal lengths.
    """
    if len(values) == len(others) == 1:
        return f"{values[0] - others[0]:+.2f}, one seed"
    known = paired(values, others)
    seeds = f"{known.n} seeds {whose}".rstrip()
    if known.p is None:
        return f"{known.mean:+.2f} at every seed, {seeds}"
    low, high = known.ci95
    return f"{known.mean:+.2f} ({low:+.2f} to {high:+.2f}) over {seeds}"


def seeds_needed(difference: Paired) -> int | None:
    """The seeds with which a two-sided paired t-test at 5 % finds such a difference with a power of 80 %.

    It takes the mean and the deviation of these differences as the true ones. None if they have no deviation or no
    mean, and beyond 10,000.
    """
    if difference.p is None or difference.mean == 0:
        return None
    effect = abs(difference.mean) / difference.std
    return next((n for n in range(2, _MOST + 1) if _power(effect, n) >= _POWER), None)


def _power(effect: float, n: int) -> float:
    """How often the test with n pairs finds an effect, in standard deviations: by the noncentral t distribution."""
    from scipy.special import nctdtr, stdtrit

    return 1 - float(nctdtr(n - 1, effect * sqrt(n), stdtrit(n - 1, 1 - _LEVEL / 2)))
