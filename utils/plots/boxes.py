"""Boxes, text and counts drawn on images, crops, feature maps, and mosaics of whole batches, by YOLOv5's names.

Images are uint8 (h, w, 3) in BGR unless said otherwise. OpenCV's built-in font draws Latin, Greek, Cyrillic, Arabic,
Chinese, Japanese and Korean; for other scripts the system's font folders are searched once. What no font has is drawn
as `?` and named in a warning. Torch tensors are taken without importing torch.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.boxes import Detections, clip_boxes, xywh2xyxy, xyxy2xywh
from utils.errors import UserError, printable
from utils.files import increment_path

if TYPE_CHECKING:
    from utils.media.counting import Counts


LOGGER = logging.getLogger("yolov5")
Array = Any  # np.ndarray or torch.Tensor
Color = tuple[int, int, int]
Names = Mapping[int, str] | Sequence[str]

PALETTE = (
    "FF3838", "FF9D97", "FF701F", "FFB21D", "CFD231", "48F90A", "92CC17", "3DDB86", "1A9334", "00D4BB",
    "2C99A8", "00C2FF", "344593", "6473FF", "0018EC", "8438FF", "520085", "CB38FF", "FF95C8", "FF37C7",
)  # fmt: skip
BLACK, WHITE, GREY = (0, 0, 0), (255, 255, 255), (128, 128, 128)
NO_TRACK_COLOR = (160, 160, 160)  # of objects that have no track (yet)
COUNTING_COLOR = (0, 235, 255)  # yellow, on a black rim: seen on any ground
SMALLEST_FONT_PX = 9
BATCH_CONF_THRES = 0.25  # predictions below it are not shown in mosaics
TILE_NAME_LENGTH = 40


class Colors:
    """YOLOv5's palette of 20 colours: `colors(class_id, bgr=True)`.

    Attributes:
        palette: (r, g, b) of each.
        n: how many there are.
    """

    def __init__(self) -> None:
        self.palette = [self.hex2rgb(f"#{code}") for code in PALETTE]
        self.n = len(self.palette)

    def __call__(self, i: int, bgr: bool = False) -> Color:
        """Returns a class's colour as (r, g, b) or (b, g, r)."""
        rgb = self.palette[int(i) % self.n]
        return rgb[::-1] if bgr else rgb

    @staticmethod
    def hex2rgb(h: str) -> Color:
        """Returns (r, g, b) of `#rrggbb`."""
        return tuple(int(h[at : at + 2], 16) for at in (1, 3, 5))


colors = Colors()


class Annotation(NamedTuple):
    """What is drawn over one object."""

    box_xyxy: Sequence[float]  # px
    label: str  # empty for a bare box
    color: Color  # in the image's own order of channels, as all colours here
    text_color: Color | None = None  # None takes black or white, whichever reads better


class Annotator:
    """Draws labelled boxes into an image, in place; colours are in the image's own order of channels.

    Attributes:
        im: the image, uint8 (h, w, 3).
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
        """Takes a contiguous array, or an image of Pillow's, which is copied.

        Args:
            im: the image.
            line_width: px; None suits the image.
            font_size: px; None suits the line width and the image.
            font: names nothing here, as `pil` and `example`: text of any script finds its font by itself.
            pil: see `font`.
            example: see `font`.

        Raises:
            UserError: the array is not contiguous.
        """
        self.im = np.array(im) if isinstance(im, Image.Image) else im
        if not self.im.flags.c_contiguous:
            raise UserError("Annotator: the image is not contiguous; hand in np.ascontiguousarray(im).")
        self.lw = int(line_width or default_line_width(self.im.shape))
        self._font_px = None if font_size is None else max(round(font_size), SMALLEST_FONT_PX)

    def box_label(self, box: Any, label: str = "", color: Color = GREY, txt_color: Color | None = None) -> None:
        """Draws a box with a label above it, or where there is room.

        Args:
            box: (4,) xyxy px: numbers, an array or a tensor.
            label: its text; empty for none.
            color: of the box and of the label's ground.
            txt_color: of the text; None takes black or white, whichever reads better.
        """
        self.annotate([Annotation(_numbers(box), label, _plain(color), txt_color and _plain(txt_color))])

    def annotate(
        self, annotations: Sequence[Annotation], keep_clear_xyxy: Sequence[Sequence[float]] = ()
    ) -> np.ndarray:
        """Draws first all boxes, then all labels, so that no line strikes text; returns the image.

        Args:
            annotations: what to draw, the most important first: it is drawn on top and its label has first choice of
                the places around its box.
            keep_clear_xyxy: areas in px that labels avoid.
        """
        for item in reversed(annotations):
            x1, y1, x2, y2 = (round(float(value)) for value in item.box_xyxy)
            cv2.rectangle(self.im, (x1, y1), (x2, y2), item.color, self.lw)
        height, width = self.im.shape[:2]
        font_px = self._font_px or max(min(6 * self.lw, height // 12), SMALLEST_FONT_PX + 1)
        padding = max(font_px // 6, 2)
        placed = np.array(keep_clear_xyxy, np.float32).reshape(-1, 4)
        for item in filter(lambda item: item.label, annotations):
            text, size = fit_text(item.label, width - 2 * padding, font_px, SMALLEST_FONT_PX)
            label_wh = (min(text_width(text, size) + 2 * padding, width), math.ceil(LINE_HEIGHT * size))
            x, y = _place_label(item.box_xyxy, label_wh, (height, width), self.lw, placed)
            placed = np.concatenate([placed, [(x, y, x + label_wh[0], y + label_wh[1])]], dtype=np.float32)
            cv2.rectangle(self.im, (x, y), (x + label_wh[0] - 1, y + label_wh[1] - 1), item.color, cv2.FILLED)
            text_color = item.text_color or readable_on(item.color)
            draw_text(self.im, text, x + padding, y + round(ASCENT * size), size, text_color)
        return self.im

    def rectangle(self, xy: Any, fill: Color | None = None, outline: Color | None = None, width: int = 1) -> None:
        """Draws a rectangle (4,) xyxy px, filled and outlined with the colours given."""
        x1, y1, x2, y2 = (round(value) for value in _numbers(xy))
        if fill is not None:
            cv2.rectangle(self.im, (x1, y1), (x2, y2), _plain(fill), cv2.FILLED)
        if outline is not None:
            cv2.rectangle(self.im, (x1, y1), (x2, y2), _plain(outline), width)

    def text(self, xy: Sequence[float], text: str, txt_color: Color = WHITE) -> None:
        """Writes a line of text with its upper left corner at (x, y) px."""
        size_px = self._font_px or max(6 * self.lw, SMALLEST_FONT_PX)
        draw_text(self.im, text, round(xy[0]), round(xy[1] + ASCENT * size_px), size_px, _plain(txt_color))

    def result(self) -> np.ndarray:
        """Returns the image."""
        return self.im


def _numbers(values: Any) -> list[float]:
    """Returns numbers, single-element tensors among them, an array or a tensor as a flat list of floats."""
    return values.reshape(-1).tolist() if hasattr(values, "shape") else [float(value) for value in values]


def _plain(color: Sequence[float]) -> Color:
    return tuple(int(level) for level in color)


def default_line_width(shape_hw: Sequence[int]) -> int:
    """Returns the line width in pixels that suits an image of (height, width)."""
    return max(round((shape_hw[0] + shape_hw[1] + 3) / 2 * 0.003), 2)


def readable_on(ground_bgr: Color) -> Color:
    """Returns black or white, whichever reads better on a colour (BGR; Rec. 601 luma)."""
    b, g, r = ground_bgr
    return BLACK if 0.114 * b + 0.587 * g + 0.299 * r > 140 else WHITE


def class_name(names: Names, class_id: int) -> str:
    """Returns a class's name; its number where `names` has none."""
    known = class_id in names if isinstance(names, Mapping) else 0 <= class_id < len(names)
    return printable(names[class_id]) if known else str(class_id)


def as_mapping(names: Names) -> dict[int, str]:
    """Returns class names, a list or a mapping, as {number: name}."""
    return dict(names) if isinstance(names, Mapping) else dict(enumerate(names))


def detection_labels(detections: Detections, names: Names, hide_conf: bool = False) -> list[str]:
    """Returns `name 0.87`, `name`, or `id:3 name 0.87` for each detection."""
    tracks = [-1] * len(detections) if detections.track_ids is None else detections.track_ids
    return [
        (f"id:{track} " if track >= 0 else "")
        + class_name(names, class_id)
        + ("" if hide_conf else f" {confidence:.2f}")
        for class_id, confidence, track in zip(detections.classes, detections.confidences, tracks, strict=True)
    ]


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    names: Names,
    line_width: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
    counts: Sequence[Counts] = (),
) -> np.ndarray:
    """Draws what was found in an image into it, in place.

    Args:
        image: uint8 (h, w, 3) BGR, contiguous.
        detections: where they have tracks, colours tell these apart, not classes.
        names: the classes' names.
        line_width: of the boxes, in pixels; None suits the image.
        hide_labels: draw boxes alone.
        hide_conf: leave the confidences out of the labels.
        counts: draw these lines and zones, and the numbers into the top left corner.

    Returns:
        The same image.
    """
    labels = [""] * len(detections) if hide_labels else detection_labels(detections, names, hide_conf)
    numbers = detections.classes if detections.track_ids is None else detections.track_ids
    items = [
        Annotation(box_xyxy, label, colors(number, bgr=True) if number >= 0 else NO_TRACK_COLOR)
        for box_xyxy, label, number in zip(detections.boxes_xyxy, labels, numbers, strict=True)
    ]
    captions = _draw_counting(image, counts, names) if counts else []
    Annotator(image, line_width).annotate(items, [caption.box_xyxy for caption in captions])
    for caption in captions:
        caption.draw(image, WHITE)
    return image


class _Caption(NamedTuple):
    """A line of text on a dark ground."""

    text: str
    left: int  # px, as all of these
    top: int
    font_px: int

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """What it covers, nothing without text."""
        width = text_width(self.text, self.font_px) + 8 if self.text else 0
        return self.left, self.top, self.left + width, self.top + math.ceil(LINE_HEIGHT * self.font_px)

    def draw(self, image: np.ndarray, text_bgr: Color) -> None:
        """Draws it into an image (h, w, 3), in place."""
        left, top, right, bottom = self.box_xyxy
        image[top:bottom, left:right] //= 4
        draw_text(image, self.text, left + 4, top + round(ASCENT * self.font_px), self.font_px, text_bgr)


def _draw_counting(
    image: np.ndarray, counted: Sequence[Counts], names: Mapping[int, str] | Sequence[str]
) -> list[_Caption]:
    """Draws lines with arrows that point inwards, and zones; returns captions, which are to be drawn last."""
    (height, width), stroke_px = image.shape[:2], default_line_width(image.shape)
    texts = [f"{one.name}: {text}" if one.name else text for one in counted for text in one.describe(names)]
    font_px = max(7 * stroke_px, SMALLEST_FONT_PX + 3)
    font_px = min(fit_text(text, width - 8, font_px, SMALLEST_FONT_PX)[1] for text in texts)
    texts = [fit_text(text, width - 8, font_px, font_px)[0] for text in texts]
    captions = [_Caption(text, 0, row * math.ceil(LINE_HEIGHT * font_px), font_px) for row, text in enumerate(texts)]
    for one in counted:
        shapes = [np.array(one.points_xy)]  # corners in px
        at, word = shapes[0].min(0), one.name  # of a zone
        if not one.is_zone:
            start, end = shapes[0]
            middle, along = (start + end) / 2, (end - start) / np.linalg.norm(end - start)
            inwards = np.array([-along[1], along[0]])  # to the right of the line, as y points down
            tip = middle + inwards * 2 * font_px
            wings = [tip + (side * along * 0.5 - inwards * 0.7) * font_px for side in (-1, 1)]
            shapes += [np.array([middle, tip]), np.array([wings[0], tip, wings[1]])]
            at, word = tip + (inwards - 0.7) * font_px, f"{one.name} {one.headings[0]}".strip()
        if word:
            farthest = np.maximum([width - 2 * font_px, height - 2 * font_px], 0)  # that is still in the image
            x, y = np.rint(at).clip(0, farthest).astype(int)
            captions.append(_Caption(word, x, y, font_px))
        for stroke_bgr, thickness in ((BLACK, stroke_px + 2), (COUNTING_COLOR, stroke_px)):
            for corners in [np.rint(shape).astype(np.int32) for shape in shapes]:
                cv2.polylines(image, [corners], one.is_zone, stroke_bgr, thickness, cv2.LINE_AA)
    return captions


def _place_label(
    box_xyxy: Sequence[float],
    label_wh: tuple[int, int],
    shape_hw: tuple[int, int],
    line_width: int,
    placed_xyxy: np.ndarray,
) -> tuple[int, int]:
    """Returns the top left corner for a label: above its box if there is room, else the next best place.

    Labels cover the outer half of the box's line; `placed_xyxy` (n, 4) are those that stand already.
    """
    (label_w, label_h), (height, width) = label_wh, shape_hw
    half = line_width / 2
    x1, y1, x2, y2 = box_xyxy[0] - half, box_xyxy[1] - half, box_xyxy[2] + half, box_xyxy[3] + half
    corners = [(x1, y1 - label_h), (x1, y1), (x2 - label_w, y1 - label_h), (x2 - label_w, y1)]
    corners += [(x1, y2), (x1, y2 - label_h), (x2 - label_w, y2), (x2 - label_w, y2 - label_h)]
    tops = np.rint([y for _, y in corners])
    lefts = np.clip(np.rint([x for x, _ in corners]), 0, max(width - label_w, 0))
    clamped = np.clip(tops, 0, max(height - label_h, 0))
    overlap_w = np.minimum(lefts[:, None] + label_w, placed_xyxy[:, 2]) - np.maximum(lefts[:, None], placed_xyxy[:, 0])
    overlap_h = np.minimum(clamped[:, None] + label_h, placed_xyxy[:, 3]) - np.maximum(
        clamped[:, None], placed_xyxy[:, 1]
    )
    covered = (np.maximum(overlap_w, 0) * np.maximum(overlap_h, 0)).sum(1)
    best = int(np.argmin(covered + (np.abs(clamped - tops) > 1)))  # the first of equals; moved ones come after
    return int(lefts[best]), int(clamped[best])


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
    """Cuts a box out of an image and saves it as JPEG; a file that is there is not overwritten but numbered.

    Args:
        xyxy: (4,) or (1, 4) px: numbers, an array or a tensor.
        im: (h, w, 3).
        file: where to save; its folder is made, its suffix becomes `.jpg`.
        gain: the sides are multiplied by it ...
        pad: ... and so many px are added; then the box is clipped to the image.
        square: cut a square.
        BGR: the image's channels are BGR; else RGB, and the crop is turned round.
        save: whether to save.

    Returns:
        The crop (h, w, 3) BGR.

    Raises:
        UserError: the file cannot be written.
    """
    box_xywh = xyxy2xywh(np.array([_numbers(xyxy)[:4]], np.float64))
    if square:
        box_xywh[:, 2:] = box_xywh[:, 2:].max()
    box_xywh[:, 2:] = box_xywh[:, 2:] * gain + pad
    x1, y1, x2, y2 = clip_boxes(xywh2xyxy(box_xywh), im.shape[:2])[0].astype(int)
    crop = im[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    crop = crop if BGR else np.ascontiguousarray(crop[..., ::-1])
    if save:
        path = Path(file).with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(increment_path(path), crop)
    return crop


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Writes an image (h, w, 3) BGR in the format of the path's suffix, JPEG at quality 95.

    Raises:
        UserError: OpenCV has no writer for the suffix, or the file cannot be written.
    """
    path = Path(path)
    try:
        done, data = cv2.imencode(printable(path.suffix), image)
    except cv2.error as error:
        raise UserError(f"{path}: images cannot be written in this format ({error.err}).") from error
    if not done:
        raise UserError(f"{path}: an image of {image.shape[1]}x{image.shape[0]} px cannot be encoded.")
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error


def feature_visualization(
    x: Array, module_type: str, stage: int, n: int = 32, save_dir: str | Path = "runs/detect/exp"
) -> None:
    """Saves a layer's first n channels as an image, and all of them as `.npy`: `stage3_C3_features.png`.

    Args:
        x: (b, c, h, w), the first image's are shown; an array or a tensor.
        module_type: the layer's name, such as `models.common.C3`; a detection layer is skipped.
        stage: its row in the model.
        n: how many channels to show.
        save_dir: an existing folder.

    Raises:
        UserError: a file cannot be written.
    """
    if "Detect" in module_type or x.ndim != 4 or min(x.shape[2:]) < 2:
        return
    maps = _to_numpy(x)
    path = Path(save_dir) / f"stage{stage}_{module_type.rpartition('.')[2]}_features.png"
    save_image(path, feature_grid(maps[0], max_channels=n))
    try:
        np.save(path.with_suffix(".npy"), maps)
    except OSError as error:
        raise UserError(f"{path.with_suffix('.npy')}: cannot be written ({error.strerror}).") from error


def feature_grid(maps: np.ndarray, max_channels: int = 32, columns: int = 8, cell_px: int = 160) -> np.ndarray:
    """Shows a layer's channels side by side, each scaled to its own range, in the viridis colours.

    Args:
        maps: (c, h, w), any float values.
        max_channels: the first so many are shown.
        columns: cells side by side.
        cell_px: longest side of a cell; small maps are enlarged pixel by pixel.

    Returns:
        The image, uint8 (h, w, 3) BGR, white between the cells.
    """
    count, gap = min(len(maps), max_channels), 4
    height, width = maps.shape[1:]
    scale = cell_px / max(height, width)
    cell_w, cell_h = max(round(width * scale), 1), max(round(height * scale), 1)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (cell_h + gap) + gap, columns * (cell_w + gap) + gap, 3), 255, np.uint8)
    for index in range(count):
        channel = np.nan_to_num(maps[index].astype(np.float32))
        low, high = channel.min(), channel.max()
        levels = ((channel - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
        method = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
        cell = cv2.applyColorMap(cv2.resize(levels, (cell_w, cell_h), interpolation=method), cv2.COLORMAP_VIRIDIS)
        row, column = divmod(index, columns)
        top, left = gap + row * (cell_h + gap), gap + column * (cell_w + gap)
        grid[top : top + cell_h, left : left + cell_w] = cell
    return grid


def output_to_target(output: Sequence[Array]) -> np.ndarray:
    """Joins each image's detections (k, 6) to rows (m, 7) [image, class, x, y, w, h in px, confidence]."""
    joined = [np.zeros((0, 7), np.float32)]
    for number, rows in enumerate(map(_to_numpy, output)):
        image = np.full((len(rows), 1), number, np.float32)
        joined.append(np.concatenate((image, rows[:, 5:6], xyxy2xywh(rows[:, :4]), rows[:, 4:5]), axis=1))
    return np.concatenate(joined)


def plot_images(
    images: Array,
    targets: Array,
    paths: Sequence[str] | None = None,
    fname: str | Path | None = "images.jpg",
    names: Names | None = None,
    max_size: int = 1920,
    max_subplots: int = 16,
) -> np.ndarray:
    """Draws a batch with its labels or its detections as one mosaic, filled column by column on white, and saves it.

    Args:
        images: (b, 3, h, w) RGB, uint8 or float from 0 to 1; an array or a tensor.
        targets: labels (m, 6) [image, class, x, y, w, h in 0 to 1], or detections (m, 7) of `output_to_target`, of
            which those above confidence 0.25 are shown.
        paths: the images' paths; their file names are written into the tiles.
        fname: where to save the mosaic, if anywhere.
        names: of the classes.
        max_size: the mosaic's longest side in px; larger ones are scaled down.
        max_subplots: more images are left out.

    Returns:
        The mosaic, uint8 (h, w, 3) BGR.

    Raises:
        UserError: the file cannot be written.
    """
    images, targets, names = _to_bgr_images(images[:max_subplots]), _to_numpy(targets), names or {}
    count, height, width = images.shape[:3]
    rows_columns = math.ceil(math.sqrt(count))
    scale = min(max_size / rows_columns / max(height, width), 1.0)
    tile_h, tile_w = max(int(height * scale), 1), max(int(width * scale), 1)
    side = max(tile_h, tile_w)
    mosaic = np.full((rows_columns * tile_h, rows_columns * tile_w, 3), 255, np.uint8)
    labels_px = scale if targets.shape[1] > 6 else np.array([width, height, width, height]) * scale
    boxes_xyxy = xywh2xyxy(targets[:, 2:6] * labels_px)
    for index in range(count):
        tile = images[index]
        tile = tile if scale == 1 else cv2.resize(tile, (tile_w, tile_h), interpolation=cv2.INTER_AREA)
        tile = np.ascontiguousarray(tile)
        annotations = []
        own = targets[:, 0] == index
        for target, box_xyxy in zip(targets[own], boxes_xyxy[own], strict=True):
            confidence = target[6:7].tolist()  # empty for a label
            if all(value > BATCH_CONF_THRES for value in confidence):
                label = " ".join([class_name(names, int(target[1])), *(f"{value:.1f}" for value in confidence)])
                annotations.append(Annotation(box_xyxy, label, colors(target[1], bgr=True)))
        name = Path(paths[index]).name[:TILE_NAME_LENGTH] if paths else ""
        name, name_px = fit_text(name, tile_w - 8, max(min(side // 32, 14), SMALLEST_FONT_PX), SMALLEST_FONT_PX)
        caption = _Caption(name, 0, 0, name_px)  # labels keep off it
        Annotator(tile, 2 if side > 240 else 1, min(side // 36, 16)).annotate(annotations, [caption.box_xyxy])
        caption.draw(tile, (220, 220, 220))
        cv2.rectangle(tile, (0, 0), (tile_w - 1, tile_h - 1), WHITE, 1)
        column, row = divmod(index, rows_columns)
        mosaic[row * tile_h : (row + 1) * tile_h, column * tile_w : (column + 1) * tile_w] = tile
    if fname is not None:
        save_image(fname, mosaic)
    return mosaic


def _to_numpy(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.detach().cpu().float().numpy()


def _to_bgr_images(images: Array) -> np.ndarray:
    """Turns a batch (b, 3, h, w) RGB, uint8 or float from 0 to 1, into uint8 (b, h, w, 3) BGR."""
    if not isinstance(images, np.ndarray):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return images.transpose(0, 2, 3, 1)[..., ::-1]


WEIGHT = 500  # between regular and semibold: legible at small sizes on coloured ground
ASCENT, LINE_HEIGHT = 0.95, 1.35  # of the font size; Arabic descends deepest, by the difference

_NO_WRAP = (0, 1 << 20)
_FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
    "~/AppData/Local/Microsoft/Windows/Fonts",
)
_FONT_SUFFIXES = (".ttf", ".otf", ".ttc")
_PROBE_PX, _PROBE_SIDE = 20, 64


@functools.lru_cache(maxsize=1024)
def text_width(text: str, size_px: int) -> int:
    """Returns the width in pixels of one line of text."""
    text = printable(text)
    path = _font_for(text)
    if path:
        return math.ceil(_pillow_font(path, size_px).getlength(text))
    return cv2.getTextSize((0, 0), text, (0, 0), cv2.FontFace(), size_px, WEIGHT, 0, _NO_WRAP)[2] if text else 0


def draw_text(image: np.ndarray, text: str, left: int, baseline: int, size_px: int, color: tuple[int, ...]) -> None:
    """Draws one line of text into `image` uint8 (h, w, 3), in place; it never wraps."""
    text = printable(text)
    path = _font_for(text)
    if path is None:
        cv2.putText(image, text, (left, baseline), color, cv2.FontFace(), size_px, WEIGHT, 0, _NO_WRAP)
        return
    alpha, (right, down) = _rendered(text, path, size_px)
    x, y = left + right, baseline + down
    alpha = alpha[max(-y, 0) :, max(-x, 0) :]
    region = image[max(y, 0) :, max(x, 0) :][: alpha.shape[0], : alpha.shape[1]]
    alpha = alpha[: region.shape[0], : region.shape[1]]
    region[:] = np.rint(region * (1 - alpha) + np.asarray(color, np.float32) * alpha)


@functools.lru_cache(maxsize=1024)
def _rendered(text: str, path: str, size_px: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Renders a line of text once: how much each pixel is covered (h, w, 1), and where that begins, from its origin.

    The built-in font keeps its glyphs itself.
    """
    left, top, right, bottom = _pillow_font(path, size_px).getbbox(text, anchor="ls")
    mask = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=_pillow_font(path, size_px), anchor="ls")
    return np.asarray(mask, np.float32)[..., None] / 255, (left, top)


def fit_text(text: str, width_px: int, size_px: int, smallest_px: int) -> tuple[str, int]:
    """Returns the text and font size that fit into `width_px`: first set smaller, then shortened with an ellipsis."""
    text, size = printable(text), size_px
    while size > smallest_px and text_width(text, size) > width_px:
        size -= 1
    if text_width(text, size) <= width_px:
        return text, size
    low, high = 0, len(text)  # the longest beginning that fits lies in between
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(f"{text[:middle]}…", size) <= width_px else (low, middle - 1)
    return f"{text[:low]}…", size


def _font_for(text: str) -> str | None:
    """Returns the font file that a text needs; None where the built-in font will do, or nothing better exists."""
    return None if text.isascii() else _font_with(frozenset(character for character in text if character > "\x7f"))


@functools.lru_cache(maxsize=1024)
def _font_with(characters: frozenset[str]) -> str | None:
    """Returns an installed font that has all of `characters`; None where the built-in one has them, or none does."""
    blank = _built_in_glyph("?")
    lacking = {character for character in characters if np.array_equal(_built_in_glyph(character), blank)}
    if not lacking:
        return None
    path = next((path for path in _installed_fonts() if _has_all(path, characters | {"a", "0"})), None)
    if path is None:
        LOGGER.warning(f"WARNING: no installed font has '{''.join(sorted(lacking))}': drawn as '?' in images.")
    return path


def _built_in_glyph(character: str) -> np.ndarray:
    """Renders one character with the built-in font on a black square (side, side); `?` where it is lacking."""
    square = np.zeros((_PROBE_SIDE, _PROBE_SIDE), np.uint8)
    cv2.putText(square, character, (16, 40), (255,), cv2.FontFace(), _PROBE_PX, WEIGHT, 0, _NO_WRAP)
    return square


def _installed_fonts() -> Iterator[str]:
    """Yields the font files of the system's font folders, sorted within each."""
    for folder in _FONT_FOLDERS:
        files = sorted(Path(os.path.expanduser(folder)).rglob("*"))
        yield from (str(path) for path in files if path.suffix.lower() in _FONT_SUFFIXES)


def _has_all(path: str, characters: frozenset[str]) -> bool:
    """Says whether a font file opens and draws each of `characters` otherwise than a code point that cannot exist."""
    try:
        font = _pillow_font(path, _PROBE_PX)
        blank = bytes(font.getmask("\uffff"))
        return all(bytes(font.getmask(character)) != blank for character in characters)
    except (OSError, ValueError):
        return False


@functools.lru_cache(maxsize=64)
def _pillow_font(path: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size_px)
