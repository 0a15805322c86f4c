"""The README's commands: each one composes, parses and plans."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_py
from tests.test_datasets import write_folder

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python run\.py *(.*)$", README, re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 6


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    arguments = shlex.split(command, comments=True)
    where = ("hydra.run.dir=out", "hydra.sweep.dir=out")
    done = run_py(*arguments, "dry_run=true", *where, cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "stages to train" in done.stdout


def test_the_readme_names_the_test_command_of_ci() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_pictures_and_links_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
