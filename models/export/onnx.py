"""ONNX: for ONNX Runtime and OpenCV, and on the way to OpenVINO, TensorRT and TensorFlow.

One input `images` (b, 3, h, w) of values 0 to 1; one output `output`: rows (b, n, 5 + nc) in pixels, or detections
(b, max_det, 6) with --nms; with --train one output a level. What the file says of itself is in its metadata.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.export.formats import install_hint, missing_packages
from models.export.job import ExportJob
from utils.checks import UserError
from utils.files import atomic_write

if TYPE_CHECKING:
    from onnx import ModelProto

DEFAULT_OPSET = 12
QUANTISED_OPSET = 13  # the first with a scale for each channel
INPUT, OUTPUT = "images", "output"
INT8_SUFFIX = "-int8.onnx"


def export(job: ExportJob) -> Path:
    """Writes `<stem>.onnx`, or `<stem>-int8.onnx`; returns its path."""
    if not job.options.int8:
        path = job.path(job.format.suffix)
        write_onnx(job, path)
        return path
    from models.export.onnx_int8 import CALIBRATION_IMAGES, quantize

    path = job.path(INT8_SUFFIX)
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as temporary:
        full, quantised = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        write_onnx(job, full, least_opset=QUANTISED_OPSET)
        quantize(full, quantised, job.calibration(CALIBRATION_IMAGES))
        temporary.write_bytes(_described(job, quantised.read_bytes()))
    return path


def write_onnx(job: ExportJob, path: Path, head: nn.Module | None = None, least_opset: int = DEFAULT_OPSET) -> None:
    """Writes the model of a job as ONNX: the weights in float16 with --half, sizes free with --dynamic.

    Args:
        job: the job; its format need not be ONNX.
        path: the file, written all or nothing.
        head: what follows the trunk; None for what the options ask.
        least_opset: the lowest opset that will do; --opset may ask for a higher one.

    Raises:
        UserError: --opset is too low, or onnxslim is missing for --simplify.
    """
    opset = job.options.opset or least_opset
    if opset < least_opset:
        raise UserError(f"--opset {opset} is too low: at least {least_opset} is needed here")
    if job.options.simplify and missing_packages(("onnxslim",)):
        raise UserError(f"--simplify needs onnxslim: {install_hint('onnx')}")
    with atomic_write(path) as temporary:
        _trace(job, temporary, job.head() if head is None else head, opset)
        content = temporary.read_bytes()
        if job.options.simplify:
            content = _simplified(content)
        temporary.write_bytes(_described(job, content))


def _trace(job: ExportJob, path: Path, head: nn.Module, opset: int) -> None:
    """Writes the graph that torch records of one run."""
    model, example = job.with_head(head), job.example()
    if job.options.half:
        model, example = copy.deepcopy(model).half(), example.half()
    outputs = _output_names(job)
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter that torch recommends needs onnxscript and later opsets; recording sizes is meant here.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=outputs,
            dynamic_axes=_free_axes(job, outputs) if job.metadata.dynamic else None,
        )


def _output_names(job: ExportJob) -> list[str]:
    """Returns the outputs' names: one, or with --train one a level."""
    more = range(1, job.source.detect.nl) if job.options.train else ()
    return [OUTPUT, *(f"{OUTPUT}_{level}" for level in more)]


def _free_axes(job: ExportJob, outputs: Sequence[str]) -> dict[str, dict[int, str]]:
    """Names the axes whose length an input of another size changes."""
    axes = {INPUT: {0: "batch", 2: "height", 3: "width"}}
    if job.options.train:
        return axes | {name: {0: "batch", 2: f"rows_{i}", 3: f"columns_{i}"} for i, name in enumerate(outputs)}
    return axes | {OUTPUT: {0: "batch"} if job.metadata.nms else {0: "batch", 1: "anchors"}}


def _simplified(content: bytes) -> bytes:
    """Returns a model's bytes with what is constant computed and what is of no use left out."""
    import onnx
    import onnxslim

    return onnxslim.slim(onnx.load_from_string(content)).SerializeToString()


def _described(job: ExportJob, content: bytes) -> bytes:
    """Returns a model's bytes with its metadata and the lengths of its output that are fixed, checked."""
    import onnx

    model: ModelProto = onnx.load_from_string(content)
    for port in model.graph.output:
        for axis, length in _fixed_axes(job).items():  # in dynamic graphs torch loses sight of some
            port.type.tensor_type.shape.dim[axis].dim_value = length
    onnx.helper.set_model_props(model, job.metadata.texts())
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _fixed_axes(job: ExportJob) -> dict[int, int]:
    """Returns the axes of an output whose length depends on the model alone, with their lengths."""
    detect, nms = job.source.detect, job.metadata.nms
    if job.options.train:
        return {1: detect.na, 4: detect.no}
    return {2: detect.no} if nms is None else {1: nms.max_det, 2: 6}
