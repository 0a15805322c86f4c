"""A search with its study in a real PostgreSQL server, which is started here. Skipped without PostgreSQL."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from tests.conftest import QUICK, run_py

pytestmark = pytest.mark.slow


def _programs() -> Path:
    """The folder of initdb and pg_ctl, which Debian keeps off the path."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("psycopg2 is not installed (pip install psycopg2-binary)")
    return folders[-1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a database of its own."""
    programs, place = _programs(), tmp_path / "postgres"
    # It refuses to be run by root; Debian's package brings a user for it.
    user: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser")
        user = ["runuser", "-u", "postgres", "--"]
        for folder in [tmp_path, *tmp_path.parents][:-2]:
            folder.chmod(folder.stat().st_mode | 0o055)
    place.mkdir()
    if user:
        shutil.chown(place, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [*user, str(programs / program), "-D", str(place / "data"), *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=place)

    run("initdb", "-U", "kd", "-A", "trust", "-N")
    options = f"-h 127.0.0.1 -p {port} -k {place}"
    run("pg_ctl", "-o", options, "-l", str(place / "log"), "-w", "start")
    yield f"postgresql+psycopg2://kd@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-m", "immediate", "stop")


def test_a_search_goes_on_in_postgresql(server: str, tmp_path: Path) -> None:
    common = ("-m", *QUICK, "sweep=tpe", "train.epochs=1", f"hydra.sweeper.storage={server}", "hydra.sweep.dir=out")
    for n_trials, said in ((2, "0 trials done, 2 to go"), (3, "2 trials done, 1 to go")):
        done = run_py(*common, f"hydra.sweeper.n_trials={n_trials}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    (study,) = optuna.get_all_study_summaries(server)
    assert study.n_trials == 3
    assert not (tmp_path / "out" / "study.db").exists()
