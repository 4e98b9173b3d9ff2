"""Runtimes that a model may run on, one file each, chosen by the weights' suffix.

`open_model` tells what a weights file is, before a runtime is started where the format allows it; `load_backend` loads
it. A runtime's libraries are imported only when a file of its kind is loaded, torch among them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.backends.base import ArrayBackend, Backend
from models.backends.metadata import Metadata
from models.backends.safety import check_path
from utils.cli import find_weights
from utils.errors import UserError

__all__ = ["BACKENDS", "ArrayBackend", "Backend", "Metadata", "ModelFile", "load_backend", "open_model", "runtime_of"]

# what a file's or folder's name ends in -> module of this package with a `load(path, device, half)`, and `read_texts`
# where the file can be asked before the runtime is there
BACKENDS = {
    ".pt": "pytorch",
    ".torchscript": "torchscript",
    ".onnx": "onnxruntime",
    "_openvino_model": "openvino",
    ".xml": "openvino",
    "_ncnn_model": "ncnn",
    "_rknn_model": "rknn",
    ".mnn": "mnn",
    ".pte": "executorch",
    ".tflite": "tflite",
    "_saved_model": "tensorflow",
    ".pb": "tensorflow",
    ".mlmodel": "coreml",
    ".mlpackage": "coreml",
    ".engine": "tensorrt",
    "_web_page": "onnxruntime",
}
PAGE_MODEL = "model.onnx"  # in the folder of a page, which runs elsewhere than in a browser as well
BROWSER_SUFFIX = "_web_model"


@dataclass(frozen=True)
class ModelFile:
    """A weights file, or an ensemble's, that has been looked at; `build` loads it.

    Attributes:
        path: the file or folder; of an ensemble the first one's.
        metadata: what it says of itself; of an ensemble the first one's, with the largest stride.
        trained_px: the image size that a checkpoint was trained at; None where it does not say, and for exports.
        build: returns the backend.
    """

    path: Path
    metadata: Metadata
    trained_px: int | None
    build: Callable[[], Backend]


def open_model(
    weights: str | Path | Sequence[str | Path],
    device: str = "",
    half: bool = False,
    dnn: bool = False,
    bf16: bool = False,
) -> ModelFile:
    """Reads what weights say of themselves, and checks that they may be loaded.

    Files of other people's that say too little, and formats that only their runtime can read, are loaded at once.

    Args:
        weights: a checkpoint or an exported model; or several checkpoints, which make an ensemble.
        device: as `--device`; empty chooses.
        half: compute in 16 bits where the device can; elsewhere in float32, and says so.
        dnn: run an ONNX file in OpenCV.
        bf16: compute in bfloat16 where the format leaves the choice.

    Raises:
        UserError: no such file, a name that stands for no runtime, a library that is missing, a file that cannot be
            loaded, a device that the runtime does not have, or models that make no ensemble.
    """
    files = [file / PAGE_MODEL if file.name.endswith("_web_page") else file for file in find_weights(weights)]
    runtimes = [runtime_of(file) for file in files]
    for file, runtime in zip(files, runtimes, strict=True):
        if len(files) > 1 and runtime != "pytorch":
            raise UserError(f"--weights: several files make an ensemble of checkpoints (.pt), and {file} is none.")
        if dnn and runtime != "onnxruntime":
            raise UserError(f"--dnn runs ONNX files in OpenCV, and {file} is none: give an .onnx file.")
    path = files[0]
    try:
        module = importlib.import_module(f"models.backends.{'opencv' if dnn else runtimes[0]}")
    except ModuleNotFoundError as error:  # these modules import nothing foreign but PyTorch
        raise UserError(
            f"{path} needs PyTorch ({error.name} is not installed): pip install -r requirements.txt, or export the "
            "model where it is installed (export.py --include onnx) and give the .onnx file."
        ) from error
    if runtimes[0] == "pytorch":
        return ModelFile(path, *module.open_checkpoints(files, device, half, bf16))
    build = partial(module.load, check_path(path), device, half or bf16)
    texts = module.read_texts(path) if hasattr(module, "read_texts") else {}
    metadata = Metadata.from_texts(texts, path) if "metadata" in texts else None
    if metadata is None:
        backend = build()
        metadata, build = backend.metadata, lambda: backend
    return ModelFile(path, metadata, None, build)


def load_backend(
    weights: str | Path | Sequence[str | Path], device: str = "", half: bool = False, dnn: bool = False
) -> Backend:
    """Loads a model for inference on the runtime that its name stands for; logs the runtime and its device.

    Arguments and errors are those of `open_model`.
    """
    return open_model(weights, device, half, dnn).build()


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
