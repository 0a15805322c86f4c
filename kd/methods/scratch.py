"""scratch: the student alone, by cross-entropy (TAKD's NOKD)."""

from kd.losses import CrossEntropy
from kd.methods.method import Ends, Link, Method


class Scratch(Method):
    """The student without any guide, by cross-entropy or a `loss` that needs no guide. A teacher is ignored."""

    def chain(self, ends: Ends) -> list[Link]:
        alone = not ends.loss.needs
        return [Link("student", ends.student, ends.loss.spec() if alone else CrossEntropy(), ends.seed)]
