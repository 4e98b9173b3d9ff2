"""Runtimes that a model may run on, one file each; `load_backend` chooses by the weights' suffix.

A runtime's libraries are imported only when a file of its kind is loaded, torch among them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from models.backends.base import ArrayBackend, Backend
from models.backends.metadata import Metadata
from utils.cli import find_weights
from utils.errors import UserError

__all__ = ["BACKENDS", "ArrayBackend", "Backend", "Metadata", "load_backend", "runtime_of", "weight_files"]

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
ENSEMBLE_RUNTIME = "pytorch"  # the only one that runs several models as one


def load_backend(
    weights: str | Path | Sequence[str | Path], device: str = "", half: bool = False, dnn: bool = False
) -> Backend:
    """Loads a model for inference on the runtime that its name stands for; logs the runtime and its device.

    Args:
        weights: a checkpoint or an exported model; or several checkpoints, which make an ensemble.
        device: as `--device`; empty chooses.
        half: compute in 16 bits where the device can; elsewhere in float32, and says so.
        dnn: run an ONNX file in OpenCV.

    Raises:
        UserError: no such file, a name that stands for no runtime, a library that is missing, a file that cannot be
            loaded, a device that the runtime does not have, or models that make no ensemble.
    """
    files = weight_files(weights)
    file, runtime = files[0], runtime_of(files[0])
    if dnn and runtime != "onnxruntime":
        raise UserError(f"--dnn runs ONNX files in OpenCV, and {file} is none: give an .onnx file, or leave it out.")
    try:
        module = importlib.import_module(f"models.backends.{'opencv' if dnn else runtime}")
    except ModuleNotFoundError as error:  # these modules import nothing foreign but PyTorch
        raise UserError(
            f"{file} needs PyTorch ({error.name} is not installed): pip install -r requirements.txt, or export the "
            "model where it is installed (export.py --include onnx) and give the .onnx file."
        ) from error
    return module.load(file, device, half) if len(files) == 1 else module.load_ensemble(files, device, half)


def weight_files(weights: str | Path | Sequence[str | Path]) -> list[Path]:
    """Returns the files that `--weights` names, of which several make an ensemble; see `utils.cli.find_weights`.

    Raises:
        UserError: a missing file, or several that are not all checkpoints.
    """
    files = find_weights(weights)
    if len(files) > 1:
        for file in files:
            if runtime_of(file) != ENSEMBLE_RUNTIME:
                raise UserError(f"--weights: several files make an ensemble of checkpoints (.pt), and {file} is none.")
    return files


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
