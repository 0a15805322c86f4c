"""Names that people can read: of a run, of its stages' curves, and of the multirun that it belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kd.losses import Distill, TeachableTeacher
from kd.stage import Source, Stage


def run_name(students: Sequence[Stage]) -> str:
    """A run's chain, student first, what its losses are set to, and its seeds.

    `resnet8 ← resnet20 ← resnet110 · T5 λ0.5 · s31`; w is the weight of a trained teacher's divergence.
    """
    student = students[0]
    networks = " ← ".join(source.model for source in reversed(student.chain))
    settings = [f"T{student.loss.T:g} λ{student.loss.lam:g}"] if isinstance(student.loss, Distill) else []
    losses = [source.loss for source in student.chain if isinstance(source, Stage)]
    settings += [f"w{loss.weight:g}" for loss in losses if isinstance(loss, TeachableTeacher)]
    seeds = f"s{student.seed}" + (f"–{students[-1].seed}" if len(students) > 1 else "")
    return " · ".join(part for part in (networks, " ".join(settings), seeds) if part)


def group_of(folder: Path) -> str:
    """A multirun's name: that of its folder, after the date where the folder's parent is one."""
    parent, name = folder.absolute().parts[-2:]
    return f"{parent} {name}" if re.fullmatch(r"\d{4}-\d\d-\d\d", parent) else name


def axes(sources: Sequence[Source]) -> dict[str, str]:
    """A name for each stage's key, unique in the run: its role, with network, seed or key only where needed."""
    unique = {source.key: source for source in sources}
    names = {key: _candidates(source) for key, source in unique.items()}
    taken = Counter(name for candidates in names.values() for name in candidates)
    return {key: next(name for name in candidates if taken[name] == 1) for key, candidates in names.items()}


def _candidates(source: Source) -> list[str]:
    role = source.role
    seed = [f"{role}-s{source.seed}"] if isinstance(source, Stage) else []
    return [role, f"{role}-{source.model}", *seed, f"{role}-{source.key}"]
