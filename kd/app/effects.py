"""What a run says before it begins: overrides without effect, and choices that the images or the epochs decide.

One rule for what is typed: a key that the chosen method, loss, optimiser or schedule does not read changes nothing, and
a line says so. So one sweep may have methods and losses with different keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kd.app.config import Config, chain, for_photos, idle, trained_networks
from kd.app.parsing import foreign
from kd.core.settings import TrainSpec
from kd.core.stage import VIEWS, DatasetSpec, Stage
from kd.datasets import DATASETS, LARGE
from kd.losses import CrossEntropy
from kd.methods.method import Link


def remarks(
    config: Config, dataset: DatasetSpec, student: Stage, given: Mapping[str, str], *, multirun: bool
) -> Iterator[str]:
    """All lines, each once. `given` has the keys that are typed, with the texts of their values."""
    lines = (choices(config, dataset, given), Effects(config, student, given, multirun).lines(), still_growing(student))
    yield from dict.fromkeys(line for each in lines for line in each)


@dataclass(frozen=True)
class Effects:
    """What is typed for a run, and what its student's chain reads of it."""

    config: Config
    student: Stage
    given: Mapping[str, str]
    multirun: bool

    def lines(self) -> Iterator[str]:
        """A line for each key, or group of keys, that is typed and has no effect."""
        yield from self._of_other_options()
        yield from self._of_losses()
        yield from self._of_assistants()
        yield from self._of_the_teacher()
        yield from self._of_training()
        yield from self._of_students()
        yield from self._of_sweeps()
        yield from self._of_tracking()

    @property
    def _links(self) -> list[Link]:
        return chain(self.config)

    @property
    def _method(self) -> str:
        return f"method={self.config.method.name}"

    def _named(self, key: str) -> str:
        """What was typed of a group: its option, or else the first of its keys."""
        for name in (key, f"loss@{key}"):
            if name in self.given:
                return f"{key}={self.given[name]}"
        return next(each for each in self.given if each.startswith(f"{key}."))

    def _of_other_options(self) -> Iterator[str]:
        names = {"method": self.config.method.name}
        names |= {"loss": self.config.loss.name, "assistant_loss": self.config.assistant_loss.name}
        options = names | {"loss": self.config.loss.option, "assistant_loss": self.config.assistant_loss.option}
        for key in foreign({section: {"name": name} for section, name in names.items()}, self.given):
            section = key.partition(".")[0]
            yield f"{key} has no effect: {section}={options[section]} does not read it"

    def _of_losses(self) -> Iterator[str]:
        learning: dict[str, Link] = {link.role: link for link in self._links}  # assistants learn by the same loss
        for key, role, section, choice in (
            ("loss", "student", "method", self.config.loss),
            ("assistant_loss", "assistant", "method.assistant", self.config.assistant_loss),
        ):
            link, called = learning.get(role), f"{key}={choice.option}"
            if link is None:
                if _is_set(key, self.given):
                    yield f"{called} has no effect: {self._method} has no {role}"
            elif link.loss.name != choice.name:
                if _is_set(key, self.given):
                    yield f"{called} has no effect: it needs a guide, and {self._method} gives the {role} none"
            else:
                yield from (
                    f"{section}.{name} has no effect: {called} does not read it"
                    for name in ("T", "lambda")
                    if f"{section}.{name}" in self.given and not choice.reads(name)
                )
                if choice.reads("lambda") and f"{section}.T" in self.given and link.loss.guided and _weight(link) == 0:
                    yield f"{section}.T changes nothing of the {role}'s training but its key: {section}.lambda=0"
                if link is not self._links[0] and not link.loss.guided:
                    yield f"{called} needs no guide: no network teaches the {role}"

    def _of_assistants(self) -> Iterator[str]:
        if hasattr(self.config.method, "assistant") and not any(link.role == "assistant" for link in self._links):
            for key in self.given:
                if key.startswith("method.assistant."):
                    yield f"{key} has no effect: {self._method} has no assistant"

    def _of_the_teacher(self) -> Iterator[str]:
        teachers = [link.model for link in self._links if link.role == "teacher"]
        if not _is_set("teacher", self.given):
            return
        if not teachers:
            yield f"{self._named('teacher')} has no effect: {self._method} has no teacher"
        elif self.config.teacher.name not in teachers:
            for key in (
                "teacher",
                "teacher.arch",
                "teacher.args",
                "teacher.init",
                "teacher.freeze",
                "teacher.image_size",
            ):
                if key in self.given:
                    yield f"{key}={self.given[key]} has no effect: the teachers are {', '.join(teachers)}"

    def _of_training(self) -> Iterator[str]:
        """Training settings that no network of their scope reads."""
        stages = [stage for stage in self.student.chain if isinstance(stage, Stage)]
        for section, role in (("train", None), ("model.train", "student"), ("teacher.train", "teacher")):
            scope = [stage for stage in stages if role in (None, stage.role)]
            for name in TrainSpec.model_fields:
                if f"{section}.{name}" in self.given and self.given[f"{section}.{name}"] != "null" and scope:
                    reasons = [self._idle(name, stage, role is None) for stage in scope]
                    if all(reasons):
                        yield f"{section}.{name} has no effect: {reasons[-1]}"

    def _of_students(self) -> Iterator[str]:
        """What vary and baseline would change, if there were more students or networks."""
        if self.config.vary == "chain" and self.config.replicates == 1:
            yield "vary=chain has no effect: replicates=1 has one student"
        elif self.config.vary == "chain" and len(trained_networks(self.config)) == 1:
            yield f"vary=chain has no effect: {self._method}, and no network but the student is trained"
        if self.config.baseline and not self._links[-1].loss.guided:
            yield f"baseline=true has no effect: {self._method}, and no network teaches the student"

    def _of_sweeps(self) -> Iterator[str]:
        if self.config.runtime.trial is None:
            for key in ("sweep.join", "sweep.prune"):
                if self.given.get(key, "false").lower() != "false":
                    yield f"{key} has no effect: this run is not a trial of a search"
        of_sweeps = r"sweep\.objective|runtime\.(tables|live)|hydra[/.](launcher|sweeper|sweep)\b.*"
        for key in self.given:
            if self.multirun and key == "hydra.run.dir":
                yield f"{key} has no effect: the folder of a multirun is hydra.sweep.dir"
            elif not self.multirun and re.fullmatch(of_sweeps, key):
                yield f"{key} has no effect: this is a single run, without -m"

    def _of_tracking(self) -> Iterator[str]:
        if self.config.tracking.name != "wandb":
            for key in self.given:
                if key.startswith("tracking.") and key != "tracking.name" and self.given[key] != "null":
                    yield f"{key} has no effect: tracking={self.config.tracking.name} does not read it"

    def _idle(self, name: str, stage: Stage, shared: bool) -> str | None:
        """Why a stage does not read a training setting, if it does not; `shared` is for all stages of the chain."""
        own: dict[str, Any] = {"student": self.config.model.train, "teacher": self.config.teacher.train}
        section = {"student": "model.train", "teacher": "teacher.train"}.get(stage.role)
        if shared and section and getattr(own[stage.role], name) is not None:
            return f"{section}.{name} takes its place"
        if name == "label_smoothing":
            own_links = [link for link in self._links if (link.role, link.model) == (stage.role, stage.model)]
            alone = any(link.loss == CrossEntropy() for link in own_links)
            return None if alone else f"{stage.role} {stage.model} does not learn from labels alone"
        why = idle(stage.train.model_dump())
        return f"{why[name]} does not read it" if name in why else None


def _weight(link: Link) -> float | None:
    weight: float | None = getattr(link.loss, "lam", None)
    return weight


def still_growing(student: Stage) -> Iterator[str]:
    """A line for each loss whose weight grows until its network's training ends."""
    keys = {"student": "loss", "assistant": "assistant_loss"}
    for stage in student.chain:
        if isinstance(stage, Stage) and stage.role in keys and (grows := stage.loss.growth):
            key, epochs, growing = keys[stage.role], stage.train.epochs, getattr(stage.loss, grows)
            if epochs <= growing:
                called, values = stage.loss.option or stage.loss.name, f"{key}.{grows}={growing}, train.epochs={epochs}"
                yield f"{key}={called}: its weight grows until training ends: {values}"


def choices(config: Config, dataset: DatasetSpec, given: Collection[str]) -> Iterator[str]:
    """A line for each choice that the images decide, and for what names no network or another data set."""
    ends = ("student", config.model.name), ("teacher", config.teacher.name)
    networks = {link.model for link in chain(config) if (link.role, link.model) not in ends}
    for key, named in (("init", config.init), ("freeze", config.freeze)):
        for other in sorted({*named} - networks):
            yield (
                f"{key}={other} has no effect: no network between the ends of the chain has this name "
                f"(the ends have model.{key} and teacher.{key})"
            )
    if "dataset.views" in given and dataset.views is not None and dataset.views >= VIEWS[dataset.augment]:
        all_of_them = f"augment={dataset.augment} has {VIEWS[dataset.augment]} in all"
        yield f"dataset.views={dataset.views} changes no image, but the keys of the stages: {all_of_them}"
    if "dataset.split_seed" in given and dataset.val_fraction == 0 and dataset.views is None:
        yield "dataset.split_seed changes no split, but the keys of the stages: no images are split off for validation"
    own = [key for key in ("init", "freeze", "image_size") if getattr(config.model, key) is not None]
    if own and ("reference", config.model.name) in {(link.role, link.model) for link in chain(config)}:
        alone = ", ".join(f"model.{key}" for key in own)
        yield f"the reference {config.model.name} is trained without what is for the student alone: {alone}"
    recipe = config.train.recipe
    if recipe in DATASETS and recipe != dataset.name and "train" not in given and "train.recipe" not in given:
        yield f"recipe train={recipe}, not that of dataset={dataset.name}, which is train={dataset.name}"
    if config.train.recipe == "folder":
        photos = for_photos("folder", dataset.image_size)
        name, why = (photos, "are larger than") if photos else ("cifar10", "are not larger than")
        yield f"recipe train={name}, because the images {why} {LARGE} pixels; train=<name> takes another"


def _is_set(key: str, given: Collection[str]) -> bool:
    return any(each in (key, f"loss@{key}") or each.startswith(f"{key}.") for each in given)
