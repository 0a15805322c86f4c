"""Every loss in every place: planned, resumed to the same bits, and (slow) trained as run.py trains it."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Container, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from bench.workloads import images
from kd.app.config import plan
from kd.app.parsing import parse
from kd.core.settings import TrainSpec
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.datasets import DatasetConfig, load_data, resolve
from kd.datasets.data import Data
from kd.losses import LOSSES
from kd.methods.method import LossChoice
from kd.models.normalization import Normalized
from kd.store import TrainedStage
from kd.store.stages import parse_source
from kd.tools.paper.graph import Graph, graph
from kd.tools.paper.request import Request, profiles
from kd.tools.paper.tables import papers
from kd.training.bank import open_bank
from kd.training.checkpoint import Checkpoint
from kd.training.guide import Guide, LiveGuide
from kd.training.loop import train_stage
from kd.training.step import Step, make_network
from tests.conftest import ROOT, composed
from tests.test_methods import planned
from tests.test_stage import TRAIN
from tests.test_train import Interrupted, Silent, same

OPTIONS = sorted(path.stem for path in (ROOT / "conf" / "loss").glob("*.yaml"))
GUIDED = [name for name in LOSSES if LOSSES[name].needs]
# The losses that can be chosen, by their options.
CHOSEN = {option: LOSSES[name] for name in LOSSES if (option := LOSSES[name].option or name) in OPTIONS}
PLACES = {
    "kd": ("method=kd", "loss={}"),
    "ta": ("method=ta", "loss={}"),
    "assistant": ("method=ta", "loss@assistant_loss={}"),
    "trained_teacher": ("method=trained_teacher", "loss={}"),
    "dgkd": ("method=dgkd", "loss={}"),
    "multi_teacher": ("method=multi_teacher", "loss={}"),
}
(BENCHMARK,) = [table for paper in papers() for table in paper.tables if table.id == "benchmark"]
ONE_GUIDE = "simkd"  # a network keeps the classifier of one guide


def benchmark(row: str) -> Graph:
    return graph(Request("full", profiles()["full"], ("benchmark",), (row,), (0,)))


@pytest.fixture(scope="module")
def few() -> Data:
    config = DatasetConfig(name="digits", augment="crop_flip", val_fraction=0.1, split_seed=0)
    spec = resolve(config, Path("nowhere"))
    data = load_data(spec, Path("nowhere"), "cpu")
    return dataclasses.replace(data, train=data.train[:200])


def stage_of(name: str, few: Data, guides: int = 1, precision: str = "fp32") -> Stage:
    loss = LossChoice(name=name, fields={}).spec(**{"T": 4, "lambda": 0.5})
    if "weight" in type(loss).model_fields and loss.model_dump().get("weight") is None:
        loss = loss.model_copy(update={"weight": 0.5})
    train = TrainSpec(**{**TRAIN.model_dump(), "lr": 0.005, "epochs": 3, "batch_size": 64, "precision": precision})
    common: dict[str, Any] = {"dataset": few.spec, "train": train}
    teachers = [
        Stage(role="teacher", model="resnet14", loss=LOSSES["cross_entropy"](), seed=seed, **common)
        for seed in range(guides)
    ]
    return Stage(
        role="student", model="resnet8", loss=loss, seed=0, guide=teachers[-1], others=tuple(teachers[:-1]), **common
    )


def network_of(source: Any) -> Normalized:
    return make_network(source, "cpu").eval()


def guides_of(stage: Stage, few: Data, place: Path | None = None) -> list[Guide | LiveGuide]:
    precision, needs = stage.train.precision, stage.loss.needs
    if stage.loss.live:
        return [LiveGuide(network_of(guide), few, precision, "cpu", needs) for guide in stage.guides]
    found = [Guide(network_of(guide), few, precision, "cpu", needs=needs) for guide in stage.guides]
    for guide, source in zip(found, stage.guides, strict=True):
        if place is not None:
            features = guide.learner.outputs.pooled.shape[1]
            guide.cache("logits", open_bank(place, source.key, "w", few, precision, "cpu"))
            guide.cache("pooled", open_bank(place, source.key, "w", few, precision, "cpu", features=features))
    return list(found)


def train(stage: Stage, few: Data, place: Path | None = None, **more: Any) -> TrainedStage:
    guides = guides_of(stage, few, place)
    return train_stage(stage, data=few, guides=guides, device="cpu", watch=more.pop("watch", Silent()), **more)


def some(names: Iterable[str], quick: Container[str]) -> list[Any]:
    """All of the names; those that are not among the quick ones for `make test-slow` alone."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", some((name for name in GUIDED if name != "teachable_teacher"), ("distill", "crd", "vid", "reviewkd"))
)
def test_a_loss_resumes_to_the_same_bits(name: str, few: Data, tmp_path: Path) -> None:
    stage = stage_of(name, few)
    unbroken = train(stage, few)
    partial = Checkpoint(tmp_path / "partial", stage, {"threads": 1}, every=1)
    with pytest.raises(KeyboardInterrupt):
        train(stage, few, checkpoint=partial, watch=Interrupted(2))
    assert same(unbroken, train(stage, few, checkpoint=partial))
    assert unbroken.state.keys() == network_of(stage).network.state_dict().keys()  # no module of the loss is kept
    assert all(row["loss"] is not None for row in unbroken.metrics)


@pytest.mark.parametrize("name", [name for name in GUIDED if "pooled" in LOSSES[name].needs and name != "reviewkd"])
def test_pooled_features_from_the_bank_train_the_same_student(name: str, few: Data, tmp_path: Path) -> None:
    stage = stage_of(name, few)
    computed = train(stage, few)
    assert same(computed, train(stage, few, tmp_path))
    assert same(computed, train(stage, few, tmp_path))  # now from the bank alone
    assert len([*tmp_path.glob("*/pooled.bin")]) == 1


@pytest.mark.parametrize("name", some(["distill", "dkd", "rkd", "fitnet"], ("distill", "fitnet")))
def test_several_guides_are_a_weighted_mean(name: str, few: Data) -> None:
    two = stage_of(name, few, guides=2)
    assert two.key != stage_of(name, few).key
    fields = {field: getattr(two, field) for field in Stage.model_fields}
    one_sided = Stage(**{**fields, "weights": (1 - 1e-12, 1e-12)})
    assert one_sided.key != two.key
    alone = Stage(**{**fields, "guide": two.others[0], "others": ()})
    first, only = (train(stage, few).metrics[0]["loss"] for stage in (one_sided, alone))
    if name != "fitnet":  # a regressor's first values depend on how many are made before it
        assert first == pytest.approx(only, rel=1e-4)
    assert train(two, few).metrics[0]["loss"] != pytest.approx(only, rel=1e-4)


def test_a_network_keeps_the_classifier_of_one_guide_only(few: Data) -> None:
    with pytest.raises(KnownError, match="guide"):
        train(stage_of(ONE_GUIDE, few, guides=2), few)


def test_a_loss_has_the_random_numbers_of_the_stages_seed(few: Data) -> None:
    before = torch.get_rng_state()
    train(stage_of("fitnet", few), few)
    assert torch.equal(before, torch.get_rng_state())


@cache
def configured(*overrides: str) -> DictConfig:
    """The configuration, composed once: that takes longer than all the rest of a plan."""
    return composed(*overrides)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_loss_is_planned_in_every_place(option: str, place: str) -> None:
    method, section = PLACES[place]
    section = "assistant_loss" if "assistant_loss" in section else "loss"
    cfg = copy.deepcopy(configured(method, "model=resnet8", "teacher=resnet20"))
    cfg[section] = configured(f"loss={option}").loss
    config = parse(cfg)
    student = plan(config, resolve(config.dataset, config.data_root))[0]
    for source in student.chain:
        assert parse_source(source.model_dump(mode="json", by_alias=True)).key == source.key
    role = "assistant" if place == "assistant" else "student"
    learning = [source for source in student.chain if isinstance(source, Stage) and source.role == role]
    (loss,) = {source.loss.name for source in learning}
    assert loss == {"kd": "distill"}.get(option, option)


def other(value: Any) -> Any:
    """A value that differs, for a sweep."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 or 0.5


def own_parameters(option: str) -> dict[str, tuple[Any, Any]]:
    """What a loss takes from its section, with its value and another one."""
    spec = LossChoice.model_validate(dict(configured(f"loss={option}").loss)).spec(**{"T": 4, "lambda": 0.5})
    values = {key: spec.model_dump()[key] for key in configured(f"loss={option}").loss if key != "name"}
    return {key: (value, other(value)) for key, value in values.items()}


def test_every_option_is_a_loss() -> None:
    assert sorted(CHOSEN) == OPTIONS


@pytest.mark.parametrize("option", CHOSEN)
def test_each_parameter_of_a_loss_is_a_student_of_its_own(option: str) -> None:
    base = configured("method=kd", "model=resnet8", "teacher=resnet20")
    keys, teachers, parameters = [], set(), own_parameters(option)
    for changed in ({}, *({key: values[1]} for key, values in parameters.items())):
        cfg = copy.deepcopy(base)
        cfg.loss = {**configured(f"loss={option}").loss, **changed}
        config = parse(cfg)
        (student,) = plan(config, resolve(config.dataset, config.data_root))
        keys.append(student.key)
        teachers |= {guide.key for guide in student.guides}
    assert len({*keys}) == 1 + len(parameters)
    assert len(teachers) == (1 if CHOSEN[option].needs else 0)


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in CHOSEN if own_parameters(option)])
def test_a_sweep_over_a_parameter_of_a_loss(
    option: str, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("KD_STORE", str(tmp_path_factory.getbasetemp() / "store of all losses"))
    name, values = next(iter(own_parameters(option).items()))
    swept = f"loss.{name}={','.join(str(value).lower() for value in values)}"
    results = job("model=resnet8", "teacher=resnet14", f"loss={option}", swept, multirun=True)
    assert len({result["chain"][-1]["key"] for result in results}) == 2
    assert len({result["chain"][0]["key"] for result in results}) == (1 if CHOSEN[option].needs else 2)


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option, kind in CHOSEN.items() if kind.needs])
def test_a_given_teacher_teaches_by_every_loss_as_the_trained_one_does(
    option: str, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = tmp_path_factory.getbasetemp() / "store of all losses"
    monkeypatch.setenv("KD_STORE", str(store))
    common = ("model=resnet8", "teacher=resnet14", f"loss={option}")
    teacher, student = job(*common)["chain"]
    taught = job(*common, f"teacher.checkpoint={store / teacher['key'] / 'model.safetensors'}", folder="given")["chain"]
    assert [outcome["loss"] is None for outcome in taught] == [True, False]
    assert taught[0]["test_acc"] == teacher["test_acc"]
    weights = [(store / key / "model.safetensors").read_bytes() for key in (student["key"], taught[1]["key"])]
    assert student["key"] != taught[1]["key"]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("row", [row.id for row in BENCHMARK.expanded])
def test_every_pair_of_the_benchmark_takes_a_step_by_every_loss(row: str) -> None:
    ((planned_row,),) = [table.rows for table in benchmark(row).tables]
    stages = [next(iter(cell.jobs.values())).student for cell in planned_row.cells]
    data = Data.of(stages[0].dataset, images(2000, "cifar100"), "cpu")
    samples = data.train[:8].astype("int64")
    index, views = torch.from_numpy(samples), torch.zeros(8, dtype=torch.int64)
    shown = data.show(index, views)
    for stage in stages:
        guides = guides_of(stage, data)
        for guide in guides:
            guide.begin(samples, views.numpy(), lambda count: None)
        step = Step(stage, data=data, guides=guides, device="cpu")
        step.begin_epoch(0)
        said = [guide.outputs(slice(0, 8), shown) for guide in guides]
        _, parts = step(shown, data.labels[index], index, said)
        assert all(value.isfinite() for value in parts.values()), stage.loss


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_loss_trains_in_every_place(
    option: str,
    place: str,
    job: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setenv("KD_STORE", str(tmp_path_factory.getbasetemp() / "store of all losses"))
    overrides = [part.format(option) for part in PLACES[place]]
    several = place in ("dgkd", "multi_teacher")
    refused = option == ONE_GUIDE and several
    result = job("model=resnet8", "teacher=resnet14", *overrides, code=2 if refused else 0)
    if not refused:
        assert result["chain"][-1]["role"] == "student"
        assert result["chain"][-1]["test_acc"] > 0


# what a run says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("loss=rkd", "method.T=2"), "method.T has no effect: loss=rkd does not read it"),
        (("loss=dkd", "method.lambda=1"), "method.lambda has no effect: loss=dkd does not read it"),
        (("loss=label_smoothing",), "loss=label_smoothing needs no guide: no network teaches the student"),
        (
            ("method=scratch", "loss=kd"),
            "loss=kd has no effect: it needs a guide, and method=scratch gives the student none",
        ),
        (
            ("method=scratch", "loss=dkd"),
            "loss=dkd has no effect: it needs a guide, and method=scratch gives the student none",
        ),
        (("loss@assistant_loss=dkd",), "assistant_loss=dkd has no effect: method=kd has no assistant"),
        (
            ("method=ta", "loss@assistant_loss=rkd", "method.assistant.T=2"),
            "method.assistant.T has no effect: assistant_loss=rkd does not read it",
        ),
    ],
)
def test_what_has_no_effect_is_said(
    overrides: tuple[str, ...], line: str, tmp_path: Path, job: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError):  # a dry run has no result
        job(*overrides, "dry_run=true")
    assert line in capsys.readouterr().out.splitlines()


def test_a_plan_names_a_loss_as_it_is_chosen(job: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError):
        job("loss=kd", "dry_run=true")
    said = capsys.readouterr().out
    assert " kd T=4 lambda=0.5 " in said
    assert "distill" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].growth])
def test_a_weight_that_grows_until_training_ends_is_said(
    name: str, job: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*overrides: str) -> list[str]:
        with pytest.raises(FileNotFoundError):
            job("method=ta", *overrides, "method.assistants=[plane4,resnet14]", "dry_run=true")
        return [line for line in capsys.readouterr().out.splitlines() if "its weight grows" in line]

    for option, key in (("loss", "loss"), ("loss@assistant_loss", "assistant_loss")):
        line = f"{key}={name}: its weight grows until training ends: {key}.warmup=20, train.epochs="
        assert said(f"{option}={name}", "train.epochs=20") == [f"{line}20"]
        assert said(f"{option}={name}", "train.epochs=9") == [f"{line}9"]
        assert said(f"{option}={name}", "train.epochs=21") == []
    assert said() == []


def test_a_loss_that_is_read_says_nothing(job: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError):
        job("loss=dkd", "method.T=2", "loss.beta=2", "dry_run=true")
    assert "no effect" not in capsys.readouterr().out


def test_all_problems_of_losses_are_told_at_once() -> None:
    with pytest.raises(KnownError) as refused:
        planned("loss=dkd", "loss.beta=-1", "+loss.nonsense=2", "loss@assistant_loss=kd", "assistant_loss.name=gone")
    told = str(refused.value).splitlines()
    assert any(line.startswith("loss.beta: should be at least 0") for line in told)
    assert any(line.startswith("loss.nonsense: unknown key (got 2); there are loss.name, ") for line in told)
    assert any(line.startswith("assistant_loss.name: ") and "gone" in line for line in told)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("+loss.T=2",), "loss.T: is set by method.T (got 2)"),
        (("loss=dkd", "+loss.T=2"), "loss.T: is set by method.T (got 2)"),
        (("+loss.lambda=0.9",), "loss.lambda: is set by method.lambda (got 0.9)"),
        (("+loss.reduction=mean",), "loss.reduction: is set by mode (got mean)"),
        (("method=ta", "+assistant_loss.T=2"), "assistant_loss.T: is set by method.assistant.T (got 2)"),
    ],
)
def test_a_loss_takes_temperature_and_lambda_from_the_method_alone(overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(KnownError, match=re.escape(line)):
        parse(configured(*overrides))


def test_the_released_code_has_one_loss() -> None:
    with pytest.raises(KnownError, match=r"loss: should be kd with its own values in mode=reference \(got 'dkd'\)"):
        planned("mode=reference", "dataset=cifar10", "loss=dkd")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("loss=fitnet", "model=mlp"), "student mlp: loss=fitnet: "),
        (("loss=fitnet", "loss.stage=9"), "student plane2: loss=fitnet: stage: should be at most 2, "),
        (
            ("loss=ofd",),
            "student plane2: loss=ofd: Plane has no BatchNorm of all channels directly before the activation of",
        ),
        (
            ("method=multi_teacher", "method.teachers=[plane4,plane6]", "loss=simkd"),
            "student plane2: loss=simkd: a network keeps one classifier, so it can have one guide only",
        ),
    ],
)
def test_a_loss_that_cannot_be_built_is_refused_before_anything_is_trained(
    overrides: tuple[str, ...], line: str, job: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for asked in ((), ("dry_run=true",)):
        job(*overrides, *asked, code=2)
        told = capsys.readouterr()
        assert line in told.err
        assert "epoch" not in told.out
