"""The base of all specs, the hash that keys are made of, errors with readable messages, and the extension tables."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

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
_ELSEWHERE = {  # keys of other tools, by their names here
    "learning_rate": "lr",
    "wd": "weight_decay",
    "bs": "batch_size",
    "temperature": "T",
    "temp": "T",
    "alpha": "lambda",
    "lam": "lambda",
    "scheduler": "schedule",
    "opt": "optimizer",
}
_LISTED = 30  # names of a table that a message shows
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "model": "a group of keys",
    "dict": "a group of keys",
}
_KIND = re.compile(r"literal\[.*|(constrained-)?(bool|int|float|str)|none")  # of value, as pydantic names it in places


class KnownError(Exception):
    """A failure with a known reason: its message is all a user needs, so no traceback is shown.

    One problem a line; each says what is wrong, where, and what would be right. The home folder is `~` in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, tilde(message).split("\n"))))


class LostImageError(KnownError):
    """An image that was there when the data set was read is not there any more. Of several ranks one may meet it."""


class NonFiniteError(KnownError):
    """A training's loss or weights are NaN or infinite."""


def tilde(text: str) -> str:
    """A text with the user's home folder as `~`, for records and lines that others may read."""
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", text) if home else text


def printable(text: str) -> str:
    """A text on one line: control characters and invalid UTF-8 are escaped."""
    odd = ("Cc", "Cs", "Zl", "Zp")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in odd else c for c in text)


def explain(error: ValidationError, section: str = "") -> list[str]:
    """One line for each problem that pydantic found: the key as on the command line, what is allowed, and the value."""
    found = error.errors()
    places = [details["loc"] for details in found]

    # A list is also reported as too short if its entries are wrong: that line would only repeat the problem.
    def is_consequence(place: tuple[int | str, ...]) -> bool:
        return any(other != place and other[: len(place)] == place for other in places)

    by_key = dict[str, list[ErrorDetails]]()
    for details in found:
        if not is_consequence(details["loc"]):
            by_key.setdefault(_key(details, section), []).append(details)
    return [line for key, problems in by_key.items() for line in _lines(key, problems)]


def _key(details: ErrorDetails, section: str) -> str:
    """The key as on the command line. pydantic adds the kind of value that it tried: `compile.bool` is `compile`."""
    place = details["loc"]
    if place and _KIND.fullmatch(str(place[-1])) and details["type"] != "extra_forbidden":
        place = place[:-1]
    return (section + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)).lstrip(".")


def _lines(key: str, problems: Sequence[ErrorDetails]) -> list[str]:
    """A key's problems; one line says what is allowed if values of several kinds are."""
    texts = [_text(details) for details in problems]
    if len(texts) > 1 and all(text.startswith("should be ") for text in texts):
        texts = [", or ".join([texts[0], *(text.removeprefix("should be ") for text in texts[1:])])]
    lines = [text + _got(details) for text, details in zip(texts, problems, strict=False)]
    return [f"{key}: {line}" if key else line for line in lines]


def _text(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in _MESSAGES:
        return _MESSAGES[kind].format(**context)
    expected = _TYPES.get(kind.split("_")[0])
    return f"should be {expected}" if expected else details["msg"]


def _got(details: ErrorDetails) -> str:
    given = details["input"]
    return "" if isinstance(given, (dict, BaseModel)) or details["type"] == "missing" else f" (got {_shown(given)})"


def _shown(given: Any) -> str:
    """A value as YAML has it."""
    return str(given).lower() if isinstance(given, bool) else "null" if given is None else repr(given)


@dataclass(frozen=True)
class Neutral:
    """Marks a field that was added after keys existed: it leaves the hash while it has this value.

    `ema: Annotated[float, Neutral(0.0)] = 0.0` moves no key of a stage that is trained without it.
    """

    value: Any


class Unhashed:
    """Marks a field that is recorded and never hashed: another field decides it."""


class Frozen(BaseModel):
    """Base of all specs: no unknown keys, no NaN or infinity, no change after construction."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    def dump(self) -> dict[str, Any]:
        """JSON-ready fields; λ is called `lambda` here, as in YAML and on the command line."""
        return self.model_dump(mode="json", by_alias=True)

    def identity(self) -> dict[str, Any]:
        """What is hashed: the fields of dump(), without those that have their neutral value or are unhashed."""
        identity = self.dump()
        for name, field in type(self).model_fields.items():
            value, key = getattr(self, name), field.serialization_alias or name
            if any(_leaves(mark, value) for mark in field.metadata):
                del identity[key]
            else:
                identity[key] = _identity(value, identity[key])
        return identity


def _leaves(mark: Any, value: Any) -> bool:
    return isinstance(mark, Unhashed) or (isinstance(mark, Neutral) and bool(mark.value == value))


def _identity(value: Any, dumped: Any) -> Any:
    """What is hashed of a value: the identity of each spec in it, and everything else as it is dumped."""
    if isinstance(value, Frozen):
        return value.identity()
    if isinstance(value, (tuple, list)):
        return [_identity(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {key: _identity(value[key], dumped[key]) for key in value}
    return dumped


def hashed(identity: dict[str, Any]) -> str:
    """16 hex digits of sha256 over the sorted JSON of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _one_line(text: str) -> str:
    if printable(text) != text:
        raise ValueError("should be without control characters, in UTF-8")
    return text


def _path(text: str) -> str:
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > 255 or len(text) > 4000:  # what file systems take
        raise ValueError("is too long for a path")
    return text


def located(text: str, told: ValidationInfo) -> str:
    """A path that is relative to the `home` of the context, if there is one; otherwise it stays as it is."""
    home = (told.context or {}).get("home")
    return text if home is None else os.path.join(home, os.path.expanduser(text))


Text = Annotated[str, AfterValidator(_one_line)]
FileName = Annotated[str, Field(min_length=1), AfterValidator(_one_line), AfterValidator(_path)]
PathText = Annotated[FileName, AfterValidator(located)]


def nearest(name: str, names: Sequence[str], listed: Sequence[str] = ()) -> str:
    """A question with the names that are nearest to a misspelt one, or what there is: those `listed`, or all."""
    plain = {re.sub(r"[^a-z0-9]", "", each.lower()): each for each in reversed(names)}
    found = get_close_matches(re.sub(r"[^a-z0-9]", "", name.lower()), plain, n=3, cutoff=0.65)
    if found:
        return f"did you mean {', '.join(plain[each] for each in found)}?"
    return _listed(listed or names, 12)


def nearest_keys(key: str, keys: Sequence[str]) -> str:
    """A question with the keys that end alike, or else with those of the nearest names."""
    parent, _, last = key.rpartition(".")
    for name in (last, _ELSEWHERE.get(last)):
        alike = sorted((each for each in keys if each.rpartition(".")[2] == name), key=lambda each: each.count("."))
        if alike:
            return f"did you mean {', '.join(alike[:3])}?"
    return nearest(key, keys, [each for each in keys if each.rpartition(".")[0] == parent])


def _listed(names: Sequence[str], most: int = _LISTED) -> str:
    more = f", … ({len(names)} in all; --help lists them)" if len(names) > most else ""
    return f"there are {', '.join(names[:most])}{more}"


T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """The entries of a table by name: ours, the entry points of `group`, and any dotted path.

    An installed package brings an entry by `[project.entry-points."kd.models"] tiny = "package.module:TINY"`; without
    installing, its name is `package.module.TINY`. Our own names come first. Nothing from outside is imported before
    it is asked for, so a broken entry stops only the runs that use it.
    """

    def __init__(self, group: str, own: Mapping[str, T | str], kind: Any) -> None:
        """`kind` is the type of the entries: a class, or `type[base]` if the entries are classes.

        An entry of ours may be a dotted path: then it is imported when it is asked for.
        """
        self.group, self._own, self._kind = group, own, kind

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group) if entry.name not in self._own}

    def __getitem__(self, name: str) -> T:
        """The entry. Raises KeyError for an unknown name; KnownError if it cannot be imported or has the wrong type."""
        if name in self._own:
            entry = self._own[name]
            return load_attribute(entry) if isinstance(entry, str) else entry
        point = self._points.get(name)
        if point is None and "." not in name:
            raise KeyError(name)
        whose = f"{self.group}: {name}" + (f" ({_origin(point)})" if point else "")
        found: T = _imported(whose, point.load if point else partial(_attribute, name))
        if not _fits(found, self._kind):
            raise KnownError(f"{whose} is not a {_described(self._kind)} (got {' '.join(repr(found).split())[:100]})")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self._points])

    def __len__(self) -> int:
        return len(self._own) + len(self._points)

    @property
    def installed(self) -> list[str]:
        """The names that installed packages bring."""
        return list(self._points)

    def usable(self) -> dict[str, T]:
        """All entries, without those of installed packages that are broken."""
        found = {name: self[name] for name in self._own}
        for name in self._points:
            with suppress(KnownError):
                found[name] = self[name]
        return found

    def parse(self, tree: Any) -> Any:
        """A spec from a record of it, by the record's `name`; for tables of specs. Anything else is returned unchanged.

        Raises ValueError for an unknown name: the package that defined the spec may be uninstalled.
        """
        if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
            return tree
        kind: Any = self[self.known(tree["name"])]
        return kind.model_validate(tree)

    def known(self, name: str) -> str:
        """The name, if it stands for something. Raises ValueError with the nearest names where it does not."""
        try:
            self[name]
        except KnownError as error:
            raise ValueError(str(error)) from error
        except KeyError as error:
            near = get_close_matches(name, self, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{hint}{_listed([*self])}") from error
        return name


def load_attribute(path: str) -> Any:
    """The object at the dotted path `package.module.name`. Raises KnownError, in one line, if there is none."""
    return _imported(path, partial(_attribute, path))


def _attribute(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _imported(whose: str, load: Callable[[], Any]) -> Any:
    """What load() returns. Whatever a module raises while it is imported becomes one line."""
    try:
        return load()
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise KnownError(f"{whose} cannot be imported ({why})") from error


def _origin(point: EntryPoint) -> str:
    return point.value + (f" of the package {point.dist.name}" if point.dist else "")


def _fits(entry: Any, kind: Any) -> bool:
    if get_origin(kind) is type:
        return isinstance(entry, type) and issubclass(entry, get_args(kind)) and not isabstract(entry)
    return isinstance(entry, kind)


def _described(kind: Any) -> str:
    return f"complete subclass of {get_args(kind)[0].__name__}" if get_origin(kind) is type else str(kind.__name__)
