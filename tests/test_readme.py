"""The README's commands: each one composes, parses and plans."""

import re
import shlex
from pathlib import Path

import pytest

from kd.parsing import parse
from tests.conftest import ROOT, composed, run_py
from tests.test_datasets import write_folder

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python run\.py *(.*)$", README, re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 6


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    (tmp_path / "resnet110_best.pth.tar").touch()  # a dry run takes its hash and does not open it
    arguments = shlex.split(command, comments=True)
    where = ("hydra.run.dir=out", "hydra.sweep.dir=out")
    done = run_py(*arguments, "dry_run=true", *where, cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "stages to train" in done.stdout


PAGES = [path for path in (ROOT / "docs").glob("*.md") if path.name != "measurements.md"]
IN_PAGES = {
    found[0] or found[1]
    for page in PAGES
    for found in re.findall(r"`python run\.py ([^`\n]*)`|^python run\.py (.*)$", page.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("command", sorted(IN_PAGES - {"-m …"}))
def test_command_of_a_page(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composes and parses; of a sweep, its first job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet110_best.pth.tar").touch()
    arguments = [argument for argument in shlex.split(command) if argument != "-m"]
    firsts = [a if re.search(r"[\[{]", a) else a.split(",")[0] for a in arguments if a != "dry_run=true"]
    parse(composed(*firsts))


def test_the_readme_names_the_test_command_of_ci() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_pictures_and_links_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
