"""Boxes, text and counts drawn on images, crops, and mosaics of whole batches.

Images are uint8 (h, w, 3) in BGR unless said otherwise. OpenCV's built-in font draws Latin, Greek, Cyrillic, Arabic,
Chinese, Japanese and Korean; for other scripts the system's font folders are searched once. What no font has is drawn
as `?` and named in a warning. Torch tensors are taken (`draw_batch`) without importing torch.
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

from utils.boxes import clip_boxes, xywh2xyxy, xywhn2xyxy, xyxy2xywh
from utils.errors import UserError, printable

if TYPE_CHECKING:
    from utils.media.counting import Counts


Array = Any  # np.ndarray or torch.Tensor
Color = tuple[int, int, int]

PALETTE = (
    "FF3838", "FF9D97", "FF701F", "FFB21D", "CFD231", "48F90A", "92CC17", "3DDB86", "1A9334", "00D4BB",
    "2C99A8", "00C2FF", "344593", "6473FF", "0018EC", "8438FF", "520085", "CB38FF", "FF95C8", "FF37C7",
)  # fmt: skip
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
GRAY = (160, 160, 160)  # of objects that have no track (yet)
COUNTING_COLOR = (0, 235, 255)  # yellow, on a black rim: seen on any ground
SMALLEST_FONT_PX = 9
BATCH_CONF_THRES = 0.25  # predictions below it are not shown in mosaics
TILE_NAME_LENGTH = 40


class Annotation(NamedTuple):
    """What is drawn over one object."""

    box_xyxy: Sequence[float]  # px
    label: str  # empty for a bare box
    color: Color  # BGR


def color(class_id: int, bgr: bool = True) -> Color:
    """Returns the class's colour of YOLOv5's palette of 20, as (b, g, r) or (r, g, b)."""
    code = PALETTE[int(class_id) % len(PALETTE)]
    r, g, b = (int(code[at : at + 2], 16) for at in (0, 2, 4))
    return (b, g, r) if bgr else (r, g, b)


def text_color(ground_bgr: Color) -> Color:
    """Returns black or white, whichever reads better on a colour (BGR; Rec. 601 luma)."""
    b, g, r = ground_bgr
    return BLACK if 0.114 * b + 0.587 * g + 0.299 * r > 140 else WHITE


def class_name(names: Mapping[int, str] | Sequence[str], class_id: int) -> str:
    """Returns a class's name; its number where `names` has none."""
    known = class_id in names if isinstance(names, Mapping) else 0 <= class_id < len(names)
    return printable(names[class_id]) if known else str(class_id)


def detection_labels(
    detections: np.ndarray, names: Mapping[int, str] | Sequence[str], hide_conf: bool = False
) -> list[str]:
    """Returns `name 0.87`, `name`, or `id:3 name 0.87` for detections (k, 6) or (k, 7), see `draw_detections`."""
    labels = []
    for row in np.asarray(detections):
        track = f"id:{int(row[6])} " if len(row) > 6 and row[6] >= 0 else ""
        labels.append(track + class_name(names, int(row[5])) + ("" if hide_conf else f" {row[4]:.2f}"))
    return labels


def detection_color(row: Sequence[float]) -> Color:
    """Returns the colour of a detection's class, or of its track where there are tracks: gray for none."""
    if len(row) <= 6:
        return color(int(row[5]))
    return color(int(row[6])) if row[6] >= 0 else GRAY


def default_line_width(shape_hw: Sequence[int]) -> int:
    """Returns the line width in pixels that suits an image of (height, width)."""
    return max(round((shape_hw[0] + shape_hw[1] + 3) / 2 * 0.003), 2)


def annotate(
    image: np.ndarray,
    annotations: Sequence[Annotation],
    line_width: int | None = None,
    font_px: int | None = None,
    keep_clear_xyxy: Sequence[Sequence[float]] = (),
) -> np.ndarray:
    """Draws labelled boxes into an image, in place: first all boxes, then all labels, so that no line strikes text.

    Args:
        image: uint8 (h, w, 3) BGR, contiguous.
        annotations: what to draw, the most important first: it is drawn on top and its label has first choice of
            the places around its box.
        line_width: of the boxes, in pixels; None suits the image.
        font_px: font size; None suits the line width and the image.
        keep_clear_xyxy: areas in pixels that labels avoid.

    Returns:
        The same image.
    """
    line_width = line_width or default_line_width(image.shape)
    font_px = font_px or max(min(6 * line_width, image.shape[0] // 12), SMALLEST_FONT_PX + 1)
    for item in reversed(annotations):
        x1, y1, x2, y2 = (round(float(value)) for value in item.box_xyxy)
        cv2.rectangle(image, (x1, y1), (x2, y2), item.color, line_width)
    _draw_labels(image, [item for item in annotations if item.label], line_width, font_px, keep_clear_xyxy)
    return image


def draw_detections(
    image: np.ndarray,
    detections: np.ndarray,
    names: Mapping[int, str] | Sequence[str],
    line_width: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
    counts: Counts | None = None,
) -> np.ndarray:
    """Draws what was found in an image into it, in place.

    Args:
        image: uint8 (h, w, 3) BGR, contiguous.
        detections: (k, 6) [x1, y1, x2, y2 in px of the image, confidence, class], or (k, 7) with the track, -1 for
            none: colours then tell tracks apart, not classes.
        names: the classes' names.
        line_width: of the boxes, in pixels; None suits the image.
        hide_labels: draw boxes alone.
        hide_conf: leave the confidences out of the labels.
        counts: draw this line or zone, and the numbers into the top left corner.

    Returns:
        The same image.
    """
    labels = [""] * len(detections) if hide_labels else detection_labels(detections, names, hide_conf)
    items = [Annotation(row[:4], label, detection_color(row)) for row, label in zip(detections, labels, strict=True)]
    if counts is None:
        return annotate(image, items, line_width)
    captions = _draw_counting(image, counts, names)
    annotate(image, items, line_width, keep_clear_xyxy=[caption.box_xyxy for caption in captions])
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


def _draw_counting(image: np.ndarray, counts: Counts, names: Mapping[int, str] | Sequence[str]) -> list[_Caption]:
    """Draws the line with an arrow that points inwards, or the zone; returns captions, which are to be drawn last."""
    (height, width), stroke_px = image.shape[:2], default_line_width(image.shape)
    texts, font_px = counts.describe(names), max(7 * stroke_px, SMALLEST_FONT_PX + 3)
    font_px = min(fit_text(text, width - 8, font_px, SMALLEST_FONT_PX)[1] for text in texts)
    texts = [fit_text(text, width - 8, font_px, font_px)[0] for text in texts]
    captions = [_Caption(text, 0, row * math.ceil(LINE_HEIGHT * font_px), font_px) for row, text in enumerate(texts)]
    shapes = [np.array(counts.points_xy)]  # corners in px
    if not counts.is_zone:
        start, end = shapes[0]
        middle, along = (start + end) / 2, (end - start) / np.linalg.norm(end - start)
        inwards = np.array([-along[1], along[0]])  # to the right of the line, as y points down
        tip = middle + inwards * 2 * font_px
        wings = [tip + (side * along * 0.5 - inwards * 0.7) * font_px for side in (-1, 1)]
        shapes += [np.array([middle, tip]), np.array([wings[0], tip, wings[1]])]
        farthest = np.maximum([width - 2 * font_px, height - 2 * font_px], 0)  # that is still in the picture
        x, y = np.rint(tip + (inwards - 0.7) * font_px).clip(0, farthest).astype(int)
        captions.append(_Caption(counts.headings[0], x, y, font_px))
    for stroke_bgr, thickness in ((BLACK, stroke_px + 2), (COUNTING_COLOR, stroke_px)):
        for corners in [np.rint(shape).astype(np.int32) for shape in shapes]:
            cv2.polylines(image, [corners], counts.is_zone, stroke_bgr, thickness, cv2.LINE_AA)
    return captions


def _draw_labels(
    image: np.ndarray,
    annotations: Sequence[Annotation],
    line_width: int,
    font_px: int,
    keep_clear_xyxy: Sequence[Sequence[float]],
) -> None:
    """Draws each annotation's label on a ground of its colour, where it is inside the image and overlaps least."""
    height, width = image.shape[:2]
    padding = max(font_px // 6, 2)
    placed = np.array(keep_clear_xyxy, np.float32).reshape(-1, 4)
    for item in annotations:
        text, size = fit_text(item.label, width - 2 * padding, font_px, SMALLEST_FONT_PX)
        label_wh = (min(text_width(text, size) + 2 * padding, width), math.ceil(LINE_HEIGHT * size))
        x, y = _place_label(item.box_xyxy, label_wh, (height, width), line_width, placed)
        placed = np.concatenate([placed, [(x, y, x + label_wh[0], y + label_wh[1])]], dtype=np.float32)
        cv2.rectangle(image, (x, y), (x + label_wh[0] - 1, y + label_wh[1] - 1), item.color, cv2.FILLED)
        draw_text(image, text, x + padding, y + round(ASCENT * size), size, text_color(item.color))


def _place_label(
    box_xyxy: Sequence[float],
    label_wh: tuple[int, int],
    shape_hw: tuple[int, int],
    line_width: int,
    placed_xyxy: np.ndarray,
) -> tuple[int, int]:
    """Returns the top left corner for a label: above its box if there is room, else the next best place.

    Args:
        box_xyxy: the object's box, in pixels.
        label_wh: the label's width and height.
        shape_hw: the image's height and width.
        line_width: of the box; labels cover its outer half.
        placed_xyxy: (n, 4) the labels that stand already.
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


def crop_box(
    image: np.ndarray, box_xyxy: Sequence[float], gain: float = 1.02, pad: int = 10, square: bool = False
) -> np.ndarray:
    """Cuts a box (4,) in pixels out of an image, its sides times `gain` plus `pad` pixels, clipped to the image."""
    box_xywh = xyxy2xywh(np.asarray(box_xyxy, np.float64)[None, :4])
    if square:
        box_xywh[:, 2:] = box_xywh[:, 2:].max()
    box_xywh[:, 2:] = box_xywh[:, 2:] * gain + pad
    x1, y1, x2, y2 = clip_boxes(xywh2xyxy(box_xywh), image.shape[:2])[0].astype(int)
    return image[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Writes an image (h, w, 3) BGR in the format of the path's suffix, JPEG at quality 95.

    Raises:
        UserError: OpenCV has no writer for the suffix, or the file cannot be written.
    """
    path = Path(path)
    try:
        done, data = cv2.imencode(printable(path.suffix), image)
    except cv2.error as error:
        raise UserError(f"{path}: pictures cannot be written in this format ({error.err}).") from error
    if not done:
        raise UserError(f"{path}: a picture of {image.shape[1]}x{image.shape[0]} px cannot be encoded.")
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error


def feature_grid(maps: np.ndarray, max_channels: int = 32, columns: int = 8, cell_px: int = 160) -> np.ndarray:
    """Shows a layer's channels side by side, each scaled to its own range, in the viridis colours.

    Args:
        maps: (c, h, w), any float values.
        max_channels: the first so many are shown.
        columns: cells side by side.
        cell_px: longest side of a cell; small maps are enlarged pixel by pixel.

    Returns:
        The picture, uint8 (h, w, 3) BGR, white between the cells.
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


def draw_batch(
    images: Array,
    targets: Array | Sequence[Array],
    paths: Sequence[str] | None,
    names: Mapping[int, str] | Sequence[str],
    file: str | Path | None = None,
    max_images: int = 16,
    max_side: int = 1920,
) -> np.ndarray:
    """Draws a batch with its labels or its detections as one mosaic, filled column by column on white.

    Args:
        images: (b, 3, h, w) RGB, uint8 or float from 0 to 1; an array or a tensor.
        targets: labels (m, 6) [image, class, x, y, w, h normalised], or for each image its detections (k, 6)
            [x1, y1, x2, y2 in px of the padded image, confidence, class], shown above confidence 0.25.
        paths: the images' paths; their file names are written into the tiles.
        names: the classes' names.
        file: where to save the mosaic, if anywhere.
        max_images: more are left out.
        max_side: the mosaic's longest side in pixels; larger ones are scaled down.

    Returns:
        The mosaic, uint8 (h, w, 3) BGR.
    """
    images = _to_bgr_images(images[:max_images])
    count, height, width = images.shape[:3]
    rows_columns = math.ceil(math.sqrt(count))
    scale = min(max_side / rows_columns / max(height, width), 1.0)
    tile_h, tile_w = max(int(height * scale), 1), max(int(width * scale), 1)
    mosaic = np.full((rows_columns * tile_h, rows_columns * tile_w, 3), 255, np.uint8)
    boxes = targets if isinstance(targets, (list, tuple)) else _split_targets(_to_numpy(targets), count, height, width)
    for index in range(count):
        tile = images[index]
        tile = tile if scale == 1 else cv2.resize(tile, (tile_w, tile_h), interpolation=cv2.INTER_AREA)
        tile = np.ascontiguousarray(tile)
        name = Path(paths[index]).name[:TILE_NAME_LENGTH] if paths else ""
        _annotate_tile(tile, _to_numpy(boxes[index]), names, scale, name)
        cv2.rectangle(tile, (0, 0), (tile_w - 1, tile_h - 1), WHITE, 1)
        column, row = divmod(index, rows_columns)
        mosaic[row * tile_h : (row + 1) * tile_h, column * tile_w : (column + 1) * tile_w] = tile
    if file is not None:
        save_image(file, mosaic)
    return mosaic


def _to_numpy(array: Array) -> np.ndarray:
    """Returns an array, or a tensor on any device, as an array."""
    return array if isinstance(array, np.ndarray) else array.detach().cpu().float().numpy()


def _to_bgr_images(images: Array) -> np.ndarray:
    """Turns a batch (b, 3, h, w) RGB, uint8 or float from 0 to 1, into uint8 (b, h, w, 3) BGR."""
    if not isinstance(images, np.ndarray):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return images.transpose(0, 2, 3, 1)[..., ::-1]


def _split_targets(targets: np.ndarray, count: int, height: int, width: int) -> list[np.ndarray]:
    """Splits labels (m, 6) [image, class, xywh normalised] into (k, 6) [xyxy px, NaN, class] for each image."""
    boxes_xyxy_px = xywhn2xyxy(targets[:, 2:6], width, height)
    unsure = np.full((len(targets), 1), np.nan, np.float32)  # a label has no confidence
    rows = np.concatenate([boxes_xyxy_px, unsure, targets[:, 1:2]], axis=1)
    return [rows[targets[:, 0] == index] for index in range(count)]


def _annotate_tile(
    tile: np.ndarray, rows: np.ndarray, names: Mapping[int, str] | Sequence[str], scale: float, file_name: str
) -> None:
    """Draws (k, 6) [x1, y1, x2, y2, confidence or NaN, class] of the full-size image into its tile, in place.

    The file name stands in the top left corner, on a dark ground; labels keep off it.
    """
    side = max(tile.shape[:2])
    font_px = max(min(side // 36, 16), SMALLEST_FONT_PX)
    name_px = max(min(side // 32, 14), SMALLEST_FONT_PX)
    file_name, name_px = fit_text(file_name, tile.shape[1] - 8, name_px, SMALLEST_FONT_PX)
    caption = _Caption(file_name, 0, 0, name_px)
    annotations = []
    for row in rows[~(rows[:, 4] <= BATCH_CONF_THRES)]:
        label = class_name(names, int(row[5])) + ("" if np.isnan(row[4]) else f" {row[4]:.1f}")
        annotations.append(Annotation(row[:4] * scale, label, color(int(row[5]))))
    annotate(tile, annotations, 2 if side > 240 else 1, font_px, [caption.box_xyxy])
    caption.draw(tile, (220, 220, 220))


LOGGER = logging.getLogger("yolov5")
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
    if path:
        _draw_with_pillow(image, text, left, baseline, size_px, color, path)
    else:
        cv2.putText(image, text, (left, baseline), color, cv2.FontFace(), size_px, WEIGHT, 0, _NO_WRAP)


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
        LOGGER.warning(f"WARNING: no installed font has '{''.join(sorted(lacking))}': drawn as '?' in pictures.")
    return path


def _built_in_glyph(character: str) -> np.ndarray:
    """Renders one character with the built-in font on a black square (side, side); `?` where it is lacking."""
    square = np.zeros((_PROBE_SIDE, _PROBE_SIDE), np.uint8)
    cv2.putText(square, character, (16, 40), (255,), cv2.FontFace(), _PROBE_PX, WEIGHT, 0, _NO_WRAP)
    return square


def _installed_fonts() -> Iterator[str]:
    """Yields the font files of the system's font folders, sorted within each."""
    for folder in _FONT_FOLDERS:
        yield from (
            str(path)
            for path in sorted(Path(os.path.expanduser(folder)).rglob("*"))
            if path.suffix.lower() in _FONT_SUFFIXES
        )


def _has_all(path: str, characters: frozenset[str]) -> bool:
    """Says whether a font file opens and draws each of `characters` otherwise than a code point that cannot exist."""
    try:
        font = _pillow_font(path, _PROBE_PX)
        blank = bytes(font.getmask("\uffff"))
        return all(bytes(font.getmask(character)) != blank for character in characters)
    except (OSError, ValueError):
        return False


@functools.lru_cache(maxsize=64)
def _pillow_font(path: str, size_px: int) -> object:
    """Opens a font file at a size."""
    from PIL import ImageFont

    return ImageFont.truetype(path, size_px)


def _draw_with_pillow(
    image: np.ndarray, text: str, left: int, baseline: int, size_px: int, color: tuple[int, ...], path: str
) -> None:
    """Blends text drawn by Pillow into `image` uint8 (h, w, 3), in place, cut at its borders."""
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    mask = Image.new("L", (width, min(height, 3 * size_px)))
    top = min(max(baseline - 2 * size_px, 0), height - mask.height)
    ImageDraw.Draw(mask).text((left, baseline - top), text, fill=255, font=_pillow_font(path, size_px), anchor="ls")
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    region = image[top : top + mask.height]
    region[:] = np.rint(region * (1 - alpha) + np.asarray(color, np.float32) * alpha)
