"""`why=<key>`: where a value comes from, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from kd.app.command_line import read_command
from kd.app.config import plan
from kd.app.options import register
from kd.app.parsing import parse
from kd.app.provenance import reasons
from kd.core.hardware import cpu_count
from kd.core.spec import KnownError
from kd.datasets import resolve
from tests.conftest import ROOT


def told(*overrides: str) -> list[str]:
    """The lines of `why`."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["train.precision=auto", "runtime.device=cpu", *overrides])
        config = parse(cfg)
        student = plan(config, resolve(config.dataset, config.data_root, 1, config.image_size))[0]
        return list(reasons(cfg, config, student, overrides))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["why=method.T"], "method.T=4: conf/method/kd.yaml"),
        (["why=method.T", "method=ta"], "method.T=4: conf/method/ta.yaml, chosen by method=ta"),
        (["why=method.T", "method.T=7"], "method.T=7: the command line (method.T=7)"),
        (["why=seed"], "seed=0: conf/config.yaml"),
        (["why=teacher.seed"], "teacher.seed=0: conf/base.yaml"),
        (["why=assistant_loss.beta", "loss@assistant_loss=dkd", "method=ta"], "assistant_loss.beta="),
        (["why=model.name"], "model.name=resnet8: model/resnet8"),
        (["why=model.name", "model=plane2"], "model.name=plane2: model/plane2, chosen by model=plane2"),
        (["why=model.freeze"], "model.freeze=null: the default"),
        (["why=runtime.threads"], f"runtime.threads=null, here {cpu_count()}: conf/runtime/default.yaml"),
        (["why=runtime.threads", "runtime.threads=1"], "runtime.threads=1: the command line (runtime.threads=1)"),
        (["why=dataset.label", "dataset.label=mine"], "dataset.label=mine: the command line (dataset.label=mine)"),
        (["why=method.reference", "method=trained_teacher"], "method.reference=null, here resnet8: conf/method/"),
        (["why=mode", "mode=paper"], "mode=paper: the command line (mode=paper)"),
        (["why=freeze"], "freeze=[]: conf/config.yaml"),
    ],
)
def test_where_a_value_comes_from(overrides: list[str], line: str) -> None:
    (found,) = told(*overrides)
    assert found.startswith(line)


def test_a_training_setting_is_told_for_each_stage() -> None:
    assert told("why=train.epochs", "train.epochs=3", "model.train.epochs=4") == [
        "train.epochs of teacher resnet20=3: the command line (train.epochs=3)",
        "train.epochs of student resnet8=4: the command line (model.train.epochs=4)",
    ]
    assert told("why=train.lr", "method=scratch") == ["train.lr of student resnet8=0.05: recipe digits of mode=paper"]
    (precision,) = told("why=train.precision", "method=scratch", "model.train.precision=fp32")
    assert precision == "train.precision of student resnet8=fp32: the command line (model.train.precision=fp32)"


def test_several_keys_and_a_group_s_name() -> None:
    assert [line.partition("=")[0] for line in told("why=[seed,method]", "seed=3")] == [
        "seed",
        "method.name",
        "method.T",
        "method.lambda",
    ]


@pytest.mark.parametrize(
    ("key", "near"),
    [("method.Temp", "method.T"), ("lr", "train.lr"), ("runtime.thread", "runtime.threads"), ("sed", "seed")],
)
def test_a_misspelt_key_gets_the_nearest_names(key: str, near: str) -> None:
    with pytest.raises(KnownError, match=rf"why: there is no key {key}; did you mean .*\b{near}\b"):
        told(f"why={key}")


def test_on_the_command_line_it_trains_nothing(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("why=[method.T,nothing.at.all]", "hydra.run.dir=out") == 2
    told = capfd.readouterr().err
    assert told.startswith("why: there is no key nothing.at.all; there are ")
    assert told.endswith(" in all; --help lists them)\n")
    assert command("--why", "method.T", "method.T=2", "hydra.run.dir=out") == 0
    assert capfd.readouterr().out == "method.T=2: the command line (method.T=2)\n"
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["--why", "method.T", "seed=1"], ["seed=1", "why=method.T"]),
        (["-m", "--why=method.T", "seed=1,2"], ["-m", "seed=1,2", "why=method.T"]),
        (["why=method.T", "why=train.lr"], ["why=[method.T,train.lr]"]),
        (["--why", "method.T,seed", "why=[mode, loss]"], ["why=[method.T,seed,mode,loss]"]),
        (["why=[method.T,seed]", "mode=paper"], ["why=[method.T,seed]", "mode=paper"]),
        (["-m", "why=choice(method.T,seed)"], ["-m", "why=choice(method.T,seed)"]),
    ],
)
def test_a_flag_and_several_are_one_why(words: list[str], read: list[str]) -> None:
    register()
    assert read_command(words) == read


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--why"], "--why: needs a key: python run.py --why method.T"),
        (["--why="], "--why: needs a key: python run.py --why method.T"),
        (["--why", "-m", "seed=1,2"], "--why: needs a key: python run.py --why method.T"),
        (["why=method.T", "why=choice(seed,mode)"], "why: is given twice; one list: 'why=[method.T,train.lr]'"),
    ],
)
def test_what_asks_for_nothing_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(KnownError) as refused:
        read_command(words)
    assert str(refused.value) == line


def test_a_sweep_prints_equal_lines_once(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"hydra.sweep.dir={tmp_path}"
    assert command("-m", where, "method=kd,ta", "seed=0,1", "--why", "method.T", "--why=mode", "tracking=none") == 0
    assert capsys.readouterr().out.splitlines() == [
        "method.T=4: conf/method/kd.yaml, chosen by method=kd",
        "mode=paper: conf/mode/paper.yaml",
        "method.T=4: conf/method/ta.yaml, chosen by method=ta",
    ]


@pytest.mark.parametrize("way", ["--config-dir={}", "hydra.searchpath=[{}]"])
def test_a_file_of_another_folder_is_named(
    way: str, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own" / "experiment" / "mine" / "first.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\nmethod: {T: 9}\n")
    own = ("experiment=mine/first", "why=[method.T,method.lambda]", f"hydra.run.dir={tmp_path / 'out'}")
    assert command(way.format(tmp_path / "own"), *own) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"method.T=9: {file}, chosen by experiment=mine/first",
        "method.lambda=0.5: conf/method/kd.yaml",
    ]
