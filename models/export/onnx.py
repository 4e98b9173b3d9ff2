"""ONNX: for ONNX Runtime and OpenCV, and on the way to OpenVINO, TensorRT and TensorFlow.

One input `images` (b, 3, h, w) of values 0 to 1; one output `output`: rows (b, n, 5 + nc) in pixels, or detections
(b, max_det, 6) with --nms; with --train one output a level; with --raw maps of scores, one or two a level
(`models.raw`). What the file says of itself is in its metadata.

Int8 is static quantisation by ONNX Runtime's own tool, measured on images of the training set. Weights have a scale for
each output channel, activations one for each tensor. The head's convolutions and what follows them (decoding of boxes,
NMS) stay in float: a box's place needs more than 256 steps. With --raw everything is int8, as integer devices need it.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from models.export.calibrate import ActivationRange, calibration_batches, log_ranges
from models.export.formats import LEAST_OPSETS, install_hint, missing_packages
from models.export.job import ExportJob, quietly
from utils.errors import UserError
from utils.files import atomic_write

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto


DEFAULT_OPSET = 12
QUANTISED_OPSET = 13  # the first with a scale for each channel
DYNAMO_OPSET = 18  # what PyTorch's newer exporter writes; it would have to convert down from there
INPUT = "images"
INT8_SUFFIX = "-int8.onnx"
CALIBRATION_IMAGES = 64  # ranges settle early, and the tool holds the activations of all of them in memory


def export(job: ExportJob) -> Path:
    """Writes `<stem>.onnx`, or `<stem>-int8.onnx`; returns its path."""
    path = job.path(INT8_SUFFIX if job.config.int8 else job.format.suffix)
    write_model(job, path)
    return path


def write_model(job: ExportJob, path: Path) -> None:
    """Writes the model of a job to a path as the options ask, in int8 too; see `write_onnx`."""
    if not job.config.int8:
        write_onnx(job, path)
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(_described(job, quantized(job)))


def write_onnx(job: ExportJob, path: Path, head: nn.Module | None = None, least_opset: int = DEFAULT_OPSET) -> None:
    """Writes the model of a job as ONNX: the weights in float16 with --half, sizes free with --dynamic.

    Args:
        job: the job; its format need not be ONNX.
        path: the file, written all or nothing.
        head: what follows the trunk; None for what the options ask.
        least_opset: the lowest opset that will do, but for blocks that need more; --opset may ask for a higher one.

    Raises:
        UserError: --opset is too low, or onnxslim is missing for --simplify.
    """
    dynamo = job.config.torch_export and "torch_export" in job.format.options.split()
    least_opset = max(least_opset, *(LEAST_OPSETS.get(type(block).__name__, 0) for block in job.source.modules()))
    least_opset = max(least_opset, DYNAMO_OPSET) if dynamo else least_opset
    opset = job.config.opset or least_opset
    if opset < least_opset:
        raise UserError(f"--opset {opset} is too low: at least {least_opset} is needed here")
    if job.config.simplify and missing_packages(("onnxslim",)):
        raise UserError(f"--simplify needs onnxslim: {install_hint('onnx')}")
    if dynamo and missing_packages(("onnxscript",)):
        raise UserError(f"--torch-export needs onnxscript: {install_hint('onnx')}")
    model, example = job.with_head(job.head() if head is None else head), job.example()
    if dynamo and job.metadata.dynamic:  # lengths of 1 would be taken for fixed ones
        example = torch.zeros(2, job.shape[1], 2 * job.metadata.stride, 3 * job.metadata.stride)
    if job.config.half:
        model, example = copy.deepcopy(model).half(), example.half()
    common = {"opset_version": opset, "input_names": [INPUT], "output_names": job.output_names}
    with warnings.catch_warnings(), torch.no_grad(), atomic_write(path) as temporary:
        if dynamo:
            with quietly():
                shapes = (_free_axes(job.metadata.stride),) if job.metadata.dynamic else None
                program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, **common)
                program.save(str(temporary), external_data=False)
        else:
            warnings.simplefilter("ignore", DeprecationWarning)  # recording sizes is meant here
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            axes = _axis_names(job) if job.metadata.dynamic else None
            torch.onnx.export(model, (example,), temporary, dynamo=False, dynamic_axes=axes, **common)
        content = temporary.read_bytes()
        if job.config.simplify:
            import onnx
            import onnxslim

            content = onnxslim.slim(onnx.load_from_string(content)).SerializeToString()
        temporary.write_bytes(_described(job, content))


def _axis_names(job: ExportJob) -> dict[str, dict[int, str]]:
    """Returns the names of the axes of input and outputs that are free with --dynamic."""
    outputs = job.output_names
    axes = {INPUT: {0: "batch", 2: "height", 3: "width"}}
    if len(outputs) > 1:
        axes |= {name: {0: "batch", 2: f"rows_{i}", 3: f"columns_{i}"} for i, name in enumerate(outputs)}
    else:
        axes[outputs[0]] = {0: "batch"} if job.metadata.nms else {0: "batch", 1: "anchors"}
    return axes


def _free_axes(stride: int) -> dict[int, Any]:
    """Returns the free axes of the input as torch.export takes them: sides are multiples of the stride."""
    from torch.export import Dim

    return {0: Dim("batch"), 2: stride * Dim("rows"), 3: stride * Dim("columns")}


def _described(job: ExportJob, content: bytes) -> bytes:
    """Returns a model's bytes with its metadata and the lengths of its output that are fixed, checked."""
    import onnx

    head, nms = job.source.head, job.metadata.nms
    fixed = {2: head.no} if nms is None else {1: nms.max_det, 2: 6}
    if job.config.train or job.config.raw:
        fixed = {1: head.na, 4: head.channels} if job.config.train else {}
    model: ModelProto = onnx.load_from_string(content)
    for port in model.graph.output:
        for axis, length in fixed.items():
            port.type.tensor_type.shape.dim[axis].dim_value = length  # in dynamic graphs torch loses sight of some
    onnx.helper.set_model_props(model, job.metadata.texts())
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def quantized(job: ExportJob, **how: Any) -> bytes:
    """Returns the model of a job in int8, without its metadata; logs the ranges. `how` is passed to `quantize`."""
    with tempfile.TemporaryDirectory() as folder:
        full, result = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        write_onnx(job, full, least_opset=QUANTISED_OPSET)
        quantize(full, result, job.calibration(CALIBRATION_IMAGES), whole=job.config.raw, **how)
        return result.read_bytes()


def quantize(
    full: Path, quantised: Path, images: Sequence[np.ndarray], symmetric: bool = False, whole: bool = False
) -> None:
    """Quantises an ONNX file to int8 and logs how.

    Args:
        full: the float32 model, from images (b, 3, h, w) to the decoded output.
        quantised: the file to write; it does not carry over the metadata.
        images: calibration images, uint8 (1, 3, h, w) RGB.
        symmetric: as TensorRT reads it: convolutions alone, every zero point 0, biases in float. Else activations are
            unsigned, which processors multiply fastest.
        whole: leave nothing in float; what the outputs' sigmoids give is 0 to 1, whatever the images showed.
    """
    import onnx
    from onnxruntime import quantization

    options: dict[str, Any] = {
        "activation_type": quantization.QuantType.QUInt8,
        # a single odd image widens no range
        "extra_options": {"CalibMovingAverage": True, "CalibMovingAverageConstant": 0.01},
    }
    if symmetric:
        options = {
            "activation_type": quantization.QuantType.QInt8,
            "quant_format": quantization.QuantFormat.QDQ,
            "op_types_to_quantize": ["Conv"],
            "extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        }
    prepared = full.with_suffix(".prepared.onnx")
    with quietly():
        # The symbolic shape inference knows fewer operations than the rest, and nothing here depends on it
        quantization.quant_pre_process(str(full), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        if whole:
            scores = [node.output[0] for node in model.graph.node if node.op_type == "Sigmoid"]
            ports = {port.name for port in model.graph.output}
            full_range = {"rmin": np.float32(0), "rmax": np.float32(1)}
            overrides = {name: [full_range] for name in scores if name in ports}
            options["extra_options"] |= {"TensorQuantOverrides": overrides}
        quantization.quantize_static(
            str(prepared),
            str(quantised),
            _Reader(model, images),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=[] if whole else float_nodes(model.graph),
            **options,
        )
    graph = onnx.load(quantised).graph
    in_int8 = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    layers = sum(node.op_type == "Conv" and node.input[1] in in_int8 for node in graph.node)
    log_ranges(activation_ranges(graph), layers, len(images))


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
