"""The structure that docs/design.md promises: who may import whom, and where each library stays."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the bottom up. A module imports only from rows below its own; within a row, nobody.
ROWS = [
    ["kd.spec"],
    [
        "kd.files",
        "kd.losses",
        "kd.hardware",
        "kd.problems",
        "kd.ranks",
        "kd.revision",
        "kd.signals",
        "kd.statistics",
        "kd.streams",
    ],
    ["kd.stage"],
    ["kd.models", "kd.datasets", "kd.recipes", "kd.compilation", "kd.evaluation", "kd.optimization"],
    ["kd.methods"],
    ["kd.bank", "kd.store", "kd.partial", "kd.given"],
    ["kd.guide", "kd.tracking", "kd.progress"],
    ["kd.train", "kd.config"],
    ["kd.parsing", "kd.workplace"],
    ["kd.pipeline", "kd.store.__main__", "kd.store.listing"],
    ["kd.records"],
    ["kd.tables"],
    ["kd.export", "kd.inspection", "kd.report", "kd.summary", "kd.search"],
    ["kd.job"],
    ["kd.sweep", "kd.paper"],
    ["run", "kd"],
]
SEARCH = {"kd.search.sampler", "kd.search.study", "kd.search.pruning"}
PAPER = {"kd.paper.plan", "kd.paper.tables"}
HOMES = {
    "hydra": {"run", "kd.job", "kd.paper.plan", "kd.sweep", *SEARCH},
    "omegaconf": {"run", "kd.job", "kd.parsing", "kd.records", "kd.sweep", "kd.search.study", *PAPER},
    "onnx": {"kd.export.onnx"},
    "onnxruntime": {"kd.export.onnx"},
    "onnxscript": {"kd.export.onnx"},
    "jinja2": {"kd.paper.page.html"},
    "markdown_it": {"kd.paper.page.html"},
    "optuna": SEARCH,
    "wandb": {"kd.tracking.wandb", "kd.tracking.probe"},
}
# The only modules that may import something slow at their top: none of them is on the way of --help and dry_run.
WITH_TORCH = {
    "kd.evaluation",
    "kd.guide",
    "kd.optimization",
    "kd.train",
    "kd.datasets.data",
    "kd.export.measures",
    "kd.export.onnx",
    "kd.export.safetensors",
    "kd.inspection.landscape",
    "kd.datasets.views",
    "kd.models.cifar_resnet",
    "kd.models.densenet",
    "kd.models.mlp",
    "kd.models.mobilenetv2",
    "kd.models.net",
    "kd.models.normalized",
    "kd.models.plane",
    "kd.models.preresnet",
    "kd.models.resnet",
    "kd.models.resnext",
    "kd.models.shufflenetv2",
}
DRAWING = {f"kd.paper.page.{name}" for name in ("accuracy", "axes", "chains", "figures", "likeness")}

FILES = [*sorted((ROOT / "kd").rglob("*.py")), ROOT / "run.py"]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def row(name: str) -> int:
    """The row of a module, by itself or by its package."""
    owner = max((m for r in ROWS for m in r if name == m or name.startswith(m + ".")), key=len)
    return next(i for i, r in enumerate(ROWS) if owner in r)


def imports(tree: ast.AST, *, top_only: bool = False) -> set[str]:
    """Modules imported anywhere in a file, but for those that only type checkers see."""
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


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_only_from_rows_below(path: Path) -> None:
    name = module(path)
    package = ".".join(name.split(".")[:2]) if path.parent != ROOT / "kd" else ""
    for other in imports(ast.parse(path.read_text())):
        inside = package != "" and other.startswith(package + ".")
        if other.split(".")[0] == "kd" and not inside:
            assert row(other) < row(name), f"{name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_libraries_stay_at_home(path: Path) -> None:
    used = {other.split(".")[0] for other in imports(ast.parse(path.read_text()))}
    for library, homes in HOMES.items():
        assert library not in used or module(path) in homes, f"{module(path)} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_torch_is_imported_late_where_help_and_dry_run_pass(path: Path) -> None:
    top = {other.split(".")[0] for other in imports(ast.parse(path.read_text()), top_only=True)}
    slow = top & {"torch", "torchvision", "sklearn", "scipy", "matplotlib", "wandb", "PIL"}
    allowed = {"torch"} if module(path) in WITH_TORCH else {"matplotlib"} if module(path) in DRAWING else set()
    assert slow == allowed


def test_sizes() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 300 or "models" in path.parts, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 50, f"{path}:{node.name}"


def test_the_rules_can_fail() -> None:
    assert row("kd.losses.kl") < row("kd.train")
    assert imports(ast.parse("def f():\n import torch\n from kd.train import x")) == {"torch", "kd.train.x"}
    assert imports(ast.parse("if TYPE_CHECKING:\n import torch")) == set()
    assert imports(ast.parse("def f():\n import torch"), top_only=True) == set()
