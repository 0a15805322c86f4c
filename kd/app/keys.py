"""What --help lists: each key with its value and what it may be; training settings once, not once for each network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import fill
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from kd.app.config import Config
from kd.app.parsing import SECTIONS

_WIDTH, _INDENT = 80, 30  # columns, and where a value stands
_KINDS: dict[str, Any] = get_type_hints(Config, include_extras=True)
_TRAINING = "train"  # the settings that model.train and teacher.train have, too


def listed(cfg: DictConfig) -> str:
    """All keys of a configuration with their values, and what else is possible, in lines of 80 columns."""
    tree: Any = OmegaConf.to_container(cfg)
    lines = [line for name in Config.model_fields for line in _section(name, tree[name])]
    note = "train.… is for the whole chain, model.train.… for the student, teacher.train.… for the teacher; "
    note += "null: the recipe's value, or that of the whole chain. docs/running.md says what each key means."
    return "\n".join([*lines, "", fill(note, _WIDTH)])


def _section(name: str, value: Any) -> Iterator[str]:
    """The lines of a section: its keys, or itself where it has a value of its own."""
    if not isinstance(value, dict) or not value:
        yield _line(name, value, _possible(TypeAdapter(_KINDS[name]).json_schema()))
        return
    known = _schemas(name, value)
    for key, own in value.items():
        if key == "name" or (key == _TRAINING):  # chosen as <section>=<option>; and above
            continue
        if isinstance(own, dict) and own:
            yield from (_line(f"{name}.{key}.{inner}", each, "") for inner, each in own.items())
        else:
            yield _line(f"{name}.{key}", own, _possible(known.get(key, {}), known))


def _schemas(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schemas of a section's keys. `$defs` has those that others refer to."""
    kind = _KINDS[name]
    if name in ("method", "loss", "assistant_loss") and value.get("name") in (table := SECTIONS[name][1]):
        kind = table[value["name"]]
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return {}
    try:
        schema = kind.model_json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):  # of a package, with types of its own
        return {}
    return {**schema.get("properties", {}), "$defs": schema.get("$defs", {})}


def _possible(schema: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> str:
    """The values that a schema allows, in words; "" if these are any text, list or group."""
    if "$ref" in schema:
        return _possible((known or {}).get("$defs", {}).get(schema["$ref"].rpartition("/")[2], {}), known)
    if "anyOf" in schema:
        return ", ".join(dict.fromkeys(filter(None, (_possible(each, known) for each in schema["anyOf"]))))
    if "enum" in schema or "const" in schema:
        return ", ".join(str(each) for each in schema.get("enum", [schema.get("const")]))
    if "examples" in schema:
        return ", ".join(schema["examples"])
    if schema.get("type") == "boolean":
        return "true, false"
    if schema.get("type") in ("integer", "number"):
        return _limits(schema)
    return ""


def _limits(schema: Mapping[str, Any]) -> str:
    """The range of a number in words. Upper bounds that only catch typing errors are left out."""
    kind = "a whole number" if schema["type"] == "integer" else "a number"
    signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    told = [f"{sign} {schema[limit]:g}" for limit, sign in signs.items() if abs(schema.get(limit, 1e3)) < 1e3]
    return " ".join([kind, *told])


def _line(key: str, value: Any, possible: str) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    start = f"{key}={shown}".ljust(_INDENT)
    if not possible:
        return start.rstrip()
    return fill(f"{start}  {possible}", _WIDTH, subsequent_indent=" " * (_INDENT + 2), break_on_hyphens=False)
