"""What an exported model says of itself, and how every format carries it: as short texts by name.

Each format stores texts in its own way (ONNX properties, OpenVINO's rt_info, a JSON member ...); the texts are the same
everywhere. `stride` and `names` are YOLOv5's, which its own and other people's runtimes read; the rest is ours. Free of
torch.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from utils.errors import UserError
from utils.nms import NMSConfig

PREPROCESSING = (
    "BGR to RGB; scaled to fit with bilinear interpolation, the rest filled with grey 114 (letterbox); "
    "values divided by 255; batch, channels, height, width"
)
LICENCE = "GPL-3.0"
# What json and ast raise on damaged texts or such as are nested to exhaust them, and reading values of the wrong kind.
PARSING_ERRORS = (AttributeError, LookupError, MemoryError, OverflowError, RecursionError, SyntaxError)
PARSING_ERRORS += (TypeError, ValueError)
NMS_TEXTS = ("conf_thres", "iou_thres", "max_det", "agnostic")  # what a file with `--nms` says of it
PLAIN_TEXTS = ("stride", "names")  # texts that YOLOv5 itself writes and reads, beside ours


@dataclass(frozen=True)
class Metadata:
    """What a model file says of itself.

    Attributes:
        names: class names {number: name}.
        stride: what the sides of the images must be multiples of, px.
        shape_hw: height and width of the images that the file was exported for, px.
        batch: images at a time that it was exported for.
        dynamic: whether it takes other sizes and numbers of images as well.
        precision: of the weights: "float32", "float16" or "int8".
        nms: how detections are chosen inside; None for raw rows.
        boxes_normalised: boxes are fractions of the image's width and height (TensorFlow's formats), else pixels.
        task: always "detect".
        licence: of the weights.
        preprocessing: how an image becomes the input, in words.
        date: when it was exported, ISO 8601.
        versions: versions of the libraries that wrote it.
        data: the data set YAML that the checkpoint was trained on; empty when unknown.
    """

    names: dict[int, str]
    stride: int
    shape_hw: tuple[int, int]
    batch: int = 1
    dynamic: bool = False
    precision: str = "float32"
    nms: NMSConfig | None = None
    boxes_normalised: bool = False
    task: str = "detect"
    licence: str = LICENCE
    preprocessing: str = PREPROCESSING
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    data: str = ""

    def texts(self) -> dict[str, str]:
        """Returns the texts that a file carries: `stride`, `names` (a Python dict, as YOLOv5 writes it), `metadata`."""
        said = asdict(self)
        said["nms"] = self.nms and {name: getattr(self.nms, name) for name in NMS_TEXTS}
        return {"stride": str(self.stride), "names": str(self.names), "metadata": json.dumps(said)}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str) -> Metadata | None:
        """Reads what `texts` wrote, or what YOLOv5 wrote (`stride` and `names` alone); None where nothing is said.

        Args:
            texts: texts by name, as found in a file.
            where: the file, for messages.

        Raises:
            UserError: they are damaged.
        """
        try:
            if "metadata" in texts:
                return _from_plain(json.loads(texts["metadata"]))
            if not {"stride", "names"} <= set(texts):
                return None
            names = ast.literal_eval(texts["names"])
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            named = {int(number): str(name) for number, name in pairs}
            return cls(named, int(float(texts["stride"])), (0, 0), licence="", preprocessing="")
        except PARSING_ERRORS as error:
            raise UserError(f"{where}: what the file says of itself is damaged ({error}): export it again.") from error


def _from_plain(plain: Mapping[str, Any]) -> Metadata:
    """Makes the metadata from parsed JSON, whose keys are texts and whose tuples are lists."""
    known = {name: plain[name] for name in Metadata.__dataclass_fields__ if name in plain}
    known["names"] = {int(number): str(name) for number, name in known["names"].items()}
    known["stride"] = int(known["stride"])
    height, width = known["shape_hw"]
    known["shape_hw"] = (int(height), int(width))
    if known.get("nms") is not None:
        known["nms"] = NMSConfig(**{name: known["nms"][name] for name in NMS_TEXTS})
    return Metadata(**known)
