"""kd: the teacher teaches the student directly (Hinton et al. 2015; TAKD's BLKD)."""

from kd.methods.method import DistillingMethod, Ends, Link


class KD(DistillingMethod):
    """teacher → student."""

    def chain(self, ends: Ends) -> list[Link]:
        return [self.teacher_of(ends), self.student_of(ends)]
