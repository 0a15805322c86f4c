"""The experiments: each one composes, parses and plans, and is what the papers' rows say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from kd.losses import Distill, TeachableTeacher
from kd.parsing import parse
from kd.stage import Stage
from tests.conftest import ROOT, composed

DOCS: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "experiments.py"))
NAMES: list[str] = DOCS["names"]()


def chain(name: str, *overrides: str) -> list[Stage]:
    student: Stage = DOCS["planned"](parse(composed(f"experiment={name}", *overrides)))
    return [stage for stage in student.chain if isinstance(stage, Stage)]


def models(name: str) -> list[str]:
    return [stage.model for stage in chain(name)]


def test_the_page_lists_them_all_as_they_are() -> None:
    """Composes, parses and plans every one on the way."""
    assert Path(DOCS["PAGE"]).read_text() == DOCS["page"](), "run `make docs`"


@pytest.mark.parametrize("name", NAMES)
def test_short_and_named_after_its_chain(name: str) -> None:
    lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 15
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    dataset = name.split("/")[1]
    assert f"  - override /dataset: {dataset}" in lines
    assert f"  - override /train: {dataset}" in lines
    named = [part.replace("resnext29", "resnext29_8x64d") for part in name.rpartition("/")[2].split("_")]
    networks = [part for part in named if any(c.isdigit() for c in part) or part == "net"]
    overridden = [line.split(": ")[1] for line in lines if "/model:" in line or "/teacher:" in line]
    assert set(overridden) == {networks[0], networks[-1]}


def test_no_published_row_is_absent() -> None:
    takd = {"takd/cifar10/kd_resnet110_resnet8", "takd/cifar100/kd_resnet110_resnet8"}  # README 3.1, both ways
    takd |= {"takd/cifar100/ta_resnet110_resnet20_resnet8", "takd/cifar10/ta_resnet110_resnet14_resnet8"}
    small, large = ["mobilenetv2", "shufflenetv2"], ["resnet18", "mobilenetv2", "shufflenetv2"]
    cnns = ["preresnet20", "preresnet32", "net"]
    tt = {f"cifar10/baseline_{m}" for m in ("resnet18", "resnext29", "preresnet20", "preresnet32", "net")}
    tt |= {f"cifar10/{kind}_resnet18_{s}" for kind in ("normal", "nasty", "trained") for s in cnns}
    for data in ("cifar100", "tiny_imagenet"):
        tt |= {f"{data}/baseline_{m}" for m in (*large, "resnet50", "resnext29")}
        for kind in ("normal", "nasty"):
            tt |= {f"{data}/{kind}_resnet18_{s}" for s in small}
            tt |= {f"{data}/{kind}_{t}_{s}" for t in ("resnet50", "resnext29") for s in large}
        tt |= {f"{data}/trained_resnet50_{s}" for s in large}
    assert takd | {f"tt/{name}" for name in tt} <= set(NAMES)


def test_takds_readme() -> None:
    assert models("takd/cifar10/kd_resnet110_resnet8") == ["resnet110", "resnet8"]
    assert models("takd/cifar100/ta_resnet110_resnet20_resnet8") == ["resnet110", "resnet20", "resnet8"]
    assert models("takd/cifar10/ta_resnet110_resnet14_resnet8") == ["resnet110", "resnet14", "resnet8"]
    for stage in chain("takd/cifar100/ta_resnet110_resnet20_resnet8"):
        assert (stage.dataset.name, stage.train.epochs, stage.train.lr) == ("cifar100", 160, 0.1)


def test_the_authors_tuned_settings() -> None:
    teacher, assistant, student = chain("takd/cifar100/tuned_ta_resnet110_resnet20_resnet8")
    assert (assistant.loss, assistant.seed) == (Distill(T=5, lam=0.5, reduction="mean"), 55)
    assert (student.loss, student.seed) == (Distill(T=5, lam=0.15, reduction="mean"), 31)
    direct = chain("takd/cifar100/tuned_kd_resnet110_resnet8")
    assert (direct[1].loss, direct[1].seed) == (Distill(T=2, lam=0.2, reduction="mean"), 31)
    assert direct[0].key == teacher.key
    assert chain("takd/cifar100/tuned_kd_resnet110_resnet20")[1].key == assistant.key
    assert chain("takd/cifar100/tuned_scratch_resnet110")[0].train.lr == 0.01


@pytest.mark.parametrize(
    ("name", "reference", "loss", "T"),
    [
        ("cifar10/nasty_resnet18_net", "resnet18", TeachableTeacher(T=4, weight=-0.04), 4),
        ("cifar100/nasty_resnext29_mobilenetv2", "resnext29_8x64d", TeachableTeacher(T=20, weight=-0.005), 20),
        ("tiny_imagenet/nasty_resnet50_resnet18", "resnet50", TeachableTeacher(T=20, weight=-0.01), 20),
        ("cifar10/trained_resnet50_preresnet20", "resnet18", TeachableTeacher(T=4, weight=0.005), 4),
        ("cifar100/trained_resnet50_mobilenetv2", "resnet18", TeachableTeacher(T=4, weight=0.005), 20),
        ("tiny_imagenet/trained_resnet18_shufflenetv2", "resnet18", TeachableTeacher(T=4, weight=0.005), 20),
    ],
)
def test_trained_and_nasty_teachers(name: str, reference: str, loss: TeachableTeacher, T: float) -> None:
    first, teacher, student = chain(f"tt/{name}")
    assert (first.model, teacher.loss) == (reference, loss)
    assert student.loss == Distill(T=T, lam=0.9)
    assert name.split("_")[-1] == student.model


def test_a_normal_teacher_is_shared_and_recipes_are_each_familys() -> None:
    normal, nasty = chain("tt/cifar10/normal_resnet18_net"), chain("tt/cifar10/nasty_resnet18_net")
    assert normal[0].key == nasty[0].key == chain("tt/cifar10/baseline_resnet18")[0].key
    assert [(s.train.optimizer, s.train.epochs) for s in normal] == [("sgd", 160), ("adam", 100)]
    student = chain("tt/cifar100/normal_resnet50_mobilenetv2")[-1].train
    assert (student.epochs, student.gamma, student.milestones) == (200, 0.2, (0.3, 0.6, 0.8))


def test_modes_and_other_data_can_be_put_on_top() -> None:
    stage = chain("tt/cifar10/normal_resnet18_net", "mode=reference")[-1]
    assert (stage.train.select, stage.dataset.val_fraction) == ("best_test_batches", 0)
    copy = chain("takd/cifar10/kd_resnet110_resnet8", "dataset=folder", "dataset.root=/x", "train.epochs=5")[-1]
    assert (copy.dataset.name, copy.train.lr, copy.train.epochs) == ("folder", 0.1, 5)
