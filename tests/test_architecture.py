"""The structure that docs/design.md promises: which package may import which, and where each library stays."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Rule 1: imports go down this list, from a package to those in rows below its own.
ROWS = [
    ["run", "kd"],  # the entry, kd.load, and the commands `python -m kd.<name>`
    ["kd.tools"],
    ["kd.app"],
    ["kd.training"],
    ["kd.reporting"],
    ["kd.store"],
    ["kd.methods"],
    ["kd.losses", "kd.models", "kd.datasets"],
    ["kd.core"],
]
# Rules 2 to 6: each library stays in its rooms.
HOMES = {
    "hydra": ["run", "kd.app", "kd.tools.paper"],
    "omegaconf": ["run", "kd.app", "kd.tools.paper", "kd.tools.watch", "kd.reporting.results"],
    "optuna": ["kd.app.search"],
    "timm": ["kd.models"],
    "wandb": ["kd.reporting.tracking"],
    "onnx": ["kd.tools.export"],
    "onnxruntime": ["kd.tools.export"],
    "jinja2": ["kd.tools.paper.page"],
    "markdown_it": ["kd.tools.paper.page"],
}
# Rule 7: what is slow to import is imported at the top only where tensors are the subject, which --help and dry_run
# never reach.
WITH_PIXELS = [f"kd.datasets.{name}" for name in ("data", "photos", "streamed", "views")]
WITH_TORCH = ["kd.models.", "kd.losses.", *WITH_PIXELS, "kd.training", "kd.tools"]
LIGHT_LOSSES = [f"kd.losses{name}" for name in ("", ".cross_entropy", ".distillation", ".teachable_teacher")]
WITHOUT_TORCH = ["kd.models", *LIGHT_LOSSES, "kd.training.pipeline", "kd.training.ranks", "kd.training.checkpoint"]
SLOW = {"torch", "torchvision", "sklearn", "scipy", "wandb", "PIL", "timm"}
DRAWING = ["kd.tools.paper.page"]  # matplotlib

FILES = [*sorted((ROOT / "kd").rglob("*.py")), ROOT / "run.py"]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(name: str, packages: list[str]) -> bool:
    return any(name == package.rstrip(".") or name.startswith(package.rstrip(".") + ".") for package in packages)


def row(name: str) -> int:
    """The row of a module's package, counted from the bottom. Modules outside of packages are in the first row."""
    return next((i for i, packages in enumerate(reversed(ROWS)) if within(name, packages)), len(ROWS) - 1)


def imports(tree: ast.AST, *, top_only: bool = False) -> set[str]:
    """Modules imported anywhere in a file, except under TYPE_CHECKING."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    nodes = tree.body if top_only and isinstance(tree, ast.Module) else ast.walk(tree)
    found = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package(name: str) -> str:
    return ".".join(name.split(".")[:2])


def is_command(path: Path) -> bool:
    """A short file that makes a command of kd.tools available as `python -m kd.…`."""
    return "kd.tools.command.run_command" in imports(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_down_the_list(path: Path) -> None:
    name = module(path)
    if is_command(path):
        assert len(path.read_text().splitlines()) <= 10
        return
    for other in imports(ast.parse(path.read_text())):
        if other.split(".")[0] == "kd" and package(other) != package(name):
            assert row(other) < row(name), f"{name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    used = {other.split(".")[0] for other in imports(ast.parse(path.read_text()))}
    for library, rooms in HOMES.items():
        assert library not in used or within(module(path), rooms), f"{module(path)} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_help_and_dry_run_import_nothing_slow(path: Path) -> None:
    name = module(path)
    top = {other.split(".")[0] for other in imports(ast.parse(path.read_text()), top_only=True)}
    allowed = {"torch"} if within(name, WITH_TORCH) and name not in WITHOUT_TORCH else set()
    assert top & SLOW <= allowed
    assert "matplotlib" not in top or within(name, DRAWING)


def test_a_file_is_one_subject_and_a_function_fits_a_screen() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400 or "models" in path.parts, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno < 50, f"{path}:{node.name}"


# What an extension point asks every one of its files for.
PROTOCOLS = {"read", "prepare", "main"}


def test_no_two_things_share_a_name() -> None:
    modules = Counter(path.stem for path in FILES if path.stem not in ("__init__", "__main__") and not is_command(path))
    assert [name for name, times in modules.items() if times > 1] == []
    names: Counter[str] = Counter()
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                typing_only = any(ast.unparse(each) == "overload" for each in node.decorator_list)
                names[node.name] += node.name not in PROTOCOLS and not typing_only
    assert [name for name, times in names.items() if times > 1] == []


def test_the_rules_can_fail() -> None:
    assert row("kd.losses.kl") < row("kd.training.loop") < row("kd.app.jobs") < row("run")
    assert imports(ast.parse("def f():\n import torch\n from kd.store import x")) == {"torch", "kd.store.x"}
    assert imports(ast.parse("if TYPE_CHECKING:\n import torch")) == set()
    assert imports(ast.parse("def f():\n import torch"), top_only=True) == set()
