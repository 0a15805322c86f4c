"""Evidence that a guide teaches: what is measured in every epoch, and the lines that say what looks wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from kd.core.stage import Outputs, Stage
from kd.core.statistics import near_chance, trim
from kd.store import Metrics

_LEAST, _MOST = 0.01, 0.999  # shares of the gradient beyond which one side hardly counts
_CLEARLY = 1.0  # points of accuracy by which a guide is worse than its student: less is a few images near 100 %


def guide_share(parts: Mapping[str, Tensor], label_weight: float, net: Outputs) -> float | None:
    """The guide's share of the loss's gradient: ‖g‖ / (‖g‖ + ‖h‖), between 0 and 1.

    g is the gradient of what the guide adds to the loss, and h that of the labels' cross-entropy, with its weight. Both
    are with respect to what the loss reads of the network: its logits, and features if the loss reads these. The
    network itself is not passed. None if the loss has no part `ce`, or if neither has a gradient.
    """
    if "ce" not in parts:
        return None
    read = [tensor for tensor in net.tensors.values() if tensor.requires_grad]
    whole, labels = (_gradient(parts[name], read) for name in ("loss", "ce"))
    labels = label_weight * labels
    of_guide, of_labels = vector_norm(whole - labels).item(), vector_norm(labels).item()
    total = of_guide + of_labels
    # A difference of rounding errors is no gradient.
    return None if total == 0 else 0.0 if of_guide < 1e-6 * of_labels else trim(of_guide / total)


def _gradient(part: Tensor, read: Sequence[Tensor]) -> Tensor:
    """The gradient of a part with respect to what the loss reads, as one vector."""
    if not part.requires_grad:
        return torch.zeros(1, device=part.device)
    found = torch.autograd.grad(part, read, retain_graph=True, allow_unused=True)
    pairs = zip(found, read, strict=True)
    return torch.cat([(torch.zeros_like(each) if gradient is None else gradient).flatten() for gradient, each in pairs])


def hits(said: Outputs, labels: Tensor, classifier: Callable[[], nn.Module | None]) -> Tensor | None:
    """Whether a guide knew the label [sample]; None if it said neither logits nor what its classifier takes.

    `classifier` gives its last layer on the labels' device. It is asked only if the guide said no logits: a network may
    have two last layers, and losses on logits do not need one.
    """
    if "logits" in said.tensors:
        return said.logits.argmax(1) == labels
    layer = classifier() if "pooled" in said.tensors else None
    if isinstance(layer, nn.Linear):
        rows = said.pooled
    elif isinstance(layer, nn.Conv2d) and layer.in_channels == said.pooled.shape[1]:
        rows = said.pooled[:, :, None, None]  # a 1×1 convolution behind the pooling
    else:
        return None
    with torch.no_grad():
        logits: Tensor = layer(rows.to(layer.weight.dtype))
    return logits.flatten(1).argmax(1) == labels


class Alarm(NamedTuple):
    """Something that looks wrong: its kind, said once for a stage, and a line."""

    kind: str
    text: str


def alarms(stage: Stage, history: Sequence[Metrics]) -> Iterator[Alarm]:
    """What looks wrong after the last epoch of a history; nothing for a stage without guides."""
    if not stage.guides:
        return
    row, who, guides = history[-1], f"{stage.role} {stage.model}", _called(stage)
    share, accuracy, own = row.get("guide_share"), row.get("guide_acc"), row.get("train_acc")
    taught = not stage.loss.smaller_guide
    if share is not None:
        yield from _about_share(stage, row, taught)
    term, before = _term(stage, row), _term(stage, history[-2]) if len(history) > 1 else None
    if term is not None and term == before and share != 0:  # a term without a gradient does not change either
        yield Alarm("constant", f"{who}: the loss term of {guides} was {term:g} in two epochs: it does not change")
    if not taught or accuracy is None:
        return
    worst = guides if len(stage.guides) == 1 else f"the worst of {guides}"
    if near_chance(accuracy, stage.dataset.num_classes):
        text = f"{who}: {worst} classifies {accuracy:.2f} % of the training views correctly: near chance"
        yield Alarm("chance", text)
    elif own is not None and own > accuracy + _CLEARLY:
        text = f"{who} classifies {own:.2f} % of the training views correctly, and {worst} {accuracy:.2f} %"
        yield Alarm("worse", f"{text}: the guide is worse than its student")


def _called(stage: Stage) -> str:
    """A stage's guides in a sentence."""
    return f"its guide{'s' if len(stage.guides) > 1 else ''} {' and '.join(guide.model for guide in stage.guides)}"


def _about_share(stage: Stage, row: Metrics, taught: bool) -> Iterator[Alarm]:
    share, one, loss = row["guide_share"], len(stage.guides) == 1, stage.loss.described
    who, makes = f"{stage.role} {stage.model}: {_called(stage)}", "makes" if one else "make"
    percent = f"{100 * share:.3g} %"
    if share == 0:
        teaches, term = ("teaches", "its term") if one else ("teach", "their term")
        yield Alarm("zero", f"{who} {teaches} nothing: {term} in the loss has no gradient ({loss})")
    elif share < _LEAST and taught and not _grows(stage, row):
        yield Alarm("small", f"{who} {makes} only {percent} of the gradient ({loss})")
    elif share > _MOST and stage.loss.label_weight:
        yield Alarm("large", f"{who} {makes} {percent} of the gradient: the labels hardly count ({loss})")


def _grows(stage: Stage, row: Metrics) -> bool:
    """Whether the weight of the guide's term is still below its full value in this epoch, because the loss warms up."""
    return stage.loss.ramp(int(row["epoch"]) - 1) < 1


def _term(stage: Stage, row: Metrics) -> float | None:
    """What the guide added to the loss, a mean over an epoch."""
    loss, ce = row.get("loss"), row.get("ce")
    return None if loss is None or ce is None else round(loss - stage.loss.label_weight * ce, 6)
