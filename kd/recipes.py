"""How each family of networks is trained on each data set, in each mode: plain data."""

from dataclasses import dataclass
from typing import Any

from kd.losses import Reduction
from kd.spec import KnownError
from kd.stage import Augment, Channels

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
_TAKD: dict[str, Recipe] = {
    "plane": {**_CONSTANT, "epochs": 160},
    "cifar_resnet": {**_STEP, "epochs": 160},
}

# Trained Teacher's and Nasty Teacher's params.json: A for CIFAR-10, B for CIFAR-100 and Tiny-ImageNet, C for the
# two small networks everywhere.
_SGD: Recipe = {**_STEP, "nesterov": False, "weight_decay": 5e-4}
_A: Recipe = {**_SGD, "epochs": 160}
_B: Recipe = {**_SGD, "epochs": 200, "milestones": (0.3, 0.6, 0.8), "gamma": 0.2}
_C: Recipe = {"epochs": 100, "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0}


def _trained_teacher(sgd: Recipe, adam: Recipe = _C) -> dict[str, Recipe]:
    families = ("resnet", "preresnet", "resnext", "densenet", "mobilenetv2", "shufflenetv2")
    return {**dict.fromkeys(families, sgd), "net": adam, "mlp": adam}


def _for(epochs: int, **changes: Any) -> dict[str, Recipe]:
    """Every family's recipe of CIFAR-10, shortened."""
    recipes = {**_TAKD, **_trained_teacher(_A)}
    return {family: {**known, "epochs": epochs, **changes} for family, known in recipes.items()}


# Ours: 1,293 scans are 21 steps an epoch, and .1 is more than those can use.
_DIGITS = _for(20, batch_size=64)
_DIGITS |= {family: {**known, "lr": 0.05} for family, known in _DIGITS.items() if known["lr"] == 0.1}

# recipe -> family -> settings
_PAPER: dict[str, dict[str, Recipe]] = {
    "digits": _DIGITS,
    "fashion_mnist": _for(40),  # ours, a quarter of CIFAR's length: the data set is easier
    "cifar10": {**_TAKD, **_trained_teacher(_A)},
    "cifar100": {**_TAKD, **_trained_teacher(_B)},
    "tiny_imagenet": {**_TAKD, **_trained_teacher(_B)},  # TAKD has no such data set
}
_PAPER["folder"] = _PAPER["cifar10"]  # a guess for unknown images; `train=<data set>` names a better one


@dataclass(frozen=True)
class Released:
    """A system's released code on one data set: what it does to a whole chain, beside each network's recipe."""

    system: str
    methods: tuple[str, ...]  # that it can run
    data: str  # the recipe's name
    families: dict[str, Recipe]  # that it can train
    mean: Channels
    std: Channels
    normalization: str  # what `teacher.normalize` calls mean and std
    augment: Augment
    reduction: Reduction  # what the sum of KL's terms is divided by: batch or batch·classes
    teacher_by_student: bool  # whether the teacher is trained by the rule of the student's family
    free: frozenset[str]  # settings of its training that a run may change; a run that changes others is no reference


def _takd_released(data: str) -> Released:
    # The test that should divide the learning rate at a half of the epochs is never true, and so it starts
    # at what it should have been then; the code for crop and flip cannot be reached.
    sgd: Recipe = {"lr": 0.01, "epochs": 160, "nesterov": False, "precision": "fp32", "select": "best_test"}
    return Released(
        system="TAKD",
        methods=("scratch", "kd", "ta"),
        data=data,
        families={"plane": sgd, "cifar_resnet": {**sgd, "schedule": "step", "milestones": (0.75,)}},
        mean=(0.507, 0.487, 0.441),
        std=(0.267, 0.256, 0.276),
        normalization="takd",
        augment="none",
        reduction="mean",
        teacher_by_student=True,
        free=frozenset({"epochs", "momentum", "weight_decay", "test_curve"}),
    )


def _tt_released(data: str, sgd: Recipe, mean: Channels, std: Channels) -> Released:
    as_released: Recipe = {"precision": "fp32", "select": "best_test_batches"}
    return Released(
        system="Trained Teacher",
        methods=("scratch", "kd", "ta", "trained_teacher"),
        data=data,
        families=_trained_teacher({**sgd, **as_released}, {**_C, **as_released}),
        mean=mean,
        std=std,
        normalization="tiny_imagenet" if data == "tiny_imagenet" else "trained_teacher",
        augment="rotate_flip" if data == "tiny_imagenet" else "crop_flip",
        reduction="batchmean",
        teacher_by_student=False,
        free=frozenset({"epochs", "lr", "milestones", "gamma", "test_curve"}),
    )


_BOTH_CIFARS: tuple[Channels, Channels] = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))

RELEASED = (
    _takd_released("cifar10"),
    _takd_released("cifar100"),
    _tt_released("cifar10", _A, *_BOTH_CIFARS),
    _tt_released("cifar100", _B, *_BOTH_CIFARS),
    _tt_released("tiny_imagenet", _B, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
)

# mode -> recipe -> family -> settings
RECIPES: dict[str, dict[str, dict[str, Recipe]]] = {
    "paper": _PAPER,
    "reference": {
        data: {family: known for code in RELEASED if code.data == data for family, known in code.families.items()}
        for data in ("cifar10", "cifar100", "tiny_imagenet")
    },
}


def recipe(mode: str, name: str, family: str) -> Recipe:
    """Every setting of a family's training under recipe `name`.

    Raises KnownError where the recipe does not know the family.
    """
    families = RECIPES[mode][name]
    if family not in families:
        raise KnownError(
            f"train={name} has no recipe for the {family} networks in mode={mode}; it has: {', '.join(families)}"
        )
    return {**_COMMON, **families[family]}


def released(mode: str, name: str, family: str) -> Released | None:
    """The released code by which mode=reference trains the networks of a family; None in a mode that is nobody's."""
    if mode != "reference":
        return None
    return next((code for code in RELEASED if code.data == name and family in code.families), None)
