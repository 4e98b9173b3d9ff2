"""OpenVINO: a folder of the graph (.xml), its weights (.bin) and, as YOLOv5 writes it, a YAML file of names and stride.

Made from ONNX: input `images`, output `output`, both float32 whatever the weights are. With --half the weights are
stored in float16, with --int8 the network is quantised (`models.export.openvino_int8`).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.backends.metadata import Metadata
from models.export.folders import atomic_folder
from models.export.job import ExportJob
from models.export.onnx import write_onnx
from models.export.telemetry import without_telemetry
from utils.files import write_yaml

if TYPE_CHECKING:
    from openvino import Model

INT8_SUFFIX = "-int8_openvino_model"
TEXTS_AT = "model_info"  # the group of rt_info that OpenVINO's own tools read


def export(job: ExportJob) -> Path:
    """Writes `<stem>_openvino_model/`, or `<stem>-int8_openvino_model/`; returns its path."""
    path = job.path(INT8_SUFFIX if job.options.int8 else job.format.suffix)
    model = _converted(job)
    if job.options.int8:
        from models.export.openvino_int8 import CALIBRATION_IMAGES, quantize

        model = quantize(model, job.calibration(CALIBRATION_IMAGES), job.metadata.batch)
    with atomic_folder(path) as folder:
        _save(model, folder / job.weights.stem, job.metadata)
    return path


def _converted(job: ExportJob) -> Model:
    """Returns the model of a job in float32."""
    import openvino

    options = argparse.Namespace(**{**vars(job.options), "half": False})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "float32.onnx")
        write_onnx(replace(job, options=options), file)
        with without_telemetry():
            return openvino.convert_model(file)


def _save(model: Model, path: Path, metadata: Metadata) -> None:
    """Writes a model, with what it says of itself, to files of this name and the suffixes .xml, .bin and .yaml."""
    import openvino

    for name, text in metadata.texts().items():
        model.set_rt_info(text, [TEXTS_AT, name])
    openvino.save_model(model, str(path) + ".xml", compress_to_fp16=metadata.precision == "float16")
    write_yaml(str(path) + ".yaml", {"stride": metadata.stride, "names": metadata.names})
