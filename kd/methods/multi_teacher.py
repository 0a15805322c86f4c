"""multi_teacher: several teachers, each trained alone, teach the student at the same time (You et al., KDD 2017)."""

from typing import Annotated

from pydantic import Field, model_validator

from kd.losses import CrossEntropy
from kd.methods.method import DistillingMethod, Ends, Link
from kd.models import NetworkName


class MultiTeacher(DistillingMethod):
    """teacher₁, …, teacherₙ → student. The student's loss is the weighted mean of its losses with each teacher.

    With KD its gradient is that of the paper's averaged softened outputs. The paper's term on triplets of intermediate
    features is left out.

    A network that is listed several times is trained from several seeds: teacher.seed, teacher.seed + 1, …
    A given checkpoint takes the place of the first teacher that is `teacher`'s network.
    """

    teachers: tuple[NetworkName, ...] = Field(min_length=1)
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None  # relative; null: equal

    @model_validator(mode="after")
    def _one_weight_for_each_teacher(self) -> "MultiTeacher":
        if self.weights is not None and len(self.weights) != len(self.teachers):
            raise ValueError(f"weights should have {len(self.teachers)} entries, one for each teacher")
        return self

    def chain(self, ends: Ends) -> list[Link]:
        teachers = []
        for i, model in enumerate(self.teachers):
            again = self.teachers[:i].count(model)
            first = model == ends.teacher and not again
            teachers.append(Link("teacher", model, CrossEntropy(), ends.teacher_seed + again, replaceable=first))
        return [*teachers, self.student_of(ends, tuple(teachers), self.weights or ())]

    def no_use_of_checkpoint(self, ends: Ends) -> str:
        return f"teacher={ends.teacher} should be one of method.teachers (got [{','.join(self.teachers)}])"
