"""TensorFlow Lite (LiteRT) straight from PyTorch, and its int8 form for Google's Edge TPU.

One input `images` (b, h, w, 3) of values 0 to 1; one output `output`: rows (b, n, 5 + nc) or with --nms detections
(b, max_det, 6), boxes as fractions of the image's width and height; with --raw maps of scores (b, ny, nx, channels),
one or two a level (`models.raw`), that the host decodes. Weights are float16, with --int8 int8 for each channel,
activations calibrated on images: what lies between the input and the head's convolutions computes in int8. Those
convolutions and all behind them stay in float, as do input and output: one scale for coordinates and scores together
would be too coarse. The Edge TPU knows int8 alone; for it, and with --raw, nothing stays in float. What the file says
of itself is a zip archive at its end, as usual there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.export.calibrate import ActivationRange, calibration_batches, log_ranges
from models.export.job import ExportJob, quietly, run_tool
from utils.errors import UserError
from utils.files import atomic_write
from utils.log import LOGGER

if TYPE_CHECKING:
    from ai_edge_quantizer.quantizer import Quantizer


FLOAT16_SUFFIX, INT8_SUFFIX = "-fp16.tflite", "-int8.tflite"
EDGETPU_SUFFIX = "-int8_edgetpu.tflite"
EDGETPU_COMPILER = "edgetpu_compiler"
EDGETPU_PAGE = "https://coral.ai/docs/edgetpu/compiler"
METADATA_MEMBER = "metadata.json"
INPUT = "images"
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


class ChannelsLast(nn.Module):
    """A model that reads images (b, h, w, 3), and gives maps so, as everything of TensorFlow's does."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        """Takes a model that reads (b, 3, h, w), and what its outputs are called."""
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps images (b, h, w, 3) of values 0 to 1 to the model's rows, or maps (b, ny, nx, channels), by name."""
        found = self.model(images.permute(0, 3, 1, 2))
        outputs = [found] if isinstance(found, Tensor) else [level.permute(0, 2, 3, 1) for level in found]
        return dict(zip(self.names, outputs, strict=True))


def export(job: ExportJob) -> Path:
    """Writes `<stem>-fp16.tflite`, `<stem>-int8.tflite` or `<stem>-int8_edgetpu.tflite`; returns its path.

    Raises:
        UserError: for the Edge TPU: its compiler is missing or fails, or --int8 was not given.
    """
    metadata, edgetpu = replace(job.metadata, boxes_normalised=not job.config.raw), job.format.argument == "edgetpu"
    compiler = shutil.which(EDGETPU_COMPILER) if edgetpu else None
    if edgetpu and not job.config.int8:
        raise UserError("the Edge TPU computes in int8 only: add --int8 and the --data to calibrate on.")
    if edgetpu and compiler is None:
        raise UserError(f"needs Google's {EDGETPU_COMPILER} (x86 Linux) on the PATH: see {EDGETPU_PAGE}.")
    content = convert(job)
    if not job.config.int8:
        path, content = job.path(FLOAT16_SUFFIX), with_float16_weights(content)
    else:
        path, whole = job.path(EDGETPU_SUFFIX if edgetpu else INT8_SUFFIX), edgetpu or job.config.raw
        content = quantize(content, INPUT, job.calibration(CALIBRATION_IMAGES), job.metadata.batch, whole)
    if compiler:
        content = _compiled(compiler, content, path.name)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        with zipfile.ZipFile(temporary, "a") as archive:  # interpreters read past it
            archive.writestr(METADATA_MEMBER, json.dumps(metadata.texts()))
    return path


def _compiled(compiler: str, content: bytes, name: str) -> bytes:
    """Returns an int8 file with its operations handed to the Edge TPU; `name` is that of the result."""
    with tempfile.TemporaryDirectory() as folder:
        source = name.replace("_edgetpu", "")  # the compiler adds it
        Path(folder, source).write_bytes(content)
        summary = run_tool([compiler, "--show_operations", "--out_dir", folder, source], Path(folder))
        if not Path(folder, name).is_file():
            raise UserError(f"{EDGETPU_COMPILER} wrote no {name}:\n{summary}")
        LOGGER.info(summary.strip())
        return Path(folder, name).read_bytes()


def convert(job: ExportJob) -> bytes:
    """Returns the model of a job as a TFLite file in float32."""
    model = ChannelsLast(job.with_head(job.head(normalised=True)), job.output_names).eval()
    example = job.example().permute(0, 2, 3, 1).contiguous()
    with quietly(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        import litert_torch

        path = Path(folder, "float32.tflite")
        litert_torch.convert(model, sample_kwargs={INPUT: example}).export(str(path))
        return path.read_bytes()


def with_float16_weights(content: bytes) -> bytes:
    """Returns a float32 TFLite file with the weights in float16: half the size, computed in float32 as before."""
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    casting = quantizer.Quantizer(content)
    for name in WEIGHTED:
        operation = qtyping.TFLOperationName(name)
        casting.update_quantization_recipe(".*", operation, config, AlgorithmName.FLOAT_CASTING)
    with quietly():
        return bytes(casting.quantize(enable_progress_report=False).quantized_model)


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
