"""The configuration: every option can be used, and all bad values are reported at once, one line each."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException

from kd.app.config import plan, recipe_name
from kd.app.parsing import parse
from kd.core.recipes import RECIPES
from kd.core.spec import KnownError
from kd.datasets import DATASETS, Facts, specify
from kd.methods import METHODS
from kd.models import MODELS
from kd.models.libraries import LIBRARIES
from tests.conftest import ROOT, composed

CONF = ROOT / "conf"
GROUPS = {
    "model": {*MODELS, *LIBRARIES},
    "teacher": {*MODELS, *LIBRARIES},
    "dataset": set(DATASETS),
    "method": set(METHODS),
    "mode": set(RECIPES),
    "train": {*RECIPES["paper"], *DATASETS},
}


def options_of(group: str) -> set[str]:
    composed()  # readies Hydra's configuration loader
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return set(GlobalHydra.instance().config_loader().get_group_options(group))


@pytest.mark.parametrize("group", GROUPS)
def test_options_equal_tables(group: str) -> None:
    assert options_of(group) == GROUPS[group]


def options() -> list[str]:
    files = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name != "paper")  # tables, no group
    from_files = [f"{path.relative_to(CONF).parent.as_posix()}={path.stem}" for path in files]
    from_tables = [f"{group}={name}" for group in ("model", "teacher", "train") for name in sorted(GROUPS[group])]
    return [*from_files, *from_tables]


def suited(option: str) -> list[str]:
    """A recipe that knows the network of an option, or a network that the recipe of an option knows.

    Networks, recipes and data sets that are added need not go with the defaults.
    """
    group, name = option.split("=")
    recipes = RECIPES["paper"]
    if name in LIBRARIES:
        return [f"{group}.arch=resnet18"]
    if group in ("model", "teacher") and MODELS[name].recipe is None:
        known = [recipe for recipe, families in recipes.items() if MODELS[name].family in families]
        return [] if "digits" in known else [f"train={known[0]}"]
    if group in ("train", "dataset") and "cifar_resnet" not in (families := recipes[recipe_name("paper", name)]):
        fitting = next(model for model, entry in MODELS.items() if entry.family in families)
        return [f"model={fitting}", f"teacher={fitting}"]
    return []


@pytest.mark.parametrize("option", options())
def test_every_yaml_composes_parses_and_plans(option: str) -> None:
    needed = {
        "dataset=folder": ["dataset.root=/nowhere"],
        "mode=reference": ["dataset=cifar10"],
        "sweep=takd": ["dataset=cifar10"],
    }
    extra = needed.get(option, [])
    config = parse(composed(option, *extra, *suited(option)))
    chain = plan(
        config, specify(config.dataset, DATASETS[config.dataset.name].facts or Facts(2, 32, (0,) * 3, (1,) * 3))
    )
    assert chain[0].role == "student"


def test_defaults() -> None:
    config = parse(composed())
    assert (config.model.name, config.teacher.name, config.method.name) == ("resnet8", "resnet20", "kd")
    assert config.dataset.name == "digits"
    assert list(parse(composed("method=ta")).method.model_dump()["assistants"]) == ["resnet14"]


def test_the_recipe_follows_the_data_set_unless_named() -> None:
    assert composed("dataset=cifar100").train.recipe == "cifar100"
    assert composed("dataset=folder", "train=cifar10").train.recipe == "cifar10"


def test_experiments_and_sweeps_come_last() -> None:
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    assert defaults[-5:-2] == ["_self_", {"experiment": None}, {"sweep": None}]  # the last two are of Hydra itself


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.lambda=1.5", "method.lambda: should be at most 1 (got 1.5)"),
        ("method.T=0", "method.T: should be above 0 (got 0)"),
        ("method.T=hot", "method.T: should be a number (got 'hot')"),
        ("method.T=nan", "method.T: should be a finite number"),
        ("+method.foo=1", "method.foo: unknown key (got 1); did you mean method, method.T?"),
        ("+method.temperature=1", "method.temperature: unknown key (got 1); did you mean method.T?"),
        ("+foo=1", "foo: unknown key"),
        ("~method", "method.name: should be one of scratch, kd, ta, trained_teacher"),
        ("seed=-1", "seed: should be at least 0 (got -1)"),
        ("seed=0.5", "seed: should be a whole number (got 0.5)"),
        ("replicates=0", "replicates: should be at least 1 (got 0)"),
        ("dry_run=maybe", "dry_run: should be true or false (got 'maybe')"),
        ("dry_run=1", "dry_run: should be true or false (got 1)"),
        ("runtime.compile=maybe", "runtime.compile: should be true or false, or 'auto' (got 'maybe')"),
        ("dataset.views=0", "dataset.views: should be at least 1, or 'auto' (got 0)"),
        ("model.name=resnet9", "model.name: did you mean resnet8? there are plane2, plane4"),
        ("teacher.train.epochs=0", "teacher.train.epochs: should be at least 1 (got 0)"),
        ("train.precision=fp8", "train.precision: should be 'auto', 'fp32', 'bf16', 'fp16' or 'fp64' (got 'fp8')"),
        ("train.milestones=[0.7,0.5]", "train.milestones should increase (got [0.7, 0.5])"),
        (
            "train.milestones=[2]",
            "train.milestones[0]: should be a fraction of the epochs, between 0 and 1: 80 of 160 is 0.5 (got 2)",
        ),
        ("train.recipe=mnist", "train.recipe: should be one of digits, fashion_mnist"),
        ("mode=reference", "cifar10, cifar100, tiny_imagenet in mode=reference (got 'digits')"),
        ("dataset.augment=null", "dataset.augment: null is only for mode=reference"),
        ("teacher.normalize=lab", "teacher.normalize: should be one of digits, fashion_mnist, cifar10"),
        ("teacher.normalize={mean: [0, 0, 0], std: [0, 1, 1]}", "teacher.normalize.std[0]: should be above 0 (got 0)"),
        (
            "teacher.normalize=cifar10",
            "teacher.normalize: needs teacher.checkpoint=<file>, which is not set",
        ),
        ("teacher.part=student", "teacher.part: needs teacher.checkpoint=<file>, which is not set"),
        ("teacher.checkpoint=", "teacher.checkpoint: should not be empty"),
        ("teacher.checkpoint=nothing.pt", "teacher.checkpoint: nothing.pt cannot be read (No such file or directory)"),
        ("teacher.min_acc=101", "teacher.min_acc: should be at most 100 (got 101)"),
        ("model.train.momentum=0", "student resnet8: train.nesterov=true needs train.momentum above 0"),
        ("dataset.name=mnist", "dataset.name: should be one of digits"),
        ("dataset.val_fraction=0", "resnet20: train.select=best_val needs dataset.val_fraction above 0"),
        ("dataset=folder", "dataset.root: dataset=folder needs the path of its images"),
        ("dataset.root=pets", "dataset.root: is only for dataset=folder and dataset=tiny_imagenet"),
        ("runtime.device=tpu", "runtime.device: should be auto, cpu, mps, cuda, or the number of a GPU"),
        ("tracking.mode=sometimes", "tracking.mode: should be 'auto', 'online' or 'offline'"),
        ("tracking.mode=disabled", "tracking.mode: tracking=none turns it off"),
        ("~model", "model.name: is missing"),
        ("train.epochs=${nothing}", "train.epochs: has no value"),
    ],
)
def test_bad_values(override: str, message: str) -> None:
    with pytest.raises(KnownError) as caught:
        parse(composed(override))
    lines = str(caught.value).splitlines()
    assert any(message in line for line in lines), lines


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("loss.name=dkd", "loss.name: is chosen by loss=dkd"),
        ("loss.name=distill", "loss.name: is chosen by loss=kd"),
        ("loss.name=kd", "loss.name: is chosen by loss=kd"),
        ("++assistant_loss.name=dkd", "assistant_loss.name: is chosen by loss@assistant_loss=dkd"),
        ("method.name=ta", "method.name: is chosen by method=ta"),
        ("dataset.name=cifar100", "dataset.name: is chosen by dataset=cifar100"),  # the rest would be the digits'
    ],
)
def test_a_name_without_its_options_other_keys(override: str, line: str) -> None:
    with pytest.raises(KnownError) as caught:
        parse(composed(override), [override])
    assert str(caught.value) == line


def test_a_run_and_a_search_say_how_an_option_is_chosen(
    job: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job("loss.name=dkd", code=2)
    assert capsys.readouterr().err == "loss.name: is chosen by loss=dkd\n"
    job("sweep=tpe", "loss.name=dkd", multirun=True, code=2)
    assert capsys.readouterr().err == "loss.name: is chosen by loss=dkd\n"


def test_all_problems_at_once() -> None:
    bad = (
        "method.lambda=2",
        "seed=-1",
        "train.lr=0",
        "dataset.val_fraction=0",
        "runtime.threads=0",
        "train.select=best_val",
    )
    with pytest.raises(KnownError) as caught:
        parse(composed(*bad))
    keys = {line.split(":")[0] for line in str(caught.value).splitlines()}
    assert {"method.lambda", "seed", "train.lr", "runtime.threads"} <= keys


def test_problems_between_groups_are_found_beside_others() -> None:
    with pytest.raises(KnownError) as caught:
        parse(composed("method.lambda=2", "train.momentum=0", "train.warmup=99"))
    text = str(caught.value)
    assert "method.lambda" in text
    assert "teacher resnet20: train.nesterov" in text
    assert "train.warmup should be below train.epochs" in text


def test_only_stages_of_the_chain_need_a_validation_split() -> None:
    parse(composed("method=scratch", "dataset.val_fraction=0", "model.train.select=last"))
    with pytest.raises(KnownError, match=r"teacher resnet20: train.select=best_val needs"):
        parse(composed("dataset.val_fraction=0", "model.train.select=last"))


def test_another_optimizer_needs_a_learning_rate() -> None:
    with pytest.raises(KnownError, match=r"student resnet8: train.optimizer=adam needs a train.lr of its own"):
        parse(composed("train.optimizer=adam"))
    parse(composed("train.optimizer=adam", "train.lr=0.001"))
    parse(composed("method=scratch", "train.optimizer=adam", "model.train.lr=0.001"))  # scratch has no teacher


@pytest.mark.parametrize(
    ("common", "idle"),
    [
        (("train.optimizer=adam", "train.lr=0.001"), "train.momentum=0.5"),
        (("train.schedule=cosine",), "train.milestones=[0.3]"),
        (("train.schedule=constant",), "train.gamma=0.5"),
    ],
)
def test_what_is_not_read_makes_no_difference(common: tuple[str, ...], idle: str) -> None:
    one, other = (parse(composed(*common, *extra)) for extra in ((), (idle,)))
    dataset = specify(one.dataset, Facts(2, 32, (0,) * 3, (1,) * 3))
    assert plan(one, dataset)[0].key == plan(other, dataset)[0].key


def test_a_wrong_assistant_is_one_problem() -> None:
    with pytest.raises(KnownError) as caught:
        parse(composed("method=ta", "method.assistants=[resnet9]"))
    assert str(caught.value).startswith("method.assistants[0]: did you mean resnet8?")
    assert len(str(caught.value).splitlines()) == 1


def test_parse_changes_nothing() -> None:
    cfg = composed("method=ta")
    before = cfg.copy()
    parse(cfg)
    assert cfg == before


@pytest.mark.parametrize("override", ["model=resnet9", "method.temprature=3"])
def test_unknown_groups_and_keys_are_hydras_to_refuse(override: str) -> None:
    with pytest.raises(ConfigCompositionException):
        composed(override)


def test_the_help_says_how_the_loss_of_assistants_is_chosen() -> None:
    text = yaml.safe_load((CONF / "config.yaml").read_text())["hydra"]["help"]["footer"]
    (command,) = [line for line in text.splitlines() if "loss@assistant_loss=" in line]
    overrides = command.partition("   ")[0].removeprefix("python run.py ").split()
    assert parse(composed(*overrides)).assistant_loss.name == "dkd"
