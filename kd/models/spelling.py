"""The names of networks of libraries: `timm/resnet18?drop_rate=0.1`. One network has one name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class LibraryName(NamedTuple):
    """A name such as `timm/resnet18?drop_rate=0.1`, in its parts."""

    library: str
    arch: str
    options: Mapping[str, Any]  # keyword arguments of the network

    @classmethod
    def parse(cls, text: str) -> LibraryName:
        """Raises ValueError for options that are not written as key=value, joined by &."""
        head, _, query = text.partition("?")
        library, _, arch = head.partition("/")
        options: dict[str, Any] = {}
        for pair in filter(None, query.split("&")):
            key, equals, value = pair.partition("=")
            if not equals or not key.isidentifier():
                raise ValueError(f"options should be key=value, joined by & (got {pair})")
            if key in options:
                raise ValueError(f"the option {key} is given twice")
            options[key] = _value(value)
        return cls(library, arch, options)

    def __str__(self) -> str:
        """The same network always has the same text: options are sorted, and their values are JSON or plain words."""
        query = "&".join(f"{key}={_written(self.options[key])}" for key in sorted(self.options))
        return f"{self.library}/{self.arch}" + (f"?{query}" if query else "")


def _value(text: str) -> Any:
    """A value as JSON has it; a number such as .1 and the words of YAML, too. Anything else is a text."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) else text


def _written(value: Any) -> str:
    """The shortest text that _value() reads back; & is escaped as JSON allows it."""
    if isinstance(value, str) and _value(value) == value and "&" not in value:
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":")).replace("&", "\\u0026")
