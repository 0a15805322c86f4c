"""Fuzzing checkpoints: damaged, hostile and strange files give a message or the right weights, and run no code.

KD_FUZZ=5000 draws so many instead of the suite's few.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from safetensors.torch import save

from kd.core.spec import KnownError
from kd.models import build
from kd.store.foreign import fingerprint, load_network
from tests.test_given import given

FEW = 200
EXAMPLES = int(os.environ.get("KD_FUZZ", FEW))
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, of files that are none


@cache
def contents() -> dict[str, bytes]:
    """A small network in each format that we read."""
    torch.manual_seed(0)
    state = build("plane2", num_classes=10, image_size=16).state_dict()

    def saved(zipped: bool, content: Any) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()

    whole = {"epoch": 3, "state_dict": state, "acc": np.float64(7)}
    return {"zip": saved(True, whole), "legacy": saved(False, whole), "safetensors": save(state)}


def outcome(path: Path) -> str:
    """The message about a file, or `loaded`. Errors other than KnownError are raised."""
    try:
        load_network(path, given("plane2", sha256=fingerprint(path)))
    except KnownError as error:
        text = str(error)
        assert text.startswith("teacher.checkpoint: ")
        assert all(line.isprintable() and len(line) < 4000 for line in text.splitlines())
        return text
    return "loaded"


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == FEW, suppress_health_check=list(HealthCheck))
@drawn(data=st.data())
def test_damaged_files(data: st.DataObject, tmp_path: Path) -> None:
    kind = data.draw(st.sampled_from([*contents(), "random"]))
    if kind == "random":
        content = bytearray(data.draw(st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"])))
        content += data.draw(st.binary(max_size=300))
    else:
        content = bytearray(contents()[kind])
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        begin_or_end = st.integers(0, 2000) | st.integers(-2000, -1) | st.integers(0, 10**9)
        for place in data.draw(st.lists(begin_or_end, max_size=8)) if content else ():
            content[place % len(content)] ^= 1 << data.draw(st.integers(0, 7))
    file = tmp_path / "file.pt"
    file.write_bytes(content)
    before = time.monotonic()
    outcome(file)
    assert time.monotonic() - before < 20


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, what: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = what, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def calls(canary: Path) -> dict[str, Call]:
    command = f"touch {canary}"
    return {
        "os.system": Call(os.system, command),
        "eval": Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({str(canary)!r}, 'w')"),
        "open": Call(io.open, str(canary), "w"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "torch.load": Call(torch.load, str(canary)),
        "np.save": Call(np.save, str(canary), 1),
    }


def state_with(call: Call) -> dict[str, Any]:
    return {**build("plane2", num_classes=10, image_size=16).state_dict(), "more": call}


@pytest.mark.parametrize("name", calls(Path("x")))
@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle", "in a rebuilt tensor", "tar", "second pickle", "name"])
def test_nothing_runs(name: str, how: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    call, file = calls(canary)[name], tmp_path / "evil.pt"
    if how in ("zip", "legacy"):
        torch.save(state_with(call), file, _use_new_zipfile_serialization=how == "zip")
    elif how == "bare pickle":
        file.write_bytes(pickle.dumps({"model": call}))
    elif how == "in a rebuilt tensor":
        from torch._utils import _rebuild_tensor_v2

        torch.save({"fc.weight": Call(_rebuild_tensor_v2, call, 0, (1,), (1,), False, {})}, file)
    elif how == "tar":
        with tarfile.open(file, "w") as packed:
            for member in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(member)
                info.size = len(content := pickle.dumps(call))
                packed.addfile(info, io.BytesIO(content))
    elif how == "second pickle":
        file.write_bytes(contents()["zip"])
        with zipfile.ZipFile(file, "a") as packed:
            packed.writestr("archive/more/data.pkl", pickle.dumps(call))
            packed.writestr("../../canary", "x")
    else:
        file = tmp_path / "evil.safetensors"
        file.write_bytes(pickle.dumps(call))
    assert outcome(file) != "loaded"
    assert not canary.exists()
    assert not (tmp_path.parent.parent / "canary").exists()


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@cache
def bomb() -> bytes:
    """A checkpoint whose first storage unpacks to 2 GB."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(contents()["zip"])) as whole,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out,
    ):
        for name in whole.namelist():
            with out.open(name, "w") as member:
                member.write(whole.read(name))
                for _ in range(200 if name.endswith("data/0") else 0):
                    member.write(bytes(10_000_000))
    return packed.getvalue()


def zip_bomb(file: Path) -> None:
    file.write_bytes(bomb())


def far_end(file: Path) -> None:
    """The same, with its end record so far from the file's end that torch sees a zip and Python does not."""
    zip_bomb(file)
    with file.open("ab") as end:
        end.write(bytes(67_000))


def wrap_deeply(file: Path) -> None:
    state = build("plane2", num_classes=10, image_size=16).state_dict()
    torch.save({"module." * 5000 + name: tensor for name, tensor in state.items()}, file)


def nest_deeply(file: Path) -> None:
    file.write_bytes(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


STRANGE: dict[str, Callable[[Path], object]] = {
    "a directory": lambda file: file.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "empty": lambda file: file.write_bytes(b""),
    "absent": lambda file: None,
    "a circle of links": lambda file: file.symlink_to(file),
    "a bomb": zip_bomb,
    "a bomb with a far end": far_end,
    "nested": nest_deeply,
    "a header of 2**63 bytes": lambda file: file.write_bytes(struct.pack("<Q", 2**63) + b"{"),
    "a header of 1 TB": lambda file: file.write_bytes(struct.pack("<Q", 10**12) + b"{}"),
    "a tensor of 2**60 numbers": lambda file: file.write_bytes(
        header(w={"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]})
    ),
    "overlapping tensors": lambda file: file.write_bytes(
        header(**{n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}) + bytes(4)
    ),
    "an unknown dtype": lambda file: file.write_bytes(
        header(w={"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}) + bytes(4)
    ),
    "a large bytearray": lambda file: torch.save({"model": Call(bytearray, 10**14)}, file),
    "odd names": lambda file: torch.save({"\x1b[31m\n" + "a" * 10**6: torch.zeros(1)}, file),
    "keys that are no names": lambda file: torch.save({1: torch.zeros(1), (2, 3): 4, None: 5}, file),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if "bomb" in kind or kind == "odd names" else ()) for kind in STRANGE],
)
def test_strange_files(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    STRANGE[kind](file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcome(file) != "loaded"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # KiB


def test_however_deeply_wrapped(tmp_path: Path) -> None:
    wrap_deeply(tmp_path / "file.pt")
    assert outcome(tmp_path / "file.pt") == "loaded"
