"""One override by itself: the values of its range, and a line about what is wrong with it.

A grid's `range(start, stop, step)` is computed by decimal arithmetic, because Hydra adds rounding errors up.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from decimal import ROUND_CEILING, Decimal
from typing import Any

from hydra.core.override_parser.types import Override, Quote, QuotedString, RangeSweep

from kd.app.parsing import SECTIONS, keys_in, option_has
from kd.core.spec import nearest, nearest_keys
from kd.models.libraries import LIBRARIES

_OPEN = ("init", "model.args", "teacher.args")  # groups of keys that a user names
_NOTHING = object()  # what a missing key has
NEEDED = {  # groups that no run is without, with what may be meant by deleting them
    "teacher": "method=scratch has none",
    "tracking": "tracking=none turns it off",
    "dataset": "dataset=<name> chooses another",
}


def is_range(override: Override) -> bool:
    """Whether the value is a range(start, stop, step)."""
    return isinstance(override.value(), RangeSweep)


def value_of(override: Override) -> str:
    """The text of the value."""
    return str(override.input_line).partition("=")[2].strip()


def unreadable(word: str) -> str:
    """A line about a word that Hydra's grammar does not take, with quotes that may help."""
    name, equal, value = word.partition("=")
    if not equal or not name.strip("+~ "):
        return f"{word}: should be key=value"
    quoted = QuotedString(value.replace('"', "").replace("'", ""), Quote.double).with_quotes()
    return f"{name}: {value} cannot be read; a text with other signs needs quotes: {shlex.quote(f'{name}={quoted}')}"


def option_problems(
    key: str, options: Sequence[str], values: Sequence[Any], sweep: Callable[[str], str]
) -> Iterator[str]:
    """Lines about values of a group that are no options, or a list; `sweep` gives the command for each of them."""
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    if any(isinstance(value, list) and len(value) != 1 for value in values):
        hint = f"; a run for each: {sweep(f'{key}=' + ','.join(map(str, names)))}" if names else ""
        yield f"{key}: takes one option, not a list{hint}"
        return
    for name in names:
        if isinstance(name, dict):
            yield f"{key}: takes the name of an option, not keys"
            continue
        inside = [option for option in options if option.startswith(f"{name}/")]
        if inside:
            yield f"{key}={name}: is a folder of options: {', '.join(inside[:3])}, …"
        elif name not in options and not re.fullmatch(r"\$\{(dataset|model|teacher|method)\}", str(name)):
            shown = "null" if name is None else name
            yield f"{key}={shown}: there is no such option; {_instead(key, str(name)) or nearest(str(name), options)}"


def _instead(key: str, name: str) -> str | None:
    """How to choose what is no option: a library's network, or an entry by its dotted path."""
    library, _, arch = name.partition("/")
    if key in ("model", "teacher") and library in LIBRARIES and arch:
        return f"{key}={library} {key}.arch={arch}"
    if key in ("model", "teacher", *SECTIONS) and re.fullmatch(r"[a-zA-Z_]\w*(\.\w+)+", name):
        return f"a dotted path is {key}.name={name}"
    return None


def group_problems(override: Override, groups: dict[str, Any]) -> Iterator[str]:
    """A line about a group that does not exist, or has a + that it must not have."""
    key = override.get_key_element().lstrip("+~")
    if override.is_add() and key in groups:
        yield f"{key}: is chosen without a +"
    elif not override.is_add() and key not in groups:
        yield f"{key}: unknown key; {nearest(key, [*groups])}"


def key_problem(override: Override, tree: dict[str, Any]) -> str | None:
    """A line about an override's key; "" if it has to be forced, None if it is right."""
    key, section = override.key_or_group, override.key_or_group.partition(".")[0]
    exists = override.package is None and _at(tree, key) is not _NOTHING
    if override.is_force_add():
        return None
    if override.is_add():
        return (
            f"{key}: exists already; leave the + out"
            if exists and not isinstance(override.value(), (dict, list))
            else None
        )
    if exists:
        return None if override.is_delete() else _node_problem(key, _at(tree, key), override.value(), tree)
    table = SECTIONS[section][1] if section in SECTIONS else None
    brought = table is not None and tree[section].get("name") in table.installed
    if not override.is_delete() and (brought or option_has(key) or key.rpartition(".")[0] in _OPEN):
        return ""
    return f"{override.get_key_element().lstrip('+')}: unknown key; {_near_keys(key, tree)}"


def _node_problem(key: str, node: Any, value: Any, tree: dict[str, Any]) -> str | None:
    """A line about a group of keys that gets a value, or keys that it lacks; "" if they are the user's to name."""
    if isinstance(node, list) and isinstance(value, dict):
        return f"{key}: is a list, not a group of keys"
    if not isinstance(node, dict) or (key in _OPEN and isinstance(value, dict)):
        return "" if isinstance(node, dict) else None
    if not isinstance(value, dict):
        return f"{key}: is a group of keys{': ' if node else ''}{', '.join(map(str, node))}"
    unknown = [f"{key}.{name}" for name in value if name not in node]
    return f"{unknown[0]}: unknown key; {_near_keys(unknown[0], tree)}" if unknown else None


def _near_keys(key: str, tree: dict[str, Any]) -> str:
    keys = [*keys_in(tree if key.startswith("hydra") else {name: tree[name] for name in tree if name != "hydra"})]
    for part in ("launcher", "sweeper"):
        if key.startswith(f"hydra.{part}."):
            return f"hydra/{part}={tree['hydra']['runtime']['choices'][f'hydra/{part}']} has none of this name"
    return nearest_keys(key, keys)


def _at(tree: Any, key: str) -> Any:
    """What a tree has at a dotted key; _NOTHING if it has no such key."""
    for part in key.split("."):
        tree = tree.get(part, _NOTHING) if isinstance(tree, dict) else _NOTHING
    return tree


def means(text: str, value: float) -> bool:
    """Whether a number is what its text says: 1e-400 is not 0."""
    return value != 0 or not re.search("[1-9]", re.split("[eE]", text)[0])


# ranges ---------------------------------------------------------------------------------------------------------------


def exact(override: Override) -> str:
    """An override whose value is a range, with the range's values in its place if they are no whole numbers."""
    span: Any = override.value()
    if isinstance(span.range(), range):
        return str(override.input_line)
    values = ",".join(map(str, _decimals(span)))
    return f"{override.get_key_element()}={'shuffle' if span.shuffle else 'choice'}({values})"


def _decimals(span: RangeSweep) -> Iterator[float]:
    """The values of a range, by decimal arithmetic on what is typed."""
    start, step = Decimal(str(span.start)), Decimal(str(span.step))
    yield from (float(start + step * number) for number in range(length_of(span)))


def length_of(span: RangeSweep) -> int:
    """How many values a range has; 0 for one that never ends."""
    start, stop, step = (Decimal(str(each)) for each in (span.start, span.stop, span.step))
    if not step or not all(each.is_finite() for each in (start, stop, step)):
        return 0
    return max(0, int(((stop - start) / step).to_integral_value(ROUND_CEILING)))
