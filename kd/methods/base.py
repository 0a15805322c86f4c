"""What a method is: hyperparameters that plan a chain of stages. It trains nothing."""

from abc import ABC, abstractmethod

from pydantic import Field

from kd.models import NetworkName
from kd.spec import Frozen
from kd.stage import Planner, Seed, Source, Stage


class Method(Frozen, ABC):
    """A method's fields are its hyperparameters, and their types its validation; `name` picks it from METHODS."""

    name: str

    @abstractmethod
    def plan(self, planner: Planner) -> Stage:
        """The student's stage, standing on the chain that it needs."""


class DistillingMethod(Method):
    """A method whose student learns from a guide; T and λ are those of the student's stage alone."""

    T: float = Field(gt=0)
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")

    def student(self, planner: Planner, guide: Source) -> Stage:
        """The student, distilled from the guide."""
        return planner.student(planner.distill(self.T, self.lam), guide)


class AssistantSettings(Frozen):
    """How every assistant of a chain is distilled; fixed while the student's own T, λ and seed are swept."""

    T: float = Field(gt=0)
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")
    seed: Seed


class AssistedMethod(DistillingMethod):
    """A method with networks of intermediate size between teacher and student."""

    assistants: tuple[NetworkName, ...]  # largest first
    assistant: AssistantSettings

    def through_assistants(self, planner: Planner, guide: Source) -> Source:
        """The last assistant's stage, each one distilled from the one before it; the guide itself if there are none."""
        loss = planner.distill(self.assistant.T, self.assistant.lam)
        for model in self.assistants:
            guide = planner.stage("assistant", model, loss, self.assistant.seed, guide)
        return guide
