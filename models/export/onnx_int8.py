"""ONNX in int8: static quantisation by ONNX Runtime's own tool, measured on images of the training set.

Weights have a scale for each output channel, activations (unsigned, which processors multiply fastest) one for each
tensor. The head's convolutions and what follows them (decoding of boxes, NMS) stay in float: a box's place needs more
than 256 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.export.calibrate import ActivationRange, calibration_batches, log_ranges
from models.export.quiet import quietly

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

CALIBRATION_IMAGES = 64  # ranges settle early, and the tool holds the activations of all of them in memory
_SMOOTHING = {"CalibMovingAverage": True, "CalibMovingAverageConstant": 0.01}  # a single odd image widens no range


def quantize(full: Path, quantised: Path, images: Sequence[np.ndarray]) -> None:
    """Quantises an ONNX file to int8 and logs how.

    Args:
        full: the float32 model, from images (b, 3, h, w) to the decoded output.
        quantised: the file to write; it does not carry over the metadata.
        images: calibration images, uint8 (1, 3, h, w) RGB.
    """
    import onnx
    from onnxruntime import quantization

    prepared = full.with_suffix(".prepared.onnx")
    with quietly():
        # The symbolic shape inference knows fewer operations than the rest, and nothing here depends on it
        quantization.quant_pre_process(str(full), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        quantization.quantize_static(
            str(prepared),
            str(quantised),
            _Reader(model, images),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=float_nodes(model.graph),
            extra_options=_SMOOTHING,
        )
    graph = onnx.load(quantised).graph
    log_ranges(activation_ranges(graph), _count_quantised(graph), len(images))


class _Reader:
    """Hands out calibration images one batch after the other, in the way of `CalibrationDataReader`."""

    def __init__(self, model: ModelProto, images: Sequence[np.ndarray]) -> None:
        port = model.graph.input[0]
        batch = port.type.tensor_type.shape.dim[0].dim_value or 1  # 0 where it is free
        self._name, self._batches = port.name, calibration_batches(images, batch)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def float_nodes(graph: GraphProto) -> list[str]:
    """Returns the names of the head's convolutions and of the nodes between them and the output."""
    producers = {output: node for node in graph.node for output in node.output}
    names, left = set(), [port.name for port in graph.output]
    while left:
        node = producers.get(left.pop())
        if node is not None and node.name not in names:
            names.add(node.name)
            left += node.input if node.op_type != "Conv" else ()
    return sorted(names)


def activation_ranges(graph: GraphProto) -> list[ActivationRange]:
    """Returns the range of every quantised activation, in the graph's order."""
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            scale, zero = (constants[name] for name in node.input[1:3])
            limits = np.iinfo(zero.dtype)
            low, high = ((limit - int(zero)) * float(scale) for limit in (limits.min, limits.max))
            found.append(ActivationRange(node.input[0], low, high))
    return found


def _count_quantised(graph: GraphProto) -> int:
    """Returns how many convolutions have quantised weights."""
    quantised = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    return sum(node.op_type == "Conv" and node.input[1] in quantised for node in graph.node)
