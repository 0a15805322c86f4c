"""How each family of networks is trained on each data set, in each mode: plain data."""

from typing import Any

from kd.spec import KnownError

Recipe = dict[str, Any]

GAMMA = 0.1  # what a milestone multiplies the learning rate by

# What all recipes share unless they say otherwise.
_COMMON: Recipe = {
    "batch_size": 128,
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "schedule": "constant",
    "milestones": (),
    "gamma": GAMMA,
    "warmup": 0,
    "precision": "auto",
    "select": "best_val",
    "test_curve": False,
}

# TAKD as its paper intends (section "Experiment setup"): 160 epochs, ResNets from .1 divided by ten at a half
# and three quarters; the plane networks at a constant .01, since .1 kills them.
_STEP: Recipe = {"lr": 0.1, "schedule": "step", "milestones": (0.5, 0.75)}
_CONSTANT: Recipe = {"lr": 0.01}

# Ours: 1,293 scans are 21 steps an epoch.
_DIGITS: Recipe = {"epochs": 20, "batch_size": 64}

# recipe -> family -> settings
_PAPER: dict[str, dict[str, Recipe]] = {
    "digits": {
        "plane": {**_CONSTANT, **_DIGITS},
        "cifar_resnet": {**_STEP, "lr": 0.05, **_DIGITS},
    },
    # Ours, a quarter of CIFAR's length: the data set is easier.
    "fashion_mnist": {
        "plane": {**_CONSTANT, "epochs": 40},
        "cifar_resnet": {**_STEP, "epochs": 40},
    },
    "cifar10": {
        "plane": {**_CONSTANT, "epochs": 160},
        "cifar_resnet": {**_STEP, "epochs": 160},
    },
}
_PAPER["cifar100"] = _PAPER["cifar10"]
_PAPER["tiny_imagenet"] = _PAPER["cifar10"]
_PAPER["folder"] = _PAPER["cifar10"]  # a guess for unknown images; `train=<data set>` names a better one

RECIPES: dict[str, dict[str, dict[str, Recipe]]] = {"paper": _PAPER}


def recipe(mode: str, name: str, family: str) -> Recipe:
    """Every setting of a family's training under recipe `name`.

    Raises KnownError where the recipe does not know the family.
    """
    families = RECIPES[mode][name]
    if family not in families:
        raise KnownError(f"train={name} has no recipe for the {family} networks; it has: {', '.join(families)}")
    return {**_COMMON, **families[family]}
