"""The losses: how a network learns. Each loss has one file and one line in LOSSES."""

from __future__ import annotations

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
        "dkd": "kd.losses.dkd.DKD",
        "dist": "kd.losses.dist.DIST",
        "nkd": "kd.losses.nkd.NKD",
        "wsld": "kd.losses.wsld.WSLD",
        "label_smoothing": "kd.losses.label_smoothing.LabelSmoothing",
        "tf_kd": "kd.losses.tf_kd.TfKD",
        "fitnet": "kd.losses.fitnet.FitNet",
        "at": "kd.losses.at.AT",
        "sp": "kd.losses.sp.SP",
        "vid": "kd.losses.vid.VID",
        "rkd": "kd.losses.rkd.RKD",
        "pkt": "kd.losses.pkt.PKT",
        "crd": "kd.losses.crd.CRD",
        "reviewkd": "kd.losses.reviewkd.ReviewKD",
        "ofd": "kd.losses.ofd.OFD",
        "simkd": "kd.losses.simkd.SimKD",
    },
    type[LossSpec],
)

Loss = Annotated[SerializeAsAny[LossSpec], BeforeValidator(LOSSES.parse)]
