"""Measures of logits besides accuracy: fidelity to a guide, calibration, and confusion of guide and student."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.core.spec import Frozen
from kd.core.statistics import trim

Logits = NDArray[np.floating[Any]]  # [sample, class]
Labels = NDArray[np.integer[Any]]  # [sample]


class Fidelity(Frozen):
    """How closely a student follows its guide (Stanton et al. 2021, "Does knowledge distillation really work?")."""

    agreement: float  # how often both choose the same class, in percent
    kl: float  # KL(guide ‖ student) at T=1 in nats, the mean over images
    n: int  # images


class Bin(Frozen):
    """The images of one range of confidence; means in percent, null where there are none."""

    confidence: float | None
    accuracy: float | None
    count: int


class Calibration(Frozen):
    """How well confidence matches accuracy (Guo et al. 2017, "On calibration of modern neural networks", eq. 3)."""

    ece: float  # expected calibration error in percent
    bins: tuple[Bin, ...]  # of equal width: bin i of m holds confidences in (i/m, (i+1)/m]


class Confusion(Frozen):
    """The classes that guide and student choose, and which of the two is right, in percent of the images."""

    matrix: tuple[tuple[int, ...], ...]  # images by [guide's class, student's class]
    both_right: float
    guide_only: float
    student_only: float
    neither_right: float


def fidelity(student: Logits, guide: Logits) -> Fidelity:
    """The fidelity of a student to its guide, on the same images. Raises ValueError for logits that are not finite.

    If classes have equal logits, the first is chosen. The other measures do the same.
    """
    from scipy.special import log_softmax

    student, guide = _checked(student), _checked(guide)
    _same("guide's logits", guide.shape, student.shape)
    ours, theirs = log_softmax(student, axis=1), log_softmax(guide, axis=1)
    kl = (np.exp(theirs) * (theirs - ours)).sum(1).mean()
    same = student.argmax(1) == guide.argmax(1)
    return Fidelity(agreement=_percent(same), kl=trim(max(float(kl), 0.0)), n=len(student))


def calibration(logits: Logits, labels: Labels, bins: int = 15) -> Calibration:
    """The calibration of a network's largest probability for each image. Raises ValueError as fidelity()."""
    from scipy.special import softmax

    if bins < 1:
        raise ValueError(f"bins should be at least 1 (got {bins})")
    logits = _checked(logits)
    right = logits.argmax(1) == _checked_labels(labels, logits)
    confidence = softmax(logits, axis=1).max(1)
    which = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    members = [which == number for number in range(bins)]
    gaps = [abs(confidence[each].sum() - right[each].sum()) for each in members]
    return Calibration(
        ece=trim(100 * float(sum(gaps)) / len(logits)),
        bins=tuple(
            Bin(confidence=_percent(confidence[each]), accuracy=_percent(right[each]), count=int(each.sum()))
            if each.any()
            else Bin(confidence=None, accuracy=None, count=0)
            for each in members
        ),
    )


def confusion(*, guide: Logits, student: Logits, labels: Labels) -> Confusion:
    """The classes that guide and student choose for the same images. Raises ValueError as fidelity()."""
    guide, student = _checked(guide), _checked(student)
    _same("guide's logits", guide.shape, student.shape)
    labels = _checked_labels(labels, guide)
    theirs, ours = guide.argmax(1), student.argmax(1)
    matrix = np.zeros((guide.shape[1],) * 2, np.int64)
    np.add.at(matrix, (theirs, ours), 1)
    guided, learned = theirs == labels, ours == labels
    return Confusion(
        matrix=tuple(tuple(row) for row in matrix.tolist()),
        both_right=_percent(guided & learned),
        guide_only=_percent(guided & ~learned),
        student_only=_percent(~guided & learned),
        neither_right=_percent(~guided & ~learned),
    )


def _checked(logits: Logits) -> NDArray[np.float64]:
    checked = logits.astype(np.float64)
    if checked.ndim != 2 or checked.size == 0:
        raise ValueError(f"logits should be [sample, class] and not empty (got {list(checked.shape)})")
    if not np.isfinite(checked).all():
        raise ValueError("logits should be finite")
    return checked


def _checked_labels(labels: Labels, logits: Logits) -> Labels:
    _same("labels", labels.shape, logits.shape[:1])
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels should be below {logits.shape[1]} and not negative")
    return labels


def _same(what: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise ValueError(f"the {what} should be {list(wanted)} (got {list(got)})")


def _percent(values: NDArray[Any]) -> float:
    return trim(100 * float(values.mean()))
