"""TensorRT engines for NVIDIA GPUs, built from ONNX on the GPU that is to run them.

Types are those of the ONNX file (a strongly typed network): float32, with --half float16, with --int8 quantised as
TensorRT wants it, symmetric, decoder and head in float. With --dynamic an engine takes 1 to --batch-size images whose
sides are multiples of the stride up to the longer side of --imgsz and one stride more (validation pads so). What the
engine says of itself is in its name. Needs TensorRT 10 or newer.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.backends.metadata import Metadata
from models.export.job import ExportJob
from models.export.onnx import INPUT, quantized, write_onnx
from utils.errors import UserError
from utils.files import atomic_write
from utils.log import LOGGER

LEAST_VERSION = 10
LEAST_OPSET = 13
WORKSPACE_GIB = 4  # where --workspace is not given
NAME_BYTES = 4095  # the longest name that TensorRT keeps


def export(job: ExportJob) -> Path:
    """Writes `<stem>.engine`; returns its path.

    Raises:
        UserError: no CUDA device, TensorRT is too old, or it cannot build the model.
    """
    if job.device.type != "cuda":
        raise UserError(f"is built on the CUDA GPU that is to run it, and this is {job.device.type}: add --device 0.")
    import tensorrt

    if int(tensorrt.__version__.split(".")[0]) < LEAST_VERSION:
        raise UserError(f"needs TensorRT {LEAST_VERSION} or newer, this is {tensorrt.__version__}.")
    path = job.path(job.format.suffix)
    with tempfile.TemporaryDirectory() as folder, torch.cuda.device(job.device):
        if job.config.int8:
            content = quantized(job, symmetric=True)
        else:
            write_onnx(job, Path(folder, "model.onnx"), least_opset=LEAST_OPSET)
            content = Path(folder, "model.onnx").read_bytes()
        engine = build(tensorrt, content, job)
    with atomic_write(path) as temporary:
        temporary.write_bytes(engine)
    return path


def build(tensorrt: Any, content: bytes, job: ExportJob) -> bytes:
    """Returns an engine.

    Args:
        tensorrt: the library.
        content: an ONNX model with the input `images`.
        job: whose options and metadata apply.

    Raises:
        UserError: TensorRT does not know an operator, or finds no way to run the model.
    """
    level = tensorrt.Logger.VERBOSE if job.config.verbose else tensorrt.Logger.WARNING
    logger = tensorrt.Logger(level)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(content):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise UserError(f"TensorRT {tensorrt.__version__} cannot read the model: {reasons}.")
    network.name = engine_name(job.metadata)
    config = builder.create_builder_config()
    workspace = WORKSPACE_GIB if job.config.workspace is None else job.config.workspace
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, int(workspace * (1 << 30)))
    if job.metadata.dynamic:
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, *profile_shapes(job))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"TensorRT {tensorrt.__version__} could not build the model; --verbose tells why.")
    return bytes(engine)


def profile_shapes(job: ExportJob) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns the least, the likeliest and the largest shape (b, c, h, w) of a dynamic engine's images."""
    batch, channels, height, width = job.shape
    stride = job.metadata.stride
    longest = max(height, width) + stride
    return (1, channels, stride, stride), (batch, channels, height, width), (batch, channels, longest, longest)


def engine_name(metadata: Metadata) -> str:
    """Returns what an engine is called: its metadata as JSON, the less important parts left out where it is long."""
    shorter = replace(metadata, preprocessing="", versions={})
    for candidate in (metadata, shorter):
        text = candidate.texts()["metadata"]
        if len(text.encode()) <= NAME_BYTES:
            return text
    LOGGER.warning(
        f"WARNING: an engine has no room for the names of {len(metadata.names)} classes: they will be called class0, "
        "class1, ..."
    )
    return ""
