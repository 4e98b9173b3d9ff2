"""Mosaics of four and of nine images, and copy-paste between their halves.

A mosaic is thought of as tiles on a square canvas of twice the image size that is warped into the output. The canvas
is never painted: each tile is drawn once, through its own matrix, straight into the output. Images are uint8 RGB.
Mosaic: Bochkovskiy et al. 2020, arXiv:2004.10934. Copy-paste: Ghiasi et al. 2021, arXiv:2012.07177.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from utils.augmentations.warp import draw_warped, translation, warp_labels, warp_points
from utils.boxes import bbox_ioa
from utils.images import PAD_COLOUR

MAX_COVERED = 0.30  # a pasted object may hide at most this share of another one's box
_SUBPIXEL_BITS = 4


class Tile(NamedTuple):
    """An image with its labels and its place on the canvas."""

    image: np.ndarray  # uint8 (h, w, 3) RGB
    labels: np.ndarray  # float32 (n, 5) [class, x1, y1, x2, y2] in its own pixels
    segments: list[np.ndarray]  # n polygons (k, 2) float32, k = 0 where only the box is known; [] where none has one
    x: int  # its left edge on the canvas, px; may be negative
    y: int


def place_four(sizes_hw: Sequence[tuple[int, int]], size: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Places four images around a random centre of a 2 * size canvas.

    Args:
        sizes_hw: (height, width) of the images at the top left, top right, bottom left, bottom right.
        size: side of the training image, px.
        generator: draws the centre, from 0.5 to 1.5 of `size`.

    Returns:
        (x, y) of each image's upper left corner.
    """
    center_y, center_x = (int(value) for value in generator.uniform(size / 2, 3 * size / 2, 2))
    tops = [center_y - sizes_hw[0][0], center_y - sizes_hw[1][0], center_y, center_y]
    lefts = [center_x - sizes_hw[0][1], center_x, center_x - sizes_hw[2][1], center_x]
    return list(zip(lefts, tops, strict=True))


def place_nine(sizes_hw: Sequence[tuple[int, int]], size: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Places nine images on a 3 * size canvas, of which a random 2 * size window is used.

    The first stands in the middle; the others follow clockwise from the top, each beside the one before.

    Args:
        sizes_hw: (height, width) of the nine images.
        size: side of the training image, px.
        generator: draws the window's corner, from 0 to `size`.

    Returns:
        (x, y) of each image's upper left corner, in the window.
    """
    window_y, window_x = (int(value) for value in generator.uniform(0, size, 2))
    center_h, center_w = sizes_hw[0]
    corners = []
    before_h, before_w = center_h, center_w
    for slot, (h, w) in enumerate(sizes_hw):
        corner = (
            (size, size),  # centre
            (size, size - h),  # top
            (size + before_w, size - h),  # top right
            (size + center_w, size),  # right
            (size + center_w, size + before_h),  # bottom right
            (size + center_w - w, size + center_h),  # bottom
            (size + center_w - before_w - w, size + center_h),  # bottom left
            (size - w, size + center_h - h),  # left
            (size - w, size + center_h - before_h - h),  # top left
        )[slot]
        corners.append((corner[0] - window_x, corner[1] - window_y))
        before_h, before_w = h, w
    return corners


def compose(
    tiles: Sequence[Tile],
    matrix: np.ndarray,
    gain: float,
    size: int,
    copy_paste: float,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws tiles of a 2 * size canvas through a warp.

    Args:
        tiles: in drawing order.
        matrix: (3, 3), canvas to output.
        gain: by how much it enlarges.
        size: side of the output, px.
        copy_paste: share of the objects with a polygon that are pasted, mirrored, onto the canvas's other half.
        generator: chooses those.

    Returns:
        The image (size, size, 3), grey where no tile is, and its labels (n, 5).
    """
    side = 2 * size
    output = np.full((size, size, 4), PAD_COLOUR[0], dtype=np.uint8)  # OpenCV warps 4 bytes twice as fast as 3
    for tile in tiles:
        _draw_tile(tile, matrix, side, output)
    labels, segments = canvas_labels(tiles, side)
    rows = choose_pastes(labels, segments, side, copy_paste, generator)
    if rows:
        _draw_pastes(tiles, segments, rows, matrix, output)
        labels = np.concatenate([labels, mirrored_labels(labels[rows], side)])
        segments += [_mirrored_polygon(segments[row], side) for row in rows]
    return cv2.cvtColor(output, cv2.COLOR_RGBA2RGB), warp_labels(labels, segments, matrix, gain, (size, size))


def _draw_tile(tile: Tile, matrix: np.ndarray, side: int, output: np.ndarray) -> None:
    """Draws what a canvas of `side` px would show of a tile, through canvas-to-output `matrix`; `output` is RGBA."""
    height, width = tile.image.shape[:2]
    left, top = max(tile.x, 0), max(tile.y, 0)
    right, bottom = min(tile.x + width, side), min(tile.y + height, side)
    if right > left and bottom > top:
        shown = tile.image[top - tile.y : bottom - tile.y, left - tile.x : right - tile.x]
        draw_warped(cv2.cvtColor(shown, cv2.COLOR_RGB2RGBA), matrix @ translation(left, top), output)


def canvas_labels(tiles: Sequence[Tile], side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Joins the tiles' labels and polygons, moved to their places on a canvas of `side` px and clipped to it."""
    labels = np.concatenate([tile.labels for tile in tiles])
    shifts = np.repeat(
        np.float32([[tile.x, tile.y] * 2 for tile in tiles]), [len(tile.labels) for tile in tiles], axis=0
    )
    labels[:, 1:] = (labels[:, 1:] + shifts).clip(0, side)
    segments: list[np.ndarray] = []
    if any(tile.segments for tile in tiles):
        for tile in tiles:
            own = tile.segments or [np.zeros((0, 2), np.float32)] * len(tile.labels)
            segments += [(polygon + np.float32([tile.x, tile.y])).clip(0, side) for polygon in own]
    return labels, segments


def choose_pastes(
    labels: np.ndarray, segments: Sequence[np.ndarray], width: int, probability: float, generator: np.random.Generator
) -> list[int]:
    """Chooses the objects to paste mirrored about the middle of a canvas of `width` px.

    Of the objects with a polygon, round(probability * their number) are drawn without replacement; one is taken if
    something of it is on the canvas and its mirrored box hides less than 30 % of every box that is there by then.

    Returns:
        Rows of `labels`.
    """
    candidates = [row for row, polygon in enumerate(segments) if len(polygon)]
    number = round(probability * len(candidates))
    present, taken = labels, []
    for row in generator.choice(candidates, number, replace=False) if number else ():
        _, x1, y1, x2, y2 = labels[row]
        mirrored = mirrored_labels(labels[row : row + 1], width)
        if x2 > x1 and y2 > y1 and (bbox_ioa(mirrored[0, 1:], present[:, 1:]) < MAX_COVERED).all():
            present = np.concatenate([present, mirrored])
            taken.append(int(row))
    return taken


def mirrored_labels(labels: np.ndarray, width: int) -> np.ndarray:
    """Returns labels (n, 5) mirrored about the middle of a canvas of `width` px."""
    classes, x1, y1, x2, y2 = labels.T
    return np.stack([classes, width - x2, y1, width - x1, y2], axis=1)


def _mirrored_polygon(polygon: np.ndarray, width: int) -> np.ndarray:
    """Mirrors a polygon (k, 2) about the middle of a canvas of `width` px."""
    return np.stack([width - polygon[:, 0], polygon[:, 1]], axis=1)


def _draw_pastes(
    tiles: Sequence[Tile], segments: Sequence[np.ndarray], rows: Sequence[int], matrix: np.ndarray, output: np.ndarray
) -> None:
    """Draws the mirror images of the objects in `rows`: each owner's tile once, through the masks of its objects."""
    side = 2 * len(output)
    owners = np.repeat(np.arange(len(tiles)), [len(tile.labels) for tile in tiles])
    mirror = np.diag([-1.0, 1.0, 1.0])
    mirror[0, 2] = side - 1  # pixel i goes to side - 1 - i
    for owner in sorted({int(owners[row]) for row in rows}):
        mask = np.zeros(output.shape[:2], dtype=np.uint8)
        for row in rows:
            points, visible = warp_points(_mirrored_polygon(segments[row], side), matrix)
            if owners[row] == owner and visible.all():
                # boxes count from a pixel's edge, masks from its centre
                fixed_point = np.round((points - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
                cv2.fillPoly(mask, [fixed_point], 255, shift=_SUBPIXEL_BITS)
        layer = output.copy()
        _draw_tile(tiles[owner], matrix @ mirror, side, layer)
        cv2.copyTo(layer, mask, output)
