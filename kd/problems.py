"""What is wrong with a value, in words: pydantic's verdicts as lines that name the key and what would be right."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kd.spec import Frozen

_MESSAGES = {
    "greater_than": "should be above {gt:.16g}",
    "greater_than_equal": "should be at least {ge:.16g}",
    "less_than": "should be below {lt:.16g}",
    "less_than_equal": "should be at most {le:.16g}",
    "literal_error": "should be {expected}",
    "extra_forbidden": "unknown key",
    "missing": "is missing",
    "string_too_short": "should not be empty",
    "too_short": "should have at least {min_length} entries",
    "finite_number": "should be a finite number",
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "model": "a group of keys",
}


def explain(error: ValidationError, section: str = "") -> list[str]:
    """pydantic's verdict, a line a problem: the key as the command line has it, what would be right, what was given."""
    found = error.errors()
    places = [details["loc"] for details in found]

    def is_consequence(place: tuple[int | str, ...]) -> bool:  # a list is too short where its entries are wrong
        return any(other != place and other[: len(place)] == place for other in places)

    return [_line(details, section) for details in found if not is_consequence(details["loc"])]


def _line(details: ErrorDetails, section: str) -> str:
    key = section + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"])
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        text = str(context["error"])
    elif kind in _MESSAGES:
        text = _MESSAGES[kind].format(**context)
    else:
        expected = _TYPES.get(kind.split("_")[0])
        text = f"should be {expected}" if expected else details["msg"]
    given = details["input"]
    shown = "" if isinstance(given, (dict, Frozen)) or kind == "missing" else f" (got {_shown(given)})"
    return f"{key.lstrip('.')}: {text}{shown}" if key else text


def _shown(given: Any) -> str:
    """A value as YAML has it."""
    return str(given).lower() if isinstance(given, bool) else "null" if given is None else repr(given)
