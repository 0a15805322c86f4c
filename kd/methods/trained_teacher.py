"""trained_teacher: a teacher that first learns to teach, with a frozen small network as its guide (Displays 2023)."""

from kd.core.spec import Frozen
from kd.core.stage import Temperature
from kd.losses import CrossEntropy, TeachableTeacher
from kd.methods.method import AssistedMethod, Ends, Link
from kd.models import NetworkName


class TeacherSettings(Frozen):
    """The divergence term of the teacher's own training."""

    T: Temperature
    weight: float  # below 0: a nasty teacher, which cannot be distilled (ICLR 2021)


class TrainedTeacher(AssistedMethod):
    """reference → teacher → [assistants] → student."""

    reference: NetworkName | None  # null: the student's network
    teacher: TeacherSettings

    def chain(self, ends: Ends) -> list[Link]:
        reference = Link("reference", self.reference or ends.student, CrossEntropy(), ends.teacher_seed)
        loss = TeachableTeacher(T=self.teacher.T, weight=self.teacher.weight)
        teacher = Link("teacher", ends.teacher, loss, ends.teacher_seed)
        return [reference, teacher, *self.assistants_of(ends), self.student_of(ends)]
