"""scratch: the student alone, by cross-entropy (TAKD's NOKD)."""

from kd.losses import CrossEntropy
from kd.methods.method import Ends, Link, Method


class Scratch(Method):
    """The student without any guide; a configured teacher is ignored."""

    def chain(self, ends: Ends) -> list[Link]:
        return [Link("student", ends.student, CrossEntropy(), ends.seed)]
