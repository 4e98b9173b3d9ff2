"""Core ML, for Apple's systems: converted anywhere, run on macOS and iOS only.

A `.mlmodel` with one input `image` (RGB, scaled to 0 to 1 inside) and one output `output`: rows (1, n, 5 + nc) in
pixels, or with --nms detections (1, max_det, 6). --half and --int8 store the weights in 16 or 8 bits; Core ML computes
in the precision that its device likes best. What the file says of itself is in its user-defined metadata.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from models.backends.base import before_tensorflow
from models.export.job import ExportJob, quietly
from utils.errors import UserError
from utils.files import atomic_write

INPUT, OUTPUT = "image", "output"
WEIGHT_BITS = {"float32": 32, "float16": 16, "int8": 8}


def export(job: ExportJob) -> Path:
    """Writes `<stem>.mlmodel`; returns its path.

    Raises:
        UserError: more than one image at a time, or images that are not RGB.
    """
    batch, channels, _, _ = job.shape
    if batch != 1:
        raise UserError(f"--batch-size {batch}: Core ML takes one image at a time: leave it at 1.")
    if channels != 3:
        raise UserError(f"Core ML takes images with 3 channels; this model reads {channels}.")
    path = job.path(job.format.suffix)
    with quietly():
        spec = convert(job)
    said = spec.description.metadata
    said.shortDescription = f"YOLOv5 detector {job.weights.stem}: {len(job.metadata.names)} classes"
    said.license = job.metadata.licence
    for name, text in job.metadata.texts().items():
        said.userDefined[name] = text
    with atomic_write(path) as temporary:
        temporary.write_bytes(spec.SerializeToString())
    return path


def convert(job: ExportJob) -> Any:
    """Returns the model of a job as Core ML's description (`Model_pb2.Model`), its weights in the job's precision."""
    before_tensorflow()  # coremltools loads it where it is installed
    import coremltools
    from coremltools.models.neural_network.quantization_utils import quantize_weights

    model, example = job.with_head(job.head()), job.example()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coremltools names every version that it was not tested with
        program = torch.export.export(model, (example,)).run_decompositions({})
        image = coremltools.ImageType(INPUT, example.shape, scale=1 / 255, color_layout=coremltools.colorlayout.RGB)
        output = coremltools.TensorType(OUTPUT)
        converted = coremltools.convert(
            program,
            inputs=[image],
            outputs=[output],
            convert_to="neuralnetwork",  # one file, for every version of Core ML
            skip_model_load=True,
        )
        bits = WEIGHT_BITS[job.metadata.precision]
        if bits < 32:
            converted = quantize_weights(converted, bits)
    spec = converted if hasattr(converted, "SerializeToString") else converted.get_spec()
    shape = spec.description.output[0].type.multiArrayType.shape
    if not shape:  # the converter leaves it open
        shape.extend(int(length) for length in model(example).shape)
    return spec
