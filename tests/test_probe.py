"""Whether W&B is online: decided by the environment, a key, and whether the server answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd.spec import KnownError
from kd.tracking import probe
from tests.conftest import QUICK, run_py


@pytest.fixture(autouse=True)
def _forget_the_decision() -> Iterator[None]:
    probe.decide.cache_clear()
    yield
    probe.decide.cache_clear()


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
