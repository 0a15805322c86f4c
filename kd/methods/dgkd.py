"""dgkd: every larger network of the chain teaches every smaller one (Son et al., ICCV 2021)."""

from typing import Annotated

from pydantic import Field, model_validator

from kd.methods.method import AssistedMethod, Ends, Link
from kd.models import NetworkName


class DGKD(AssistedMethod):
    """teacher, assistant₁ … assistantₙ, student: each learns from all networks before it.

    A network's loss is the weighted mean of its losses with each guide. Son et al. add them up, so that their learning
    rate grows with the number of guides. They also leave out guides at random; here all guides teach at each step.
    """

    assistants: tuple[NetworkName, ...] = Field(min_length=1)
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None  # relative, teacher first; null: equal

    @model_validator(mode="after")
    def _one_weight_for_each_guide(self) -> "DGKD":
        guides = 1 + len(self.assistants)
        if self.weights is not None and len(self.weights) != guides:
            raise ValueError(f"weights should have {guides} entries: the teacher and each assistant")
        return self

    def chain(self, ends: Ends) -> list[Link]:
        links, weights = [self.teacher_of(ends)], self.weights or ()
        for model in self.assistants:
            links.append(self.assistant_of(ends, model, tuple(links), weights[: len(links)]))
        return [*links, self.student_of(ends, tuple(links), weights)]
