"""Fuzzing: any configuration gives a plan, or lines that name its wrong keys.

KD_FUZZ=20000 draws so many instead of the suite's few.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.app.command_line import read_command
from kd.app.config import plan
from kd.app.options import register
from kd.app.parsing import parse, recorded
from kd.core.spec import KnownError, printable
from kd.datasets import resolve
from kd.methods import METHODS
from tests.conftest import composed

EXAMPLES = int(os.environ.get("KD_FUZZ", "400"))
SEEN = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 400, suppress_health_check=list(HealthCheck)
)
BASES = (
    *((f"method={method}",) for method in METHODS),
    ("experiment=takd/cifar10/kd_resnet110_resnet8", "mode=reference"),
    ("dataset=folder", "dataset.root=nowhere"),
    ("dataset=tiny_imagenet", "dataset.root=nowhere"),
    ("teacher.checkpoint=nowhere.pt", "teacher.normalize=takd"),
)
SECRET = "canary-4f1d"
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**9, 10**12, -(10**30), 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"),
    float("-inf"), float("nan"), "1e400", ".inf", "", " ", "null", "0x10", "1_000", "resnet8", "digits", "auto",
    "cuda:99999999999999999999", "a" * 10_000, "ünïcödé ← λ", "\x00", "a\nb\r\x1b[31mred", "\ud800", "../../etc", "/",
    "/dev/null", "~", "~nobody/x", b"bytes", [], [[]], [None], [0.5, "x"], [1e400, -1], ["resnet8"] * 3, {}, {"a": {}},
    {"name": []}, {"name": "kd"}, {1: 2}, {"mean": [0, 0, 0], "std": [0, 1, 1]}, Path("x"),
    "${nope}", "${oc.env:HOME}", "${oc.env:CANARY}", "${oc.env:NOPE}", "${oc.decode:'['}", "${seed}",
    "${method}", "${train}", "${tracking.project}", "${unclosed", "${a b}", "${nope:1}", "${..}", "???", "$",
    "x${seed}y",     ["${nope}"], ["???"], {"deep": {"deeper": "${nope}"}},
]  # fmt: skip
WORDS = re.compile(
    r"validation error|pydantic|omegaconf|https?://(?!cs231n)|Input should|Traceback|<class '|object at 0x|Errno"
)


@cache
def base(overrides: tuple[str, ...]) -> DictConfig:
    return composed(*overrides)


def keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """Every key of the tree, groups and leaves."""
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


@st.composite
def configurations(draw: st.DrawFn) -> tuple[DictConfig, dict[str, Any]]:
    """A composed configuration with some values replaced, and these."""
    cfg = deepcopy(base(draw(st.sampled_from(BASES))))
    known = sorted(keys(OmegaConf.to_container(cfg)))
    places = st.sampled_from(known) | st.builds("{}.{}".format, st.sampled_from(known), st.sampled_from(["nope", "T"]))
    values = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=30)
    return cfg, draw(st.dictionaries(places, values, min_size=1, max_size=4))


def told(cfg: DictConfig) -> str:
    """The message about a configuration; "" if it can be planned."""
    try:
        config = parse(cfg)
        plan(config, resolve(config.dataset, config.data_root))
        recorded(cfg)
    except KnownError as error:
        return str(error) or pytest.fail("an error without words")
    return ""


@pytest.fixture(autouse=True, scope="module")
def _secret() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY", SECRET)
        yield


@pytest.mark.slow
@SEEN
@given(configurations())
def test_any_values_end_in_a_plan_or_in_readable_lines(drawn: tuple[DictConfig, dict[str, Any]]) -> None:
    cfg, changes = drawn
    for key, value in changes.items():
        try:
            OmegaConf.update(cfg, key, value, force_add=True)
        except (OmegaConfBaseException, AssertionError, TypeError, ValueError):  # what no YAML can say either
            continue
    for line in told(cfg).splitlines():
        assert not WORDS.search(line), line
        assert printable(line) == line
        assert SECRET not in line
        assert len(line) < 500, line


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (("seed=-1", "method.T=hot", "model.train.epochs=${nope}"), ("seed:", "method.T:", "model.train.epochs:")),
        (("seed=${seed}", "train.lr=???", "replicates=${oc.env:NOPE}"), ("seed:", "train.lr:", "replicates:")),
        (
            ("train.epochs=true", "method.T=true", "seed=false"),
            ("train.epochs: should be a number", "method.T:", "seed:"),
        ),
    ],
)
def test_all_bad_values_are_told_at_once(overrides: tuple[str, ...], lines: tuple[str, ...]) -> None:
    text = told(composed(*overrides))
    for line in lines:
        assert f"\n{line}" in f"\n{text}"


def test_a_value_from_the_environment_is_not_told() -> None:
    text = told(composed("method.T=${oc.env:CANARY}", "dataset.name=x${oc.env:CANARY}"))
    assert SECRET not in text
    assert "method.T: should be a number (got '${oc.env:CANARY}')" in text


def test_what_is_recorded_names_the_variable() -> None:
    cfg = composed("tracking.project=${oc.env:CANARY}", "tracking.group=${tracking.project}")
    tracking = recorded(cfg)["tracking"]
    assert tracking["project"] == tracking["group"] == "${oc.env:CANARY}"


@pytest.mark.parametrize("huge", ["train.epochs", "train.batch_size", "dataset.views", "replicates", "runtime.workers"])
def test_huge_numbers_are_a_line_or_a_plan_at_once(huge: str) -> None:
    cfg = composed(f"{huge}={10**12}")
    began = time.monotonic()
    told(cfg)
    assert time.monotonic() - began < 2


# the command line --------------------------------------------------------------------------------------------------

SPELLINGS = ["", "1e3", "[1,2]", "${nope}", "~/a=b (c): d"]
MORE = [
    "null",
    "True",
    "nan",
    "{a: 1}",
    "a\nb",
    "0x10",
    "1_000",
    "1e-400",
    "-0",
    "0,5",
    "[",
    "f(x)",
    "choice(1,2)",
    "${seed",
    "'a b'",
    "a" * 5_000,
]
GROUPS = (
    "model",
    "teacher",
    "method",
    "loss",
    "loss@assistant_loss",
    "dataset",
    "mode",
    "train",
    "tracking",
    "runtime",
)
PARENTS = ("model.train", "teacher.train", "model.args", "init", "method.assistant", "hydra.run", "nope", "method.nope")


def leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def plain(value: Any) -> Any:
    """A value without the mark of a text in which ${ begins no interpolation."""
    return value.replace("\\${", "${") if isinstance(value, str) else value


def meanings(text: str) -> list[Any]:
    """What a spelling may stand for, read without Hydra."""
    text = text.strip()
    found: list[Any] = [text, None] if text == "null" else [text]
    if text[:1] in ("'", "[", "{"):
        found += [yaml.safe_load(text) if text != "[" else text, ["1", "2"]]  # the latter is a list of texts
    found += [text == "True"] if text == "True" else []
    for number in (int, float):
        with suppress(ValueError):
            found.append(number(text))
    return found


def _named(word: str) -> str:
    """A pattern for lines about a word; those about `init={a: 1}` may name `init.a`."""
    key, _, value = word.partition("=")
    return re.escape(key) + ("[:=.]" if value[:1] == "{" else "[:=]")


def refused(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that the command line is left with, and the lines in which it refuses the others."""
    register()  # as run.py does before it reads its command
    lines: list[str] = []
    while words:
        GlobalHydra.instance().clear()
        try:
            return read_command(words), lines
        except KnownError as error:
            found = str(error).splitlines()
        lines += found
        left = [word for word in words if not any(re.match(_named(word), line) for line in found)]
        assert len(left) < len(words), found
        words = left
    return words, lines


@pytest.mark.parametrize(
    "spelling",
    [*SPELLINGS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)],
    ids=lambda text: repr(text)[:12],
)
def test_every_key_means_what_is_typed_or_a_line_says_why_not(spelling: str) -> None:
    cfg = base(("method=ta", "loss=dkd", "loss@assistant_loss=crd"))
    known = [key for key in leaves(OmegaConf.to_container(cfg)) if key.rpartition(".")[2] != "name"]
    chosen = ["method=ta", "loss=dkd", "loss@assistant_loss=crd"]
    words, lines = refused([*chosen, *(f"{key}={spelling}" for key in known)])
    taken = composed(*words)
    for word in words[len(chosen) :]:
        key = word.lstrip("+").partition("=")[0]
        value = OmegaConf.to_container(taken)
        for part in key.split("."):
            value = value[part]  # type: ignore[index, call-overload]
        assert any(plain(value) == meant or value != value for meant in meanings(spelling)), (word[:100], value)
    assert len(words) - len(chosen) + len(lines) >= len(known)
    for line in [*lines, *told(taken).splitlines()]:
        assert not WORDS.search(line), line
        assert printable(line) == line
        assert len(line) < 700, line


@pytest.mark.parametrize(
    "spelling",
    [*SPELLINGS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)],
    ids=lambda text: repr(text)[:12],
)
def test_every_group_is_an_option_or_a_line(spelling: str) -> None:
    keys = [*GROUPS, *PARENTS]
    words, lines = refused([f"{key}={spelling}" for key in keys])
    assert {word.lstrip("+").partition("=")[0] for word in words} <= {*PARENTS}
    for line in [*lines, *told(composed(*words)).splitlines()]:
        assert not WORDS.search(line), line
        assert printable(line) == line
        assert len(line) < 700, line


@pytest.mark.parametrize(
    ("argument", "code", "said"),
    [
        ("dry_run=${nope}", 2, "dry_run:"),
        ("seed=???", 2, "seed: is missing"),
        ("train.lr=1e400", 2, "train.lr: should be a finite number"),
        ("method=kdd", 2, "method=kdd: there is no such option"),
        ("method.T={", 2, "method.T: { cannot be read"),
        ("model.nme=x", 2, "model.nme: unknown key"),
        ("dataset.label=\x1b[31m", 2, "dataset.label: should be without control characters"),
        ('tracking.project="a\x07b"', 2, "tracking.project: should be without control characters"),
    ],
)
def test_the_command_line_shows_no_traceback(
    argument: str,
    code: int,
    said: str,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert command(argument, "dry_run=true" if "dry_run" not in argument else "seed=0") == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert said in told
