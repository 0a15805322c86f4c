"""Terminals and locales without our characters: files are UTF-8, and what is printed is escaped."""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICK, run_py
from tests.test_architecture import FILES, module

LABEL = "数字"
ESCAPED = LABEL.encode("ascii", "backslashreplace").decode()


@contextmanager
def terminal(encoding: str) -> Iterator[io.BytesIO]:
    """What a terminal of another encoding gets; PYTHONIOENCODING makes Python open it in this way."""
    screen = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, io.TextIOWrapper(screen, encoding, errors="strict", write_through=True))
        yield screen


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_a_sweep_ends_with_its_summary(encoding: str, job: Callable[..., Any], tmp_path: Path) -> None:
    with terminal(encoding) as screen:
        shown = ("runtime.tables=true", "train.epochs=1", f"dataset.label='{LABEL}'")
        results = job(*shown, "method=scratch,kd", multirun=True)
        printed = screen.getvalue().decode(encoding)
    assert [result["dataset"] for result in results] == [LABEL] * 2
    assert f"on {ESCAPED}, mode paper" in printed
    assert "best setting, chosen on validation" in printed
    assert "Error" not in printed
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert f"Data set {LABEL}." in summary
    assert "plane4 → plane2" in summary


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_a_dry_run_and_a_refusal(encoding: str, job: Callable[..., Any]) -> None:
    with terminal(encoding) as screen:
        job("dry_run=true", f"dataset.label='{LABEL}'", multirun=True)
        job(f"dataset.root='{LABEL}'", code=2)
        printed = screen.getvalue().decode(encoding)
    assert "2 of 2 stages to train" in printed
    assert f"(got '{ESCAPED}' with dataset=digits)" in printed


@pytest.mark.slow
def test_a_locale_without_utf_8(tmp_path: Path) -> None:
    """Python itself mends LANG=C; this is what remains on other machines, and Windows' cp1252."""
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    mine = ("train.epochs=1", "method=kd", "seed=0,1", "hydra.sweep.dir=sweep")
    done = run_py("-m", *QUICK, *mine, cwd=tmp_path, **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "plane4 → plane2" in (tmp_path / "sweep" / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=module)
def test_every_file_of_text_is_utf_8(path: Path) -> None:
    assert list(without_encoding(ast.parse(path.read_text(encoding="utf-8")))) == []


def without_encoding(tree: ast.AST) -> Iterator[str]:
    """Calls that read or write text in the locale's encoding."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        whose = ast.unparse(call.func).split(".")[0]
        opens = name == "open" and whose not in ("os", "Image", "Bank") and "b" not in ast.unparse(call.args[-1:])
        texts = name == "write_text" or (name == "read_text" and not call.args)  # its first argument is the encoding
        if (opens or texts) and "encoding" not in {word.arg for word in call.keywords}:
            yield ast.unparse(call)


def test_the_search_finds_them() -> None:
    found = without_encoding(ast.parse("p.read_text(); p.open('a'); open(p, 'rb'); p.write_text('', encoding='utf-8')"))
    assert list(found) == ["p.read_text()", "p.open('a')"]


def test_records_are_utf_8(job: Callable[..., Any], tmp_path: Path) -> None:
    job("train.epochs=1", "method=scratch", f"dataset.label='{LABEL}'")
    assert json.loads((tmp_path / "out" / "result.json").read_bytes().decode("utf-8"))["dataset"] == LABEL
