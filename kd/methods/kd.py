"""kd: the teacher teaches the student directly (Hinton et al. 2015; TAKD's BLKD)."""

from kd.methods.base import DistillingMethod
from kd.stage import Planner, Stage


class KD(DistillingMethod):
    """teacher → student."""

    def plan(self, planner: Planner) -> Stage:
        return self.student(planner, planner.teacher())
