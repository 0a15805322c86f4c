"""The training settings of a stage: one declared table, for stages and for configurations."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, Field, create_model, model_validator

from kd.core.spec import Frozen, Neutral

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
Select = Literal["best_val", "last", "best_test", "best_test_batches"]
OnNaN = Literal["stop", "retry_fp32"]  # what to do if a loss or weights are not finite; not part of any key


def _fraction(milestone: float) -> float:
    if not 0 < milestone < 1:
        raise ValueError("should be a fraction of the epochs, between 0 and 1: 80 of 160 is 0.5")
    return milestone


class Says(NamedTuple):
    """The description of a setting. `also` is a type of further values that a configuration may use."""

    text: str
    also: Any = None


class TrainSpec(Frozen):
    """The resolved training settings of a stage. Each line declares a setting: name, type and range, description.

    Upper bounds catch typing errors, and keep 64-bit integers from overflowing. A new setting declares its neutral
    value (`Neutral`), so that no existing key moves.
    """

    epochs: Annotated[int, Field(ge=1, le=1_000_000), Says("passes over the training images")]
    batch_size: Annotated[int, Field(ge=1, le=10_000_000), Says("images a step, over all ranks")]
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], Says("the optimiser")]
    lr: Annotated[float, Field(gt=0), Says("learning rate after warm-up")]
    momentum: Annotated[float, Field(ge=0, lt=1), Says("momentum of SGD")]
    nesterov: Annotated[bool, Says("use Nesterov momentum (SGD)")]
    weight_decay: Annotated[float, Field(ge=0), Says("weight decay of all parameters")]
    schedule: Annotated[Literal["constant", "step", "cosine"], Says("how the learning rate changes over the epochs")]
    milestones: Annotated[
        tuple[Annotated[float, AfterValidator(_fraction)], ...], Says("fractions of the epochs, for schedule=step")
    ]
    gamma: Annotated[float, Field(gt=0, le=1), Says("the learning rate is multiplied by this at each milestone")]
    warmup: Annotated[int, Field(ge=0), Says("epochs at the start in which the learning rate increases linearly")]
    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=1),
        Neutral(0.0),
        Says("label smoothing of networks that learn from labels alone"),
    ] = 0.0
    precision: Annotated[
        Precision, Says("auto: bf16 if the hardware has it and gains by it, otherwise fp32", also=Literal["auto"])
    ]
    select: Annotated[Select, Says("the epoch whose weights are kept: the best on validation, or the last")]
    test_curve: Annotated[bool, Says("record test accuracy after every epoch; no choice depends on it")]
    ranks: Annotated[int, Field(ge=1), Says("processes that share a batch, each with its own BatchNorm")] = 1

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainSpec":
        problems = []
        if self.nesterov and self.momentum == 0:
            problems.append("train.nesterov=true needs train.momentum above 0")
        if self.schedule == "step" and not self.milestones:
            problems.append("train.schedule=step needs train.milestones, e.g. [0.5,0.75]")
        if list(self.milestones) != sorted(set(self.milestones)):
            problems.append(f"train.milestones should increase (got {list(self.milestones)})")
        if self.warmup >= self.epochs and self.warmup:
            problems.append(f"train.warmup should be below train.epochs (got {self.warmup} of {self.epochs})")
        if self.batch_size < self.ranks:
            least = f"{self.ranks} ranks share each batch, so it should be at least {self.ranks}"
            problems.append(f"train.batch_size: {least} (got {self.batch_size})")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def descriptions() -> dict[str, str]:
    """The description of each setting, by name."""
    return {name: _says(field.metadata).text for name, field in TrainSpec.model_fields.items()}


def _says(metadata: list[Any]) -> Says:
    return next(mark for mark in metadata if isinstance(mark, Says))


def _override(annotation: Any, metadata: list[Any]) -> Any:
    """The type of a setting in a configuration: as in TrainSpec, or null for the recipe's value."""
    also = _says(metadata).also
    if also is not None:  # one Literal, so that the error message lists all allowed values
        choices = (*get_args(also), *get_args(annotation))
        annotation = Literal[choices]
    limits = [mark for mark in metadata if not isinstance(mark, (Says, Neutral))]
    for limit in limits:
        annotation = Annotated[annotation, limit]
    return annotation | None


if TYPE_CHECKING:

    class TrainOverrides(Frozen):
        """Training settings in a configuration; null means the recipe's value."""

else:
    TrainOverrides = create_model(
        "TrainOverrides",
        __base__=Frozen,
        __doc__="Training settings in a configuration; null means the recipe's value.",
        **{name: (_override(f.annotation, f.metadata), None) for name, f in TrainSpec.model_fields.items()},
    )
