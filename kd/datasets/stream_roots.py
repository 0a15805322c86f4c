"""Where streamed pictures lie. Copies of one data set have one content, and two runs may use two copies at once."""

from __future__ import annotations

import json
from pathlib import Path

from kd.core import files

_MOST = 8  # places that a file keeps, the newest first

_chosen: dict[Path, Path] = {}  # the roots of this process, by their files


def keep_root(path: Path, root: Path) -> None:
    """Note that a run of this process uses the copy at `root`. `path` is <content>.root."""
    _chosen[path] = root.absolute()
    told = [str(root.absolute()), *(each for each in _known(path) if each != str(root.absolute()))]
    if told[:_MOST] != _known(path):
        files.write(path, json.dumps(told[:_MOST]))


def root_of(path: Path) -> Path:
    """This process's copy; or else the newest that is still there. Raises OSError or ValueError without a file."""
    if path in _chosen:
        return _chosen[path]
    known = [Path(each) for each in _known(path, strict=True)]
    return next((each for each in known if each.exists()), known[0])


def _known(path: Path, *, strict: bool = False) -> list[str]:
    """The places in the file. One that is damaged or missing has none, unless `strict`."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return [told] if isinstance(told, str) else [str(each) for each in told]  # a text: of earlier versions
    except (OSError, ValueError, TypeError):
        if strict:
            raise
        return []
