"""The methods: how a student comes to be trained, each planned as a chain of stages."""

from kd.methods.base import Method
from kd.methods.kd import KD
from kd.methods.scratch import Scratch
from kd.methods.ta import TA
from kd.methods.trained_teacher import TrainedTeacher

METHODS: dict[str, type[Method]] = {
    "scratch": Scratch,
    "kd": KD,
    "ta": TA,
    "trained_teacher": TrainedTeacher,
}
