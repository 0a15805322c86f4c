"""The command line as people type it: texts as they are typed, sweeps that were meant, and mistakes in one line."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import kd
from kd.app.command_line import read_command
from kd.app.config import Config, plan
from kd.app.effects import remarks
from kd.app.keys import listed
from kd.app.multirun import Multirun
from kd.app.options import register
from kd.app.parsing import given_keys, parse, recorded
from kd.core.spec import KnownError
from kd.datasets import resolve
from kd.reporting.console import without_comment
from tests.conftest import ROOT, composed, own_option, run_py
from tests.test_readme import PAGES

Job = Callable[..., Any]


def read(*words: str) -> list[str]:
    """The arguments that Hydra gets."""
    GlobalHydra.instance().clear()
    register()
    return read_command(words)


def told(*words: str) -> list[str]:
    """The lines in which a command is refused."""
    with pytest.raises(KnownError) as caught:
        read(*words)
    return str(caught.value).splitlines()


def configured(*words: str) -> Config:
    """The configuration of a single run, as run.py reads it."""
    overrides = read(*words)
    return parse(composed(*overrides), overrides)


# one option, or a run for each -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "group",
    ["model", "teacher", "method", "dataset", "loss", "loss@assistant_loss", "mode", "train", "tracking", "runtime"],
)
def test_a_list_of_options_is_refused_with_the_sweep_that_was_meant(group: str) -> None:
    options = {
        "model": "resnet8,resnet14",
        "teacher": "plane4,plane8",
        "method": "scratch,kd",
        "train": "cifar10,digits",
    }
    options |= {"dataset": "digits,cifar10", "mode": "paper,reference", "tracking": "none,wandb"}
    values = options.get(group, "default,default" if group == "runtime" else "kd,dkd")
    line = f"{group}: takes one option, not a list; a run for each: python run.py -m {group}={values}"
    assert told(f"{group}=[{values}]") == [line]
    assert told("-m", f"{group}=[{values}]") == [line]
    assert read("-m", f"{group}={values}") == ["-m", f"{group}={values}"]


@pytest.mark.parametrize(
    "groups", ["experiment=[takd/cifar10/kd_resnet110_resnet8,takd/cifar10/kd_plane10_plane2]", "sweep=[tpe,takd]"]
)
def test_a_list_for_a_group_without_a_default_is_refused_too(groups: str) -> None:
    assert "takes one option, not a list; a run for each: python run.py -m " in told(groups)[0]
    assert "not a list" in told("hydra/launcher=[basic,joblib]")[0]


@pytest.mark.parametrize("key", ["seed", "method.T", "method.lambda", "train.lr", "replicates", "runtime.device"])
def test_a_list_for_a_key_of_one_value_is_refused_with_the_sweep(key: str) -> None:
    with pytest.raises(KnownError, match=rf"^{re.escape(key)}: .*; a run for each: python run\.py -m {key}=1,2$"):
        configured(f"{key}=[1,2]")
    assert configured("train.milestones=[0.25,0.5]").train.milestones == (0.25, 0.5)


@pytest.mark.parametrize("override", ["seed=0,1", "model=resnet8,resnet14", "seed=range(3)", "method.T=choice(1,5)"])
def test_several_values_without_m_are_refused_with_m(override: str) -> None:
    (line,) = told(override)
    assert line.endswith(f": several values need -m: python run.py -m {shlex.quote(override)}")


def test_an_interval_needs_a_search_and_a_range_needs_values() -> None:
    assert told("-m", "method.T=interval(1,5)")[0].startswith("method.T: interval(1,5) needs a search: sweep=tpe")
    assert read("-m", "sweep=tpe", "method.T=interval(1,5)")[-1] == "method.T=interval(1,5)"
    for empty in ("seed=range(5,1)", "method.T=range(1,2,0)", "method.T=range(1,2,0.0)", "seed=range(0,1e9,0.1)"):
        assert "1 to 100,000 are possible" in told("-m", empty)[0]
    assert told("-m", "model=glob(zz*)") == ["model: there is no value in glob(zz*)"]
    assert told("-m", "seed=range(0,3),7") == ["seed: a range stands alone in range(0,3),7"]


def test_flags_may_follow_overrides_and_a_pasted_comment_is_none() -> None:
    assert read("method=kd", "-m", "seed=0,1") == ["-m", "method=kd", "seed=0,1"]
    assert read("method=kd", "#", "trains", "resnet20") == ["method=kd"]
    assert without_comment(["show", "48b7", "#", "one", "stage"]) == ["show", "48b7"]


# numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("range(0.1,1.05,0.1)", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("range(0.3,0.9,0.3)", [0.3, 0.6]),  # in binary, three steps of .3 are below .9
        ("range(start=0.05,stop=0.2,step=0.05)", [0.05, 0.1, 0.15]),
        ("range(1,0.7,-0.1)", [1.0, 0.9, 0.8]),
    ],
)
def test_a_range_has_the_decimals_that_are_typed(typed: str, values: list[float]) -> None:
    for beside in ((), ("loss.beta=2",)):  # the second is no key of kd's loss, which Hydra is told by ++
        *_, override = read("-m", *beside, f"method.lambda={typed}")
        assert override == f"method.lambda=choice({','.join(map(str, values))})"


def keys(*overrides: str) -> list[str]:
    config = parse(composed(*overrides))
    return [each.key for each in plan(config, resolve(config.dataset, config.data_root))]


@pytest.mark.parametrize(
    ("computed", "plain"),
    [
        ("method.lambda=0.30000000000000004", "method.lambda=0.3"),
        ("method.T=2.9999999999999996", "method.T=3"),
        ("train.lr=0.020000000000000004", "train.lr=0.02"),
        ("train.milestones=[0.30000000000000004,0.7999999999999999]", "train.milestones=[0.3,0.8]"),
        ("dataset.val_fraction=0.15000000000000002", "dataset.val_fraction=0.15"),
    ],
)
def test_a_rounding_error_makes_no_other_key(computed: str, plain: str) -> None:
    assert keys(computed) == keys(plain)
    assert recorded(composed(computed)) == recorded(composed(plain)) or plain == "method.T=3"
    assert keys(plain) != keys()


def test_numbers_of_our_own_files_keep_their_keys() -> None:
    """Twelve digits are enough for each of them."""
    for path in (ROOT / "conf").rglob("*.yaml"):
        for number in re.findall(r"(?<![\w.])\d*\.\d+(?:e-?\d+)?", path.read_text()):
            assert float(f"{float(number):.12g}") == float(number), path


def test_a_search_gives_its_trials_plain_numbers(job: Job) -> None:
    """Optuna's third step from .1 is .30000000000000004."""
    space = "method.lambda=range(0.1,0.5,0.2)"
    results = job("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "train.epochs=1", space, multirun=True)
    found = {result["chain"][-1]["loss"]["lambda"] for result in results}
    assert found <= {0.1, 0.3, 0.5}


# a search maximises ------------------------------------------------------------------------------------------------


def test_a_plain_optuna_sweep_maximises_and_says_so(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "method=scratch", "train.epochs=1")
    results = job(*words, "train.lr=choice(0.00001,0.01)", multirun=True)
    assert "hydra.sweeper.direction=maximize: jobs return accuracies" in capsys.readouterr().out
    best = yaml.safe_load((tmp_path / "out" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(result["objective"] for result in results)


@pytest.mark.parametrize("choice", ["hydra/sweeper=optuna", "sweep=tpe"])
def test_a_search_that_is_told_to_minimise_is_refused(
    job: Job, capsys: pytest.CaptureFixture[str], choice: str
) -> None:
    job(choice, "hydra.sweeper.direction=minimize", multirun=True, code=2)
    assert capsys.readouterr().err == (
        "hydra.sweeper.direction: a search maximises accuracy; hydra.sweeper.direction=maximize or nothing\n"
    )


@pytest.mark.parametrize(
    ("sweeper", "key", "wanted"),
    [
        ({"optim": {"maximize": False}}, "optim.maximize", True),  # Nevergrad
        ({"ax_config": {"experiment": {"minimize": True}}}, "ax_config.experiment.minimize", False),  # Ax
        ({"direction": ["minimize"]}, "direction", "maximize"),
    ],
)
def test_other_sweepers_maximise_too(
    sweeper: dict[str, Any], key: str, wanted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = {"sweeper": {"_target_": "Sweeper", **sweeper}, "sweep": {"dir": str(tmp_path)}}
    launcher = {"launcher": {"_target_": "x.BasicLauncher"}, "overrides": {"hydra": [], "task": []}}
    cfg = OmegaConf.create({"hydra": {**sweep, **launcher}})
    Multirun().on_multirun_start(cfg, config_name="config")
    Multirun.folder = None
    assert OmegaConf.select(cfg.hydra.sweeper, key) == wanted
    assert f"hydra.sweeper.{key}={str(wanted).lower()}: jobs return accuracies" in capsys.readouterr().out


# overrides without effect ------------------------------------------------------------------------------------------


def lines(*words: str, multirun: bool = False) -> list[str]:
    """What a run says before it begins."""
    overrides = read(*words)
    config = parse(cfg := composed(*overrides), overrides)
    dataset = resolve(config.dataset, config.data_root)
    return [*remarks(config, dataset, plan(config, dataset)[0], given_keys(cfg, overrides), multirun=multirun)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("method=scratch method.T=5", "method.T has no effect: method=scratch does not read it"),
        ("method.assistants=[resnet14]", "method.assistants has no effect: method=kd does not read it"),
        ("+method.weights=[1,2]", "method.weights has no effect: method=kd does not read it"),
        ("method.assistant.T=2", "method.assistant.T has no effect: method=kd does not read it"),
        (
            "method=trained_teacher method.assistant.T=2",
            "method.assistant.T has no effect: method=trained_teacher has no assistant",
        ),
        ("loss.beta=2", "loss.beta has no effect: loss=kd does not read it"),
        ("loss=dkd loss.gamma=2", "loss.gamma has no effect: loss=dkd does not read it"),
        ("method=ta assistant_loss.beta=2", "assistant_loss.beta has no effect: assistant_loss=kd does not read it"),
        ("loss=rkd method.T=2", "method.T has no effect: loss=rkd does not read it"),
        ("method=scratch teacher=resnet110", "teacher=resnet110 has no effect: method=scratch has no teacher"),
        ("method=scratch teacher.train.lr=1", "teacher.train.lr has no effect: method=scratch has no teacher"),
        (
            "method=multi_teacher method.teachers=[resnet14,resnet26] teacher=resnet110",
            "teacher=resnet110 has no effect: the teachers are resnet14, resnet26",
        ),
        (
            "train.optimizer=adam train.lr=0.001 train.momentum=0.5",
            "train.momentum has no effect: train.optimizer=adam does not read it",
        ),
        (
            "model.train.optimizer=adamw model.train.lr=0.001 model.train.nesterov=true",
            "model.train.nesterov has no effect: train.optimizer=adamw does not read it",
        ),
        (
            "train.schedule=cosine train.milestones=[0.3]",
            "train.milestones has no effect: train.schedule=cosine does not read it",
        ),
        (
            "teacher.train.schedule=constant teacher.train.gamma=0.5",
            "teacher.train.gamma has no effect: train.schedule=constant does not read it",
        ),
        (
            "model.train.label_smoothing=0.1",
            "model.train.label_smoothing has no effect: student resnet8 does not learn from labels alone",
        ),
        (
            "method=trained_teacher model.train.label_smoothing=0.1",
            "model.train.label_smoothing has no effect: student resnet8 does not learn from labels alone",
        ),
        (
            "freeze=[resnet20]",
            "freeze=resnet20 has no effect: no network between the ends of the chain has this name "
            "(the ends have model.freeze and teacher.freeze)",
        ),
        (
            "experiment=takd/cifar10/kd_resnet110_resnet8 dataset=digits",
            "recipe train=cifar10, not that of dataset=digits, which is train=digits",
        ),
        (
            "method=scratch train.lr=0.2 model.train.lr=0.1",
            "train.lr has no effect: model.train.lr takes its place",
        ),
        (
            "method.lambda=0 method.T=2",
            "method.T changes nothing of the student's training but its key: method.lambda=0",
        ),
        (
            "dataset.views=5 dataset.augment=none",
            "dataset.views=5 changes no image, but the keys of the stages: augment=none has 1 in all",
        ),
        (
            "dataset.split_seed=5 dataset.val_fraction=0 train.select=last",
            "dataset.split_seed changes no split, but the keys of the stages: no images are split off for validation",
        ),
        (
            "experiment=takd/cifar10/tuned_kd_resnet110_resnet20 method=scratch dataset=digits mode=paper",
            "method.T has no effect: method=scratch does not read it",
        ),
        (
            "method=trained_teacher model.image_size=32",
            "the reference resnet8 is trained without what is for the student alone: model.image_size",
        ),
        ("sweep.join=true", "sweep.join has no effect: this run is not a trial of a search"),
        ("sweep.prune=true", "sweep.prune has no effect: this run is not a trial of a search"),
        ("sweep.objective=test_acc", "sweep.objective has no effect: this is a single run, without -m"),
        ("runtime.tables=true", "runtime.tables has no effect: this is a single run, without -m"),
        ("runtime.live=true", "runtime.live has no effect: this is a single run, without -m"),
        ("hydra/launcher=joblib", "hydra/launcher has no effect: this is a single run, without -m"),
        ("hydra.sweep.dir=sw", "hydra.sweep.dir has no effect: this is a single run, without -m"),
        ("tracking=none tracking.project=x", "tracking.project has no effect: tracking=none does not read it"),
        (
            "tracking=tensorboard tracking.tags=[x]",
            "tracking.tags has no effect: tracking=tensorboard does not read it",
        ),
    ],
)
def test_what_is_typed_without_effect_is_said_in_one_line(words: str, line: str) -> None:
    assert line in lines(*words.split())


def test_what_a_sweep_reads_has_an_effect_there() -> None:
    assert lines("sweep.objective=test_acc", "runtime.tables=true", "hydra.sweep.dir=sw", multirun=True) == []
    (line,) = lines("hydra.run.dir=here", multirun=True)
    assert line == "hydra.run.dir has no effect: the folder of a multirun is hydra.sweep.dir"
    assert lines("hydra.run.dir=here") == []
    assert lines("tracking=wandb", "tracking.project=x") == []
    assert lines("tracking.name=tensorboard", "tracking.project=null") == []


@pytest.mark.parametrize(
    "words",
    [
        "method.T=5 method.lambda=0.3 teacher=resnet110 teacher.train.lr=0.02 train.lr=0.01",
        "method=ta method.assistants=[resnet14] method.assistant.T=2 loss=dkd loss.beta=2 loss.warmup=1",
        "train.optimizer=adam train.lr=0.001 model.train.optimizer=sgd train.momentum=0.5",  # the student reads it
        "train.label_smoothing=0.1",  # the teacher reads it
        "method=multi_teacher teacher=resnet110 method.weights=[1,2]",
        "experiment=takd/cifar10/kd_resnet110_resnet8",
    ],
)
def test_nothing_is_said_of_what_has_an_effect(words: str) -> None:
    assert lines(*words.split()) == []


def test_an_idle_key_moves_no_key_and_is_not_recorded() -> None:
    overrides = read("method=scratch", "method.T=5")
    cfg = composed(*overrides)
    config = parse(cfg, overrides)
    idle = plan(config, resolve(config.dataset, config.data_root))
    assert [each.key for each in idle] == keys("method=scratch")
    assert recorded(cfg, overrides)["method"] == {"name": "scratch"}


def test_a_grid_in_a_file_may_have_different_keys_too(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = '{method: "scratch,kd", method.lambda: "range(0.3,0.9,0.3)"}'  # .3 and .6, as typed
    own_option(tmp_path / "own", "experiment/mine", f"hydra: {{sweeper: {{params: {params}}}}}\n")
    results = job(f"--config-dir={tmp_path}/own", "experiment=mine", "method.T=2", "train.epochs=1", multirun=True)
    assert [result["method"] for result in results] == ["scratch", "scratch", "kd", "kd"]
    assert [result["chain"][-1]["loss"].get("T") for result in results] == [None, None, 2, 2]
    assert [result["chain"][-1]["loss"].get("lambda") for result in results] == [None, None, 0.3, 0.6]
    assert capsys.readouterr().out.count("method.T has no effect: method=scratch does not read it") == 1


def test_methods_and_losses_of_different_keys_are_one_sweep(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    results = job("method=scratch,kd", "method.T=2,4", "train.epochs=1", multirun=True)
    printed = capsys.readouterr().out
    assert [result["chain"][-1]["loss"].get("T") for result in results] == [None, None, 2, 4]
    assert len({result["chain"][-1]["key"] for result in results}) == 3
    assert printed.count("method.T has no effect: method=scratch does not read it") == 1  # of two jobs
    assert "++" not in printed.partition("4 jobs, ")[2]
    assert read("-m", "loss=kd,dkd", "loss.beta=2,8")[-1] == "++loss.beta=2,8"
    assert read("-m", "method=kd,ta", "method.assistants=[resnet14]")[-1] == "++method.assistants=[resnet14]"


def test_a_key_that_no_option_has_is_refused() -> None:
    assert told("method=scratch", "method.temprature=3")[0].startswith("method.temprature: unknown key; ")
    with pytest.raises(KnownError, match=r"method\.temprature: unknown key"):
        parse(composed("+method.temprature=3"), ["+method.temprature=3"])


# texts -------------------------------------------------------------------------------------------------------------

TEXTS = [
    "runs/epoch=9-step=100.ckpt", "~/pets", "~nobody/x", "my pets/a b", "pets (copy)", "pets[1]", "{pets}", "C:/pets",
    "a:b", "2024", "1e3", "true", "a'b", 'say "pets"', "100%", "a&b|c;d", "a#b", "ünï/λ", "x!",
    "a?b*", "-x", "a@b", "^", "`x`",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_means_what_is_typed(text: str) -> None:
    names = ("teacher.checkpoint", "dataset.root", "runtime.store", "dataset.label", "tracking.project", "model.init")
    cfg = composed(*read(*(f"{name}={text}" for name in names), f"+init.resnet14={text}"))
    assert [OmegaConf.select(cfg, name) for name in names] == [text] * len(names)
    assert cfg.init.resnet14 == text


@pytest.mark.parametrize("word", ["dataset.root=null", "dataset.root=", "dataset.root='a b'", 'dataset.root="a=b"'])
def test_null_and_what_is_quoted_already_stay(word: str) -> None:
    assert read(word) == [word]


def test_commas_sweep_over_texts() -> None:
    assert read("-m", "dataset.root=~/pets,x=1,plain")[1] == "dataset.root='~/pets','x=1',plain"
    assert read("-m", "teacher.checkpoint=choice(a=1.ckpt,b.ckpt)")[1] == "teacher.checkpoint=choice('a=1.ckpt',b.ckpt)"
    assert "one text: \"dataset.label='cats, dogs'\"" in told("dataset.label=cats, dogs")[0]
    assert read("tracking.tags=[2024,a=b,plain]") == ["tracking.tags=['2024','a=b',plain]"]
    assert read("dataset.root=${oc.env:HOME,/tmp}/a=b") == ["dataset.root='${oc.env:HOME,/tmp}/a=b'"]


def test_a_checkpoint_and_photographs_are_found_as_they_are_typed(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a folder of its own, which is the home folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command("teacher.checkpoint=runs/epoch=9-step=100.ckpt", "dry_run=true", "hydra.run.dir=out") == 2
    told = capfd.readouterr().err
    assert told == "teacher.checkpoint: runs/epoch=9-step=100.ckpt cannot be read (No such file or directory)\n"
    assert command("dataset=folder", "dataset.root=~/pets", "hydra.run.dir=out") == 2
    assert capfd.readouterr().err.startswith("dataset.root: ~/pets does not exist")


def shell_lines() -> list[str]:
    """Each command of README and docs/ that has its own line, with its comment."""
    starts = r"^((?:python|make|torchrun|pip|pytest) .*)$"
    pages = (page for page in PAGES if page.name != "measurements.md")
    blocks = (text for page in pages for text in re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S))
    return [line for text in blocks for line in re.findall(starts, text.replace("\\\n", ""), re.MULTILINE)]


def test_the_commands_of_the_docs_survive_zsh_and_powershell() -> None:
    """No shell reads what is outside of single quotes. zsh hands a pasted comment over, and make would take it."""
    assert len(shell_lines()) > 40
    for line in shell_lines():
        command, _, comment = re.sub(r"'[^'\"\\]*'", "", line).partition(" #")
        placeholders = re.sub(r"<[\w-]+>", "", command)
        assert re.fullmatch(r"[\w./=,:@+ …-]*", placeholders), line
        assert re.fullmatch(r"[\w./=,:+ -]*", comment), line
        assert not comment or line.startswith("python"), line


@pytest.mark.parametrize("shell", [name for name in ("bash", "dash", "zsh") if shutil.which(name)])
def test_a_shell_hands_the_commands_over(shell: str) -> None:
    for line in (each for each in shell_lines() if "<" not in each):
        command = f'show() {{ printf "%s\\n" "$@"; }}\nshow {line}\n'
        printed = subprocess.run([shell], input=command, capture_output=True, text=True, check=True).stdout
        assert printed.splitlines() == without_comment(shlex.split(line)), line


# misspelt ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("model=resnet9", "model=resnet9: there is no such option; did you mean resnet8, "),
        ("teacher=ResNet-110", "teacher=ResNet-110: there is no such option; did you mean resnet110"),
        ("method=kdd", "method=kdd: there is no such option; did you mean kd"),
        ("loss=dk", "loss=dk: there is no such option; did you mean dkd"),
        ("loss@assistant_loss=crdd", "loss@assistant_loss=crdd: there is no such option; did you mean crd"),
        ("dataset=cifar-100", "dataset=cifar-100: there is no such option; did you mean cifar100"),
        ("train=cifr10", "train=cifr10: there is no such option; did you mean cifar10"),
        ("mode=papers", "mode=papers: there is no such option; did you mean paper?"),
        ("tracking=wandbb", "tracking=wandbb: there is no such option; did you mean wandb?"),
        ("runtime=fast", "runtime=fast: there is no such option; there are default"),
        ("sweep=tpee", "sweep=tpee: there is no such option; did you mean tpe"),
        ("experiment=takd/cifar10/kd_resnet110_resnet", "did you mean takd/cifar10/kd_resnet110_resnet8"),
        ("experiment=takd/cifar10", "experiment=takd/cifar10: is a folder of options: takd/cifar10/"),
        ("hydra/launcher=joblb", "hydra/launcher=joblb: there is no such option; did you mean joblib?"),
        ("hydra/sweeper=optna", "did you mean optuna?"),
        ("model=", "model=: there is no such option; there are "),
        ("method=null", "method=null: there is no such option; there are "),
        ("model=3", "model=3: there is no such option; "),
        ("model={name: x}", "model: takes the name of an option, not keys"),
        ("mehtod=kd", "mehtod: unknown key; did you mean method"),
        ("paper=takd", "paper: unknown key; "),
        ("method@foo=kd", "method@foo: unknown key; did you mean method?"),
        ("method.lamda=3", "method.lamda: unknown key; did you mean method.lambda"),
        ("train.batchsize=3", "train.batchsize: unknown key; did you mean train.batch_size"),
        ("epochs=3", "epochs: unknown key; did you mean "),
        ("T=5", "T: unknown key; did you mean method.T?"),
        ("runtime.devcie=cpu", "runtime.devcie: unknown key; did you mean runtime.device"),
        ("model.name.x=3", "model.name.x: unknown key; did you mean model.name"),
        ("hydra.launcher.n_jobs=3", "hydra.launcher.n_jobs: unknown key; hydra/launcher=basic has none of this name"),
        ("+method.T=5", "method.T: exists already; leave the + out"),
        ("+model=plane2", "model: is chosen without a +"),
        ("~nope", "~nope: unknown key; "),
        ("~teacher", "~teacher: cannot be left out; method=scratch has none"),
        ("~dataset", "~dataset: cannot be left out; dataset=<name> chooses another"),
        ("~tracking", "~tracking: cannot be left out; tracking=none turns it off"),
        ("model=torchvision/resnet18", "there is no such option; model=torchvision model.arch=resnet18"),
        ("teacher=timm/vit_tiny", "there is no such option; teacher=timm teacher.arch=vit_tiny"),
        ("loss=mylab.losses.Mine", "there is no such option; a dotted path is loss.name=mylab.losses.Mine"),
        ("train.learning_rate=.1", "train.learning_rate: unknown key; did you mean train.lr, "),
        ("method.alpha=3", "method.alpha: unknown key; did you mean method.lambda"),
        ("method.temperature=3", "method.temperature: unknown key; did you mean method.T?"),
        ("foo", "foo: should be key=value"),
        ("=3", "=3: should be key=value"),
        ("method.T={", "method.T: { cannot be read; "),
        ("seed=${", "seed: ${ cannot be read; "),
        ("train.weight_decay=1e-400", "train.weight_decay: 1e-400 is too small for a number of 64 bits"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_names(word: str, line: str) -> None:
    (found,) = told(word)
    assert line in found
    assert len(found) < 300


def test_all_mistakes_are_told_at_once() -> None:
    found = told("-m", "model=resnet8,resnet9", "method=kdd", "seed=[", "mehtod=kd")
    assert [line.partition(":")[0] for line in found] == ["seed", "model=resnet9", "method=kdd", "mehtod"]


def test_a_mistake_ends_run_py_with_2_and_no_traceback(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert command("model=resnet9", "--cfg", "job") == 2
    out, told = capfd.readouterr()
    assert out == ""
    assert told.startswith("model=resnet9: there is no such option; did you mean resnet8")
    assert told.count("\n") == 1


def test_keys_that_a_user_names_need_no_plus() -> None:
    assert configured("init.resnet14=runs/a=1.ckpt").init == {"resnet14": "runs/a=1.ckpt"}
    name = configured("model=timm", "model.arch=resnet18", "model.args.drop_rate=0.1").model.name
    assert "resnet18" in name
    assert "drop_rate" in name


# --help ---------------------------------------------------------------------------------------------------------------


def test_help_lists_the_groups_that_can_be_chosen(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Not the folders of conf/ that are none. Networks and published rows are not listed twice."""
    assert command("--help") == 0
    printed = capfd.readouterr().out
    groups = dict(re.findall(r"^(\w+): (.+)$", printed.partition("Set any key")[0], re.MULTILINE))
    assert {"dataset", "experiment", "loss", "method", "mode", "model", "runtime", "sweep", "teacher"} <= groups.keys()
    assert not {"paper", "hydra"} & groups.keys()
    assert re.fullmatch(r"\d+ rows of tables: docs/experiments.md", groups["experiment"])
    assert "resnet8, " in groups["model"]
    assert groups["teacher"] == "as model"


def test_help_says_what_is_possible_and_lists_no_setting_twice(tmp_path: Path) -> None:
    done = run_py("--help", "method=ta", "dataset.decode=stream", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for told in (
        "mode=paper paper, reference",
        "train.select=null best_val, last, best_test, best_test_batches",
        "train.precision=null auto, fp32, bf16, fp16, fp64",
        "train.schedule=null constant, step, cosine",
        "train.optimizer=null sgd, adam, adamw",
        "train.momentum=null a number from 0 below 1",
        "dataset.resize=short_side short_side, squash, pad",
        "dataset.decode=stream auto, array, stream",
        "teacher.freeze=null backbone",
        "method.lambda=0.5 a number from 0 to 1",
        "runtime.device=auto auto, cpu, cuda, cuda:1",
        "runtime.store=${oc.env:KD_STORE,null}",
        "seed=0 a whole number from 0",
        "freeze=[]",
    ):
        assert told in [" ".join(line.split()) for line in lines], told
    keys = [line.partition("=")[0] for line in lines if re.match(r"[\w.]+=", line)]
    assert len(set(keys)) == len(keys)
    assert not [key for key in keys if key.startswith(("model.train", "teacher.train"))]
    assert all(len(line) <= 80 for line in lines[lines.index("model.arch=null") :])


@pytest.mark.parametrize("options", [["loss=dkd", "method=dgkd"], ["method=scratch"], ["loss=crd", "sweep=tpe"]])
def test_every_key_is_in_the_help(options: list[str]) -> None:
    """That of each option, too; where a group is chosen by its name, this stands above."""
    cfg = composed(*options)
    shown = {line.partition("=")[0] for line in listed(cfg).splitlines()}
    for name, value in cfg.items_ex(resolve=False):
        for key in (f"{name}.{each}" for each in value) if isinstance(value, DictConfig) and value else [str(name)]:
            inside = any(each.startswith(f"{key}.") for each in shown)
            assert key in shown or inside or key.endswith((".name", ".train")), key


# options of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path) -> Path:
    """A folder with an experiment and a sweep, outside of conf/."""
    for name, keys in (("experiment/mine/first", "method: {T: 9}"), ("sweep/mine", "method: {T: 8}")):
        file = tmp_path / "own" / f"{name}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(f"# @package _global_\n{keys}\n")
    return tmp_path / "own"


@pytest.mark.parametrize("way", ["--config-dir={}", "hydra.searchpath=[{}]"])
def test_options_of_a_folder_of_ones_own(options: Path, way: str) -> None:
    where = way.format(options)
    for choice in ("experiment=mine/first", "sweep=mine"):
        assert read(where, choice) == [where, choice]
    (line,) = told(where, "experiment=mine/frist")
    assert line.startswith("experiment=mine/frist: there is no such option; ")
    assert "mine/first" in line


def test_again_has_what_a_sweep_began_with(
    options: Path, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (options / "mine.yaml").write_text("defaults: [config, _self_]\ntrain: {epochs: 1}\n")
    (options / "sweep" / "mine.yaml").write_text(
        "# @package _global_\nmethod: {lambda: 0.9}\nhydra: {sweeper: {params: {method.T: '1,2'}}}\n"
    )
    flags = (f"--config-dir={options}", "--config-name=mine")
    common = ("model=plane2", "teacher=plane4", "tracking=none", f"runtime.store={tmp_path / 'store'}")
    assert command(*flags, "-m", "sweep=mine", *common, f"hydra.sweep.dir={tmp_path / 'out'}") == 0
    (again,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("again: ")]
    words = shlex.split(again)[3:]
    assert words[:3] == [*flags, "sweep=mine"]
    assert command(*words, "dry_run=true", f"hydra.run.dir={tmp_path / 'again'}") == 0
    assert "0 of 2 stages to train" in capsys.readouterr().out


def test_a_folder_of_options_that_is_not_there() -> None:
    assert told("--config-dir=/nope", "seed=1") == ["--config-dir: /nope is not a folder"]


# references ----------------------------------------------------------------------------------------------------------


def test_a_sweep_with_references_keeps_them(
    job: Job,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What they refer to has a value in a job alone, and may be a secret: no file and no line has it."""
    monkeypatch.setenv("KD_TEST_PLACE", str(tmp_path / "hidden-place"))
    own = ("method=scratch", "train.epochs=1", "seed=${hydra:job.num}", "runtime.data=${oc.env:KD_TEST_PLACE}")
    first, second = job("train.lr=0.01,0.02", *own, multirun=True)
    assert [each["chain"][-1]["seed"] for each in (first, second)] == [0, 1]
    out = capsys.readouterr().out
    assert "again: python run.py " in out
    written = [
        path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".md", ".csv", ".sh", ".yaml")
    ]
    assert any("oc.env" in text for text in written)
    assert not any("hidden-place" in text for text in [out, *written])
    assert [row["seed"] for row in kd.results(tmp_path / "out")] == [0, 1]


def test_a_sweep_with_a_reference_to_nothing_fails(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("method=scratch", "seed=${oc.env:KD_NOPE}", "train.lr=0.01,0.02", multirun=True, code=1)
    assert "seed: has no value" in capsys.readouterr().out
