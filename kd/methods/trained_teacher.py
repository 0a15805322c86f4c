"""trained_teacher: a teacher that first learns to teach, against a frozen small network (Displays 2023)."""

from pydantic import Field

from kd.losses import TeachableTeacher
from kd.methods.base import AssistedMethod
from kd.models import NetworkName
from kd.spec import Frozen
from kd.stage import Planner, Stage


class TeacherSettings(Frozen):
    """The divergence term of the teacher's own training."""

    T: float = Field(gt=0)
    weight: float  # below 0: a nasty teacher, which cannot be distilled (ICLR 2021)


class TrainedTeacher(AssistedMethod):
    """reference → teacher → [assistants] → student."""

    reference: NetworkName | None  # null: the student's network
    teacher: TeacherSettings

    def plan(self, planner: Planner) -> Stage:
        reference = planner.reference(self.reference or planner.student_model)
        loss = TeachableTeacher(T=self.teacher.T, weight=self.teacher.weight)
        teacher = planner.trained_teacher(loss, reference)
        return self.student(planner, self.through_assistants(planner, teacher))
