"""ta: the teacher teaches the student through assistants of intermediate size (TAKD, AAAI 2020)."""

from pydantic import Field

from kd.methods.base import AssistedMethod
from kd.models import NetworkName
from kd.stage import Planner, Stage


class TA(AssistedMethod):
    """teacher → assistant₁ … assistantₙ → student."""

    assistants: tuple[NetworkName, ...] = Field(min_length=1)

    def plan(self, planner: Planner) -> Stage:
        return self.student(planner, self.through_assistants(planner, planner.teacher()))
