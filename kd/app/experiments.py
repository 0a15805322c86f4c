"""The published rows as options of `experiment`. They are declared in conf/paper.

Your own experiments are files, conf/experiment/<name>.yaml. Hydra lists both kinds.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from kd.core.files import ROOT
from kd.core.spec import Frozen, KnownError, explain
from kd.core.stage import Seed
from kd.models import NetworkName

CONF = ROOT / "conf"
PAPERS = ("takd", "trained_teacher", "benchmark", "ours")  # files of conf/paper

Name = Annotated[str, Field(pattern=r"^\w+$")]


class Experiment(Frozen):
    """One option of `experiment`."""

    group: str  # the paper
    kind: str
    dataset: str
    chain: tuple[str, ...]  # the teacher first, the student last; only the student if it has no teacher
    about: str
    node: dict[str, Any]  # the content of a yaml file for the option

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks as they stand in the name. `_` separates networks there, so resnext29_8x64d is resnext29."""
        return tuple(network.partition("_")[0] for network in self.chain)

    @property
    def name(self) -> str:
        """The name of the option: <group>/<data set>/<kind>_<networks>."""
        return f"{self.group}/{self.dataset}/{'_'.join((self.kind, *self.networks))}"


class Declaration(Frozen):
    """Experiments that differ only in data set and networks: one for each data set and each chain.

    In `about` and in the texts of `settings`, {teacher} and {student} are replaced by the chain's networks.
    """

    kind: Name
    datasets: tuple[Name, ...] = Field(min_length=1)
    chains: tuple[Annotated[tuple[NetworkName, ...], Field(min_length=1)], ...] = Field(min_length=1)
    method: Name
    settings: dict[str, Any] = Field({})  # of the method; a chain's middle networks are its assistants
    mode: Literal["paper", "reference"] | None = None
    seed: Seed | None = None
    about: str = Field(min_length=1)

    def experiments(self, group: str) -> list[Experiment]:
        """All experiments, by data set."""
        return [
            Experiment(
                group=group,
                kind=self.kind,
                dataset=dataset,
                chain=chain,
                about=_filled(self.about, chain),
                node=self._node(dataset, chain),
            )
            for dataset in self.datasets
            for chain in self.chains
        ]

    def _node(self, dataset: str, chain: tuple[str, ...]) -> dict[str, Any]:
        chosen = {"dataset": dataset, "train": dataset, "model": chain[-1], "method": self.method}
        chosen |= {"teacher": chain[0]} if len(chain) > 1 else {}
        chosen |= {"mode": self.mode} if self.mode else {}
        settings = _filled(self.settings, chain)
        settings |= {"assistants": list(chain[1:-1])} if len(chain) > 2 else {}
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"defaults": [{f"override /{key}": name} for key, name in chosen.items()], "method": settings, **seed}


def _filled(value: Any, chain: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(entry, chain) for key, entry in value.items()}
    if isinstance(value, str):
        return value.replace("{teacher}", chain[0]).replace("{student}", chain[-1])
    return value


@cache
def experiments() -> dict[str, Experiment]:
    """Every experiment that conf/paper declares, by name.

    Raises KnownError with all problems of a file, one per line, and if two experiments have the same name.
    """
    found: dict[str, Experiment] = {}
    for paper in PAPERS:
        for group, declarations in _declared(paper).items():
            for experiment in [e for declaration in declarations for e in declaration.experiments(group)]:
                if experiment.name in found:
                    raise KnownError(f"conf/paper/{paper}.yaml: experiment {experiment.name} is declared twice")
                found[experiment.name] = experiment
    return found


def _declared(paper: str) -> dict[str, tuple[Declaration, ...]]:
    try:
        return TypeAdapter(dict[Name, tuple[Declaration, ...]]).validate_python(read_yaml(paper).get("experiments", {}))
    except ValidationError as error:
        problems = explain(error, "experiments")
        raise KnownError("\n".join(f"conf/paper/{paper}.yaml: {problem}" for problem in problems)) from error


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The fast loader, because every run reads these files; a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"{min(twice)} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(name: str) -> dict[str, Any]:
    """A file of conf/paper as plain data, with its anchors resolved. Raises KnownError if it is not valid YAML."""
    path = CONF / "paper" / f"{name}.yaml"
    try:
        tree = yaml.load(path.read_bytes(), _Loader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise KnownError(f"conf/paper/{name}.yaml: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise KnownError(f"conf/paper/{name}.yaml: should be a mapping of keys")
    return tree
