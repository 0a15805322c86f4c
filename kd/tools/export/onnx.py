"""ONNX: the network as a graph for any runtime, in float32."""

from __future__ import annotations

from copy import deepcopy

import onnx
import onnxruntime
import onnxscript  # noqa: F401 (torch's exporter needs it, and imports it late)
import torch

from kd.core.spec import KnownError
from kd.core.stage import Source
from kd.models.normalization import Normalized
from kd.tools.export.contract import Contract
from kd.tools.export.formats import Format, Logits, Pixels, Run

OPSET = 18  # the newest that torch's exporter writes without a conversion, which may fail


class Onnx(Format):
    """One file with the weights inside, for batches of any size."""

    weights = "model.onnx"
    files = ("model.onnx",)
    runtime = f"onnxruntime {onnxruntime.__version__}"
    usage = """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"images": images})
"""

    def pack(self, network: Normalized, source: Source) -> dict[str, bytes]:
        contract = Contract.of(source)
        model = _graph(network, contract)
        _forget_origin(model.graph)
        told = {
            **contract.entries(),
            "images": contract.images,
            "preprocessing": contract.preprocessing,
            "logits": f"float32 [batch, {contract.num_classes}]",
        }
        onnx.helper.set_model_props(model, told)
        onnx.checker.check_model(model, full_check=True)
        return {self.weights: model.SerializeToString()}

    def contract(self, packed: dict[str, bytes]) -> Contract:
        model = onnx.load_model_from_string(packed[self.weights])
        return Contract.told({entry.key: entry.value for entry in model.metadata_props})

    def unpack(self, packed: dict[str, bytes]) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(packed[self.weights], options, providers=["CPUExecutionProvider"])

        def run(images: Pixels) -> Logits:
            logits: Logits = session.run(["logits"], {"images": images})[0]
            return logits

        return run


def _graph(network: Normalized, contract: Contract) -> onnx.ModelProto:
    """The network as a graph. Raises KnownError if torch cannot write it."""
    size = contract.image_size
    images = torch.zeros(2, 3, size, size)  # two: with one image, torch.export makes the batch size a constant
    try:
        program = torch.onnx.export(
            deepcopy(network).float().eval(),  # onnxruntime has no convolution in float64 on a CPU
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # of many types: the exporter runs the network's own code on stand-ins for tensors
        why = next(filter(None, str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise KnownError(
            f"{contract.network} cannot be written as ONNX ({why}): --format safetensors takes every network"
        ) from error
    assert program is not None  # None comes from the older exporter only
    model: onnx.ModelProto = program.model_proto
    return model


def _forget_origin(graph: onnx.GraphProto) -> None:
    """Remove the exporter's notes on the Python lines of each node: they contain paths of this machine."""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
