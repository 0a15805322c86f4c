"""The training recipes: settings for each family of networks, on each data set, in each mode."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from kd.core.spec import KnownError
from kd.core.stage import Augment, Channels, Reduction

Recipe = dict[str, Any]  # a setting may be a function of the task: (Task) -> value

GAMMA = 0.1  # factor of the learning rate at a milestone


@dataclass(frozen=True)
class Task:
    """What a recipe may depend on: the number of training images, their size, and how the network begins."""

    images: int
    image_size: int
    begun: bool = False  # with initial weights of a file
    frozen: bool = False  # only the classifier is trained
    epochs: int | None = None  # as the configuration sets them


USUAL = Task(images=1000, image_size=32)  # of a data set that has not been read yet

# The defaults of all recipes.
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
    "label_smoothing": 0.0,
    "precision": "auto",
    "select": "best_val",
    "test_curve": False,
}

# TAKD's paper (section "Experiment setup"): 160 epochs. The learning rate of ResNets starts at 0.1, divided by ten at
# 1/2 and 3/4 of the epochs. Plane networks have a constant 0.01, because they do not train at 0.1.
_STEP: Recipe = {"lr": 0.1, "schedule": "step", "milestones": (0.5, 0.75)}
_CONSTANT: Recipe = {"lr": 0.01}
_TAKD_EPOCHS = 160
_TAKD: dict[str, Recipe] = {
    "plane": {**_CONSTANT, "epochs": _TAKD_EPOCHS},
    "cifar_resnet": {**_STEP, "epochs": _TAKD_EPOCHS},
}

# params.json of Trained Teacher and Nasty Teacher: A for CIFAR-10, B for CIFAR-100 and Tiny-ImageNet, C for net and mlp
# on every data set.
_SGD: Recipe = {**_STEP, "nesterov": False, "weight_decay": 5e-4}
_A: Recipe = {**_SGD, "epochs": 160}
_B: Recipe = {**_SGD, "epochs": 200, "milestones": (0.3, 0.6, 0.8), "gamma": 0.2}
_C: Recipe = {"epochs": 100, "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0}


def _trained_teacher(sgd: Recipe, adam: Recipe = _C) -> dict[str, Recipe]:
    families = ("resnet", "preresnet", "resnext", "densenet", "mobilenetv2", "shufflenetv2")
    return {**dict.fromkeys(families, sgd), "net": adam, "mlp": adam}


# RepDistiller's benchmark on CIFAR-100, which mdistiller follows: 240 epochs. The learning rate is divided by ten after
# epochs 150, 180 and 210. It starts lower for the networks that are made for phones.
_BENCHMARK: Recipe = {**_SGD, "batch_size": 64, "epochs": 240, "lr": 0.05, "milestones": (150 / 240, 0.75, 210 / 240)}
_MOBILE = ("mobilenetv2_half", "shufflenetv1", "shufflenetv2_rd")


def _benchmark(epochs: int) -> dict[str, Recipe]:
    """The benchmark's recipe of the families that only it has."""
    known = {**_BENCHMARK, "epochs": epochs}
    mobile = {**known, "lr": 0.01}
    return {**dict.fromkeys(("cifar_resnet_x4", "wrn", "vgg"), known), **dict.fromkeys(_MOBILE, mobile)}


# For the benchmark's networks our own: the benchmark has CIFAR-100 only, and its recipe is `train=cifar100_benchmark`.
_CIFAR10 = {**_TAKD, **_trained_teacher(_A), **_benchmark(160)}
_CIFAR100 = {**_TAKD, **_trained_teacher(_B), **_benchmark(200)}


def _for(epochs: int, **changes: Any) -> dict[str, Recipe]:
    """CIFAR-10's recipe of every family, with fewer epochs."""
    return {family: {**known, "epochs": epochs, **changes} for family, known in _CIFAR10.items()}


# Our own: an epoch of 1,293 images has only 21 steps, and a learning rate of 0.1 is too high for so few.
_DIGITS = _for(20, batch_size=64)
_DIGITS |= {family: {**known, "lr": 0.05} for family, known in _DIGITS.items() if known["lr"] == 0.1}
_DIGITS |= {family: {**_DIGITS[family], "lr": 0.02} for family in _MOBILE}  # at 0.01 two of them stay below 90 %

# recipe -> family -> settings
_PAPER: dict[str, dict[str, Recipe]] = {
    "digits": _DIGITS,
    "fashion_mnist": _for(40),  # our own: a quarter of CIFAR's epochs, because the data set is easier
    "cifar10": _CIFAR10,
    "cifar100": _CIFAR100,
    "tiny_imagenet": _CIFAR100,  # for TAKD's networks our own: its paper has no such data set
    "cifar100_benchmark": {**dict.fromkeys(_CIFAR100, _BENCHMARK), **_benchmark(240)},
}
# Networks that their family's recipe does not train: recipe -> network -> settings. At a learning rate of .05 resnet110
# stays below 30 % on digits; at this one it reaches 92 % (docs/measurements.md).
_NETWORKS: dict[str, dict[str, Recipe]] = {"digits": {"resnet110": {"lr": 0.02}}}
_PAPER["folder"] = _PAPER["cifar10"]  # a guess for small images; `train=<data set>` selects another


def _photo_epochs(task: Task) -> int:
    """Epochs of about 20,000 images in all, at least 10 and at most 60. A classifier alone costs next to nothing."""
    return task.epochs or (100 if task.frozen else min(max(ceil(20_000 / task.images), 10), 60))


def _photo_batch(task: Task) -> int:
    """So many images that their activations fit into a few GB: 32 of 224×224."""
    return 64 if task.frozen or task.image_size <= 128 else 32 if task.image_size <= 256 else 16


def _photo_lr(task: Task) -> float:
    """Lower where trained weights are only to be adapted."""
    return 3e-3 if task.frozen else 2e-4 if task.begun else 1e-3


# Our own, for photographs (docs/own_images.md): AdamW with a warm-up and a cosine. The decay is of all weights. Labels
# are not smoothed: a teacher of smoothed labels teaches worse (Müller et al., NeurIPS 2019).
_PHOTOS: Recipe = {
    "epochs": _photo_epochs,
    "batch_size": _photo_batch,
    "optimizer": "adamw",
    "lr": _photo_lr,
    "weight_decay": 0.05,
    "schedule": "cosine",
    "warmup": lambda task: _photo_epochs(task) // 20,
    "select": "last",
}
_PAPER["photos"] = dict.fromkeys(_CIFAR10, _PHOTOS)
# The same with SGD, at ten times the learning rates and more.
_PHOTOS_SGD: Recipe = {**_PHOTOS, "optimizer": "sgd", "weight_decay": 1e-4, "lr": lambda task: 20 * _photo_lr(task)}
_PAPER["photos_sgd"] = dict.fromkeys(_CIFAR10, _PHOTOS_SGD)

# torchvision's recipe of ImageNet, which TAKD's code follows, too.
_IMAGENET: Recipe = {**_STEP, "epochs": 90, "batch_size": 256, "nesterov": False, "milestones": (1 / 3, 2 / 3)}
_PAPER["imagenet"] = dict.fromkeys(_CIFAR10, _IMAGENET)


@dataclass(frozen=True)
class Released:
    """The released code of a paper on one data set: a recipe for each family, and settings for the whole chain."""

    system: str
    methods: tuple[str, ...]  # the methods that it has
    data: str  # name of the recipe
    families: dict[str, Recipe]  # the families that it trains
    mean: Channels
    std: Channels
    normalization: str  # the name of mean and std in `teacher.normalize`
    augment: Augment
    reduction: Reduction
    teacher_by_student: bool  # the teacher is trained by the recipe of the student's family
    free: frozenset[str]  # training settings that a run may change; changes of others are refused


def _takd_milestones(task: Task) -> tuple[float, ...]:
    """The fraction of the epochs at which TAKD's code divides the learning rate.

    The code divides at int(3/4·epochs), and we at the rounded epoch. Where these differ, it is the fraction that is
    rounded to the code's epoch.
    """
    epochs = task.epochs or _TAKD_EPOCHS
    first = epochs * 3 // 4
    return (0.75 if round(0.75 * epochs) == first else (first + 0.25) / epochs,)


def _takd_released(data: str) -> Released:
    # The code never divides the learning rate at 1/2 of the epochs: its condition is never true. It starts at 0.01, the
    # value after that division. The code for crop and flip is never reached.
    sgd: Recipe = {"lr": 0.01, "epochs": _TAKD_EPOCHS, "nesterov": False, "precision": "fp32", "select": "best_test"}
    return Released(
        system="TAKD",
        methods=("scratch", "kd", "ta"),
        data=data,
        families={"plane": sgd, "cifar_resnet": {**sgd, "schedule": "step", "milestones": _takd_milestones}},
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


def recipe(
    mode: str, name: str, family: str, model: str = "", own: Mapping[str, Any] | None = None, task: Task = USUAL
) -> Recipe:
    """All training settings of a network in recipe `name`: its family's, overridden by those of the network itself.

    `own` are settings of a network from outside this table. In mode=paper, a network with own settings and no recipe
    for its family starts from the recipe of `resnet`. Raises KnownError if the recipe does not have the family and the
    network has no own settings.
    """
    families, changes = RECIPES[mode][name], own if mode == "paper" else None
    settings = families.get(family) if changes is None else families.get(family, families["resnet"])
    if settings is None:
        raise KnownError(
            f"train={name} has no recipe for the {family} networks in mode={mode}; it has: {', '.join(families)}"
        )
    known = _NETWORKS.get(name, {}).get(model, {}) if mode == "paper" else {}
    found = {**_COMMON, **settings, **known, **(changes or {})}
    return {name: value(task) if callable(value) else value for name, value in found.items()}


def released(mode: str, name: str, family: str) -> Released | None:
    """The released code that mode=reference follows for a family of networks; None in mode=paper."""
    if mode != "reference":
        return None
    return next((code for code in RELEASED if code.data == name and family in code.families), None)
