"""The methods: which network learns from which. Each method has one file and one line in METHODS."""

from kd.core.spec import Registry
from kd.methods.dgkd import DGKD
from kd.methods.kd import KD
from kd.methods.method import Method
from kd.methods.multi_teacher import MultiTeacher
from kd.methods.scratch import Scratch
from kd.methods.ta import TA
from kd.methods.trained_teacher import TrainedTeacher

METHODS: Registry[type[Method]] = Registry(
    "kd.methods",
    {
        "scratch": Scratch,
        "kd": KD,
        "ta": TA,
        "trained_teacher": TrainedTeacher,
        "dgkd": DGKD,
        "multi_teacher": MultiTeacher,
    },
    type[Method],
)
