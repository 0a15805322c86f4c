"""The reader of exports: a network from its folder or its file alone."""

from __future__ import annotations

from pathlib import Path

from kd.core.spec import KnownError
from kd.tools.export.contract import Contract
from kd.tools.export.formats import FORMATS, Run, open_format

_WEIGHTS = [f"model.{name}" for name in FORMATS]


def open_export(path: Path) -> tuple[Contract, Run]:
    """An exported network: its contract, and the function that computes logits on the CPU.

    `path` is the folder of an export, or the file with the weights in it. Raises KnownError if it is none, if it is
    damaged, or if a package that it needs is not installed.
    """
    weights = _weights(path)
    form = open_format(weights.suffix.removeprefix("."))
    packed = {}
    for name in form.files:
        place = weights if name == form.weights else weights.with_name(name)
        try:
            packed[name] = place.read_bytes()
        except OSError as error:
            raise KnownError(f"{place} cannot be read ({error.strerror})") from error
    try:
        return form.contract(packed), form.unpack(packed)
    except KnownError:
        raise
    except Exception as error:  # damaged files raise many types of exceptions
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise KnownError(f"{weights} is damaged, or no export of this version ({why})") from error


def _weights(path: Path) -> Path:
    """The file with the weights."""
    if path.is_file():
        if path.suffix.removeprefix(".") not in FORMATS:
            raise KnownError(f"{path} is no exported network: its file is {' or '.join(_WEIGHTS)}")
        return path
    found = [path / name for name in _WEIGHTS if (path / name).is_file()]
    if len(found) != 1:
        got = f"{' and '.join(_WEIGHTS)}: name one of them" if found else f"neither {' nor '.join(_WEIGHTS)}"
        raise KnownError(f"{path} has {got}")
    if (path / "stage.json").is_file():
        raise KnownError(f"{path} is a stage of a store, and not an export: give its key, {path.name}")
    return found[0]
