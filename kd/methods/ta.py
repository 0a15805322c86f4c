"""ta: the teacher teaches the student through assistants of intermediate size (TAKD, AAAI 2020)."""

from pydantic import Field

from kd.methods.method import AssistedMethod, Ends, Link
from kd.models import NetworkName


class TA(AssistedMethod):
    """teacher → assistant₁ … assistantₙ → student."""

    assistants: tuple[NetworkName, ...] = Field(min_length=1)

    def chain(self, ends: Ends) -> list[Link]:
        return [self.teacher_of(ends), *self.assistants_of(ends), self.student_of(ends)]
