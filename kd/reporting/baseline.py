"""A run beside its baseline: what teaching gives the student, with which certainty, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kd.core.statistics import paired, seeds_needed, told, trim
from kd.reporting.results import Baseline, Outcome, Replicate, ReplicatedResult, RunResult, whose_seeds


def compare_alone(chains: Sequence[Sequence[Outcome]], alone: Sequence[Outcome]) -> Baseline:
    """Compare students that are taught, each the last of its chain, with the same students alone, seed by seed."""
    pairs = [(chain[-1].test_acc, single.test_acc) for chain, single in zip(chains, alone, strict=True)]
    values, others = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    certainty: dict[str, Any] = {"difference": trim(values[0] - others[0])}
    if len(pairs) > 1:
        known = paired(values, others)
        certainty = {**known.model_dump(include={"std", "ci95", "p"}), "seeds_needed": seeds_needed(known)}
        certainty["difference"] = known.mean
    return Baseline(
        student=alone[0],
        replicates=tuple(Replicate.of([each]) for each in alone),
        test_acc=trim(sum(others) / len(others)),
        seconds=_seconds(alone),
        taught_seconds=_seconds([outcome for chain in chains for outcome in chain]),
        **certainty,
    )


def _seconds(outcomes: Sequence[Outcome]) -> float:
    """Seconds of training; a stage that several students share counts once, and given weights do not count."""
    trained = {outcome.key: outcome.seconds for outcome in outcomes if outcome.loss is not None}
    return round(sum(trained.values()), 3)


def baseline_lines(result: RunResult) -> Iterator[str]:
    """What a run says of its baseline; nothing if it has none."""
    baseline = result.baseline
    if baseline is None:
        return
    taught, alone = ([each.test_acc for each in group] for group in (result.students, baseline.replicates))
    if len(alone) > 1:
        each = ", ".join(f"{accuracy:.2f}" for accuracy in alone)
        yield f"{len(alone)} students alone, at the same seeds: test {each}, mean {baseline.test_acc:.2f} %"
    whose = whose_seeds(result.varied) if isinstance(result, ReplicatedResult) else ""
    interval = ", 95 % interval" if baseline.p is not None else ""
    more = "" if len(alone) > 1 else "; replicates=3 gives an interval"
    yield f"difference to the student alone in test accuracy{interval}: {told(taught, alone, whose)}{more}"
    if baseline.p is not None and baseline.difference:
        seeds = "more than 10,000" if baseline.seeds_needed is None else f"{baseline.seeds_needed:,}"
        yield f"a paired t-test at 5 % finds an effect of this size with {seeds} seeds (power 80 %)"
    yield f"training took {baseline.taught_seconds:.0f} s with the chain, {baseline.seconds:.0f} s alone"
