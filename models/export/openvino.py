"""OpenVINO: a folder of the graph (.xml), its weights (.bin) and, as YOLOv5 writes it, a YAML file of names and stride.

Made from ONNX: input `images`, output `output`, both float32 whatever the weights are. With --half the weights are
stored in float16. With --int8 NNCF quantises the network, measured on images of the training set: weights have a scale
for each output channel, activations one for each tensor. The head's convolutions and what follows them (decoding of
boxes, NMS) stay in float: a box's place needs more than 256 steps.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from models.export.calibrate import ActivationRange, calibration_batches, log_ranges
from models.export.job import ExportJob, atomic_folder, quietly, without_telemetry
from models.export.onnx import write_onnx
from utils.files import write_yaml

if TYPE_CHECKING:
    from openvino import Model, Node


INT8_SUFFIX = "-int8_openvino_model"
TEXTS_AT = "model_info"  # the group of rt_info that OpenVINO's own tools read


CALIBRATION_IMAGES = 128
_CONVOLUTIONS = ("Convolution", "GroupConvolution")


def export(job: ExportJob) -> Path:
    """Writes `<stem>_openvino_model/`, or `<stem>-int8_openvino_model/`; returns its path."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "float32.onnx")
        write_onnx(replace(job, config=replace(job.config, half=False)), file)
        with without_telemetry():
            model = openvino.convert_model(file)
    if job.config.int8:
        model = quantize(model, job.calibration(CALIBRATION_IMAGES), job.metadata.batch)
    for name, text in job.metadata.texts().items():
        model.set_rt_info(text, [TEXTS_AT, name])
    path = job.path(INT8_SUFFIX if job.config.int8 else job.format.suffix)
    with atomic_folder(path) as folder:
        stem = str(folder / job.weights.stem)
        openvino.save_model(model, f"{stem}.xml", compress_to_fp16=job.metadata.precision == "float16")
        write_yaml(f"{stem}.yaml", {"stride": job.metadata.stride, "names": job.metadata.names})
    return path


def quantize(model: Model, images: Sequence[np.ndarray], batch: int) -> Model:
    """Quantises a model to int8 and logs how; the model handed in is used up.

    Args:
        model: float32, from images (batch, 3, h, w) to the decoded output.
        images: calibration images, uint8 (1, 3, h, w) RGB.
        batch: images that the model takes at a time.
    """
    nncf = _import_nncf()
    inputs = list(calibration_batches(images, batch))
    head = float_operations(model)
    with quietly():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.MIXED,  # steps where the values are: SiLU's are hardly below 0
            subset_size=len(inputs),
            ignored_scope=nncf.IgnoredScope(names=head),
        )
    log_ranges(activation_ranges(quantised), _count_quantised(quantised), len(images))
    return quantised


def float_operations(model: Model) -> list[str]:
    """Returns the names of the head's convolutions and of the operations between them and the output."""
    kinds, left = {}, list(model.get_results())
    while left:
        operation = left.pop()
        name, kind = operation.get_friendly_name(), operation.get_type_name()
        if name not in kinds:
            kinds[name] = kind
            inputs = operation.inputs() if kind not in _CONVOLUTIONS else ()
            left += [port.get_source_output().get_node() for port in inputs]
    return sorted(name for name, kind in kinds.items() if kind not in ("Constant", "Parameter", "Result"))


def activation_ranges(model: Model) -> list[ActivationRange]:
    """Returns the range of every quantised activation, in the graph's order."""
    found = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == "FakeQuantize":  # of activations: weights are stored in int8 as they are
            source = _source(operation, 0)
            low, high = (float(np.ravel(_source(operation, place).get_data())[0]) for place in (1, 2))
            found.append(ActivationRange(source.get_friendly_name(), low, high))
    return found


def _count_quantised(model: Model) -> int:
    """Returns how many convolutions have weights in int8, behind what scales, converts and reshapes them."""
    found = 0
    for operation in model.get_ops():
        if operation.get_type_name() in _CONVOLUTIONS:
            weights = _source(operation, 1)
            while weights.get_input_size():
                weights = _source(weights, 0)
            found += weights.get_element_type().size == 1
    return found


def _source(operation: Node, place: int) -> Node:
    """Returns what an operation's input comes from."""
    return operation.input(place).get_source_output().get_node()


def _import_nncf() -> ModuleType:
    """Imports NNCF without its reports, and without its changes to everybody's logging."""
    former = logging.getLoggerClass()
    try:
        with without_telemetry(), quietly():
            import nncf
    finally:
        logging.setLoggerClass(former)
    logger = logging.getLogger("nncf")
    logger.handlers.clear()  # bound to a stream that was turned aside; without one, errors go to standard error
    logger.setLevel(logging.ERROR)
    return nncf
