"""Static int8 for TensorFlow Lite files: weights for each channel, activations calibrated on images.

What lies between the input and the head's convolutions computes in int8. Those convolutions and all behind them stay
in float, as do input and output: one scale for coordinates and scores together would be too coarse. The Edge TPU
knows int8 alone; for it nothing stays in float.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from models.export.calibrate import ActivationRange, calibration_batches, log_ranges
from models.export.quiet import quietly

if TYPE_CHECKING:
    from ai_edge_quantizer.quantizer import Quantizer

CALIBRATION_IMAGES = 128
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")


def quantize(
    content: bytes, input_name: str, images: Sequence[np.ndarray], batch: int = 1, whole: bool = False
) -> bytes:
    """Returns a float32 TFLite file in int8; logs the ranges of the activations.

    Args:
        content: the file.
        input_name: what its signature calls the input, (batch, h, w, 3) of values 0 to 1.
        images: to calibrate on, each uint8 (1, 3, h, w) RGB.
        batch: images that the file takes at a time.
        whole: leave nothing in float, input and output included.
    """
    with quietly():
        from ai_edge_quantizer.quantizer import Quantizer

        graph = Graph.of(content)
        after_trunk = [] if whole else graph.after_trunk()
        process = Quantizer(content)
        _write_recipe(process, [node.scope for node in after_trunk])
        inputs = {graph.signature: _Inputs(input_name, images, batch)}
        ranges = process.calibrate(inputs, num_threads=os.cpu_count() or 1)
        result = process.quantize(ranges, enable_progress_report=False).quantized_model
    kept = sum(node.kind in CONVOLUTIONS for node in after_trunk)
    converted = sum(node.kind in CONVOLUTIONS for node in graph.nodes) - kept
    log_ranges(_activation_ranges(ranges, graph), converted, len(images))
    return bytes(result)


class _Inputs:
    """Calibration images as the quantizer takes them: it counts before it runs, and need not hold all at once."""

    def __init__(self, name: str, images: Sequence[np.ndarray], batch: int):
        self._name, self._images, self._batch = name, images, batch

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for images in calibration_batches(self._images, self._batch):
            yield {self._name: np.ascontiguousarray(images.transpose(0, 2, 3, 1))}

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch)


def _write_recipe(process: Quantizer, float_scopes: Sequence[str]) -> None:
    """Tells a quantizer what becomes int8: all that it can, or all but some nodes, the input and the output."""
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName

    process.add_static_config(".*", TFLOperationName.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    if not float_scopes:
        return
    exempt = [(".*", TFLOperationName.INPUT), (".*", TFLOperationName.OUTPUT)]
    exempt += [(f"^{re.escape(scope)}$", TFLOperationName.ALL_SUPPORTED) for scope in float_scopes]
    for pattern, operation in exempt:
        process.update_quantization_recipe(pattern, operation, algorithm_key=AlgorithmName.NO_QUANTIZE)


class Node(NamedTuple):
    """One operation: its kind, the scope that the quantizer's patterns are held against, tensors in and out."""

    kind: str
    scope: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """What a TFLite file computes.

    Attributes:
        signature: name of the way in.
        nodes: in the order in which they run.
        outputs: the tensors that come out.
        names: of all tensors.
    """

    signature: str
    nodes: Sequence[Node]
    outputs: Sequence[int]
    names: Sequence[str]

    @classmethod
    def of(cls, content: bytes) -> Graph:
        """Reads a file."""
        from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffer

        model = flatbuffer.read_model(content)
        graph = model.subgraphs[0]
        nodes = []
        for node in graph.operators:
            kind = flatbuffer.TFL_OP_CODE_TO_NAME.get(model.operatorCodes[node.opcodeIndex].builtinCode)
            scope = flatbuffer.get_op_scope(node, graph.tensors)
            nodes.append(Node(kind.value if kind else "", scope, tuple(node.inputs), tuple(node.outputs)))
        names = [_text(tensor.name) for tensor in graph.tensors]
        return cls(_text(model.signatureDefs[0].signatureKey), nodes, tuple(graph.outputs), names)

    def after_trunk(self) -> list[Node]:
        """Returns the nodes from the head's convolutions, these included, to the outputs."""
        wanted, found = set(self.outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                found.append(node)
                wanted.update(() if node.kind in CONVOLUTIONS else node.inputs)
        return found


def _activation_ranges(ranges: Mapping[str, Mapping[str, Any]], graph: Graph) -> list[ActivationRange]:
    """Returns the calibrated ranges of what nodes write; weights and biases are among `ranges` as well."""
    written = [graph.names[tensor] for node in graph.nodes for tensor in node.outputs]
    spans = [(name, ranges[name]) for name in written if ranges.get(name)]
    return [ActivationRange(name, float(np.min(span["min"])), float(np.max(span["max"]))) for name, span in spans]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
