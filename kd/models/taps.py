"""Taps: what losses on features read of a network, by the paths at which the network declares it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd.core.spec import KnownError
from kd.models.libraries import classifiers, stage_ends


class Tap(NamedTuple):
    """The output of the submodule at a dotted path, or its first input: that of its last call.

    A map is [sample, channel, height, width] there, or with `channels_last` [sample, height, width, channel].
    """

    path: str
    of: Literal["output", "input"] = "output"
    channels_last: bool = False


def named_taps(stages: Iterable[Tap], pre: Iterable[Tap]) -> dict[str, Tap]:
    """What a network's `taps()` returns: stage1 … stageN, then stage1_pre … stageN_pre."""
    ends = {f"stage{i}": tap for i, tap in enumerate(stages, 1)}
    return ends | {f"stage{i}_pre": tap for i, tap in enumerate(pre, 1)}


def residual_taps(network: nn.Module, *stages: str) -> dict[str, Tap]:
    """Taps of stages whose last block ends in its module `relu`."""
    lasts = [[name for name, _ in network.get_submodule(stage).named_children()][-1] for stage in stages]
    pre = [Tap(f"{stage}.{last}.relu", "input") for stage, last in zip(stages, lasts, strict=True)]
    return named_taps(map(Tap, stages), pre)


class Tapped:
    """Hooks on a network that keep its features from each forward pass until `take()`.

    `stages` are the maps at the ends of the stages, after the last activation. `pre` are the same before it. `pooled`
    is the flattened input of the last layer. Gradients flow through all of them. `of` is the network that declares the
    paths, if it is not `network` itself: a network whose BatchNorm torch.fx has folded declares none, and of it only
    `pooled` can be read. With `training_only` nothing is kept in eval mode. Raises KnownError if maps are asked of a
    network that declares none.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: bool,
        pre: bool,
        pooled: bool,
        *,
        of: nn.Module | None = None,
        training_only: bool = False,
    ) -> None:
        self._network, self._training_only = network, training_only
        declaring = network if of is None else of
        wanted = _maps(declaring, stages, pre) if stages or pre else {}
        self._names = [*wanted]
        if pooled:
            wanted["pooled"] = Tap(head(declaring), "input")
        self._kept: dict[str, Tensor] = {}
        self._hooks = [self._hook(network, name, tap) for name, tap in wanted.items()]

    def take(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The maps by name, and the pooled features, of the last forward pass. They are forgotten here."""
        kept, self._kept = self._kept, {}
        return {name: kept[name] for name in self._names}, kept.get("pooled")

    def close(self) -> None:
        """Remove the hooks. The network is as before."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, network: nn.Module, name: str, tap: Tap) -> RemovableHandle:
        module = network.get_submodule(tap.path)
        keep = self._keeper(name, tap.channels_last)
        if tap.of == "output":
            return module.register_forward_hook(lambda _module, _inputs, output: keep(output))
        return module.register_forward_pre_hook(lambda _module, inputs: (keep(inputs[0]), *inputs[1:]))

    def _keeper(self, name: str, channels_last: bool) -> Callable[[Any], Tensor]:
        """A function that keeps a tensor under this name and returns the one that the network goes on with."""

        def keep(tensor: Tensor) -> Tensor:
            if self._training_only and not self._network.training:
                return tensor
            kept = tensor.permute(0, 3, 1, 2) if channels_last else tensor
            self._kept[name] = kept.flatten(1) if name == "pooled" else kept
            # The activation after it may be in place, and would change what is kept.
            return tensor.clone() if name.endswith("_pre") else tensor

        return keep


def _maps(network: nn.Module, stages: bool, pre: bool) -> dict[str, Tap]:
    """The taps of feature maps that are asked for."""
    kind = type(network).__name__
    taps: Callable[[], dict[str, Tap]] | None = getattr(network, "taps", None)
    name: str | None = getattr(network, "library_name", None)
    if taps is None and name is not None:
        return _library_maps(name, pre)
    if taps is None:
        raise KnownError(f"losses on feature maps need a network with taps: {kind} declares no taps (method taps())")
    declared = taps()
    if not declared:
        raise KnownError(f"losses on feature maps need a network with maps: {kind} has none")
    return {name: tap for name, tap in declared.items() if (pre if name.endswith("_pre") else stages)}


def _library_maps(name: str, pre: bool) -> dict[str, Tap]:
    """The taps of a network of timm or torchvision."""
    works = "losses that read logits or pooled features alone work with it"
    if pre:
        raise KnownError(
            f"losses on maps before their activation need other networks: {name} has no such taps; {works}"
        )
    ends = stage_ends(name)
    if not ends:
        raise KnownError(f"losses on feature maps need a network with maps: no stage of {name} ends in one; {works}")
    return named_taps((Tap(end.path, channels_last=end.channels_last) for end in ends), ())


def head(network: nn.Module) -> str:
    """The path of the last layer: as declared, or else that of the last linear layer or 1×1 convolution.

    Raises KnownError if there is neither, or if the logits are the mean of two layers.
    """
    paths = last_layers(network)
    if len(paths) > 1:
        raise KnownError(
            f"{type(network).__name__} has {len(paths)} last layers ({' and '.join(paths)}): one is needed"
        )
    return paths[0]


def last_layers(network: nn.Module) -> tuple[str, ...]:
    """The paths of the layers that give the logits: one, or two in networks that were distilled by a token.

    Raises KnownError if there is none.
    """
    if (name := getattr(network, "library_name", None)) and (paths := classifiers(name, network)):
        return paths
    declared = getattr(network, "head", None)
    if name is None and isinstance(declared, str):
        return (declared,)
    layers: list[str] = [name for name, module in network.named_modules() if _is_linear(module)]
    if not layers:
        raise KnownError(
            f"{type(network).__name__} has no last layer: it has no nn.Linear, and declares none (class attribute head)"
        )
    return (layers[-1],)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
