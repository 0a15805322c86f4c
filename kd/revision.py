"""Which code this is, for records."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


@cache
def commit() -> str | None:
    """The checkout's, `+` behind it where files differ; None where the code lies in no checkout of its own."""
    if not (_ROOT / ".git").exists():  # else git would tell of whatever repository the package is installed in
        return None
    asked = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
