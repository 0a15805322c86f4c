"""The losses: how a network learns. Each loss has one file and one line in LOSSES."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from kd.core.spec import Registry
from kd.core.stage import LossSpec
from kd.losses.cross_entropy import CrossEntropy
from kd.losses.distillation import Distill, kl
from kd.losses.teachable_teacher import TeachableTeacher

__all__ = ["LOSSES", "CrossEntropy", "Distill", "Loss", "TeachableTeacher", "kl"]

LOSSES: Registry[type[LossSpec]] = Registry(
    "kd.losses",
    {
        "cross_entropy": CrossEntropy,
        "distill": Distill,
        "teachable_teacher": TeachableTeacher,
    },
    type[LossSpec],
)

Loss = Annotated[SerializeAsAny[LossSpec], BeforeValidator(LOSSES.parse)]
