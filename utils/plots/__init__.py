"""YOLOv5's names for drawing: `Annotator`, `colors`, `plot_images`, `plot_labels`, `plot_results`, `save_one_box`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from utils.boxes import xywh2xyxy, xyxy2xywh
from utils.errors import UserError
from utils.files import increment_path
from utils.log import LOGGER
from utils.plots import boxes as draw
from utils.plots import training as plots
from utils.plots.boxes import ASCENT, LINE_HEIGHT, draw_text, text_width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Annotator",
    "Colors",
    "colors",
    "feature_visualization",
    "output_to_target",
    "plot_images",
    "plot_labels",
    "plot_results",
    "save_one_box",
]

Names = Mapping[int, str] | Sequence[str]
Color = tuple[int, int, int]
GREY, WHITE = (128, 128, 128), (255, 255, 255)


class Colors:
    """YOLOv5's palette of 20 colours: `colors(class_id, bgr=True)`.

    Attributes:
        palette: (r, g, b) of each.
        n: how many there are.
    """

    def __init__(self) -> None:
        """Reads the palette."""
        self.palette = [draw.color(number, bgr=False) for number in range(len(draw.PALETTE))]
        self.n = len(self.palette)

    def __call__(self, i: int, bgr: bool = False) -> Color:
        """Returns a class's colour as (r, g, b) or (b, g, r)."""
        return draw.color(int(i), bgr)

    @staticmethod
    def hex2rgb(h: str) -> Color:
        """Returns (r, g, b) of `#rrggbb`."""
        return tuple(int(h[at : at + 2], 16) for at in (1, 3, 5))


colors = Colors()


class Annotator:
    """Draws labelled boxes into a picture, in place; colours are in the picture's own order of channels.

    Attributes:
        im: the picture, uint8 (h, w, 3).
        lw: width of the lines, px.
    """

    def __init__(
        self,
        im: np.ndarray | Image.Image,
        line_width: int | None = None,
        font_size: float | None = None,
        font: str = "",
        pil: bool = False,
        example: str = "",
    ) -> None:
        """Takes a contiguous array, or a picture of Pillow's, which is copied.

        Args:
            im: the picture.
            line_width: px; None suits the picture.
            font_size: px; None suits the picture.
            font: names nothing here, as `pil` and `example`: text of any script finds its font by itself.
            pil: see `font`.
            example: see `font`.

        Raises:
            UserError: the array is not contiguous.
        """
        self.im = np.array(im) if isinstance(im, Image.Image) else im
        if not self.im.flags.c_contiguous:
            raise UserError("Annotator: the picture is not contiguous; hand in np.ascontiguousarray(im).")
        self.lw = int(line_width or draw.default_line_width(self.im.shape))
        self._font_px = None if font_size is None else max(round(font_size), draw.SMALLEST_FONT_PX)

    def box_label(self, box: Any, label: str = "", color: Color = GREY, txt_color: Color | None = None) -> None:
        """Draws a box with a label above it, or where there is room.

        Args:
            box: (4,) xyxy px: numbers, an array or a tensor.
            label: its text; empty for none.
            color: of the box and of the label's ground.
            txt_color: of the text; None takes black or white, whichever reads better.
        """
        box_xyxy = _numbers(box)
        if not label or txt_color is None:
            draw.annotate(self.im, [draw.Annotation(box_xyxy, label, _plain(color))], self.lw, self._font_px)
            return
        draw.annotate(self.im, [draw.Annotation(box_xyxy, "", _plain(color))], self.lw)
        height = math.ceil(LINE_HEIGHT * self._text_px)
        left, top = round(box_xyxy[0]), round(box_xyxy[1])
        top = top - height if top >= height else top
        right = left + text_width(label, self._text_px) + 2 * self.lw
        self.rectangle((left, top, right, top + height), fill=color)
        self.text((left + self.lw, top), label, txt_color)

    def rectangle(self, xy: Any, fill: Color | None = None, outline: Color | None = None, width: int = 1) -> None:
        """Draws a rectangle (4,) xyxy px, filled and outlined with the colours given."""
        x1, y1, x2, y2 = (round(value) for value in _numbers(xy))
        if fill is not None:
            cv2.rectangle(self.im, (x1, y1), (x2, y2), _plain(fill), cv2.FILLED)
        if outline is not None:
            cv2.rectangle(self.im, (x1, y1), (x2, y2), _plain(outline), width)

    def text(self, xy: Sequence[float], text: str, txt_color: Color = WHITE) -> None:
        """Writes a line of text with its upper left corner at (x, y) px."""
        baseline = round(xy[1] + ASCENT * self._text_px)
        draw_text(self.im, text, round(xy[0]), baseline, self._text_px, _plain(txt_color))

    def result(self) -> np.ndarray:
        """Returns the picture."""
        return self.im

    @property
    def _text_px(self) -> int:
        """Font size of text that stands by itself."""
        return self._font_px or max(6 * self.lw, draw.SMALLEST_FONT_PX)


def _numbers(values: Any) -> list[float]:
    """Returns numbers, single-element tensors among them, an array or a tensor as a flat list of floats."""
    if hasattr(values, "shape"):
        return values.reshape(-1).tolist()
    return [float(value) for value in values]


def _plain(color: Sequence[float]) -> Color:
    """Returns a colour as OpenCV takes it."""
    return tuple(int(level) for level in color)


def save_one_box(
    xyxy: Any,
    im: np.ndarray,
    file: str | Path = "image.jpg",
    gain: float = 1.02,
    pad: int = 10,
    square: bool = False,
    BGR: bool = False,
    save: bool = True,
) -> np.ndarray:
    """Cuts a box out of a picture and saves it as JPEG; a file that is there is not overwritten but numbered.

    Args:
        xyxy: (4,) or (1, 4) px: numbers, an array or a tensor.
        im: (h, w, 3).
        file: where to save; its folder is made, its suffix becomes `.jpg`.
        gain: the sides are multiplied by it ...
        pad: ... and so many px are added.
        square: cut a square.
        BGR: the picture's channels are BGR; else RGB, and the crop is turned round.
        save: whether to save.

    Returns:
        The crop (h, w, 3) BGR.
    """
    crop = draw.crop_box(im, _numbers(xyxy)[:4], gain, pad, square)
    crop = crop if BGR else np.ascontiguousarray(crop[..., ::-1])
    if save:
        path = Path(file).with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw.save_image(increment_path(path), crop)
    return crop


def feature_visualization(
    x: Tensor, module_type: str, stage: int, n: int = 32, save_dir: str | Path = "runs/detect/exp"
) -> None:
    """Saves a layer's first n channels as a picture, and all of them as `.npy`, into an existing folder.

    Args:
        x: (b, c, h, w), the first image's are shown.
        module_type: the layer's name, such as `models.common.C3`; a detection layer is passed over.
        stage: its row in the model.
        n: how many channels to show.
        save_dir: the folder.
    """
    if "Detect" in module_type or x.ndim != 4 or min(x.shape[2:]) < 2:
        return
    maps = x.detach().cpu().float().numpy()
    path = Path(save_dir) / f"stage{stage}_{module_type.rpartition('.')[2]}_features.png"
    draw.save_image(path, draw.feature_grid(maps[0], max_channels=n))
    np.save(path.with_suffix(".npy"), maps)
    LOGGER.info(f"Saved {path}")


def output_to_target(output: Sequence[np.ndarray | Tensor]) -> np.ndarray:
    """Joins each image's detections (k, 6) to rows (m, 7) [image, class, x, y, w, h in px, confidence]."""
    joined = [np.zeros((0, 7), np.float32)]
    for number, found in enumerate(output):
        rows = _to_numpy(found)
        image = np.full((len(rows), 1), number, np.float32)
        joined.append(np.concatenate((image, rows[:, 5:6], xyxy2xywh(rows[:, :4]), rows[:, 4:5]), axis=1))
    return np.concatenate(joined)


def plot_images(
    images: np.ndarray | Tensor,
    targets: np.ndarray | Tensor,
    paths: Sequence[str] | None = None,
    fname: str | Path = "images.jpg",
    names: Names | None = None,
    max_size: int = 1920,
    max_subplots: int = 16,
) -> None:
    """Draws a batch with its boxes as one mosaic and saves it.

    Args:
        images: (b, 3, h, w) RGB, uint8 or float from 0 to 1.
        targets: labels (m, 6) [image, class, x, y, w, h in 0 to 1], or detections (m, 7) of `output_to_target`.
        paths: the images' paths, whose names are written.
        fname: the file.
        names: of the classes.
        max_size: longest side of the mosaic, px.
        max_subplots: more images are left out.
    """
    rows = _to_numpy(targets)
    boxes = rows if rows.shape[1] == 6 else _by_image(rows, len(images))
    draw.draw_batch(images, boxes, paths, as_mapping(names or {}), fname, max_subplots, max_size)


def _by_image(rows: np.ndarray, count: int) -> list[np.ndarray]:
    """Splits rows (m, 7) of `output_to_target` into each image's detections (k, 6)."""
    detections = np.concatenate((xywh2xyxy(rows[:, 2:6]), rows[:, 6:7], rows[:, 1:2]), axis=1)
    return [detections[rows[:, 0] == number] for number in range(count)]


def plot_labels(labels: np.ndarray, names: Names = (), save_dir: str | Path = "") -> None:
    """Draws labels.jpg and labels_correlogram.jpg of all labels (M, 5) [class, x, y, w, h] into a folder."""
    plots.plot_labels(np.asarray(labels), as_mapping(names), Path(save_dir))


def plot_results(file: str | Path = "path/to/results.csv", dir: str | Path = "") -> None:
    """Draws results.png beside a results.csv; with `dir`, of that folder's first results*.csv.

    Raises:
        UserError: there is none, or it is no table of training results.
    """
    table = next(iter(sorted(Path(dir).glob("results*.csv"))), None) if dir else Path(file)
    if table is None:
        raise UserError(f"{dir}: holds no results*.csv.")
    plots.plot_results(table, table.parent / "results.png")


def _to_numpy(rows: np.ndarray | Tensor) -> np.ndarray:
    """Returns an array, or a tensor on any device, as an array."""
    return rows.detach().cpu().numpy() if hasattr(rows, "detach") else np.asarray(rows)


def as_mapping(names: Names) -> dict[int, str]:
    """Returns class names, a list or a mapping, as {number: name}."""
    return dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
