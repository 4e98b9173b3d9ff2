"""Which options of export.py go together: what contradicts itself, or would change nothing, is refused in one line.

Free of torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from models.export.formats import FORMATS, Format
from utils.checks import UserError

# Options that change what every file holds: each format must honour them.
FOR_ALL = ("half", "int8", "dynamic", "train", "nms")
# Options about the way to some formats: one of them must be among those that are exported.
FOR_SOME = ("simplify", "opset", "workspace", "verbose")
# Limits whose default is None, so that it shows whether they were given: (what they need, default).
LIMITS = {
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
    ("train", "int8"): "the mAP of raw maps cannot be measured: leave one of them out.",
}
USELESS = {
    "optimize": "--optimize makes TorchScript for mobile phones, which current PyTorch no longer builds: export "
    "--include ncnn or tflite for a phone.",
    "inplace": "--inplace would change nothing: exports hold a decoder that writes nothing in place. Leave it out.",
}


def complete_options(options: argparse.Namespace, formats: Sequence[Format]) -> argparse.Namespace:
    """Returns the options with the defaults of the limits filled in, once they have been found to go together.

    Args:
        options: of export.py, as parsed.
        formats: what `options.include` names.

    Raises:
        UserError: a contradiction, an option without effect, or one that a format cannot honour; says which.
    """
    for name, message in USELESS.items():
        if getattr(options, name):
            raise UserError(message)
    for (first, second), message in CONTRADICTIONS.items():
        if getattr(options, first) and getattr(options, second):
            raise UserError(f"{flag(first)} with {flag(second)}: {message}")
    _check_formats(options, formats)
    if options.int8 and not options.data:
        raise UserError("--int8 is calibrated on training images: give their data set with --data.")
    for name, (needed, _) in LIMITS.items():
        if _given(options, name) and not getattr(options, needed):
            raise UserError(f"{flag(name)} has no effect without {flag(needed)}.")
    defaults = {name: default for name, (_, default) in LIMITS.items() if getattr(options, name) is None}
    return argparse.Namespace(**{**vars(options), **defaults, "imgsz": _height_width(options.imgsz)})


def flag(name: str) -> str:
    """Returns an option as it is typed."""
    return "--" + name.replace("_", "-")


def _given(options: argparse.Namespace, name: str) -> bool:
    """Tells whether an option was set: 0 is a value, False and None are not."""
    value = getattr(options, name)
    return value is not None and value is not False


def _check_formats(options: argparse.Namespace, formats: Sequence[Format]) -> None:
    """Checks the options that not every format has."""
    for name in (*FOR_ALL, *FOR_SOME):
        if not _given(options, name):
            continue
        unable = [entry for entry in formats if name not in entry.options]
        able = ", ".join(entry.argument for entry in FORMATS.values() if name in entry.options)
        if unable and name in FOR_ALL:
            titles = ", ".join(entry.title for entry in unable)
            raise UserError(f"{flag(name)}: {titles} cannot. Formats that can: {able}.")
        if len(unable) == len(formats):
            raise UserError(f"{flag(name)} has no effect here: it is for the formats {able}.")
    cpu = str(options.device).lower() == "cpu"
    bound = [entry.title for entry in formats if not entry.cpu and entry.gpu]
    if cpu and bound:
        raise UserError(f"--device cpu: {', '.join(bound)} is built on the GPU that it is to run on: add --device 0.")
    if cpu and options.half and any(entry.argument == "torchscript" for entry in formats):
        raise UserError("--half: TorchScript in float16 needs a GPU: add --device 0, or leave it out of --include.")


def _height_width(imgsz: int | Sequence[int]) -> list[int]:
    """Returns [height, width] for one side or both.

    Raises:
        UserError: neither one nor two sides.
    """
    sides = [imgsz] if isinstance(imgsz, int) else list(imgsz)
    if len(sides) not in (1, 2):
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: give one side, or height and width.")
    return sides * 2 if len(sides) == 1 else sides
