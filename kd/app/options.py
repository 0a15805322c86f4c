"""The options that Hydra gets from tables in Python: networks, recipes, experiments, and those of packages."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from kd.app.experiments import experiments
from kd.core.recipes import RECIPES
from kd.core.settings import TrainOverrides
from kd.datasets import DATASETS
from kd.losses import LOSSES
from kd.methods import METHODS
from kd.models import MODELS
from kd.models.libraries import LIBRARIES


class _Shared(dict[str, Any]):
    """Options that Hydra does not copy with its repository, as it does once for every group that --help lists.

    They are copied where they are loaded, before anything is changed in them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def register() -> None:
    """Tell Hydra the options of model, teacher, train and experiment, and of installed packages. May be called again.

    Our own data sets, methods and losses have a file in conf/, and Hydra warns where an option has both. Raises
    KnownError where conf/paper declares no valid experiments.
    """
    OmegaConf.register_new_resolver("kd.options", _options, replace=True)
    OmegaConf.register_new_resolver("kd.keys", _help, replace=True)
    store = ConfigStore.instance()
    unset = dict.fromkeys(TrainOverrides.model_fields)
    network = {"train": unset, "arch": None, "args": {}, "init": None, "freeze": None, "image_size": None}
    sections = {"train": unset, "model": network, "teacher": network}
    store.store("settings", sections, package="_global_", provider="kd")
    brought = {"method": METHODS.installed, "loss": LOSSES.installed}
    for group, names in {"model": [*MODELS], "teacher": [*MODELS], **brought}.items():
        for name in names:
            store.store(name, {"name": name}, group=group, provider="kd")
    for library in LIBRARIES:
        for end in ("model", "teacher"):
            store.store(library, {"name": library, "arch": "???"}, group=end, provider="kd")
    for name in DATASETS.installed:
        store.store(name, {"name": name, "augment": "none"}, group="dataset", provider="kd")
    for name in {*RECIPES["paper"], *DATASETS}:
        store.store(name, {"recipe": name}, group="train", provider="kd")
    if "experiment" not in store.repo:
        for name, experiment in experiments().items():
            group, _, option = name.rpartition("/")
            store.store(option, experiment.node, group=f"experiment/{group}", package="_global_", provider="kd")
    store.repo = _Shared(store.repo)


def _options() -> str:
    """The groups with their options, for the template of --help.

    Hydra's own list has folders of conf/ that are no groups, the networks twice, and each row of a paper's table.
    """
    loader = GlobalHydra.instance().config_loader()
    options = {group: loader.get_group_options(group, ObjectType.CONFIG) for group in loader.list_groups("")}
    own = [*options.get("experiment", []), f"{len(experiments())} rows of tables: docs/experiments.md"]
    options |= {"experiment": own, "teacher": ["as model"]}
    return "\n".join(f"{group}: {', '.join(options[group])}" for group in sorted({*options} - {"hydra", "paper"}))


def _help(*, _root_: DictConfig) -> str:
    """The keys, for the template of --help."""
    from kd.app.keys import listed

    return listed(_root_).replace("$", "$$")  # Hydra fills the template in as string.Template
