"""The experiments: the published rows, each one an option that composes, parses and plans as its name says."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException

from kd.app import experiments as declared
from kd.app.experiments import experiments
from kd.app.parsing import parse
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.losses import Distill, TeachableTeacher
from tests.conftest import ROOT, composed, run_py

DOCS: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "experiments.py"))
PAGE = Path(DOCS["PAGE"])

SMALL, LARGE, CNNS = "mobilenetv2 shufflenetv2", "resnet18 mobilenetv2 shufflenetv2", "net preresnet20 preresnet32"
PUBLISHED = {  # by group: how the names begin, and how they go on
    "takd/cifar10": {
        "scratch": "plane2 resnet8 resnet20 resnet110",
        "kd": "plane10_plane2 resnet110_resnet8 resnet110_resnet20",
        "ta": "plane10_plane4_plane2 resnet110_resnet20_resnet8 resnet110_resnet14_resnet8",
        "tuned_kd": "resnet110_resnet20",
    },
    "takd/cifar100": {
        "scratch": "plane2 resnet8",
        "kd": "plane10_plane2 resnet110_resnet8",
        "ta": "plane10_plane4_plane2 resnet110_resnet20_resnet8",
        "tuned_scratch": "resnet8 resnet20 resnet110",
        "tuned_kd": "resnet110_resnet8 resnet110_resnet20",
        **dict.fromkeys(("tuned_ta", "tuned_T10_ta", "tuned_T5_ta"), "resnet110_resnet20_resnet8"),
    },
    "takd/imagenet": {
        "scratch": "resnet14",
        "kd": "resnet50_resnet14",
        "ta": "resnet50_resnet20_resnet14",
    },
    "tt/cifar10": {
        "baseline": f"{CNNS} resnet18 resnext29",
        "normal_resnet18": CNNS,
        "normal_resnet50": CNNS,
        "nasty_resnet18": CNNS,
        "trained_resnet18": CNNS,
        "trained_resnet50": CNNS,
    },
    **{
        f"tt/{dataset}": {
            "baseline": f"{LARGE} resnet50 resnext29",
            **{f"{kind}_resnet18": SMALL for kind in ("normal", "nasty", "trained")},
            **{f"{kind}_resnet50": LARGE for kind in ("normal", "nasty", "trained")},
            **{f"{kind}_resnext29": LARGE for kind in ("normal", "nasty")},
        }
        for dataset in ("cifar100", "tiny_imagenet")
    },
}


def chain(name: str, *overrides: str) -> list[Stage]:
    student: Stage = DOCS["planned"](parse(composed(f"experiment={name}", *overrides)))
    return [stage for stage in student.chain if isinstance(stage, Stage)]


def models(name: str) -> list[str]:
    return [stage.model for stage in chain(name)]


def listed(group: str) -> set[str]:
    """What Hydra offers, also to --help."""
    composed()  # readies Hydra's configuration loader
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return set(GlobalHydra.instance().config_loader().get_group_options(f"experiment/{group}"))


def test_every_published_row_is_an_option() -> None:
    """100 names, under which results have been published. Our own experiments in conf/paper have another group."""
    expected = {
        group: {f"{beginning}_{end}" for beginning, ends in kinds.items() for end in ends.split()}
        for group, kinds in PUBLISHED.items()
    }
    assert sum(map(len, expected.values())) == 100
    assert {name for name in experiments() if name.startswith(("takd/", "tt/"))} == {
        f"{group}/{name}" for group, names in expected.items() for name in names
    }
    for group, names in expected.items():
        assert names <= listed(group)


def test_the_page_lists_them_all_as_they_are() -> None:
    """This composes, parses and plans every experiment."""
    assert PAGE.read_text() == DOCS["page"](), "run `make docs`"


def test_each_trains_the_networks_that_it_is_named_after() -> None:
    """Chains come from the page, which the test above compares with the plans. A reference precedes its teacher."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(lines) == len(experiments())
    for name, about, stages, _, mode in [line for line in lines if line[0].startswith(("`takd/", "`tt/"))]:
        kind, *_ = own = re.sub(r"^tuned_(T\d+_)?", "", name.strip("`").rpartition("/")[2]).split("_")
        networks = [
            stage.split()[0].replace("resnext29_8x64d", "resnext29").removesuffix("_imagenet")
            for stage in stages.split(" → ")
        ]
        assert networks[kind in ("nasty", "trained") :] == own[1:], name
        assert mode == ("reference" if "tuned" in name else "paper")
        assert "{" not in about


def test_takds_readme() -> None:
    assert models("takd/cifar10/kd_resnet110_resnet8") == ["resnet110", "resnet8"]
    assert models("takd/cifar100/ta_resnet110_resnet20_resnet8") == ["resnet110", "resnet20", "resnet8"]
    assert models("takd/cifar10/ta_resnet110_resnet14_resnet8") == ["resnet110", "resnet14", "resnet8"]
    for stage in chain("takd/cifar100/ta_resnet110_resnet20_resnet8"):
        assert (stage.dataset.name, stage.train.epochs, stage.train.lr) == ("cifar100", 160, 0.1)


def test_takds_imagenet() -> None:
    assert models("takd/imagenet/scratch_resnet14") == ["resnet14_imagenet"]
    assert models("takd/imagenet/kd_resnet50_resnet14") == ["resnet50_imagenet", "resnet14_imagenet"]
    stages = chain("takd/imagenet/ta_resnet50_resnet20_resnet14")
    assert [stage.model for stage in stages] == [f"resnet{depth}_imagenet" for depth in (50, 20, 14)]
    for stage in stages:
        train = stage.train
        assert (stage.dataset.name, train.epochs, train.lr, train.batch_size) == ("imagenet", 90, 0.1, 256)
        assert (train.milestones, train.gamma, train.momentum, train.weight_decay) == ((1 / 3, 2 / 3), 0.1, 0.9, 1e-4)


def test_the_authors_tuned_settings() -> None:
    teacher, assistant, student = chain("takd/cifar100/tuned_ta_resnet110_resnet20_resnet8")
    assert (assistant.loss, assistant.seed) == (Distill(T=5, lam=0.5, reduction="mean"), 55)
    assert (student.loss, student.seed) == (Distill(T=5, lam=0.15, reduction="mean"), 31)
    direct = chain("takd/cifar100/tuned_kd_resnet110_resnet8")
    assert (direct[1].loss, direct[1].seed) == (Distill(T=2, lam=0.2, reduction="mean"), 31)
    assert direct[0].key == teacher.key
    assert chain("takd/cifar100/tuned_kd_resnet110_resnet20")[1].key == assistant.key
    assert chain("takd/cifar100/tuned_scratch_resnet110")[0].train.lr == 0.01
    assert chain("takd/cifar10/tuned_kd_resnet110_resnet20")[1].loss == Distill(T=4, lam=0.4, reduction="mean")
    for T in (10, 5):
        first, *rest = chain(f"takd/cifar100/tuned_T{T}_ta_resnet110_resnet20_resnet8")
        assert first.key == teacher.key
        assert [stage.loss for stage in rest] == [Distill(T=T, lam=0.04, reduction="mean")] * 2


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


def test_an_option_stays_as_it_is_declared() -> None:
    """Hydra changes the nodes that it loads, so each has to be a copy."""
    first = composed("experiment=tt/cifar10/nasty_resnet18_net")
    composed("experiment=tt/cifar10/nasty_resnet18_net", "method.T=9", "model=plane2")
    assert composed("experiment=tt/cifar10/nasty_resnet18_net") == first


def test_a_file_is_an_experiment_too_and_may_start_from_one_of_these(tmp_path: Path) -> None:
    conf = Path(shutil.copytree(ROOT / "conf", tmp_path / "conf"))
    (conf / "experiment" / "mine").mkdir(parents=True)
    (conf / "experiment" / "mine" / "first.yaml").write_text(
        "# @package _global_\n"
        "defaults: [/experiment/tt/cifar10/nasty_resnet18_net, override /model: preresnet20]\n"
        "seed: 3\n"
    )
    composed()  # registers
    with initialize_config_dir(str(conf), version_base="1.3"):
        own, ours = (
            parse(compose("config", [f"experiment={name}"])) for name in ("mine/first", "tt/cifar10/baseline_net")
        )
    assert (own.model.name, own.seed, own.dataset.name, own.method.name) == (
        "preresnet20",
        3,
        "cifar10",
        "trained_teacher",
    )
    assert (ours.model.name, ours.method.name) == ("net", "scratch")


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(MissingConfigException, match="Could not find 'experiment/tt/cifar10/nasty_resnet18_nett'"):
        composed("experiment=tt/cifar10/nasty_resnet18_nett")


@pytest.mark.slow
def test_several_at_once_in_processes_of_their_own(tmp_path: Path) -> None:
    ended = run_py(
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        "experiment=takd/cifar10/scratch_plane2,tt/cifar10/nasty_resnet18_net",
        "dry_run=true",
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert "student plane2" in ended.stdout
    assert "reference resnet18" in ended.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chains": [["plane3"]]}, "experiments.takd[0].chains[0][0]: did you mean plane"),
        ({"chains": [[]]}, "experiments.takd[0].chains[0]: should have at least 1 entries"),
        ({"about": None}, "experiments.takd[0].about: should be a text (got null)"),
        ({"model": "plane2"}, "experiments.takd[0].model: unknown key"),
        ({"chains": [["plane2"], ["plane2"]]}, "experiment takd/cifar10/scratch_plane2 is declared twice"),
    ],
)
def test_a_declarations_problems_are_lines(change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"kind": "scratch", "datasets": ["cifar10"], "chains": [["plane2"]], "method": "scratch", "about": "alone"}
    monkeypatch.setattr("kd.app.experiments.read_yaml", lambda _: {"experiments": {"takd": [{**whole, **change}]}})
    with pytest.raises(KnownError) as caught:
        experiments.__wrapped__()
    assert str(caught.value).startswith(f"conf/paper/takd.yaml: {said}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tables: [", "cannot be read"),
        ("tables: []\ntables: []", "tables twice"),
        ("- a list", "should be a mapping"),
    ],
)
def test_a_broken_file_of_tables_is_one_line(
    text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "ours.yaml").write_text(text)
    monkeypatch.setattr(declared, "CONF", tmp_path)
    with pytest.raises(KnownError, match=f"^conf/paper/ours.yaml: .*{problem}") as caught:
        declared.read_yaml("ours")
    assert "\n" not in str(caught.value)
