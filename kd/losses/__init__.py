"""The losses: how a network learns. Each loss has one file and one line in LOSSES."""

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from kd.core.spec import Registry
from kd.core.stage import LossSpec
from kd.losses.cross_entropy import CrossEntropy
from kd.losses.distillation import Distill, kl
from kd.losses.teachable_teacher import TeachableTeacher

__all__ = ["LOSSES", "CrossEntropy", "Distill", "Loss", "TeachableTeacher", "kl", "parse_loss"]

LOSSES: Registry[type[LossSpec]] = Registry(
    "kd.losses",
    {
        "cross_entropy": CrossEntropy,
        "distill": Distill,
        "teachable_teacher": TeachableTeacher,
    },
    type[LossSpec],
)


def parse_loss(tree: Any) -> Any:
    """The loss of a record, by its `name`. Any other input is returned unchanged, and pydantic refuses it.

    Raises ValueError for an unknown name: the package that defined the loss may be uninstalled.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        return tree
    return LOSSES[LOSSES.known(tree["name"])].model_validate(tree)


Loss = Annotated[SerializeAsAny[LossSpec], BeforeValidator(parse_loss)]
