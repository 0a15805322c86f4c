"""What every spec of the project is: immutable, strict, and dumped under the names that YAML uses."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of all specs: no unknown keys, no NaN or infinity, no change after construction."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    def dump(self) -> dict[str, Any]:
        """JSON-ready fields; λ is called `lambda` here, as in YAML and on the command line."""
        return self.model_dump(mode="json", by_alias=True)


class KnownError(Exception):
    """A failure with a known reason: its message is all a user needs, so no traceback is shown.

    One problem a line; each says what is wrong, where, and what would be right.
    """


class NonFiniteError(KnownError):
    """A training's loss or weights are NaN or infinite."""
