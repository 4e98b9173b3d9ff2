"""The formats that a checkpoint can be exported to: names, files, options, and how closely each must agree.

Free of torch and of every exporter's libraries: a format's module is imported when it is exported.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from utils.checks import UserError, did_you_mean


@dataclass(frozen=True)
class Tolerance:
    """How far an export may be from the checkpoint on real images before it counts as wrong.

    Attributes:
        box_px: largest difference of a box coordinate of the raw rows that pass the confidence threshold, px.
        score: largest difference of objectness or a class probability anywhere.
        unmatched: largest share of detections without one of IoU 0.95 and equal class on the other side.
    """

    box_px: float
    score: float
    unmatched: float


# By the precision of the weights. Float32 differs by rounding alone; one detection in fifty may change sides where two
# boxes overlap by just the threshold. Int8 is judged by its mAP (`--int8-max-drop`), here just for its shape.
TOLERANCES = {
    "float32": Tolerance(box_px=0.05, score=1e-3, unmatched=0.02),
    "float16": Tolerance(box_px=4.0, score=0.03, unmatched=0.06),
    "int8": Tolerance(box_px=float("inf"), score=1.0, unmatched=1.0),
}


@dataclass(frozen=True)
class Format:
    """One line of the table.

    Attributes:
        title: for people.
        argument: what `--include` takes.
        suffix: what follows the checkpoint's stem.
        module: file of this package whose `export(job)` writes it and returns its path.
        packages: Python packages that writing it needs, beyond the program's own.
        extra: section of requirements-export.txt that installs them.
        options: options of export.py that it honours, beyond those that every format does.
        runtime: Python packages that running it needs.
        cpu, gpu: what the result runs on.
        systems: operating systems that it runs on, as `platform.system` calls them; empty for all.
        precision: of the weights where neither --half nor --int8 is given.
    """

    title: str
    argument: str
    suffix: str
    module: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    options: frozenset[str] = frozenset()
    runtime: tuple[str, ...] = ()
    cpu: bool = True
    gpu: bool = True
    systems: tuple[str, ...] = ()
    precision: str = "float32"

    def check_packages(self) -> None:
        """Makes sure that what writing the format needs is installed.

        Raises:
            UserError: it is not; says how to install it.
        """
        missing = missing_packages(self.packages)
        if missing:
            raise UserError(f"needs {', '.join(missing)}: {install_hint(self.extra)}.")

    def why_not_here(self, cuda: bool) -> str:
        """Returns why a file of this format cannot run on this machine; empty where it can.

        Args:
            cuda: whether a CUDA device is to be used.
        """
        if self.systems and platform.system() not in self.systems:
            return f"it runs on {', '.join(self.systems)} only"
        if not self.cpu and not self.gpu:
            return "it runs on its own device only"
        if not self.cpu and not cuda:
            return "it runs on a CUDA GPU only"
        missing = missing_packages(self.runtime)
        return f"{', '.join(missing)} is not installed" if missing else ""


def missing_packages(packages: Sequence[str]) -> list[str]:
    """Returns those of the packages that are not installed."""
    return [package for package in packages if find_spec(package) is None]


def install_hint(extra: str) -> str:
    """Returns what to do for the packages of a section of requirements-export.txt."""
    return f"install the section '{extra}' of requirements-export.txt"


def _options(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TF = ("onnx", "tensorflow")
_LITERT = ("litert_torch", "ai_edge_quantizer")

# In the order in which they are exported.
_TABLE = (
    Format("TorchScript", "torchscript", ".torchscript", "torchscript", options=_options("dynamic half train")),
    Format(
        *("TensorRT", "engine", ".engine", "engine", ("onnx", "tensorrt"), "tensorrt"),
        options=_options("dynamic half int8 simplify opset nms workspace verbose"),
        runtime=("tensorrt",),
        cpu=False,
    ),
    Format(
        *("ONNX", "onnx", ".onnx", "onnx", ("onnx",), "onnx"),
        options=_options("dynamic half int8 simplify opset nms train"),
        runtime=("onnxruntime",),
    ),
    Format(
        *("OpenVINO", "openvino", "_openvino_model", "openvino", ("onnx", "openvino"), "openvino"),
        options=_options("dynamic half int8 simplify opset nms"),
        runtime=("openvino",),
        gpu=False,
    ),
    Format(
        *("CoreML", "coreml", ".mlmodel", "coreml", ("coremltools",), "coreml"),
        options=_options("half int8 nms"),
        runtime=("coremltools",),
        gpu=False,
        systems=("Darwin",),
    ),
    Format(
        *("NCNN", "ncnn", "_ncnn_model", "ncnn", ("pnnx",), "ncnn"),
        options=_options("half"),
        runtime=("ncnn",),
        gpu=False,
    ),
    Format(
        *("TensorFlow SavedModel", "saved_model", "_saved_model", "tensorflow", _TF, "tensorflow"),
        options=_options("opset simplify"),
        runtime=("tensorflow",),
    ),
    Format(
        *("TensorFlow GraphDef", "pb", ".pb", "tensorflow", _TF, "tensorflow"),
        options=_options("opset simplify"),
        runtime=("tensorflow",),
    ),
    Format(
        *("TensorFlow Lite", "tflite", ".tflite", "tflite", _LITERT, "tflite"),
        options=_options("half int8 nms"),
        runtime=("ai_edge_litert",),
        gpu=False,
        precision="float16",
    ),
    Format(
        *("TensorFlow Edge TPU", "edgetpu", "_edgetpu.tflite", "tflite", _LITERT, "tflite"),
        options=_options("int8"),
        cpu=False,
        gpu=False,
        precision="int8",
    ),
    Format(
        *("TensorFlow.js", "tfjs", "_web_model", "tensorflow", _TF, "tensorflow"),
        options=_options("opset simplify"),
        cpu=False,
        gpu=False,
    ),
    Format("YOLOv5 checkpoint", "yolov5", "_yolov5.pt", "yolov5", options=_options("half")),
)

FORMATS: dict[str, Format] = {entry.argument: entry for entry in _TABLE}


def find_formats(names: Sequence[str]) -> list[Format]:
    """Looks up what `--include` names, in any case; returns them in the order of FORMATS, each once.

    Raises:
        UserError: no such format, or none named.
    """
    if not names:
        raise UserError(f"--include: name a format. Known: {', '.join(FORMATS)}.")
    wanted = [name.lower() for name in names]
    for name in wanted:
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"--include {name}: no such format.{did_you_mean(name, FORMATS)} Known: {known}.")
    return [entry for argument, entry in FORMATS.items() if argument in wanted]
