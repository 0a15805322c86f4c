"""scratch: the student alone, by cross-entropy (TAKD's NOKD)."""

from kd.losses import CrossEntropy
from kd.methods.base import Method
from kd.stage import Planner, Stage


class Scratch(Method):
    """The student without any guide; a configured teacher is ignored."""

    def plan(self, planner: Planner) -> Stage:
        return planner.student(CrossEntropy())
