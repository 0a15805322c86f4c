"""Stage keys: fixed golden values, and equal if and only if everything that decides the weights is equal."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError, create_model

from kd.core.settings import TrainOverrides, TrainSpec, descriptions
from kd.core.spec import Frozen, Neutral
from kd.core.stage import DatasetSpec, Given, Normalization, Stage, joined
from kd.losses import CrossEntropy, Distill, TeachableTeacher
from kd.store.stages import parse_source

DATASET = DatasetSpec(name="digits", num_classes=10, image_size=16, mean=(0.3,) * 3, std=(0.4,) * 3)
TRAIN = TrainSpec(
    epochs=2,
    batch_size=64,
    optimizer="sgd",
    lr=0.1,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-4,
    schedule="step",
    milestones=(0.5,),
    gamma=0.1,
    warmup=0,
    precision="fp32",
    select="best_val",
    test_curve=False,
)


def stage(**changes: Any) -> Stage:
    settings: dict[str, Any] = {
        "role": "student",
        "model": "resnet8",
        "loss": CrossEntropy(),
        "dataset": DATASET,
        "train": TRAIN,
        "seed": 0,
    }
    return Stage(**{**settings, **changes})


TEACHER = stage(role="teacher", model="resnet20")


def distilled(T: float = 4, lam: float = 0.5, **changes: Any) -> Stage:
    return stage(**{"loss": Distill(T=T, lam=lam), "guide": TEACHER, **changes})


def test_golden_keys() -> None:
    """Keys address finished stages. If one of these must change, raise FORMAT."""
    assert stage().key == "323e43477de0f1a5"
    assert distilled().key == "19ad38430173f26a"
    assert stage(loss=TeachableTeacher(T=4, weight=0.005), guide=stage()).key == "dc0aeb51fac23bc8"


def test_a_role_is_no_part_of_the_key() -> None:
    assert stage(role="reference").key == stage(role="student").key


@pytest.mark.parametrize(
    "other",
    [
        distilled(T=5),
        distilled(lam=0.25),
        distilled(seed=1),
        distilled(model="resnet14"),
        distilled(loss=Distill(T=4, lam=0.5, reduction="mean")),
        distilled(loss=TeachableTeacher(T=4, weight=0.5)),
        distilled(guide=stage(role="teacher", model="resnet20", seed=1)),
        distilled(guide=stage(role="teacher", model="resnet26")),
        distilled(dataset=DATASET.model_copy(update={"augment": "crop_flip"})),
        distilled(dataset=DATASET.model_copy(update={"split_seed": 1})),
        distilled(train=TRAIN.model_copy(update={"precision": "bf16"})),
        distilled(train=TRAIN.model_copy(update={"select": "last"})),
    ],
)
def test_whatever_decides_the_weights_moves_the_key(other: Stage) -> None:
    assert other.key != distilled().key


settings.register_profile("quick", max_examples=200, deadline=None)
settings.load_profile("quick")
numbers = st.floats(0.01, 100, allow_nan=False)
losses = st.one_of(
    st.builds(Distill, T=numbers, lam=st.floats(0, 1), reduction=st.sampled_from(["batchmean", "mean"])),
    st.builds(TeachableTeacher, T=numbers, weight=st.floats(-1, 1)),
)
trainings = st.builds(
    lambda **changes: TrainSpec(**{**TRAIN.model_dump(), **changes}),
    lr=numbers,
    epochs=st.integers(1, 300),
    optimizer=st.sampled_from(["sgd", "adam"]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    milestones=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3, unique=True).map(sorted).map(tuple),
)
guides = st.builds(stage, role=st.just("teacher"), train=trainings, seed=st.integers(0, 2))
stages = st.builds(
    stage,
    loss=losses,
    guide=guides,
    train=trainings,
    seed=st.integers(0, 2),
    model=st.sampled_from(["resnet8", "plane2"]),
)


def without_roles(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    return spec and {**spec, "role": None, "guide": without_roles(spec["guide"])}


@given(stages, stages)
def test_keys_agree_if_and_only_if_specs_do(one: Stage, other: Stage) -> None:
    assert (one.key == other.key) == (without_roles(one.dump()) == without_roles(other.dump()))


@given(stages)
def test_a_stage_survives_json(one: Stage) -> None:
    again = parse_source(json.loads(json.dumps(one.dump())))
    assert again == one
    assert again.key == one.key


def test_a_chain_in_words() -> None:
    teacher, other = stage(model="resnet20"), stage(model="vgg8")
    student = distilled(guide=teacher)
    assert joined(student.chain) == f"resnet20 → {student.model}"
    both = distilled(guide=teacher, others=(other,), weights=(0.5, 0.5))
    assert joined(both.chain) == f"vgg8 + resnet20 → {both.model}"
    assert joined(both.chain, student_first=True) == f"{both.model} ← resnet20 + vgg8"


def test_the_views_that_are_drawn() -> None:
    def shown(augment: str, views: int | None) -> int | None:
        return DatasetSpec.model_validate(
            {**stage().dataset.model_dump(), "augment": augment, "views": views}
        ).shown_views

    assert [shown("crop_flip", views) for views in (None, 8)] == [162, 8]
    assert [shown("resized_crop_flip", views) for views in (None, 8)] == [None, 8]
    assert shown("none", None) == 1


def test_lambda_has_its_own_name_in_records() -> None:
    loss = {"name": "distill", "T": 4.0, "lambda": 0.25, "reduction": "batchmean"}
    assert distilled(lam=0.25).identity()["loss"] == loss
    assert distilled(lam=0.25).dump()["loss"] == {**loss, "weight": 1.0, "standardize": False}


def test_an_integer_temperature_is_the_same_temperature() -> None:
    assert distilled(T=4).key == distilled(T=4.0).key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd", "momentum": 0.0}, "nesterov=true needs train.momentum"),
        ({"milestones": ()}, "schedule=step needs train.milestones"),
        ({"milestones": (0.7, 0.5)}, "should increase"),
        ({"warmup": 2}, "below train.epochs"),
    ],
)
def test_settings_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSpec(**{**TRAIN.model_dump(), **changes})


def test_a_loss_and_its_guide_come_together() -> None:
    with pytest.raises(ValidationError, match="distill needs a guide"):
        stage(loss=Distill(T=1, lam=0.5))
    with pytest.raises(ValidationError, match="cross_entropy reads no guide"):
        stage(guide=TEACHER)


def test_best_val_needs_a_validation_split() -> None:
    with pytest.raises(ValidationError, match=r"val_fraction above 0"):
        stage(dataset=DatasetSpec(**{**DATASET.model_dump(), "val_fraction": 0}))


def test_specs_are_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        DATASET.name = "cifar10"
    with pytest.raises(ValidationError, match="Extra inputs"):
        DatasetSpec(**DATASET.model_dump(), colour="blue")
    assert [s.role for s in distilled().chain] == ["teacher", "student"]


def with_field(spec: Any, **values: Any) -> Any:
    """The same spec, of a class that has one field more: `ema`, whose neutral value is 0."""
    kind = type(spec)
    grown = create_model(f"Grown{kind.__name__}", __base__=kind, ema=(Annotated[float, Neutral(0.0)], 0.0))
    fields = {name: getattr(spec, name) for name in kind.model_fields}
    return grown(**{**fields, **values})


def grown(one: Stage, part: str, **values: Any) -> Stage | Given:
    """A stage with one more field, in itself or in one of its parts, guides included."""
    if part == "stage":
        found: Stage = with_field(one, **values)
        return found
    if part == "guide":
        assert one.guide is not None
        return stage(loss=one.loss, train=one.train, guide=with_field(one.guide, **values))
    fields = {name: getattr(one, name) for name in Stage.model_fields}
    return Stage(**{**fields, part: with_field(fields[part], **values)})


@pytest.mark.parametrize(
    "part", ["stage", "guide", *(pytest.param(part, marks=pytest.mark.slow) for part in ("loss", "dataset", "train"))]
)
@given(one=stages)
def test_a_new_field_moves_no_key_while_it_is_neutral(part: str, one: Stage) -> None:
    base = stage(loss=one.loss, train=one.train, guide=one.guide) if part == "guide" else one
    assert grown(one, part).key == base.key
    assert grown(one, part, ema=0.9).key not in (base.key, grown(one, part, ema=0.5).key)


@pytest.mark.parametrize("part", ["itself", "normalize", "dataset"])
def test_nor_does_one_of_given_weights(part: str) -> None:
    normalize = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)
    one = Given(role="teacher", model="resnet20", sha256="0" * 64, normalize=normalize, dataset=DATASET)

    def grow(**values: Any) -> Given:
        fields = {name: getattr(one, name) for name in Given.model_fields}
        if part == "itself":
            found: Given = with_field(one, **values)
            return found
        return Given(**{**fields, part: with_field(fields[part], **values)})

    assert grow().key == one.key
    assert grow(ema=0.9).key != one.key


def test_overrides_have_every_setting_of_a_training_and_no_default() -> None:
    fields = TrainOverrides.model_fields
    assert list(fields) == list(TrainSpec.model_fields) == list(descriptions())
    assert all(field.default is None for field in fields.values())
    assert TrainOverrides.model_validate({"precision": "auto", "lr": 0.1}).dump()["precision"] == "auto"
    with pytest.raises(ValidationError):
        TrainSpec(**{**TRAIN.model_dump(), "precision": "auto"})


def test_neutral_fields_leave_the_hash_inside_lists_too() -> None:
    class Guides(Frozen):
        guides: tuple[Normalization, ...]
        named: dict[str, Normalization]

    one = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)
    plain, more, other = one, with_field(one), with_field(one, ema=0.9)
    identities = [Guides(guides=(each,), named={"a": each}).identity() for each in (plain, more, other)]
    assert identities[0] == identities[1] != identities[2]
    assert identities[2]["guides"][0]["ema"] == identities[2]["named"]["a"]["ema"] == 0.9
