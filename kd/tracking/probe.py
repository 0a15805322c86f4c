"""Whether Weights & Biases is online: decided once a process, in a few seconds at most."""

from __future__ import annotations

import netrc
import os
import socket
from functools import cache
from threading import Thread
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from kd.spec import KnownError

_PROBE_SECONDS = 3.0


@cache
def decide(mode: str) -> tuple[Literal["online", "offline", "disabled"], str]:
    """W&B's mode, and why `auto` became offline; decided once a process.

    `auto` is online where a key is configured and the server can be reached. Raises KnownError where online is
    demanded of a server that cannot.
    """
    asked = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    match asked:
        case "offline" | "disabled":
            return asked, ""
        case "auto" | "online":
            return _probe(demanded=asked == "online")
        case _:
            raise KnownError(f"WANDB_MODE: should be online, offline or disabled (got {asked!r})")


def _probe(demanded: bool) -> tuple[Literal["online", "offline"], str]:
    import wandb

    try:
        url = wandb.setup().settings.base_url
    except (wandb.Error, ValueError) as error:
        raise KnownError(f"tracking: W&B's settings are wrong ({' '.join(str(error).split())})") from error
    server = urlsplit(url)
    if not demanded and not _has_key(server.netloc):
        return "offline", "no key is configured (`wandb login`)"
    # Behind a proxy it is the proxy that must answer.
    proxy = "" if proxy_bypass(server.hostname or "") else getproxies().get(server.scheme, "")
    asked = urlsplit(proxy) if proxy else server
    host, port = asked.hostname or "", asked.port or (443 if asked.scheme == "https" else 80)
    if _answers(host, port):
        return "online", ""
    if demanded:
        raise KnownError(f"tracking: online was asked for and {host}:{port} cannot be reached; offline needs no server")
    return "offline", f"{host}:{port} cannot be reached"


def _has_key(netloc: str) -> bool:
    """Whether there is a key for the server in the environment or, as `wandb login` leaves it, in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    names = [netloc, "api.wandb.ai"] if netloc == "api.forge.coreweave.com" else [netloc]  # the same service, renamed
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(name) for name in names)


def _answers(host: str, port: int) -> bool:
    answered = []

    def probe() -> None:
        try:
            socket.create_connection((host, port), _PROBE_SECONDS).close()
            answered.append(True)
        except OSError:
            pass

    # In a thread, because no timeout bounds the look-up of a name.
    thread = Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(answered)
