"""Safetensors: the weights as they were trained. Using them needs the network's definition."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load, save

from kd.core.stage import Source
from kd.models import build
from kd.models.normalization import Normalized
from kd.tools.export.formats import Format, Logits, Pixels, Run


class Safetensors(Format):
    """The weights, with `mean` and `std` among them, and the arguments of build()."""

    weights = "model.safetensors"
    runtime = f"torch {torch.__version__}"
    usage = """\
import json

import torch
from kd.models import build  # the network's definition; of kd, only kd/models and kd/core are needed
from safetensors.torch import load_file

tensors = load_file("model.safetensors")
mean, std = tensors.pop("mean"), tensors.pop("std")
with open("model.json") as file:
    network = build(**json.load(file)["build"]).to(mean.dtype)
network.load_state_dict(tensors)
network.eval()
with torch.inference_mode():
    logits = network((torch.from_numpy(images) - mean) / std)
"""

    def pack(self, network: Normalized, source: Source) -> dict[str, bytes]:
        data = source.dataset
        tensors = {**network.network.state_dict(), "mean": network.mean, "std": network.std}
        arguments = {"name": source.model, "num_classes": data.num_classes, "image_size": source.input_size}
        told = {"key": source.key, "build": {**arguments, "in_channels": 3}}
        return {
            self.weights: save({name: tensor.contiguous() for name, tensor in tensors.items()}),
            "model.json": (json.dumps(told, indent=2) + "\n").encode(),
        }

    def unpack(self, packed: dict[str, bytes]) -> Run:
        tensors = load(packed[self.weights])
        mean, std = tensors.pop("mean"), tensors.pop("std")
        network = build(**json.loads(packed["model.json"])["build"]).to(mean.dtype)
        network.load_state_dict(tensors)
        network.eval()

        def run(images: Pixels) -> Logits:
            with torch.inference_mode():
                logits: Logits = network((torch.from_numpy(images) - mean) / std).numpy()
            return logits

        return run
