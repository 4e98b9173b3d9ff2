"""TensorFlow Lite (LiteRT) straight from PyTorch, and its int8 form for Google's Edge TPU.

One input `images` (b, h, w, 3) of values 0 to 1; one output `output`: rows (b, n, 5 + nc) or with --nms detections
(b, max_det, 6), boxes as fractions of the image's width and height. Weights are float16, with --int8 int8 for each
channel; then what lies between the input and the head's convolutions runs on int8, those and the decoder stay in
float. For the Edge TPU everything is int8. What the file says of itself is a zip archive at its end, as usual there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backends.metadata import Metadata
from models.export.job import ExportJob
from models.export.quiet import quietly, run_tool
from utils.checks import UserError
from utils.files import atomic_write
from utils.log import LOGGER

FLOAT16_SUFFIX, INT8_SUFFIX = "-fp16.tflite", "-int8.tflite"
EDGETPU_SUFFIX = "-int8_edgetpu.tflite"
EDGETPU_COMPILER = "edgetpu_compiler"
EDGETPU_PAGE = "https://coral.ai/docs/edgetpu/compiler"
METADATA_MEMBER = "metadata.json"
INPUT, OUTPUT = "images", "output"
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


class ChannelsLast(nn.Module):
    """A model that reads images (b, h, w, 3), as everything of TensorFlow's does."""

    def __init__(self, model: nn.Module):
        """Takes a model that reads (b, 3, h, w) and returns one tensor."""
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps images (b, h, w, 3) of values 0 to 1 to the model's output, by name."""
        return {OUTPUT: self.model(images.permute(0, 3, 1, 2))}


def export(job: ExportJob) -> Path:
    """Writes `<stem>-fp16.tflite`, `<stem>-int8.tflite` or `<stem>-int8_edgetpu.tflite`; returns its path.

    Raises:
        UserError: for the Edge TPU: its compiler is missing or fails, or --int8 was not given.
    """
    metadata = replace(job.metadata, boxes_normalised=True)
    if job.format.argument == "edgetpu":
        return _export_edgetpu(job, metadata)
    path = job.path(INT8_SUFFIX if job.options.int8 else FLOAT16_SUFFIX)
    content = convert(job)
    write_file(path, _quantised(content, job) if job.options.int8 else with_float16_weights(content), metadata)
    return path


def _quantised(content: bytes, job: ExportJob, whole: bool = False) -> bytes:
    """Returns a float32 file in int8, see `models.export.tflite_int8.quantize`."""
    from models.export.tflite_int8 import CALIBRATION_IMAGES, quantize

    return quantize(content, INPUT, job.calibration(CALIBRATION_IMAGES), job.metadata.batch, whole)


def _export_edgetpu(job: ExportJob, metadata: Metadata) -> Path:
    """Writes the file for the Edge TPU."""
    if not job.options.int8:
        raise UserError("the Edge TPU computes in int8 only: add --int8 and the --data to calibrate on.")
    compiler = shutil.which(EDGETPU_COMPILER)
    if compiler is None:
        raise UserError(f"needs Google's {EDGETPU_COMPILER} (x86 Linux) on the PATH: see {EDGETPU_PAGE}.")
    content = _quantised(convert(job), job, whole=True)
    path = job.path(EDGETPU_SUFFIX)
    with tempfile.TemporaryDirectory() as folder:
        name = path.name.replace("_edgetpu", "")  # the compiler adds it
        Path(folder, name).write_bytes(content)
        summary = run_tool([compiler, "--show_operations", "--out_dir", folder, name], Path(folder))
        compiled = Path(folder, path.name)
        if not compiled.is_file():
            raise UserError(f"{EDGETPU_COMPILER} wrote no {path.name}:\n{summary}")
        LOGGER.info(summary.strip())
        write_file(path, compiled.read_bytes(), metadata)
    return path


def convert(job: ExportJob) -> bytes:
    """Returns the model of a job as a TFLite file in float32."""
    model = ChannelsLast(job.with_head(job.head(normalised=True))).eval()
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


def write_file(path: Path, content: bytes, metadata: Metadata) -> None:
    """Writes a TFLite file with a zip archive at its end that holds `metadata.json`; interpreters read past it."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(METADATA_MEMBER, json.dumps(metadata.texts()))
