"""Safetensors: the weights as they were trained. Using them needs the network's definition."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load

from kd.core.stage import Source
from kd.models import build
from kd.models.normalization import Normalized
from kd.store.weights_file import packed
from kd.tools.export.contract import Contract
from kd.tools.export.formats import Format, Run, run_of


class Safetensors(Format):
    """The weights by the network's own names, and model.json: the arguments of build(), mean and std, the contract."""

    weights = "model.safetensors"
    files = ("model.safetensors", "model.json")
    runtime = f"torch {torch.__version__}"
    usage = """\
import json

import torch
from kd.core.stage import Normalization
from kd.models import build  # the network's definition; of kd, only kd/models and kd/core are needed
from kd.models.normalization import Normalized
from safetensors.torch import load_file

with open("model.json") as file:
    told = json.load(file)
network = Normalized.of(build(**told["build"]), Normalization(**told["normalization"]))
network = network.to(getattr(torch, told["dtype"])).eval()
network.network.load_state_dict(load_file("model.safetensors"))
with torch.inference_mode():
    logits = network(torch.from_numpy(images))
"""

    def pack(self, network: Normalized, source: Source) -> dict[str, bytes]:
        arguments = {"name": source.model, "num_classes": source.dataset.num_classes, "image_size": source.input_size}
        contract = Contract.of(source)
        told = {
            **contract.dump(),
            "preprocessing": contract.preprocessing,
            "build": {**arguments, "in_channels": 3},
            "dtype": str(network.mean.dtype).removeprefix("torch."),
        }
        return {
            self.weights: packed(network.network.state_dict()),
            "model.json": (json.dumps(told, indent=2) + "\n").encode(),
        }

    def contract(self, packed: dict[str, bytes]) -> Contract:
        return Contract.told(json.loads(packed["model.json"]))

    def unpack(self, packed: dict[str, bytes]) -> Run:
        told = json.loads(packed["model.json"])
        network = Normalized.of(build(**told["build"]), self.contract(packed).normalization)
        network = network.to(getattr(torch, told["dtype"])).eval()
        network.network.load_state_dict(load(packed[self.weights]))
        return run_of(network)
