"""The search space: what Hydra's sweeper will draw from, and which trials have its keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution

from kd.app.parsing import SECTIONS
from kd.core.spec import KnownError

_NONE = object()  # what no key has


def distributions(space: Mapping[str, str]) -> dict[str, Any]:
    """What the sweeper draws from, by parameter; a text for one that has a single value.

    Raises KnownError with a line for each parameter of which the sweeper would draw nothing.
    """
    found, problems, parser = dict[str, Any](), list[str](), OverridesParser.create()
    for name, values in space.items():
        try:
            override = parser.parse_override(f"{name}={values}")
        except HydraException:
            problems.append(f"{name}: {values} cannot be read")
            continue
        try:
            if problem := _wrong_ends(override):
                raise ValueError(problem)
            found[name] = create_optuna_distribution_from_override(override)
        except (ValueError, AssertionError, NotImplementedError) as error:
            problems.append(f"{name}: {values} cannot be searched; {str(error).splitlines()[0]}")
    if problems:
        raise KnownError("\n".join(problems))
    return found


def _wrong_ends(override: Override) -> str:
    """What would be right instead of an interval or a range that holds nothing; empty if it is right."""
    span = override.value()
    if not isinstance(span, (IntervalSweep, RangeSweep)) or span.start is None:
        return ""
    start, end = span.start, span.end if isinstance(span, IntervalSweep) else span.stop
    if end is None or not (math.isfinite(start) and math.isfinite(end)):
        return "both ends should be finite numbers"
    if isinstance(span, RangeSweep) and span.shuffle:  # a choice among its values
        return ""
    if start > end:
        ends = f"{end:.12g},{start:.12g}"
        right = f"interval({ends})" if isinstance(span, IntervalSweep) else f"range({ends},{abs(span.step):.12g})"
        return f"the smaller end is first: {right}"
    log = isinstance(span, IntervalSweep) and "log" in span.tags
    return "a log scale begins above 0" if log and start <= 0 else ""


def as_overrides(
    space: Mapping[str, str], named: Collection[str], compose: Callable[..., DictConfig]
) -> dict[str, str]:
    """The parameters' names as the sweeper has to give them to a trial: with ++ where some trials lack the key.

    Those are trials of a group that is searched too, as `loss.beta` beside `loss=kd,dkd`. `named` are parameters with
    keys that a user names, such as `model.args.drop`. `compose` gives a trial's configuration, with Hydra's own part,
    by the overrides that are its own. Raises KnownError with a line for each parameter that no trial has.
    """
    drawn, compose = distributions(space), cache(compose)
    names, problems = dict[str, str](), list[str]()
    for name in space:
        if "." not in name:
            names[name] = name
            continue
        section = name.partition(".")[0]
        group = SECTIONS[section][0] if section in SECTIONS else section
        options = _options(drawn, group)
        trees = [compose(option) for option in options] or [compose()]
        has = [OmegaConf.select(tree, name, default=_NONE) is not _NONE for tree in trees]
        names[name] = name if all(has) else f"++{name}"
        if not (any(has) or (name in named and section not in SECTIONS)):
            chosen = options or [f"{group}={compose().hydra.runtime.choices.get(group)}"]
            lacks = "has no such key" if len(chosen) == 1 else "have no such key"
            problems.append(f"{name}: cannot be searched, {' and '.join(chosen)} {lacks}")
    if problems:
        raise KnownError("\n".join(problems))
    return names


def _options(drawn: Mapping[str, Any], group: str) -> list[str]:
    """The overrides that choose the options of a group, or the experiments, that are searched; empty if none are."""
    for name in (group, "experiment"):
        if isinstance(drawn.get(name), CategoricalDistribution):
            return [f"{name}={option}" for option in drawn[name].choices]
    return []
