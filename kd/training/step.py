"""One training step (forward, loss, backward, update); and forward passes for predictions and accuracy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from inspect import unwrap
from math import cos, pi
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd.core.hardware import autocast, widest_float
from kd.core.settings import TrainSpec
from kd.core.spec import KnownError
from kd.core.stage import INIT, LOSS, Batch, Formula, LossContext, Outputs, Stage, random_stream
from kd.core.statistics import trim
from kd.datasets.data import Images
from kd.models import build
from kd.models.normalization import Normalized
from kd.store.foreign import initial_weights
from kd.training.evidence import guide_share
from kd.training.guide import LOGITS, Guide, LiveGuide, learner, said, tap
from kd.training.probe import Probe, ProbedGuide
from kd.training.ranks import ALONE, Team

# The number of 32×32 images after which compiling has saved twice its own time, in bf16 on a CPU (bench/compiled.py,
# bench/README.md). Networks that are not here became no faster, or were not measured.
PAYS_AFTER = {"preresnet20": 600_000, "resnet8": 1_600_000}
_PIXELS = 32 * 32


def learning_rate(train: TrainSpec, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0. It increases linearly in the first `warmup` epochs."""
    if epoch < train.warmup:
        return train.lr * (epoch + 1) / (train.warmup + 1)
    if train.schedule == "step":
        passed = sum(epoch >= round(fraction * train.epochs) for fraction in train.milestones)
        return train.lr * train.gamma**passed
    if train.schedule == "cosine":
        return train.lr * (1 + cos(pi * (epoch - train.warmup) / (train.epochs - train.warmup))) / 2
    return train.lr


def make_optimizer(parameters: list[nn.Parameter], train: TrainSpec) -> torch.optim.Optimizer:
    """The optimiser of all parameters. Weight decay applies to all of them, as in both papers' code."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    own = {"momentum": train.momentum, "nesterov": train.nesterov} if train.optimizer == "sgd" else {}
    return _eager(kinds[train.optimizer])(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=True, **own)


@cache
def _eager(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The optimiser without torch.compile, whose code takes a second to import.

    torch imports it in each of these functions, so that they stay out of what is compiled. Here no compiled code calls
    them.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    plain = {name: unwrap(getattr(torch.optim.Optimizer, name)) for name in names}
    return type(kind.__name__, (kind,), {**plain, "step": torch.no_grad()(unwrap(kind.step))})


def resolve_compile(setting: bool | Literal["auto"], stage: Stage, images: int, device: str) -> bool:
    """Whether the steps of a stage with this many images per epoch are compiled.

    `auto` compiles if that saves time by `PAYS_AFTER`. It never compiles on a GPU, where nothing was measured. If torch
    cannot compile, `auto` prints why and does not compile, and True raises KnownError.
    """
    if stage.train.ranks > 1:
        if setting is True:
            raise KnownError("runtime.compile=true: several ranks cannot train a compiled network; use auto or false")
        return False
    if stage.loss.needs - LOGITS:
        if setting is True:
            raise KnownError(
                f"runtime.compile=true: loss={stage.loss.name} reads features of the network; use auto or false"
            )
        return False
    if setting == "auto":
        pays_after = PAYS_AFTER.get(stage.model)
        if device != "cpu" or stage.train.precision != "bf16" or pays_after is None:
            return False
        if stage.train.epochs * images * stage.dataset.image_size**2 < pays_after * _PIXELS:
            return False
    if setting is False or (problem := _problem(device)) is None:
        return bool(setting)
    if setting == "auto":
        print(f"{stage.role} {stage.model}: slower without torch.compile, which fails here: {problem}", flush=True)
        return False
    raise KnownError(f"runtime.compile=true: torch cannot compile here: {problem}")


def compile_network(network: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    """The network, compiled for one shape of batches. It shares its weights with `network`.

    Call it with batches of that shape only. On a GPU it becomes a CUDA graph.
    """
    _quiet()
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # the compiler has its own flag
    # torch limits the compilations of one function, for all networks together, and then silently stops compiling.
    torch.compiler.reset()
    mode = None if device == "cpu" else "reduce-overhead"
    compiled: Callable[[Tensor], Tensor] = torch.compile(network, fullgraph=True, dynamic=False, mode=mode)
    return compiled


@cache
def _problem(device: str) -> str | None:
    """Why torch cannot compile for the device, found by trying; None if it can."""
    _quiet()
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(16, device=device))
    except Exception as error:  # no compiler, no headers, a full disk: each has its own type
        return str(error).strip().splitlines()[0]
    return None


def _quiet() -> None:
    """Silence torch's warning that CUDA is missing, which it prints whenever it compiles for the CPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def predict(network: nn.Module, batches: Iterable[Tensor], device: torch.device, precision: str) -> Tensor:
    """Logits [sample, class] of batches uint8 [batch, 3, height, width]. The network stays in eval mode."""
    network.eval()
    with torch.inference_mode(), autocast(precision, device.type):
        return torch.cat([network(batch) for batch in batches])


def evaluate(
    network: nn.Module, batches: Iterable[Tensor], labels: Tensor, precision: str, mean_of_batches: int | None = None
) -> float:
    """Top-1 accuracy in percent of batches uint8 [batch, 3, height, width], on the labels' device.

    With `mean_of_batches` it is the mean of the accuracies of batches of that size, as in Trained Teacher's code. A
    smaller last batch then counts too much. The network stays in eval mode.
    """
    hits = (predict(network, batches, labels.device, precision).argmax(1) == labels).to(widest_float(labels.device))
    parts = torch.split(hits, mean_of_batches or len(hits))
    return trim(100 * torch.stack([part.mean() for part in parts]).mean().item())


def make_network(stage: Stage, device: str, initial: Path | None = None) -> Normalized:
    """The stage's network, initialised by its seed; or with the weights of its file of initial weights.

    No global generator is changed. Raises KnownError if the file does not fit.
    """
    data = stage.dataset
    with torch.random.fork_rng(devices=[]):  # torch.manual_seed would change the generators of GPUs, too
        torch.default_generator.manual_seed(int(random_stream(stage.seed, 0, INIT).integers(2**63)))
        if stage.init is None:
            network = build(stage.model, num_classes=data.num_classes, image_size=stage.input_size)
        else:
            network, _ = load_initial(stage, initial)
    dtype = torch.float64 if stage.train.precision == "fp64" else torch.float32
    return Normalized.of(network, stage.normalize).to(memory_format=torch.channels_last).to(device, dtype)


def load_initial(
    stage: Stage, initial: Path | None, tell: Callable[[str], None] = lambda line: None
) -> tuple[nn.Module, str | None]:
    """The network with its file of initial weights, and a line if its classifier is new. Raises KnownError.

    `tell` gets a line for each choice among the file's weights.
    """
    who = f"{stage.role} {stage.model}"
    if initial is None or stage.init is None:
        raise KnownError(f"{who}: its initial weights (sha256 {stage.init}) are in no file of this run")
    classes, size = stage.dataset.num_classes, stage.input_size
    told: dict[str, Any] = {"num_classes": classes, "image_size": size, "key": f"{who}: init", "tell": tell}
    return initial_weights(initial, stage.init, stage.model, **told)


def make_losses(
    stage: Stage,
    network: Normalized | Probe,
    guides: Sequence[Guide | LiveGuide | ProbedGuide],
    data: Images,
    device: str,
) -> list[Callable[[Batch], dict[str, Tensor]]]:
    """The functions of the stage's loss, one for each guide. Those with parameters are initialised by the seed."""
    spec = stage.loss
    if isinstance(spec, Formula):
        return [spec] * max(1, len(guides))
    size = stage.dataset.image_size
    net = network.learner if isinstance(network, Probe) else learner(network, spec.needs, size)
    train, dtype = torch.from_numpy(data.train).to(data.labels.device), network.mean.dtype
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(random_stream(stage.seed, 0, LOSS).integers(2**63)))
        contexts = [LossContext(net, guide.learner, data.labels, train) for guide in guides]
        losses = [spec.build(context) for context in contexts or [LossContext(net, net, data.labels, train)]]
    order = torch.channels_last  # as the maps are
    return [each.to(memory_format=order).to(device, dtype) if isinstance(each, nn.Module) else each for each in losses]


class Step:
    """A stage's network, its loss and their optimiser; a call trains them on one batch."""

    def __init__(
        self,
        stage: Stage,
        *,
        data: Images,
        guides: Sequence[Guide | LiveGuide | ProbedGuide] = (),
        device: str,
        compiled: bool = False,
        team: Team = ALONE,
        network: Normalized | Probe | None = None,
    ) -> None:
        """`network` is one with initial weights of a file, or a probe; without it, the seed makes the network."""
        self.stage, self.device, self.team = stage, device, team
        self.network = make_network(stage, device) if network is None else network
        whole = None if isinstance(self.network, Probe) else self.network  # a probe's loss reads no features
        self._tapped = tap(whole, stage.loss.needs, training_only=True) if whole else None
        losses = make_losses(stage, self.network, guides, data, device)
        self._modules = nn.ModuleList(each for each in losses if isinstance(each, nn.Module))
        # Each rank has the same buffers: what a loss puts into them, it gathers from all ranks.
        self._losses = [
            team.parallel(each, device, buffers=False) if isinstance(each, nn.Module) else each for each in losses
        ]
        self._parallel = team.parallel(self.network, device)
        self._compiled = compile_network(self.network, device) if compiled else None
        self._optimizer = make_optimizer([*self.network.parameters(), *self._modules.parameters()], stage.train)
        self._scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=stage.train.precision == "fp16")
        self._epoch = 0
        self.guide_share: float | None = None  # of the gradient, in the last batch that was measured

    def begin_epoch(self, epoch: int) -> None:
        """Set train mode, and the learning rate of the epoch, counted from 0."""
        self._epoch = epoch
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.stage.train, epoch)
        self.network.train()

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        samples: Tensor,
        guided: Sequence[Outputs],
        part: float = 1.0,
        *,
        measure: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train on this rank's `part` of a batch. Returns its logits, and the loss and its parts for the whole batch.

        Images uint8 [sample, 3, height, width]; labels and samples' numbers [sample]; what each guide says about them.
        With `measure`, `guide_share` is measured on it.
        """
        precision = self.stage.train.precision
        # Only full batches are compiled; an epoch's last batch may be smaller.
        whole = len(images) == self.stage.train.batch_size
        forward = self._compiled if self._compiled is not None and whole else self._parallel
        with autocast(precision, self.device):
            logits = forward(images)
        # The loss is computed in fp32, or in fp64 if the network computes in fp64.
        net = separate(at_least_fp32(said(logits, self._tapped)))
        batches = [
            Batch(labels, samples, net, at_least_fp32(guide), self._epoch, self.team.gather)
            for guide in guided or [Outputs({})]
        ]
        parts = self._combined([loss(batch) for loss, batch in zip(self._losses, batches, strict=True)])
        if measure:
            self.guide_share = guide_share(parts, self.stage.loss.label_weight, net) if guided else None
        self._optimizer.zero_grad()
        self._scaler.scale(self.team.weigh(parts["loss"], part)).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return net.logits.detach(), self.team.mean({name: value.detach() for name, value in parts.items()}, part)

    def _combined(self, said: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The weighted mean, over the guides, of the loss and of each part."""
        if len(said) == 1:
            return said[0]
        weights = self.stage.weights or [1 / len(said)] * len(said)
        return {
            name: torch.stack([weight * parts[name] for weight, parts in zip(weights, said, strict=True)]).sum()
            for name in said[0]
        }

    def state(self) -> dict[str, Any]:
        """What the next step depends on, for a checkpoint."""
        return {
            "network": self.network.network.state_dict(),
            "losses": self._modules.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what state() returned."""
        self.network.network.load_state_dict(state["network"])
        self._modules.load_state_dict(state.get("losses", {}))  # absent in checkpoints from before losses had any
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])


def separate(outputs: Outputs) -> Outputs:
    """The same tensors, none of which is computed from another: gradients reach each of them from the loss alone."""
    return Outputs({name: each.view_as(each) for name, each in outputs.tensors.items()})


def at_least_fp32(outputs: Outputs) -> Outputs:
    """The same values, in fp32 where they are in a shorter type."""
    promoted = {name: each.to(torch.promote_types(each.dtype, torch.float32)) for name, each in outputs.tensors.items()}
    return Outputs(promoted)
