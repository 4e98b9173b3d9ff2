"""What an exported model says of itself, how every format carries it, and what its graph adds. Free of torch.

Each format stores short texts by name in its own way (ONNX properties, OpenVINO rt_info, a JSON member ...), the same
everywhere. `stride` and `names` are YOLOv5's, which its own and other people's runtimes read; the rest is ours. Other
people's files may say less, or nothing: then the shapes of their graphs tell.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from models.raw import RawHead
from utils.errors import UserError
from utils.files import read_yaml
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
UNKNOWN_STRIDE = 64  # of files that do not say: no YOLOv5 needs more, and multiples of it are multiples of 32
UNKNOWN_SHAPE_HW = (640, 640)  # px, likewise
UNKNOWN_MAX_DET = 300
NMS_COLUMNS = 6  # x1, y1, x2, y2, confidence, class; as many as the raw rows of a detector of one class have
STRIDES = (4, 8, 16, 32, 64, 128)
MAX_ANCHORS = 9  # per cell


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
        raw: how the host decodes the maps that the file gives (`export.py --raw`); None where it gives rows itself.
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
    raw: RawHead | None = None
    boxes_normalised: bool = False
    task: str = "detect"
    licence: str = LICENCE
    preprocessing: str = PREPROCESSING
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    data: str = ""

    @property
    def has_names(self) -> bool:
        """Whether the file names its classes itself; else they are called class0, class1, ..."""
        return self.names != unknown_names(len(self.names))

    def texts(self) -> dict[str, str]:
        """Returns the texts that a file carries: `stride`, `names` (a Python dict, as YOLOv5 writes it), `metadata`."""
        said = asdict(self)
        said["nms"] = self.nms and {name: getattr(self.nms, name) for name in NMS_TEXTS}
        return {"stride": str(self.stride), "names": str(self.names), "metadata": json.dumps(said)}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str | Path) -> Metadata | None:
        """Reads what `texts` wrote, or what YOLOv5 wrote (`stride` and `names` alone); None where nothing is said.

        Args:
            texts: texts by name, as found in a file.
            where: the file, for messages.

        Raises:
            UserError: they are damaged.
        """
        try:
            if "metadata" in texts:
                said = json.loads(texts["metadata"])
                known = {name: said[name] for name in cls.__dataclass_fields__ if name in said}
                height, width = known["shape_hw"]
                known["shape_hw"] = int(height), int(width)
                known["names"] = {int(number): str(name) for number, name in known["names"].items()}
                known["stride"] = int(known["stride"])
                if known.get("nms") is not None:
                    known["nms"] = NMSConfig(**{name: known["nms"][name] for name in NMS_TEXTS})
                if known.get("raw") is not None:
                    known["raw"] = RawHead.from_json(known["raw"])
                return cls(**known)
            if not {"stride", "names"} <= set(texts):
                return None
            names = ast.literal_eval(texts["names"])
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            named = {int(number): str(name) for number, name in pairs}
            return cls(named, int(float(texts["stride"])), UNKNOWN_SHAPE_HW, licence="", preprocessing="")
        except PARSING_ERRORS as error:
            raise damaged(where, error) from error


def unknown_names(count: int) -> dict[int, str]:
    """Returns the class names of files that tell none."""
    return {number: f"class{number}" for number in range(count)}


def damaged(where: str | Path, error: Exception) -> UserError:
    """Returns the error for a file whose texts cannot be read."""
    return UserError(f"{where}: what the file says of itself is damaged ({error}): export it again.")


def texts_of_yaml(path: Path) -> dict[str, str]:
    """Returns the texts of a YAML file beside a model, as `Metadata.from_texts` takes them."""
    content = read_yaml(path, as_text=("names",))
    return plain_texts(content) if isinstance(content, dict) else {}


def plain_texts(content: Mapping[Any, Any]) -> dict[str, str]:
    """Turns parsed values into the texts that they were written from: JSON for `metadata`, else Python's."""
    return {
        str(key): value if isinstance(value, str) else json.dumps(value) if key == "metadata" else str(value)
        for key, value in content.items()
    }


class Graph(NamedTuple):
    """What a model's graph says of its input and output; None where it leaves a length open."""

    batch: int | None
    height: int | None
    width: int | None
    rows: int | None
    columns: int | None


def graph_of(
    input_shape: Sequence[Any], output_shape: Sequence[Any], where: str | Path, channels_last: bool = False
) -> Graph:
    """Reads the lengths of an input (b, 3, h, w) or (b, h, w, 3) and an output (b, n, columns); texts are open ones.

    Raises:
        UserError: the input has not four axes.
    """
    if len(input_shape) != 4:
        axes = "(b, h, w, 3)" if channels_last else "(b, 3, h, w)"
        raise UserError(f"{where}: its input has the shape {list(input_shape)}, not that of images {axes}.")
    batch, height, width = (input_shape[axis] for axis in ((0, 1, 2) if channels_last else (0, 2, 3)))
    rows, columns = output_shape[1:] if len(output_shape) == 3 else (None, None)
    lengths = (batch, height, width, rows, columns)
    return Graph(*(length if isinstance(length, int) and length > 0 else None for length in lengths))


def describe(texts: Mapping[str, str], graph: Graph, where: str | Path, boxes_normalised: bool = False) -> Metadata:
    """Returns what a file says of itself, completed and checked by what its graph says.

    Args:
        texts: the texts found in the file.
        graph: lengths of its input (batch, height, width) and first output (rows, columns).
        where: the file, for messages.
        boxes_normalised: whether files of this format that are not ours have boxes as fractions of the image.

    Raises:
        UserError: the texts are damaged, or the output is not a YOLOv5 detector's.
    """
    found = Metadata.from_texts(texts, where)
    if found is not None and found.nms is None and texts.get("end2end", "").lower() == "true":
        if graph.columns != NMS_COLUMNS:
            raise UserError(
                f"{where}: chooses boxes itself (metadata end2end), but its first output has {graph.columns} columns, "
                f"not the {NMS_COLUMNS} of a detector: export it without that."
            )
        # Whatever it finds is in its list, which no overlap has shortened
        found = replace(found, nms=NMSConfig(0.0, 1.0, graph.rows or UNKNOWN_MAX_DET, agnostic=False))
    if found is None or found.nms is None:
        shape = f"its first output is {graph.rows or '?'} x {graph.columns or '?'} per image"
        if graph.columns is None or graph.columns < 6 or (graph.rows is not None and graph.rows < graph.columns):
            raise UserError(  # too few columns, or later YOLO versions', where rows and columns have changed places
                f"{where}: {shape}, not rows of x, y, w, h, objectness and classes: this is no YOLOv5 detector, or one "
                "exported with --train."
            )
        if "metadata" not in texts and _may_be_chosen(graph, found):
            raise UserError(
                f"{where}: {shape}, boxes that are chosen inside, but it does not say how (metadata end2end): export "
                "it without NMS, as rows of x, y, w, h, objectness and classes."
            )
        names = unknown_names(graph.columns - 5)
        found = found or Metadata({}, UNKNOWN_STRIDE, UNKNOWN_SHAPE_HW, licence="", preprocessing="")
        found = found if found.names else replace(found, names=names)
        if len(found.names) != len(names):
            raise UserError(
                f"{where}: names {len(found.names)} classes, but its rows tell {len(names)}: export it again."
            )
    if "metadata" not in texts:
        found = replace(found, boxes_normalised=boxes_normalised)
    fixed = graph.height is not None and graph.width is not None
    shape_hw = (graph.height, graph.width) if fixed else found.shape_hw
    return replace(found, dynamic=not fixed, shape_hw=shape_hw, batch=graph.batch or 1)


def _may_be_chosen(graph: Graph, said: Metadata | None) -> bool:
    """Tells whether an output may be boxes chosen inside, which look like the raw rows of one class.

    Those are some for each cell of grids whose strides double.
    """
    if graph.columns != NMS_COLUMNS:
        return False
    if said is not None and len(said.names) > 1:
        return True
    if graph.rows is None:
        return False
    if graph.height is None or graph.width is None:
        return True  # raw rows would be open as well
    cells = [(graph.height // stride) * (graph.width // stride) for stride in STRIDES]
    levels = (sum(cells[first:last]) for last in range(2, len(cells) + 1) for first in range(last - 1))
    return graph.rows not in {anchors * count for count in levels for anchors in range(1, MAX_ANCHORS + 1)}
