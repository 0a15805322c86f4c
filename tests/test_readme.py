"""README and docs/: commands compose and run dry, links work, and names in backticks exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from omegaconf import OmegaConf
from safetensors.torch import save_file

from kd.app.parsing import parse
from kd.core.settings import descriptions
from kd.methods import METHODS
from kd.models import build
from tests.conftest import ROOT, composed
from tests.test_architecture import ROWS
from tests.test_datasets import write_folder

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# extending.md names what a reader adds, and has a test that adds it. measurements.md names folders of one machine.
CHECKED = [page for page in PAGES if page.name != "extending.md"]
RUNNABLE = [page for page in CHECKED if page.name != "measurements.md"]


def commands(page: Path) -> set[str]:
    """The commands that have their own line, without comments."""
    found = re.findall(r"^python run\.py *(.*)$", page.read_text().replace("\\\n", ""), re.MULTILINE)
    return {shlex.join(shlex.split(command, comments=True)) for command in found}


COMMANDS = sorted({command for page in RUNNABLE for command in commands(page)})
INLINE = {found for page in RUNNABLE for found in re.findall(r"`python run\.py ([^`\n]*)`", page.read_text())}
INLINE -= {"-m …", "--help", "--cfg job"}


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 120


def test_there_are_commands() -> None:
    assert len(commands(ROOT / "README.md")) >= 6
    assert len(COMMANDS) > 20
    assert len(INLINE) > 5


# Sweeps of many jobs, of which each prints its plan, are among the slow tests.
@pytest.mark.parametrize(
    "typed", [pytest.param(typed, marks=pytest.mark.slow if typed.count(",") > 3 else ()) for typed in COMMANDS]
)
def test_command(
    typed: str,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for folder in ("pets", "hymenoptera_data"):
        write_folder(tmp_path / folder)
    if "checkpoint" in typed:
        torch.save(build("resnet110", num_classes=100).state_dict(), tmp_path / "resnet110_best.pth.tar")
    if "teacher.init" in typed:
        lite = build("timm/tf_efficientnet_lite0", num_classes=1000, image_size=64)
        save_file(lite.state_dict(), tmp_path / "tf_efficientnet_lite0_in1k.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    code = command(*shlex.split(typed), "dry_run=true", "hydra.run.dir=out", "hydra.sweep.dir=out")
    printed = capfd.readouterr()
    if "joblib" in typed:
        get_reusable_executor().shutdown(wait=True)  # other tests count the processes
    assert code == 0, printed.err
    assert "stages to train" in printed.out


@pytest.mark.parametrize("command", sorted(INLINE))
def test_command_in_a_sentence(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composes and parses; of a sweep, its first job."""
    monkeypatch.chdir(tmp_path)
    arguments = [argument for argument in shlex.split(command) if argument != "-m"]
    firsts = [a if re.search(r"[\[{]", a) else a.split(",")[0] for a in arguments if a != "dry_run=true"]
    parse(composed(*firsts))


def test_the_readme_names_the_test_command_of_ci() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_links_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


CODE = [*(ROOT / "kd").rglob("*.py"), *(ROOT / "bench").glob("*.py"), ROOT / "run.py"]
TESTS = list((ROOT / "tests").glob("test_*.py"))


@cache
def definitions() -> dict[str, set[str]]:
    """Every class with its members, every function, and every test."""
    found: dict[str, set[str]] = {}
    for path in (*CODE, *TESTS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and path in CODE:
                found.setdefault(node.name, set()).update(names_in(node.body))
            elif isinstance(node, ast.FunctionDef) and (path in CODE or node.name.startswith("test_")):
                found.setdefault(node.name, set())
    return found


def names_in(body: list[ast.stmt]) -> set[str]:
    """The names that a file or a class defines."""
    names = set()
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


@cache
def keys() -> set[str]:
    """Every key of the configuration."""

    def below(tree: Any, prefix: str) -> Iterator[str]:
        for name, value in tree.items() if isinstance(tree, dict) else ():
            yield f"{prefix}{name}"
            yield from below(value, f"{prefix}{name}.")

    trees = [OmegaConf.to_container(composed(f"method={method}")) for method in METHODS]
    return {key for tree in trees for key in below(tree, "")}


def expand(text: str) -> list[str]:
    """`a.{b,c}` as `a.b` and `a.c`."""
    if not (found := re.search(r"\{([\w,]+)\}", text)):
        return [text]
    start, end = text[: found.start()], text[found.end() :]
    return [each for part in found[1].split(",") for each in expand(f"{start}{part}{end}")]


def problems(span: str) -> list[str]:
    """The names in a piece of code that should exist in kd and do not."""
    found = []
    for path in re.findall(r"(?<![\w./<>-])(?:(?:kd|conf|docs|tests|bench|results)/|run\.py)[\w./<>*{},-]*", span):
        patterns = [re.sub(r"<[^>]*>", "*", each).rstrip("/.,") for each in expand(path)]
        found += [each for each in patterns if "/mine/" not in each and not list(ROOT.glob(each))]  # a reader's own
    for name in re.findall(r"(?<![\w/.-])kd(?:\.\w+)+", span):
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            found.append(name)
    found += [f"{name}()" for name in re.findall(r"(?<![\w.])(\w+)\(\)", span) if name not in definitions()]
    if named := re.fullmatch(r"([A-Z][a-z]\w+|test_\w+_\w+)(?:\.(\w+))?(?:\(\))?", span):
        name, member = named.groups()
        known = definitions().get(name)
        found += [span] if known is None or (member and member not in known) else []
    for token in span.split():
        key = token.partition("=")[0]
        if re.fullmatch(r"(model|teacher|dataset|method|train|tracking|runtime|sweep)(\.[\w{},]+)+", key):
            is_file = key.endswith((".py", ".safetensors"))
            found += [each for each in expand(key) if not is_file and each not in keys()]
    return found


def spans(page: Path) -> list[str]:
    """The pieces of code in the sentences of a page; in a drawing, its paths and functions."""
    if page.suffix == ".svg":
        words = re.findall(r">([^<]+)<", page.read_text())
        return [word.strip(":,") for text in words for word in text.split() if "kd/" in word or "()" in word]
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("page", [*CHECKED, ROOT / "docs" / "design.svg"], ids=lambda page: page.name)
def test_what_is_named_exists(page: Path) -> None:
    assert [problem for span in spans(page) for problem in problems(span)] == []


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.name)
def test_what_is_said_to_be_in_a_file_is_there(page: Path) -> None:
    for name, path in re.findall(r"`(\w+)[\w.]*(?:\(\))?` in `(kd/[\w/]+\.py)`", page.read_text()):
        assert name in names_in(ast.parse((ROOT / path).read_text()).body), f"{name} in {path}"


@pytest.mark.parametrize("page", [page for page in CHECKED if page.name != "migration.md"], ids=lambda page: page.name)
def test_files_without_a_folder_exist(page: Path) -> None:
    """Except in migration.md, which names files of other projects."""
    ours = {path.name for path in (*CODE, *TESTS, *(ROOT / "docs").glob("*.py"))}
    assert [span for span in spans(page) if re.fullmatch(r"\w+\.py", span) and span not in ours] == []


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.name)
def test_experiments_that_are_named_exist(page: Path) -> None:
    known = (ROOT / "docs" / "experiments.md").read_text()
    named = [name for span in spans(page) for name in re.findall(r"(?<![\w/])(?:takd|tt)/\w+/\w+(?![\w*…/])", span)]
    assert [name for name in named if f"| `{name}` |" not in known] == []


@pytest.mark.parametrize(
    "span",
    [
        "kd/core/nothing.py",
        "conf/{config,nothing}.yaml",
        "kd.core.spec.Nothing",
        "python -m kd.nothing",
        "nothing()",
        "NoSuchClass",
        "Released.nothing",
        "test_nothing_of_this_name",
        "method.{T,nothing}",
        "python run.py train.nothing=1",
    ],
)
def test_a_wrong_name_is_found(span: str) -> None:
    assert len(problems(span)) == 1


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next of its level."""
    text = (ROOT / "docs" / page).read_text()
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_walk_is_ten_lines_of_existing_files() -> None:
    steps = re.findall(r"^(\d+)\. (.*)\n", section("design.md", "One run through the files"), re.MULTILINE)
    assert [number for number, _ in steps] == [str(n) for n in range(1, 11)]
    for _, step in steps:
        named = re.findall(r"`([\w/]+\.py)`", step)
        assert named
        assert [path for path in named if not (ROOT / path).is_file()] == []


def test_the_rules_are_few_and_have_the_order_of_the_test() -> None:
    rules = re.split(r"^\d+\. ", section("design.md", "Rules of the code"), flags=re.MULTILINE)[1:]
    assert 1 < len(rules) <= 10
    rooms = re.findall(r"`(kd/\w+)`", rules[0])
    assert rooms == [room.replace(".", "/") for row in ROWS[1:] for room in row]


def test_the_table_of_settings_is_the_programs() -> None:
    rows = re.findall(r"^\| `train\.(\w+)` \| (.*) \|$", (ROOT / "docs" / "running.md").read_text(), re.MULTILINE)
    assert dict(rows) == descriptions()


def test_the_keys_of_every_method_are_in_the_table() -> None:
    table = re.findall(r"^\| (`[^|]*) \|", section("running.md", "Keys"), re.MULTILINE)
    named = {key for row in table for key in re.findall(r"`([\w.]+)`", row)}
    own = {key for key in keys() if key.startswith("method.")} - {"method.name", "method.assistant", "method.teacher"}
    assert own - named == set()


def test_the_tree_names_what_exists() -> None:
    (tree,) = re.findall(r"^```\n(run\.py .*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line.split(maxsplit=1) for line in tree.splitlines()]
    assert {place for place, _ in lines} >= {f"{room.replace('.', '/')}/" for row in ROWS[1:] for room in row}
    for place, says in lines:
        assert (ROOT / place).exists(), place
        assert [file for file in re.findall(r"\w+\.py", says) if not (ROOT / place / file).is_file()] == []
