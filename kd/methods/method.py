"""A method: its hyperparameters, and the chain of networks that it declares. It trains nothing."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from kd.core.spec import Frozen
from kd.core.stage import LossSpec, Need, Reduction, Role, Seed, Temperature
from kd.losses import LOSSES, CrossEntropy
from kd.models import NetworkName


class LossChoice(Frozen):
    """The `loss` section of a configuration: a name, and the fields of its spec that are set there.

    T, λ and reduction come from the method. A loss takes the T or λ that it declares without a default.
    """

    name: str
    fields: dict[str, Any] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, tree: Any) -> Any:
        """A section is flat: `{name: dkd, beta: 8}`."""
        if not isinstance(tree, dict) or "fields" in tree:
            return tree
        return {"name": tree.get("name"), "fields": {key: value for key, value in tree.items() if key != "name"}}

    @property
    def kind(self) -> type[LossSpec]:
        """The spec's class."""
        return LOSSES[self.name]

    @property
    def option(self) -> str:
        """What is chosen on the command line: `loss=kd` is the loss `distill`."""
        return self.kind.option or self.name

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss reads of its guide and network; empty: it needs no guide."""
        return self.kind.needs

    def reads(self, name: str) -> bool:
        """Whether the loss takes this setting from the method: `T`, `lambda`, `reduction`."""
        named = {field.serialization_alias or key: field for key, field in self.kind.model_fields.items()}
        return name in named and (named[name].is_required() or name == "reduction")

    def spec(self, **shared: Any) -> LossSpec:
        """The loss with the method's settings. Raises ValidationError for a value out of range, or an unknown field."""
        taken = {name: value for name, value in shared.items() if self.reads(name)}
        return self.kind.model_validate({**self.fields, **taken, "name": self.name})


DISTILL = LossChoice(name="distill", fields={})


@dataclass(frozen=True)
class Ends:
    """The networks and seeds at both ends of a chain, and how networks learn from their guides."""

    student: str
    teacher: str
    seed: int  # the student's
    teacher_seed: int
    loss: LossChoice = DISTILL  # the student's
    assistant_loss: LossChoice = DISTILL
    reduction: Reduction = "batchmean"  # of the KL of every distilled network


@dataclass(frozen=True)
class Link:
    """A network of a chain, its loss and its guides. A loss without a guide ignores them."""

    role: Role
    model: str
    loss: LossSpec
    seed: int
    replaceable: bool = False  # the weights of teacher.checkpoint may take its place
    guides: "tuple[Link, ...] | None" = None  # earlier links; None: the link before this one
    weights: tuple[float, ...] = ()  # of the guides, relative; empty: equal


class Method(Frozen, ABC):
    """Base of all methods. Its fields are the hyperparameters; `name` is its entry in METHODS."""

    name: str

    @abstractmethod
    def chain(self, ends: Ends) -> list[Link]:
        """The networks in the order of training; the last is the student."""

    def teacher_of(self, ends: Ends) -> Link:
        """The configured teacher, trained by cross-entropy. A given checkpoint replaces it."""
        return Link("teacher", ends.teacher, CrossEntropy(), ends.teacher_seed, replaceable=True)

    def no_use_of_checkpoint(self, ends: Ends) -> str:
        """Why teacher.checkpoint replaces no teacher of this chain, where it replaces none."""
        return f"method={self.name} trains its own teacher; use method=kd with a checkpoint"


class DistillingMethod(Method):
    """A method with a distilled student. T and λ apply to the student's stage only."""

    T: Temperature
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")

    def student_of(self, ends: Ends, guides: tuple[Link, ...] | None = None, weights: tuple[float, ...] = ()) -> Link:
        """The student, which learns from these guides; by default from the link before it."""
        loss = ends.loss.spec(T=self.T, **{"lambda": self.lam}, reduction=ends.reduction)
        return Link("student", ends.student, loss, ends.seed, guides=guides, weights=weights)


class AssistantSettings(Frozen):
    """The settings of every assistant. They stay the same when the student's T, λ and seed are swept."""

    T: Temperature
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")
    seed: Seed


class AssistedMethod(DistillingMethod):
    """A method with networks of intermediate size between teacher and student."""

    assistants: tuple[NetworkName, ...]  # largest first
    assistant: AssistantSettings

    def assistant_of(
        self, ends: Ends, model: str, guides: tuple[Link, ...] | None = None, weights: tuple[float, ...] = ()
    ) -> Link:
        """An assistant, which learns from these guides; by default from the link before it."""
        settings = self.assistant
        loss = ends.assistant_loss.spec(T=settings.T, **{"lambda": settings.lam}, reduction=ends.reduction)
        return Link("assistant", model, loss, settings.seed, guides=guides, weights=weights)

    def assistants_of(self, ends: Ends) -> list[Link]:
        """The assistants, each distilled from the link before it."""
        return [self.assistant_of(ends, model) for model in self.assistants]
