"""What is checked before anything is trained: files of weights, networks, losses and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd.core.spec import KnownError
from kd.core.stage import Given, Source, Stage
from kd.datasets import LARGE
from kd.models import MODELS, LibraryEntry, own_size
from kd.reporting.console import duration
from kd.store.foreign import load_network
from kd.training.workplace import Workplace


def check_students(
    place: Workplace, students: Sequence[Stage], checkpoint: Path | None, *, networks: bool = True
) -> None:
    """Check the stages that the students' chains need and that are not in the store. Raises KnownError.

    Prints a line for each thing worth knowing: new classifiers, assistants larger than their guide, and the memory and
    time of stages with photographs. Without `networks`, only what a dry run can check quickly.
    """
    chain = [*{source.key: source for student in students for source in student.chain}.values()]
    missing = [source for source in chain if place.runtime.retrain or not place.store.whole(source.key)]
    for source in missing:
        if isinstance(source, Given) and checkpoint is not None:
            load_network(checkpoint, source, print)
    stages = [source for source in missing if isinstance(source, Stage)]
    _check_initial(stages, place)
    _check_batches(stages)
    if networks and missing:
        _check_networks(chain)
    for stage in _alike(stages):
        if stage.loss.needs - {"logits"}:
            _check_loss(stage)
    _check_cost(stages, place)


def _alike(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, one of those that differ in their seeds alone."""
    return [*{_likeness(stage): stage for stage in reversed(stages)}.values()][::-1]


def _likeness(stage: Stage) -> tuple[object, ...]:
    return stage.role, stage.model, stage.loss, tuple(guide.model for guide in stage.guides)


def _check_networks(chain: Sequence[Source]) -> None:
    """Build every network without memory, so that one that cannot take the images fails now and not after hours."""
    import torch

    from kd.models import build

    sizes: dict[str, int] = {}
    with torch.device("meta"):
        for source in chain:
            network = build(source.model, num_classes=source.dataset.num_classes, image_size=source.input_size)
            sizes[source.key] = sum(each.numel() for each in network.parameters())
    for stage in _alike([source for source in chain if isinstance(source, Stage)]):
        for guide in stage.guides:
            if not stage.loss.smaller_guide and sizes[stage.key] > sizes[guide.key]:
                told = f"{stage.model} ({sizes[stage.key]:,} parameters)", f"{guide.model} ({sizes[guide.key]:,})"
                print(f"{stage.role} {told[0]} is larger than its guide, {guide.role} {told[1]}", flush=True)


def _check_batches(stages: Sequence[Stage]) -> None:
    """Raise KnownError for a network whose BatchNorm cannot train on the smallest share of a batch: a single image.

    Maps of one pixel then have one value in each channel, which has no deviation.
    """
    for stage in _alike(stages):
        needed = 2 * stage.train.ranks
        images = min(stage.train.batch_size, stage.dataset.train_images or stage.train.batch_size)
        if images >= needed or stage.freeze or not _sees_one_value(stage):
            continue
        shared = f", for {stage.train.ranks} ranks" if stage.train.ranks > 1 else ""
        few = f"train.batch_size={images}" if images == stage.train.batch_size else f"{images} training images"
        raise KnownError(
            f"{stage.role} {stage.model}: {few} leaves its BatchNorm one value a channel, from which it cannot learn: "
            f"it needs at least {needed} images a batch{shared}"
        )


def _sees_one_value(stage: Stage) -> bool:
    """Whether training the network on one image fails in a BatchNorm, found by trying, without memory."""
    import torch

    from kd.models import build

    size = stage.input_size
    with torch.device("meta"):
        network = build(stage.model, num_classes=stage.dataset.num_classes, image_size=size).train()
        try:
            network(torch.zeros(1, 3, size, size))
        except ValueError as error:  # torch's own check of BatchNorm
            return "more than 1 value per channel" in str(error)
    return False


def _check_initial(stages: Sequence[Stage], place: Workplace) -> None:
    """Read every file of initial weights. Say which classifier is new, and which network sees an unusual size.

    Say, too, which teacher of a library begins without any: most people want trained ones.
    """
    for stage in _alike(stages):
        if stage.role == "teacher" and stage.init is None and isinstance(MODELS[stage.model], LibraryEntry):
            trained = "teacher.init=pretrained or a file gives it trained ones"
            print(f"teacher {stage.model} begins with random weights: {trained}", flush=True)
    begun = [stage for stage in _alike(stages) if stage.init is not None]
    if not begun:
        return
    import torch

    from kd.training.step import load_initial

    for stage in begun:
        with torch.random.fork_rng(devices=[]):
            _, line = load_initial(stage, place.initial.get(str(stage.init)), print)
        if line is not None:
            print(f"{stage.role} {line}", flush=True)
        _say_size(stage)


def _say_size(stage: Stage) -> None:
    """A line for a network that a library made for images of another size: its weights may do much worse."""
    own, seen = own_size(stage.model), stage.input_size
    if own is not None and own != seen:
        key = {"student": "model.image_size", "teacher": "teacher.image_size"}.get(stage.role)
        hint = f"; {key}={own} resizes what it sees" if key else ""
        print(f"{stage.role} {stage.model} is made for {own}×{own} images, and sees {seen}×{seen}{hint}", flush=True)


def _check_loss(stage: Stage) -> None:
    """Build the stage's loss for untrained networks. Raises KnownError if one of them does not have what it reads."""
    import torch

    from kd.core.stage import LossContext
    from kd.models import build
    from kd.models.normalization import Normalized
    from kd.training.guide import learner

    data, classes, found = stage.dataset, torch.arange(stage.dataset.num_classes), []
    with torch.random.fork_rng(devices=[]):
        try:
            for source in (stage, *stage.guides):
                network = build(source.model, num_classes=data.num_classes, image_size=source.input_size)
                found.append(learner(Normalized.of(network, source.normalize), stage.loss.needs, data.image_size))
            for guide in found[1:]:
                stage.loss.build(LossContext(found[0], guide, classes, classes))
        except KnownError as error:
            loss = stage.loss.option or stage.loss.name
            raise KnownError(f"{stage.role} {stage.model}: loss={loss}: {error}") from error


def _check_cost(stages: Sequence[Stage], place: Workplace) -> None:
    """Say what stages with photographs cost. Raises KnownError if one does not fit into the memory."""
    large = [stage for stage in stages if stage.dataset.image_size > LARGE and stage.dataset.images]
    if not large:
        return
    from kd.training.forecast import forecasts

    kinds, total = _alike(large), 0.0
    for each in forecasts(kinds, place.device):
        stage, number = each.stage, sum(_likeness(stage) == _likeness(each.stage) for stage in large)
        total += number * each.seconds
        twins = sum((other.role, other.model) == (stage.role, stage.model) for other in kinds)
        alone = " alone" if twins > 1 and not stage.guides else ""
        seeds = f", for each of {number} seeds" if number > 1 else ""
        print(f"{stage.role} {stage.model}{alone}: {each}{seeds}", flush=True)
    if len(large) > 1:
        print(f"about {duration(total)} in all, without validation, test and reading the photographs", flush=True)
