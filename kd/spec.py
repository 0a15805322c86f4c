"""What every spec of the project is: immutable, strict, and dumped under the names that YAML uses."""

import os
import re
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """Base of all specs: no unknown keys, no NaN or infinity, no change after construction."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    def dump(self) -> dict[str, Any]:
        """JSON-ready fields; λ is called `lambda` here, as in YAML and on the command line."""
        return self.model_dump(mode="json", by_alias=True)


class KnownError(Exception):
    """A failure with a known reason: its message is all a user needs, so no traceback is shown.

    One problem a line; each says what is wrong, where, and what would be right. The home folder is `~` in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, tilde(message).split("\n"))))


class NonFiniteError(KnownError):
    """A training's loss or weights are NaN or infinite."""


def tilde(text: str) -> str:
    """A text with the user's home folder as `~`, for records and lines that others may read."""
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", text) if home else text


def printable(text: str) -> str:
    """A text as it can be shown in a line, control characters and what is not UTF-8 escaped."""
    odd = ("Cc", "Cs", "Zl", "Zp")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in odd else c for c in text)


def _one_line(text: str) -> str:
    if printable(text) != text:
        raise ValueError("should be without control characters, in UTF-8")
    return text


def _path(text: str) -> str:
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > 255 or len(text) > 4000:  # what file systems take
        raise ValueError("is too long for a path")
    return text


Text = Annotated[str, AfterValidator(_one_line)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_one_line), AfterValidator(_path)]
