"""The papers' recipes: every family on every data set, by the numbers that the two projects publish."""

from __future__ import annotations

from typing import Any

import pytest

from kd.config import train_spec
from kd.models import MODELS
from kd.parsing import parse
from kd.recipes import RECIPES, recipe
from kd.stage import TrainSpec
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


def expected(dataset: str, family: str) -> dict[str, Any]:
    return OWN.get(family, A if dataset == "cifar10" else B)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny_imagenet"])
def test_every_network_is_trained_as_published(dataset: str) -> None:
    config = parse(composed(f"dataset={dataset}"))
    for name, entry in MODELS.items():
        spec: TrainSpec = train_spec(config, "assistant", name)
        settings = spec.model_dump()
        wanted = {**expected(dataset, entry.family), "batch_size": 128, "select": "best_val", "warmup": 0}
        assert {key: settings[key] for key in wanted} == wanted, name


def test_milestones_fall_on_the_published_epochs() -> None:
    for published, epochs in ((A, [80, 120]), (B, [60, 120, 160])):
        assert [round(fraction * published["epochs"]) for fraction in published["milestones"]] == epochs


def test_every_family_has_every_recipe_of_the_papers() -> None:
    for name in RECIPES["paper"]:
        for family in {entry.family for entry in MODELS.values()}:
            assert recipe("paper", name, family)["epochs"] >= 1


def test_each_network_of_a_chain_has_its_own() -> None:
    config = parse(composed("dataset=cifar10", "model=net", "teacher=resnet18"))
    assert train_spec(config, "teacher", "resnet18").epochs == 160
    assert train_spec(config, "student", "net").epochs == 100
