"""docs/extending.md: its diffs apply and run, what they add passes the tests, and packages from outside work too."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kd.core.spec import KnownError, Registry
from kd.core.stage import LossSpec
from kd.datasets import DatasetEntry
from kd.methods.method import Method
from kd.models import MODELS, ModelEntry
from tests.conftest import ROOT, run_py

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
ADDITIONS = ["A loss", "A loss with parameters", "A network", "A data set", "A method"]
SHORT = ("tracking=none", "train.epochs=2", "train.precision=fp32", "runtime.threads=1", "hydra.run.dir=out")

# The tests that look at what is in the tables; of those of one entry each, the new ones.
TESTS = ("architecture", "config", "datasets", "losses", "methods", "models", "recipes", "reference")
NEW = "lenet5 or shapes or born_again or confidence_weighted or pefd"
NEW += " or papers or options_equal or bad_values or some_data_set or has_a_recipe or share_a_name"


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)


def commands(section: str) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^python run\.py (.*)$", SECTIONS[section], re.MULTILINE)]


def copied(place: Path) -> Path:
    """A copy of the repository."""
    for name in ("kd", "conf", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, place / name)
    return place


def add(place: Path, *sections: str) -> None:
    for section in sections:
        (diff,) = blocks(section, "diff")
        done = subprocess.run(["git", "apply", "-"], input=diff, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{section}: {done.stderr}"


def python(*arguments: str, cwd: Path) -> str:
    """What a command prints that is run in a copy of the repository."""
    command, store = [sys.executable, *arguments], {"KD_STORE": str(cwd / "store"), "KD_DATA": str(cwd / "data")}
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **store}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with every addition."""
    place = copied(tmp_path_factory.mktemp("extended"))
    add(place, *ADDITIONS)
    return place


# the diffs --------------------------------------------------------------------------------------------------------


def test_an_addition_is_a_file_and_a_line() -> None:
    for section, package in zip(ADDITIONS, ("losses", "losses", "models", "datasets", "methods"), strict=True):
        (diff,) = blocks(section, "diff")
        files = set(re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE))
        assert len([file for file in files if file.startswith(f"kd/{package}/")]) == 2
        assert f"kd/{package}/__init__.py" in files
        assert {file.split("/")[0] for file in files} <= {"kd", "conf"}
        assert len(files) <= 3
    for section, most in (("A loss", 60), ("A loss with parameters", 90)):
        (diff,) = blocks(section, "diff")
        (lines,) = re.findall(r"^\+\+\+ b/kd/losses/\w+\.py\n@@ -0,0 \+1,(\d+) @@$", diff, re.MULTILINE)
        assert int(lines) <= most


@pytest.mark.slow
def test_all_of_them_in_a_run(extended: Path) -> None:
    run = ("dataset=shapes", "model=lenet5", "method=born_again", "method.generations=1")
    python("run.py", *SHORT, *run, cwd=extended)
    result = json.loads((extended / "out" / "result.json").read_text())
    generation, student = result["chain"]
    assert (result["method"], result["dataset"]) == ("born_again", "shapes")
    assert (generation["role"], generation["loss"]["name"]) == ("teacher", "cross_entropy")
    assert (student["role"], student["loss"]) == ("student", {"name": "confidence_weighted"})
    assert generation["model"] == student["model"] == "lenet5"
    stage = json.loads((extended / "store" / student["key"] / "stage.json").read_text())["stage"]
    assert (stage["train"]["lr"], stage["train"]["weight_decay"]) == (0.05, 5e-4)  # its own; a ResNet's
    rows = (extended / "store" / student["key"] / "metrics.jsonl").read_text().splitlines()
    assert all(1 / 3 < json.loads(row)["confidence"] < 1 for row in rows)
    plan = python("run.py", "dataset=shapes", "model=lenet5", "method=scratch", *SHORT, "dry_run=true", cwd=extended)
    assert generation["key"] in plan  # what the page says of generation 0
    assert "0 of 1 stages to train" in plan


@pytest.mark.parametrize(
    ("section", "needs"),
    [("A loss with parameters", ()), ("A network", ()), ("A data set", ()), ("A method", ("A loss",))],
    ids=ADDITIONS[1:],
)
def test_each_alone(section: str, needs: tuple[str, ...], tmp_path: Path) -> None:
    place = copied(tmp_path)
    add(place, *needs, section)
    *_, last = commands(section)
    arguments = [argument for argument in last if argument != "-m"]
    firsts = [argument.split(",")[0] for argument in arguments]
    assert "stages to train" in python("run.py", *firsts, "dry_run=true", "hydra.run.dir=out", cwd=place)


@pytest.mark.slow
def test_a_loss_with_parameters_is_trained_and_discarded(extended: Path) -> None:
    run = ("dataset=shapes", "model=resnet8", "teacher=resnet14", "method=kd", "loss=pefd", "loss.projectors=2")
    python("run.py", *SHORT, *run, cwd=extended)
    *_, student = json.loads((extended / "out" / "result.json").read_text())["chain"]
    assert student["loss"] == {"name": "pefd", "ce": 1, "weight": 25, "projectors": 2}
    folder = extended / "store" / student["key"]
    first, last = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert 0 < last["pefd"] < first["pefd"] < 1
    assert not [name for name in load_file(folder / "model.safetensors") if "projector" in name]


def test_the_facts_are_what_the_page_prints_them_by(extended: Path) -> None:
    (command,) = re.findall(r"^python -c (.*)$", SECTIONS["A data set"], re.MULTILINE)
    printed = python("-c", *shlex.split(command), cwd=extended)
    (diff,) = blocks("A data set", "diff")
    mean, std = re.findall(r"(?:mean|std)=(\(.*?\))", diff)
    assert printed.strip() == f"({mean}, {std})"


@pytest.mark.slow
def test_what_is_added_passes_the_tests(extended: Path) -> None:
    for check in (("check",), ("format", "--check")):
        python("-m", "ruff", *check, "--no-cache", "kd/losses", "kd/models", "kd/datasets", "kd/methods", cwd=extended)
    files = [f"tests/test_{name}.py" for name in TESTS]
    told = python("-m", "pytest", "-vv", "-p", "no:cacheprovider", *files, "-k", NEW, cwd=extended)
    assert "skipped" not in told
    for name in ("lenet5", "shapes", "born_again", "confidence_weighted", "pefd"):
        assert re.search(rf"\[(?:.*=)?{name}\]", told), name


# from outside -----------------------------------------------------------------------------------------------------

OTHERS = {
    "losses.py": """
        from typing import ClassVar, Literal

        from kd.core.stage import Formula


        class Smooth(Formula):
            name: Literal["smooth"] = "smooth"
            needs: ClassVar[frozenset] = frozenset()
            smoothing: float = 0.1

            def __call__(self, batch):
                from torch.nn.functional import cross_entropy

                return {"loss": cross_entropy(batch.net.logits, batch.labels, label_smoothing=self.smoothing)}
        """,
    "methods.py": """
        from kd.methods.method import Link, Method
        from mylab.losses import Smooth


        class Smoothed(Method):
            smoothing: float = 0.1

            def chain(self, ends):
                return [Link("student", ends.student, Smooth(smoothing=self.smoothing), ends.seed)]
        """,
    "data.py": """
        from kd.datasets import Arrays, DatasetEntry, Facts

        HALVES = DatasetEntry("mylab.data.read", Facts(2, 8, (0.5,) * 3, (0.5,) * 3), recipe="digits")


        def read(data_root, content):
            import numpy as np

            labels = np.arange(120) % 2
            images = np.zeros((120, 8, 8, 3), np.uint8)
            images[labels == 1, :4] = 255
            return Arrays(images[:80], labels[:80], images[80:], labels[80:])
        """,
    "broken.py": "import nothing_of_this_name",
}
POINTS = """
[kd.losses]
smooth = mylab.losses:Smooth
[kd.methods]
smoothed = mylab.methods:Smoothed
[kd.datasets]
halves = mylab.data:HALVES
broken = mylab.broken:HALVES
[kd.models]
broken = mylab.broken:TINY
wrong = mylab.nets:Tiny
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's package, and in it an entry of each other kind and broken ones, as pip would have installed it."""
    from textwrap import dedent

    section = "From your own package"
    (code,), (toml,) = blocks(section, "python"), blocks(section, "toml")
    place = tmp_path / "site"
    for name, text in {**OTHERS, "nets.py": code, "__init__.py": ""}.items():
        (place / "mylab").mkdir(parents=True, exist_ok=True)
        (place / "mylab" / name).write_text(dedent(text))
    ((group, line),) = re.findall(r'\[project\.entry-points\."(.*)"\]\n(.*)', toml)
    info = place / "mylab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mylab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS + line.replace('"', "") + "\n")
    assert POINTS.rstrip().rpartition("[")[2].startswith(group)
    monkeypatch.syspath_prepend(place)
    yield place
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


def test_a_package_brings_one_of_each(package: Path, tmp_path: Path) -> None:
    """The broken entries beside them are not in the way."""
    run = ("dataset=halves", "model=tiny", "method=smoothed", "+method.smoothing=0.2")
    done = run_py(*SHORT, *run, cwd=tmp_path, PYTHONPATH=str(package))
    assert done.returncode == 0, done.stderr
    (student,) = json.loads((tmp_path / "out" / "result.json").read_text())["chain"]
    assert (student["model"], student["loss"]) == ("tiny", {"name": "smooth", "smoothing": 0.2})
    assert student["test_acc"] == 100
    stage = json.loads((tmp_path / "store" / student["key"] / "stage.json").read_text())["stage"]
    assert (stage["dataset"]["name"], stage["dataset"]["augment"], stage["train"]["lr"]) == ("halves", "none", 0.02)
    assert stage["train"]["batch_size"] == 64  # of digits' recipe


@pytest.mark.usefixtures("package")
def test_a_dotted_path_needs_no_installation(job: Callable[..., Any]) -> None:
    result = job("model.name=mylab.nets.TINY", "method.name=mylab.methods.Smoothed", "~method.T", "~method.lambda")
    assert (result["chain"][0]["model"], result["method"]) == ("mylab.nets.TINY", "mylab.methods.Smoothed")
    halves = ("dataset.name=mylab.data.HALVES", "method=scratch", "teacher.name=mylab.nets.TINY")
    assert job(*halves)["chain"][0]["test_acc"] == 100


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "model=broken",
            "model.name: kd.models: broken (mylab.broken:TINY of the package mylab) cannot be imported "
            "(ModuleNotFoundError: No module named 'nothing_of_this_name') (got 'broken')",
        ),
        pytest.param(
            "dataset=broken",
            "kd.datasets: broken (mylab.broken:HALVES of the package mylab) cannot be imported (",
            marks=pytest.mark.slow,
        ),
        ("teacher=wrong", "teacher.name: kd.models: wrong (mylab.nets:Tiny of the package mylab) is not a ModelEntry"),
        pytest.param(
            "method.name=mylab.nets.TINY",
            "kd.methods: mylab.nets.TINY is not a complete subclass of Method (got ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "model.name=mylab.nets.HUGE",
            "model.name: kd.models: mylab.nets.HUGE cannot be imported (AttributeError: ",
            marks=pytest.mark.slow,
        ),
        ("model.name=nobody.nets.TINY", "model.name: kd.models: nobody.nets.TINY cannot be imported (ModuleNot"),
    ],
)
def test_a_broken_entry_is_one_line(package: Path, override: str, line: str, tmp_path: Path) -> None:
    done = run_py(override, "tracking=none", "dry_run=true", cwd=tmp_path, PYTHONPATH=str(package))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(line)


class Abstract(Method):
    """It has no chain()."""


@pytest.mark.parametrize(
    ("kind", "found", "right"),
    [
        (ModelEntry, MODELS["plane2"], True),
        (ModelEntry, ModelEntry, False),
        (ModelEntry, ("kd.models.plane.Plane", "plane", 2), False),
        (DatasetEntry, MODELS["plane2"], False),
        (type[Method], Abstract, False),
        (type[Method], LossSpec, False),
    ],
)
def test_what_an_entry_may_be(kind: Any, found: Any, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_extending.found", found, raising=False)
    table: Registry[Any] = Registry("kd.test", {}, kind)
    if right:
        assert table["tests.test_extending.found"] is found
    else:
        with pytest.raises(KnownError, match=r"^kd\.test: tests\.test_extending\.found is not a "):
            table["tests.test_extending.found"]


@pytest.mark.usefixtures("package")
def test_a_table_with_entries_from_outside() -> None:
    own = {"tiny": MODELS["plane2"], "other": MODELS["plane4"]}
    table = Registry("kd.models", own, ModelEntry)
    assert list(table) == ["tiny", "other", "broken", "wrong"]
    assert table["tiny"] is own["tiny"]  # ours comes first
    assert table.usable() == own
    assert Registry("kd.models", {}, ModelEntry)["tiny"].family == "tiny"
    with pytest.raises(ValueError, match="did you mean other"):
        table.known("othr")
