"""The papers' recipes: every family on every data set, by the numbers that the two projects publish."""

from __future__ import annotations

from typing import Any

import pytest

from kd.app.config import plan, recipe_name, train_spec
from kd.app.parsing import parse
from kd.core.recipes import RECIPES, recipe
from kd.core.settings import TrainSpec
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.datasets import _OWN as OWN_DATA
from kd.datasets import DATASETS, DatasetEntry, Facts, specify
from kd.models import _OWN as OWN_NETWORKS
from kd.models import MODELS
from kd.training.step import learning_rate
from tests.conftest import composed

TAKD = {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "epochs": 160}
SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "schedule": "step"}
A = {**SGD, "milestones": (0.5, 0.75), "gamma": 0.1, "epochs": 160}
B = {**SGD, "milestones": (0.3, 0.6, 0.8), "gamma": 0.2, "epochs": 200}
C = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0, "schedule": "constant", "epochs": 100}
OWN = {
    "plane": {**TAKD, "lr": 0.01, "schedule": "constant"},
    "cifar_resnet": {**TAKD, "lr": 0.1, "schedule": "step", "milestones": (0.5, 0.75), "gamma": 0.1},
    "net": C,
    "mlp": C,
}
# The families of the papers' networks, and the data sets that have a recipe for each of them.
FAMILIES = {*OWN, "resnet", "preresnet", "resnext", "densenet", "mobilenetv2", "shufflenetv2"}
# The families of RepDistiller's benchmark alone, and their learning rate.
BENCHMARK = {"cifar_resnet_x4": 0.05, "wrn": 0.05, "vgg": 0.05}
BENCHMARK |= {"mobilenetv2_half": 0.01, "shufflenetv1": 0.01, "shufflenetv2_rd": 0.01}
DATA = ("digits", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "folder")


def expected(dataset: str, family: str) -> dict[str, Any]:
    return OWN.get(family, A if dataset == "cifar10" else B)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny_imagenet"])
def test_every_network_of_the_papers_is_trained_as_published(dataset: str) -> None:
    config = parse(composed(f"dataset={dataset}"))
    published = {name: entry for name, entry in MODELS.items() if entry.family in FAMILIES and entry.recipe is None}
    assert {entry.family for entry in published.values()} == FAMILIES
    for name, entry in published.items():
        spec: TrainSpec = train_spec(config, "assistant", name)
        settings = spec.model_dump()
        wanted = {**expected(dataset, entry.family), "batch_size": 128, "select": "best_val", "warmup": 0}
        assert {key: settings[key] for key in wanted} == wanted, name


def test_milestones_fall_on_the_published_epochs() -> None:
    for published, epochs in ((A, [80, 120]), (B, [60, 120, 160])):
        assert [round(fraction * published["epochs"]) for fraction in published["milestones"]] == epochs


def test_every_family_of_the_papers_has_every_recipe() -> None:
    for name in (*DATA, "cifar100_benchmark"):
        for family in (*FAMILIES, *BENCHMARK):
            assert recipe("paper", name, family)["epochs"] >= 1


def test_the_benchmark_trains_every_network_as_published() -> None:
    wanted = {**SGD, "batch_size": 64, "epochs": 240, "gamma": 0.1, "warmup": 0, "select": "best_val"}
    config = parse(composed("dataset=cifar100", "train=cifar100_benchmark"))
    for name, entry in ((name, entry) for name, entry in OWN_NETWORKS.items() if entry.recipe is None):
        spec = train_spec(config, "student", name)
        settings = spec.model_dump()
        known = {**wanted, "lr": BENCHMARK.get(entry.family, 0.05)}
        assert {key: settings[key] for key in known} == known, name
        # RepDistiller counts from 1 and divides where an epoch is above 150, 180 or 210.
        for epoch, passed in ((149, 0), (150, 1), (179, 1), (180, 2), (209, 2), (210, 3), (239, 3)):
            assert learning_rate(spec, epoch) == pytest.approx(spec.lr * 0.1**passed), name


@pytest.mark.parametrize(("dataset", "epochs"), [("digits", 20), ("fashion_mnist", 40), ("cifar10", 160)])
def test_benchmark_networks_on_other_data_sets(dataset: str, epochs: int) -> None:
    for family, lr in BENCHMARK.items():
        settings = recipe("paper", dataset, family)
        known = recipe("paper", "cifar100_benchmark", family)
        on_few = 0.02 if dataset == "digits" and lr == 0.01 else lr
        assert settings == {**known, "epochs": epochs, "lr": on_few}
        for longer in ("cifar100", "tiny_imagenet"):
            assert recipe("paper", longer, family) == {**known, "epochs": 200}


def test_every_network_can_be_trained_on_some_data_set() -> None:
    for name, entry in MODELS.items():
        assert entry.recipe is not None or any(entry.family in known for known in RECIPES["paper"].values()), name


def test_every_data_set_has_a_recipe() -> None:
    for name in DATASETS:
        assert recipe_name("paper", name) in RECIPES["paper"], name


# what a network or a data set brings ------------------------------------------------------------------------------


def bring(monkeypatch: pytest.MonkeyPatch, family: str, own: dict[str, Any] | None) -> None:
    """A network `new` of this family, otherwise like plane2. Compose first: Hydra never forgets an option."""
    monkeypatch.setitem(OWN_NETWORKS, "new", MODELS["plane2"]._replace(family=family, recipe=own))


@pytest.mark.parametrize("dataset", DATA)
def test_a_network_of_a_new_family_differs_from_the_resnets(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("dataset.root=/nowhere",) if dataset == "folder" else ()
    cfg = composed(f"dataset={dataset}", "model.name=new", "method=scratch", *asked)
    bring(monkeypatch, "new", {"lr": 0.03, "warmup": 1})
    config = parse(cfg)
    new, resnet = (train_spec(config, "student", name).model_dump() for name in ("new", "resnet18"))
    assert new == {**resnet, "lr": 0.03, "warmup": 1}


def test_what_a_network_brings_changes_its_familys_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed("dataset=cifar10", "model.name=new", "method=scratch", "train.lr=0.02")
    bring(monkeypatch, "plane", {"epochs": 7})
    config = parse(cfg)
    assert train_spec(config, "student", "new").epochs == 7
    changed = {**train_spec(config, "student", "plane4").model_dump(), "epochs": 7}
    assert train_spec(config, "student", "new").model_dump() == changed


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (None, "train=digits has no recipe for the new networks in mode=paper; it has: plane, cifar_resnet"),
        ({"speed": 1}, "student new: speed: unknown key"),
        ({"lr": 0}, "student new: lr: should be above 0"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(
    own: dict[str, Any] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = composed("model.name=new", "method=scratch")
    bring(monkeypatch, "new", own)
    with pytest.raises(KnownError) as caught:
        parse(cfg)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_family_with_a_recipe_for_digits_alone_trains_on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = ("model.name=new", "teacher.name=new", "method.assistants=[new]")
    on_digits, on_cifar10 = (composed(f"dataset={data}", "method=ta", *networks) for data in ("digits", "cifar10"))
    bring(monkeypatch, "new", None)
    monkeypatch.setitem(RECIPES["paper"]["digits"], "new", {"lr": 0.2, "epochs": 5})
    config = parse(on_digits)
    stages = plan(config, specify(config.dataset, Facts(10, 16, (0.0,) * 3, (1.0,) * 3)))[0].chain
    assert [stage.train.lr for stage in stages if isinstance(stage, Stage)] == [0.2] * 3
    with pytest.raises(KnownError, match="train=cifar10 has no recipe for the new networks"):
        parse(on_cifar10)


def test_a_data_set_says_whose_recipe_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Facts(10, 16, (0.0,) * 3, (1.0,) * 3)
    paper, reference = (composed("dataset.name=new", "train.recipe=new", f"mode={m}") for m in ("paper", "reference"))
    monkeypatch.setitem(OWN_DATA, "new", DatasetEntry("nowhere.read", known, recipe="fashion_mnist"))
    assert train_spec(parse(paper), "student", "resnet8").epochs == 40
    with pytest.raises(KnownError, match=r"in mode=reference \(got 'new'\)"):
        parse(reference)


def test_each_network_of_a_chain_has_its_own() -> None:
    config = parse(composed("dataset=cifar10", "model=net", "teacher=resnet18"))
    assert train_spec(config, "teacher", "resnet18").epochs == 160
    assert train_spec(config, "student", "net").epochs == 100
