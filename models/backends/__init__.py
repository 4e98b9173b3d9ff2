"""Runtimes that a model may run on, one file each; `load_backend` chooses by the weights' suffix.

A runtime's libraries are imported only when a file of its kind is loaded, torch among them.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from models.backends.base import ArrayBackend, Backend
from models.backends.metadata import Metadata
from utils.checks import UserError

__all__ = ["BACKENDS", "ArrayBackend", "Backend", "Metadata", "load_backend", "runtime_of"]

# what a file's or folder's name ends in -> module of this package with a `load(weights, device, half)`
BACKENDS = {
    ".pt": "pytorch",
    ".torchscript": "torchscript",
    ".onnx": "onnxruntime",
    "_openvino_model": "openvino",
    ".xml": "openvino",
    "_ncnn_model": "ncnn",
    ".tflite": "tflite",
    "_saved_model": "tensorflow",
    ".pb": "tensorflow",
    ".mlmodel": "coreml",
    ".mlpackage": "coreml",
    ".engine": "tensorrt",
}
BROWSER_SUFFIX = "_web_model"


def load_backend(weights: str | Path, device: str = "", half: bool = False, dnn: bool = False) -> Backend:
    """Loads a model for inference on the runtime that its name stands for; logs the runtime and its device.

    Args:
        weights: a checkpoint or an exported model.
        device: as `--device`; empty chooses.
        half: compute in 16 bits where the device can; elsewhere in float32, and says so.
        dnn: run an ONNX file in OpenCV.

    Raises:
        UserError: no such file, a name that stands for no runtime, a library that is missing, a file that cannot be
            loaded, or a device that the runtime does not have.
    """
    runtime = runtime_of(weights)
    if dnn and runtime != "onnxruntime":
        raise UserError(f"--dnn runs ONNX files in OpenCV, and {weights} is none: give an .onnx file, or leave it out.")
    return importlib.import_module(f"models.backends.{'opencv' if dnn else runtime}").load(weights, device, half)


def runtime_of(weights: str | Path) -> str:
    """Returns the module of this package that runs a file: by the end of its name, else by what occurs in it.

    Raises:
        UserError: no runtime.
    """
    name = Path(weights).name.lower()
    for fits in (name.endswith, name.__contains__):
        for suffix, runtime in BACKENDS.items():
            if fits(suffix):
                return runtime
    if BROWSER_SUFFIX in name:
        raise UserError(f"--weights '{weights}': TensorFlow.js models run in a browser only; give another export.")
    known = ", ".join(BACKENDS)
    raise UserError(f"--weights '{weights}': no runtime for files ending in '{Path(name).suffix}'. Known: {known}.")
