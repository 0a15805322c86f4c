"""`range(start, stop, step)` of a grid by decimal arithmetic: Hydra adds rounding errors up."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_CEILING, Decimal
from typing import Any

from hydra.core.override_parser.types import Override, RangeSweep


def exact(override: Override) -> str:
    """An override whose value is a range, with the range's values in its place if they are no whole numbers."""
    span: Any = override.value()
    if isinstance(span.range(), range):
        return str(override.input_line)
    values = ",".join(map(str, _decimals(span)))
    return f"{override.get_key_element()}={'shuffle' if span.shuffle else 'choice'}({values})"


def _decimals(span: RangeSweep) -> Iterator[float]:
    """The values of a range, by decimal arithmetic on what is typed."""
    start, step = Decimal(str(span.start)), Decimal(str(span.step))
    yield from (float(start + step * number) for number in range(length_of(span)))


def length_of(span: RangeSweep) -> int:
    """How many values a range has; 0 for one that never ends."""
    start, stop, step = (Decimal(str(each)) for each in (span.start, span.stop, span.step))
    if not step or not all(each.is_finite() for each in (start, stop, step)):
        return 0
    return max(0, int(((stop - start) / step).to_integral_value(ROUND_CEILING)))
