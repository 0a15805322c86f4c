"""The command line before Hydra reads it: texts mean what is typed, and mistakes are told in our lines.

Hydra's grammar has no `~`, `=` or `(` in a text, takes the last of `model=[a,b]`, and adds rounding errors up in
`range(0.1,1,0.1)`. Its messages for a misspelt key or option are long. This module changes nothing else.
"""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, RangeSweep, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from pydantic import BaseModel

from kd.app.config import Config
from kd.app.experiments import CONF
from kd.app.overrides import (
    NEEDED,
    exact,
    group_problems,
    is_range,
    key_problem,
    length_of,
    means,
    option_problems,
    unreadable,
    value_of,
)
from kd.app.parsing import SECTIONS, by_key, option_has
from kd.core.spec import KnownError, Text, printable
from kd.reporting.console import without_comment

_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.sweeper.storage")
_MOST = 100_000  # values of a range
_NULL = re.compile("null", re.IGNORECASE)
_MULTIRUN = r"\+*hydra\.mode=['\"]?(RunMode\.)?MULTIRUN['\"]?"
_NEVER_READ = ("help", "hydra_help", "shell_completion", "experimental_rerun")


def read_command(words: Sequence[str]) -> list[str]:
    """The arguments for Hydra, flags first. Raises KnownError with a line for each that cannot be what it should."""
    words = _with_one_why(without_comment(words))
    args = get_args_parser().parse_intermixed_args(words)
    if any(getattr(args, name) for name in _NEVER_READ) or args.info is not None:
        return words
    flags = [*words]
    for word in args.overrides:
        flags.remove(word)
    with initialize_config_dir(str(_folder(args)), version_base="1.3"):
        return [*flags, *Reader(args).read(args.overrides)]


def _with_one_why(words: Sequence[str]) -> list[str]:
    """The arguments with `why=` for `--why`. The keys of several are one list. Raises KnownError."""
    kept, asked, left = list[str](), list[str](), iter(words)
    for word in left:
        name, equal, keys = word.partition("=")
        if name == "--why":
            keys = keys if equal else next(left, "")
            if not keys or keys.startswith("-"):
                raise KnownError("--why: needs a key: python run.py --why method.T")
        if name.lstrip("+") in ("--why", "why"):
            asked.append(keys)
        else:
            kept.append(word)
    if len(asked) < 2 and "--why" not in by_key(words):
        return [*words]
    lists = [re.fullmatch(r"\[?([\w@/.,\s-]+)\]?", keys) for keys in asked]
    if not all(lists):
        raise KnownError("why: is given twice; one list: 'why=[method.T,train.lr]'")
    found = [key.strip() for each in lists if each for key in each[1].split(",")]
    return [*kept, f"why={found[0]}" if len(found) == 1 else f"why=[{','.join(found)}]"]


def _folder(args: Namespace) -> Path:
    return CONF if args.config_path is None else (CONF.parent / args.config_path).absolute()


class Reader:
    """Reads overrides with Hydra's own parser and options, which have to be initialised."""

    def __init__(self, args: Namespace, call: str | None = None) -> None:
        """`call` is the function of Python that is given the overrides; None for the command line."""
        self._loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(self._loader)
        self._config_name = args.config_name or "config"
        if args.config_dir is not None:
            self._look_into(Path(args.config_dir).absolute())
        self._multirun, self._call = args.multirun, call
        self._words: dict[str, str] = {}  # what was typed, by how Hydra's parser got it

    def _look_into(self, folder: Path) -> None:
        """Find options in `--config-dir`, too, as Hydra will."""
        if not folder.is_dir():
            raise KnownError(f"--config-dir: {folder} is not a folder")
        path = self._loader.get_search_path()
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
        self._loader.repository = ConfigRepository(path)  # type: ignore[attr-defined]

    def read(self, words: Sequence[str]) -> list[str]:
        """The overrides as Hydra should get them. Raises KnownError."""
        self._multirun |= any(re.fullmatch(_MULTIRUN, word, re.IGNORECASE) for word in words)
        overrides, problems = list[Override](), list[str]()
        for word in words:
            try:
                line = self._quoted(word) if word.partition("=")[0].strip("+~ ") else ""
                overrides.append(self._parsed(line))
                self._words[str(overrides[-1].input_line)] = word
            except (HydraException, ValueError, TypeError, RecursionError):
                problems.append(unreadable(word))
        places = [str(each.input_line) for each in overrides if each.key_or_group == "hydra.searchpath"]
        self._repository = self._searched(places)
        sound = list[Override]()
        for override in overrides:
            found = list(self._problems(override))
            problems += found
            sound += [] if found else [override]
        sound = [self._forced(override) if self._may_lack(override, sound) else override for override in sound]
        tree = self._composed([*map(self._first, sound)])
        if isinstance(tree, Exception):
            sound, tree, found = self._diagnosed(sound)
            problems += found
        grid = not isinstance(tree, Exception) and str(tree["hydra"]["sweeper"]["_target_"]).endswith(".BasicSweeper")
        problems += [
            f"{override.get_key_element()}: {value_of(override)} needs a search: sweep=tpe; grids have choice and range"
            for override in sound
            if grid and override.is_interval_sweep()
        ]
        if problems:
            raise KnownError("\n".join(_shortened(problems)))
        return [exact(each) if grid and is_range(each) else str(each.input_line) for each in sound]

    # texts ---------------------------------------------------------------------------------------------------------

    def _parsed(self, word: str) -> Override:
        override = self._parser.parse_override(word)
        override.config_loader = self._loader
        return override

    def _quoted(self, word: str) -> str:
        """An override with quotes around each text that Hydra's grammar would not take as it is."""
        name, _, value = word.partition("=")
        kind, value = _TEXTS.get(name.lstrip("+")) or name.lstrip("+").startswith("init."), value.strip()
        if not kind or not value or value[0] in "'\"":
            return word
        brackets = ("[", "]") if kind == "list" else ("choice(", ")")
        if value.startswith(brackets[0]) and value.endswith(brackets[1]) and value.count(brackets[0]) == 1:
            inner = value[len(brackets[0]) : -1]
            return f"{name}={brackets[0]}{self._each(inner)}{brackets[1]}" if inner.strip() else word
        if kind == "list" or re.fullmatch(r"\[.*,.*\]|(shuffle|sort|glob)\(.*\)", value, re.DOTALL):
            return word
        return f"{name}={self._each(value)}"

    def _each(self, values: str) -> str:
        """Values that commas separate, each with quotes where it needs them."""
        parts = [part.strip() for part in re.split(r",(?![^${}]*\})", values)]
        quoted = [*map(self._text, parts)]
        return values if quoted == parts else ",".join(quoted)

    def _text(self, value: str) -> str:
        if value[:1] in ("'", '"') or _NULL.fullmatch(value):
            return value
        try:
            taken = self._parsed(f"key={value}").value()
        except (HydraException, ValueError, TypeError, RecursionError):
            taken = None
        if isinstance(taken, str):
            return value
        closed = value.count("${") <= value.count("}")  # otherwise no interpolation is meant
        return QuotedString(value if closed else value.replace("${", r"\${"), Quote.single).with_quotes()

    # one override --------------------------------------------------------------------------------------------------

    def _problems(self, override: Override) -> Iterator[str]:
        """Lines about the values of an override, whatever the others are."""
        key = override.get_key_element().lstrip("+~")
        options = self._options(key.partition("@")[0])
        if options and not override.is_delete():
            yield from option_problems(key, options, [*self._values(override)], self._sweep)
        elif options and key in NEEDED:
            yield f"~{key}: cannot be left out; {NEEDED[key]}"
        elif not override.is_sweep_override():
            value = value_of(override)
            if isinstance(override.value(), float) and not means(value, float(override.value())):  # type: ignore[arg-type]
                yield f"{key}: {value} is too small for a number of 64 bits"
        if not override.is_sweep_override():
            return
        if not self._multirun:
            text = self._words.get(str(override.input_line), "").partition("=")[2].replace("'", "")
            hint = "" if options or _TEXTS.get(key) is None else f"; one text: \"{key}='{text}'\""
            needed = "kd.sweep" if self._call else "-m"
            yield f"{key}: several values need {needed}: {self._sweep(str(override.input_line))}{hint}"
        elif isinstance(span := override.value(), RangeSweep) and not 0 < length_of(span) <= _MOST:
            yield f"{key}: {value_of(override)} has {length_of(span):,} values; 1 to {_MOST:,} are possible"
        elif override.is_discrete_sweep() and not self._texts_of(override):
            mixed = "range(" in value_of(override)  # Hydra cannot list these
            yield f"{key}: {'a range stands alone' if mixed else 'there is no value'} in {value_of(override)}"

    def _sweep(self, word: str) -> str:
        """How to do a run for each value of an override."""
        return f"kd.sweep([{word!r}])" if self._call else f"python run.py -m {shlex.quote(word)}"

    def _options(self, group: str, folder: str = "") -> list[str]:
        """The options of a group, those of its folders too; empty for a key."""
        place = f"{group}/{folder}".rstrip("/")
        names = [f"{folder}{name}" for name in self._repository.get_group_options(place, ObjectType.CONFIG)]
        deeper = names or group == "experiment"
        folders = self._repository.get_group_options(place, ObjectType.GROUP) if deeper else []
        return [*names, *(each for name in folders for each in self._options(group, f"{folder}{name}/"))]

    def _searched(self, places: list[str]) -> ConfigRepository:
        """The folders in which Hydra looks for options, those of `hydra.searchpath` too."""
        try:  # get_group_options of the loader would read the primary configuration again for each override
            return self._loader._parse_overrides_and_create_caching_repo(self._config_name, places)[1]  # type: ignore[attr-defined,no-any-return]
        except Exception:  # the primary configuration, or a place, is wrong: composing says it
            return self._loader.repository  # type: ignore[attr-defined,no-any-return]

    def _values(self, override: Override) -> Iterator[Any]:
        if override.is_discrete_sweep() and override.value_type != ValueType.GLOB_CHOICE_SWEEP:
            yield from map(Override._convert_value, override.sweep_iterator())
        elif not override.is_sweep_override():
            yield override.value()

    def _first(self, override: Override) -> str:
        """The override with the first of its values."""
        if not override.is_sweep_override():
            return str(override.input_line)
        if not override.is_discrete_sweep():
            return f"{override.get_key_element()}={override.value().start}"  # type: ignore[union-attr]
        return f"{override.get_key_element()}={self._texts_of(override)[0]}"

    def _texts_of(self, override: Override) -> list[str]:
        """The values of a sweep, empty if Hydra cannot list them."""
        try:
            return [*override.sweep_string_iterator()]
        except Exception:  # a range among other values: AssertionError, ValidationError
            return []

    # all overrides -------------------------------------------------------------------------------------------------

    def _composed(self, lines: Iterable[str]) -> Any:
        """The configuration as a dict, or the exception that composing it ends in."""
        try:
            cfg = compose(self._config_name, [*lines], return_hydra_config=True)
        except Exception as error:  # Hydra raises ValueError, TypeError and AssertionError, too
            return error
        return OmegaConf.to_container(cfg)

    def _may_lack(self, override: Override, overrides: Sequence[Override]) -> bool:
        """Whether some jobs of a sweep over options have this key, and others do not."""
        section, _, rest = override.key_or_group.partition(".")
        swept = {each.get_key_element() for each in overrides if each.is_sweep_override()}
        if override.get_key_element() != override.key_or_group or section not in SECTIONS or not rest:
            return False
        return bool(swept & {SECTIONS[section][0], "experiment"}) and option_has(override.key_or_group)

    def _forced(self, override: Override) -> Override:
        """The override, for a job that does not have its key, too."""
        return self._parsed(f"++{str(override.input_line).lstrip('+')}")

    def _diagnosed(self, overrides: Sequence[Override]) -> tuple[list[Override], Any, list[str]]:
        """Overrides that can be composed, with the configuration, or lines that say which cannot."""
        paths = [override for override in overrides if override.key_or_group == "hydra.searchpath"]
        chosen = paths + [override for override in overrides if self._options(override.key_or_group)]
        problems, tree = list[str](), self._composed(map(self._first, chosen))
        if isinstance(tree, Exception) and not isinstance(base := self._composed([]), Exception):
            groups = base["hydra"]["runtime"]["choices"]
            problems = [problem for override in chosen[len(paths) :] for problem in group_problems(override, groups)]
        if not isinstance(tree, dict):
            return [*overrides], tree, problems or [_short(tree)]
        sound = list[Override]()
        for override in overrides:
            if override in chosen or (problem := key_problem(override, tree)) is None:
                sound.append(override)
            elif problem:
                problems.append(problem)
            else:
                sound.append(self._forced(override))
        again = tree if problems else self._composed([*map(self._first, sound)])
        if isinstance(again, Exception):
            problems = [*self._culprits(chosen, sound)] or [_short(again)]
        return sound, again, problems

    def _culprits(self, chosen: Sequence[Override], overrides: Sequence[Override]) -> Iterator[str]:
        """A line for each override that cannot be composed by itself."""
        for override in overrides:
            if isinstance(self._composed(map(self._first, [*chosen, override])), Exception):
                cannot = "deleted" if override.is_delete() else value_of(override)
                yield f"{override.get_key_element().lstrip('+~')}: cannot be {cannot}"


def _texts(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys that hold a text, or a list of texts, with `text` or `list`."""
    mark = get_args(Text)[1]
    for name, hint in get_type_hints(section, include_extras=True).items():
        found = str(hint)
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            yield from _texts(hint, f"{prefix}{name}.")
        elif repr(mark) in found and not found.startswith("dict"):
            yield f"{prefix}{name}", "list" if found.startswith("tuple") else "text"


_TEXTS = {**dict(_texts(Config)), **dict.fromkeys(_FOLDERS, "text")}


def _shortened(problems: Iterable[str]) -> Iterator[str]:
    """Each problem on one line, with long values cut."""
    for problem in dict.fromkeys(problems):
        yield printable(re.sub(r"\S{150,}", lambda word: f"{word[0][:100]}…", problem))


def _short(error: BaseException) -> str:
    """An error of Hydra in one line."""
    while not isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
