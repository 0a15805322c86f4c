"""The losses: how a network learns. Each loss has one file and one line in LOSSES."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from kd.core.spec import Frozen, Registry
from kd.core.stage import LossSpec, Need
from kd.losses.cross_entropy import CrossEntropy
from kd.losses.distillation import Distill, kl
from kd.losses.teachable_teacher import TeachableTeacher

__all__ = ["KD", "LOSSES", "CrossEntropy", "Distill", "Loss", "LossChoice", "TeachableTeacher", "kl"]

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


class LossChoice(Frozen):
    """The `loss` section of a configuration: a name, and the fields of its spec that are set there.

    T, λ and reduction come from the method. A loss takes the T or λ that it declares without a default.
    """

    name: str
    fields: dict[str, Any] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, tree: Any) -> Any:
        """A section is flat: `{name: dkd, beta: 8}`."""
        if not isinstance(tree, dict) or "fields" in tree:
            return tree
        return {"name": tree.get("name"), "fields": {key: value for key, value in tree.items() if key != "name"}}

    @property
    def kind(self) -> type[LossSpec]:
        """The spec's class."""
        return LOSSES[self.name]

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss reads of its guide and network; empty: it needs no guide."""
        return self.kind.needs

    def reads(self, name: str) -> bool:
        """Whether the loss takes this setting from the method: `T`, `lambda`, `reduction`."""
        named = {field.serialization_alias or key: field for key, field in self.kind.model_fields.items()}
        return name in named and (named[name].is_required() or name == "reduction")

    def spec(self, **shared: Any) -> LossSpec:
        """The loss with the method's settings. Raises ValidationError for a value out of range, or an unknown field."""
        taken = {name: value for name, value in shared.items() if self.reads(name)}
        return self.kind.model_validate({**self.fields, **taken, "name": self.name})


KD = LossChoice(name="distill", fields={})
