"""A method: its hyperparameters, and the chain of networks that it declares. It trains nothing."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pydantic import Field

from kd.core.spec import Frozen
from kd.core.stage import LossSpec, Reduction, Role, Seed
from kd.losses import CrossEntropy, Distill
from kd.models import NetworkName


@dataclass(frozen=True)
class Ends:
    """The networks and seeds at both ends of a chain. `reduction` is used by the KL of every distilled network."""

    student: str
    teacher: str
    seed: int  # the student's
    teacher_seed: int
    reduction: Reduction = "batchmean"


@dataclass(frozen=True)
class Link:
    """A network of a chain and its loss. A guided loss reads the logits of the link before it."""

    role: Role
    model: str
    loss: LossSpec
    seed: int
    replaceable: bool = False  # the weights of teacher.checkpoint may take its place


class Method(Frozen, ABC):
    """Base of all methods. Its fields are the hyperparameters; `name` is its entry in METHODS."""

    name: str

    @abstractmethod
    def chain(self, ends: Ends) -> list[Link]:
        """The networks in the order of training; the last is the student."""

    def teacher_of(self, ends: Ends) -> Link:
        """The configured teacher, trained by cross-entropy. A given checkpoint replaces it."""
        return Link("teacher", ends.teacher, CrossEntropy(), ends.teacher_seed, replaceable=True)


class DistillingMethod(Method):
    """A method with a distilled student. T and λ apply to the student's stage only."""

    T: float = Field(gt=0)
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")

    def student_of(self, ends: Ends) -> Link:
        """The student, distilled from the link before it."""
        loss = Distill(T=self.T, lam=self.lam, reduction=ends.reduction)
        return Link("student", ends.student, loss, ends.seed)


class AssistantSettings(Frozen):
    """The settings of every assistant. They stay the same when the student's T, λ and seed are swept."""

    T: float = Field(gt=0)
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")
    seed: Seed


class AssistedMethod(DistillingMethod):
    """A method with networks of intermediate size between teacher and student."""

    assistants: tuple[NetworkName, ...]  # largest first
    assistant: AssistantSettings

    def assistants_of(self, ends: Ends) -> list[Link]:
        """The assistants, each distilled from the link before it."""
        loss = Distill(T=self.assistant.T, lam=self.assistant.lam, reduction=ends.reduction)
        return [Link("assistant", model, loss, self.assistant.seed) for model in self.assistants]
