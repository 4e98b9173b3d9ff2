"""The formats that a checkpoint can be exported to: names, files, options, and how closely each must agree.

Options that contradict each other, or would change nothing, are refused in one line. Free of torch and of every
exporter's libraries: a format's module is imported when it is exported.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from utils.errors import UserError, did_you_mean, shown

if TYPE_CHECKING:
    from torch import nn


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
        options: options of export.py that it honours, beyond those that every format does, with spaces between.
        runtime: Python packages that running it needs.
        cpu, gpu: what the result runs on.
        systems: operating systems that it runs on, as `platform.system` calls them; empty for all.
        precision: of the weights where neither --half nor --int8 is given.
        raw: whether it is always made as with --raw.
    """

    title: str
    argument: str
    suffix: str
    module: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    options: str = ""
    runtime: tuple[str, ...] = ()
    cpu: bool = True
    gpu: bool = True
    systems: tuple[str, ...] = ()
    precision: str = "float32"
    raw: bool = False

    def check_blocks(self, model: nn.Module) -> None:
        """Makes sure that the format can carry every block of a model.

        Raises:
            UserError: it cannot; says which block and why.
        """
        for block in sorted({type(module).__name__ for module in model.modules()}):
            if reason := UNABLE.get((block, self.argument)):
                raise UserError(f"cannot carry {block}: {reason}. Choose another format, or a model without it.")

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


_TENSORFLOW = {"packages": ("onnx", "tensorflow"), "extra": "tensorflow", "options": "opset simplify"}
_TFLITE = {"packages": ("litert_torch", "ai_edge_quantizer"), "extra": "tflite", "gpu": False}

ORT_WEB_TARBALL = "onnxruntime-web-1.30.0.tgz"  # what the web page runs on, as npm calls it
DEFAULT_CHIP = "rk3588"  # that RKNN compiles for, as Rockchip's toolkit calls it
# The first ONNX opset that has what a block needs, where the usual one has not.
LEAST_OPSETS = {"DySample": 16}
# Why a format cannot carry a block, by the block's name and the format's argument.
UNABLE = {
    ("DySample", "coreml"): "a .mlmodel has no operator that samples a map at computed places (Core ML's is of iOS 15)",
    ("DySample", "edgetpu"): "the Edge TPU computes in 8 bits throughout, too few for the places where it samples",
    **{(block, "yolov5"): "YOLOv5 has no such block" for block in ("ASFF", "DySample", "MSCA", "ShuffleV2Block")},
}

# In the order in which they are exported.
_TABLE = (
    Format("TorchScript", "torchscript", ".torchscript", "torchscript", options="dynamic half train"),
    Format(
        "TensorRT",
        "engine",
        ".engine",
        "engine",
        packages=("onnx", "tensorrt"),
        extra="tensorrt",
        options="dynamic half int8 simplify opset nms workspace verbose",
        runtime=("tensorrt",),
        cpu=False,
    ),
    Format(
        "ONNX",
        "onnx",
        ".onnx",
        "onnx",
        packages=("onnx",),
        extra="onnx",
        options="dynamic half int8 simplify opset torch_export nms train raw",
        runtime=("onnxruntime",),
    ),
    Format(
        "OpenVINO",
        "openvino",
        "_openvino_model",
        "openvino",
        packages=("onnx", "openvino"),
        extra="openvino",
        options="dynamic half int8 simplify opset torch_export nms",
        runtime=("openvino",),
        gpu=False,
    ),
    Format(
        "CoreML",
        "coreml",
        ".mlmodel",
        "coreml",
        packages=("coremltools",),
        extra="coreml",
        options="half int8 nms",
        runtime=("coremltools",),
        gpu=False,
        systems=("Darwin",),
    ),
    Format(
        "NCNN",
        "ncnn",
        "_ncnn_model",
        "ncnn",
        packages=("pnnx",),
        extra="ncnn",
        options="half",
        runtime=("ncnn",),
        gpu=False,
    ),
    Format(
        "RKNN",
        "rknn",
        "_rknn_model",
        "rknn",
        packages=("onnx",),
        extra="rknn",
        options="int8 simplify opset raw chip",
        runtime=("rknnlite",),
        cpu=False,
        gpu=False,
        precision="float16",
        raw=True,
    ),
    Format(
        "MNN",
        "mnn",
        ".mnn",
        "mnn",
        packages=("onnx", "MNN"),
        extra="mnn",
        options="dynamic half simplify opset raw",
        runtime=("MNN",),
        gpu=False,
    ),
    Format(
        "ExecuTorch",
        "executorch",
        ".pte",
        "executorch",
        packages=("executorch",),
        extra="executorch",
        options="raw",
        runtime=("executorch",),
        gpu=False,
    ),
    Format(
        "TensorFlow SavedModel", "saved_model", "_saved_model", "tensorflow", runtime=("tensorflow",), **_TENSORFLOW
    ),
    Format("TensorFlow GraphDef", "pb", ".pb", "tensorflow", runtime=("tensorflow",), **_TENSORFLOW),
    Format(
        "TensorFlow Lite",
        "tflite",
        ".tflite",
        "tflite",
        options="half int8 nms raw",
        runtime=("ai_edge_litert",),
        precision="float16",
        **_TFLITE,
    ),
    Format(
        "TensorFlow Edge TPU",
        "edgetpu",
        "_edgetpu.tflite",
        "tflite",
        options="int8 raw",
        cpu=False,
        precision="int8",
        **_TFLITE,
    ),
    Format(
        "Web page",
        "web",
        "_web_page",
        "web",
        packages=("onnx",),
        extra="onnx",
        options="dynamic int8 simplify opset ort_web",
        runtime=("onnxruntime",),
        gpu=False,
    ),
    Format("TensorFlow.js", "tfjs", "_web_model", "tensorflow", cpu=False, gpu=False, **_TENSORFLOW),
    Format("YOLOv5 checkpoint", "yolov5", "_yolov5.pt", "yolov5", options="half"),
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


# Options that change what every file holds: each format must honour them.
FOR_ALL = ("half", "int8", "dynamic", "train", "raw", "nms")
# Options about the way to some formats: one of them must be among those that are exported.
FOR_SOME = ("simplify", "opset", "torch_export", "workspace", "verbose", "ort_web", "chip")
# Options whose default is None, so that it shows whether they were given: (what they need, default).
DEPENDENT = {
    "agnostic_nms": ("nms", False),
    "topk_per_class": ("nms", 100),
    "topk_all": ("nms", 100),
    "iou_thres": ("nms", 0.45),
    "conf_thres": ("nms", 0.25),
    "int8_max_drop": ("int8", 0.01),
}
CONTRADICTIONS = {
    ("half", "int8"): "weights are either float16 or int8: choose one of them.",
    ("train", "nms"): "--train leaves the boxes undecoded, so there is nothing to choose from: leave one of them out.",
    ("raw", "nms"): "--raw leaves the boxes to the host, and so their choice: leave one of them out.",
    ("raw", "train"): "--raw gives scores after the sigmoid, --train before it: leave one of them out.",
    ("train", "int8"): "the mAP of raw maps cannot be measured: leave one of them out.",
}
USELESS = {
    "optimize": "--optimize makes TorchScript for mobile phones, which current PyTorch no longer builds: export "
    "--include ncnn or tflite for a phone.",
    "inplace": "--inplace would change nothing: exports hold a decoder that writes nothing in place. Leave it out.",
}


@dataclass(frozen=True)
class ExportConfig:
    """The options of export.py, by their names, where each is described; `checked` makes sure that they go together."""

    data: str
    weights: Sequence[str]
    imgsz: Sequence[int]
    batch_size: int
    device: str
    half: bool
    inplace: bool
    train: bool
    raw: bool
    optimize: bool
    int8: bool
    int8_max_drop: float | None
    dynamic: bool
    simplify: bool
    torch_export: bool
    opset: int | None
    verbose: bool
    workspace: float | None
    nms: bool
    agnostic_nms: bool | None
    topk_per_class: int | None
    topk_all: int | None
    iou_thres: float | None
    conf_thres: float | None
    ort_web: str | None
    chip: str | None
    include: Sequence[str]

    @property
    def formats(self) -> list[Format]:
        """What `include` names, each once, in the order of FORMATS.

        Raises:
            UserError: no such format, or none named.
        """
        return find_formats(self.include)

    def checked(self) -> ExportConfig:
        """Returns the options with the defaults of those that depend on others, once they have been found sound.

        Raises:
            UserError: a contradiction, an option without effect, or one that a format cannot honour; says which.
        """
        for name, message in USELESS.items():
            if getattr(self, name):
                raise UserError(message)
        for (first, second), message in CONTRADICTIONS.items():
            if getattr(self, first) and getattr(self, second):
                raise UserError(f"{flag(first)} with {flag(second)}: {message}")
        self._check_formats()
        self._check_values()
        if self.int8 and not self.data:
            raise UserError("--int8 is calibrated on training images: give their data set with --data.")
        for name, (needed, _) in DEPENDENT.items():
            if getattr(self, name) is not None and not getattr(self, needed):
                raise UserError(f"{flag(name)} has no effect without {flag(needed)}.")
        defaults = {name: default for name, (_, default) in DEPENDENT.items() if getattr(self, name) is None}
        return replace(self, **defaults)

    def _check_values(self) -> None:
        """Refuses values that mean nothing."""
        if len(self.imgsz) > 2:
            raise UserError(f"--imgsz {' '.join(map(str, self.imgsz))}: give one side, or height and width.")
        if self.ort_web is not None and not os.path.isfile(self.ort_web):
            made = f"npm pack {ORT_WEB_TARBALL.removesuffix('.tgz').replace('web-', 'web@')}"
            raise UserError(f"--ort-web {self.ort_web}: no such file. It is made by: {made}")
        if self.chip is not None and not re.fullmatch(r"[a-z]{2}\d{4}[a-z]?", self.chip, re.ASCII):
            raise UserError(f"--chip {shown(self.chip)}: is no name of a chip, such as {DEFAULT_CHIP}.")

    def _check_formats(self) -> None:
        """Refuses options that the formats do not have."""
        formats = self.formats
        for name in (*FOR_ALL, *FOR_SOME):
            if getattr(self, name) in (None, False):
                continue
            unable = [entry for entry in formats if name not in entry.options.split()]
            able = ", ".join(entry.argument for entry in FORMATS.values() if name in entry.options.split())
            if unable and name in FOR_ALL:
                titles = ", ".join(entry.title for entry in unable)
                raise UserError(f"{flag(name)}: {titles} cannot. Formats that can: {able}.")
            if len(unable) == len(formats):
                raise UserError(f"{flag(name)} has no effect here: it is for the formats {able}.")
        cpu = str(self.device).lower() == "cpu"
        bound = [entry.title for entry in formats if not entry.cpu and entry.gpu]
        if cpu and bound:
            raise UserError(f"--device cpu: {', '.join(bound)} is built on the GPU that is to run it: add --device 0.")
        if cpu and self.half and any(entry.argument == "torchscript" for entry in formats):
            raise UserError("--half: TorchScript in float16 needs a GPU: add --device 0, or leave it out of --include.")


def flag(name: str) -> str:
    """Returns an option as it is typed."""
    return "--" + name.replace("_", "-")
