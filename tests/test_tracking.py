"""Records of a run: the local file, and W&B read back offline and from a stand-in server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kd.spec import KnownError
from kd.store import Store
from kd.tracking import TrackingSpec, probe, track
from kd.tracking.names import axes
from tests.conftest import QUICK, run_py
from tests.test_stage import TEACHER, distilled, stage
from tests.wandb_server import Server

Job = Callable[..., Any]


@pytest.fixture(autouse=True)
def _forget_the_decision() -> Iterator[None]:
    probe.decide.cache_clear()
    yield
    probe.decide.cache_clear()


def test_axes_are_as_short_as_they_can_be() -> None:
    assert axes(distilled().chain) == {TEACHER.key: "teacher", distilled().key: "student"}
    seeds = [distilled(seed=s) for s in (0, 1)]
    assert list(axes(seeds).values()) == ["student-s0", "student-s1"]
    assistants = [stage(role="assistant", model=m) for m in ("resnet14", "resnet8")]
    assert list(axes(assistants).values()) == ["assistant-resnet14", "assistant-resnet8"]
    twins = [distilled(T=t) for t in (1, 2)]
    assert len(set(axes(twins).values())) == 2


def test_the_local_record(job: Job, tmp_path: Path) -> None:
    chain = job()["chain"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["role"], r["key"], r["epoch"]) for r in rows] == [
        (s["role"], s["key"], e) for s in chain for e in (1, 2)
    ]
    job(folder="again")
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == ""  # a reused stage's lines are not replayed
    kept = (tmp_path / "store" / chain[1]["key"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in kept] == [r["loss"] for r in rows if r["role"] == "student"]


def inspect(folder: Path, *flags: str) -> str:
    (run,) = folder.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *flags, "--json", str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in inspect(folder).splitlines() if line.startswith("{")]


def summary(folder: Path) -> dict[str, Any]:
    text = inspect(folder, "--summary")
    parsed: dict[str, Any] = json.loads(text[text.index("{") :])
    return parsed


def test_offline_run_read_back(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = job("tracking=wandb", "replicates=2", "tracking.tags=[a,b]", "tracking.group=g")
    assert "no key is configured" in capsys.readouterr().out
    written = records(tmp_path / "out")
    (started,) = [r["run"] for r in written if r["type"] == "run"]
    config = started["config"]["update"]
    assert config["method"]["lambda"] == 0.5
    assert config["mode"] == "paper"
    assert config["stages"]["teacher"]["key"] == result["chain"][0]["key"]
    assert config["stages"]["student-s1"]["train"]["precision"] == "fp32"  # resolved, where the configuration says null
    assert config["stages"]["student-s1"]["train"]["lr"] == 0.01
    assert {started["run_group"], started["job_type"], *started["tags"]} == {"g", "kd", "a", "b"}
    history = [r["history"]["item"] for r in written if r["type"] == "history"]
    assert [row["teacher/epoch"] for row in history if "teacher/epoch" in row] == [1, 2]
    assert [row["student-s1/epoch"] for row in history if "student-s1/epoch" in row] == [1, 2]
    ended = summary(tmp_path / "out")
    assert ended["exit_code"] == 0
    assert ended["summary"]["objective"] == result["objective"]
    assert ended["summary"]["student-s0/test_acc"] == result["chain"][1]["test_acc"]


def test_a_failed_job_ends_as_failed_and_does_not_leak(job: Job, tmp_path: Path) -> None:
    jobs = ("tracking=wandb", "train.lr=1e30,0.01")
    assert len(job(*jobs, multirun=True, code=1)) == 1
    failed, fine = summary(tmp_path / "out" / "0"), summary(tmp_path / "out" / "1")
    assert (failed["exit_code"], fine["exit_code"]) == (1, 0)
    assert fine["config"]["train"]["lr"] == 0.01
    assert "student/epoch" in fine["summary"]
    assert "student/epoch" not in failed["summary"]


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


def test_online_run_reaches_the_server(server: Server, tmp_path: Path) -> None:
    mine = ("tracking=wandb", "tracking.project=mine", f"hydra.run.dir={tmp_path / 'out'}")
    done = run_py(*QUICK, *mine, cwd=tmp_path, **server.account)
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stdout  # nothing to explain
    (run,) = server.runs.values()
    assert run.fields["project"] == "mine"
    assert run.fields["displayName"] == "plane2 ← plane4 · T4 λ0.5 · s0"
    assert "groupName" not in run.fields  # a single run
    assert run.curve("student/epoch") == [1, 2]
    assert run.exits == [0]
    assert not list((tmp_path / "out").glob("wandb/offline-*"))


def test_an_unreachable_server_means_offline_and_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as closed:  # a port of which nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr("wandb.setup", lambda: type("Setup", (), {"settings": type("S", (), {"base_url": url})}))
    began = time.monotonic()
    mode, reason = probe.decide("auto")
    assert (mode, "cannot be reached" in reason) == ("offline", True)
    assert time.monotonic() - began < 4
    with pytest.raises(KnownError, match=r"online was asked for and .* cannot be reached"):
        probe.decide("online")


def _hang(*args: object) -> None:
    time.sleep(1)
    raise OSError


def test_a_look_up_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr("socket.create_connection", _hang)
    began = time.monotonic()
    assert not probe._answers("example.invalid", 443)
    assert time.monotonic() - began < 0.8


def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not probe._has_key("api.wandb.ai")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "a" * 40)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert probe._has_key("api.wandb.ai")
    assert probe._has_key("api.forge.coreweave.com")  # the same service under its new name
    assert not probe._has_key("elsewhere.example:8080")


def test_behind_a_proxy_the_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setattr(probe, "_answers", lambda host, port: asked.append((host, port)) or True)
    assert probe.decide("auto") == ("online", "")
    assert asked == [("proxy.example", 3128)]


def test_a_wrong_address_is_one_line(tmp_path: Path) -> None:
    done = run_py(*QUICK, "tracking=wandb", "hydra.run.dir=out", cwd=tmp_path, WANDB_BASE_URL="notaurl")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "W&B's settings are wrong" in done.stderr


def test_the_server_is_asked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(probe, "_answers", lambda host, port: asked.append(host))
    assert [probe.decide("auto")[0] for _ in range(3)] == ["offline"] * 3
    assert len(asked) == 1


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_mode_is_respected(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert probe.decide("auto") == (mode, "")
    assert probe.decide("offline") == ("offline", "")


def test_a_misspelt_wandb_mode_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(KnownError, match="WANDB_MODE: should be online, offline or disabled"):
        probe.decide("auto")


def test_a_failure_prints_no_traceback(tmp_path: Path) -> None:
    done = run_py(*QUICK, "tracking=wandb", "train.lr=1e30", f"hydra.run.dir={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "the loss is" in done.stderr.splitlines()[-1]
    assert summary(tmp_path / "out")["exit_code"] == 1


def test_online_without_a_key_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_answers", lambda host, port: True)
    spec = TrackingSpec(name="wandb", project="p", mode="online")
    refusal = pytest.raises(KnownError, match=r"tracking: W&B did not start .*tracking\.mode=offline")
    with refusal, track(spec, tmp_path, [distilled()], {"method": {"name": "kd"}}, Store(tmp_path)):
        pytest.fail("it started")
