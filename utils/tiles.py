"""Large images cut into overlapping tiles, and the detections of all tiles joined to those of the image.

Small objects keep their pixels that way, instead of vanishing when the whole image is scaled to the model's size;
the whole image is looked at too, for what is larger than a tile. After SAHI's sliced inference (Akyon et al. 2022,
arXiv:2202.06934). Not here: running a model on the windows (`models.inference`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.errors import UserError
from utils.nms import NMSConfig, suppress_again

MIN_TILE_PX = 32
MAX_OVERLAP = 0.9  # beyond, tiles are next to endless
# Chosen on coco128 with a YOLOv5n, tiles of 320 px, images whole and shrunk to a quarter of the area in mosaics.
BORDER_SHARE = 0.02  # a box that ends within this share of the window's side from its border may be cut by it
CONTAINED_SHARE = 0.5  # a cut box loses against one that holds more than this share of it
RIVAL_CONFIDENCE = 0.25  # ... and has at least this share of its confidence: what is next to noise decides nothing


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        size_px: side of a tile, in px of the image; where the image's side is shorter, that one.
        overlap: share of a tile's side by which neighbours overlap at least, from 0 to below 0.9. Objects up to that
            size stand whole in some tile.
    """

    size_px: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            UserError: a size or an overlap out of range.
        """
        if self.size_px < MIN_TILE_PX:
            raise UserError(f"--tile {self.size_px}: a side of at least {MIN_TILE_PX} px is expected.")
        if not 0 <= self.overlap < MAX_OVERLAP:
            raise UserError(
                f"--tile-overlap {self.overlap}: a share of the tile's side from 0 to below {MAX_OVERLAP} is expected."
            )


def windows(height: int, width: int, tiling: Tiling) -> np.ndarray:
    """Cuts an image into tiles, spread evenly so that they cover it exactly.

    Args:
        height: of the image, px.
        width: of the image, px.
        tiling: size and least overlap of the tiles.

    Returns:
        (t, 4) int64 [x1, y1, x2, y2 in px]: the tiles row by row, the whole image last. Where that is not larger
        than a tile it is the only one.
    """
    tile_h, tile_w = min(tiling.size_px, height), min(tiling.size_px, width)
    tiles = [
        (left, top, left + tile_w, top + tile_h)
        for top in _starts(height, tile_h, tiling.overlap)
        for left in _starts(width, tile_w, tiling.overlap)
    ]
    whole = (0, 0, width, height)
    return np.array([whole] if tiles == [whole] else [*tiles, whole], dtype=np.int64)


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Returns where tiles of `side` px begin along `length` px, no further apart than the overlap allows."""
    longest_step = max(side - math.ceil(side * overlap), 1)
    steps = math.ceil((length - side) / longest_step)
    return [step * (length - side) // max(steps, 1) for step in range(steps + 1)]


def merge(detections: Sequence[np.ndarray], windows_xyxy: np.ndarray, nms: NMSConfig) -> np.ndarray:
    """Joins the detections of an image's windows: each object once, and whole where some window shows it whole.

    First go the pieces: a box that ends at a border of its window which is no border of the image may show a part
    of an object. It is dropped where a box of its class from another window holds more than CONTAINED_SHARE of it,
    unless that one is cut as well and not larger, or has less than RIVAL_CONFIDENCE of its confidence. What is left
    is suppressed as the detections of one image are. A piece of what no window shows whole stays. The order of the
    windows does not matter.

    Args:
        detections: for each window (k, 6) [x1, y1, x2, y2 in px of the whole image, confidence, class].
        windows_xyxy: (t, 4) the windows, px; together they cover the image.
        nms: how the detections of one image are suppressed.

    Returns:
        (m, 6) of the same columns, float32, most confident first.
    """
    found = np.concatenate([np.asarray(rows, np.float32).reshape(-1, 6) for rows in detections])
    window_of = np.repeat(np.arange(len(detections)), [len(rows) for rows in detections])
    order = np.lexsort((*found[:, :4].T, found[:, 5], -found[:, 4]))  # ties are settled by the boxes themselves
    found, window_of = found[order], window_of[order]
    cut = _touches_inner_border(found[:, :4], windows_xyxy[window_of], windows_xyxy)
    groups = np.zeros(len(found)) if nms.agnostic else found[:, 5]
    keep = np.ones(len(found), dtype=bool)
    for group in np.unique(groups[cut]):
        members = np.flatnonzero(groups == group)
        keep[members] = _is_no_piece(found[members], window_of[members], cut[members])
    return suppress_again(found[keep], nms)


def _touches_inner_border(boxes_xyxy: np.ndarray, own_xyxy: np.ndarray, windows_xyxy: np.ndarray) -> np.ndarray:
    """Says which boxes (n, 4) end at a border of their own window (n, 4) that lies within the image, bool (n,)."""
    image_xyxy = np.concatenate((windows_xyxy[:, :2].min(0), windows_xyxy[:, 2:].max(0)))
    sides_px = np.tile(own_xyxy[:, 2:] - own_xyxy[:, :2], 2)
    near = np.abs(boxes_xyxy - own_xyxy) <= BORDER_SHARE * sides_px
    return (near & (own_xyxy != image_xyxy)).any(1)


def _is_no_piece(found: np.ndarray, window_of: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Says which detections of one class stay when pieces of others go.

    Args:
        found: (n, 6) detections.
        window_of: int (n,), the window of each.
        cut: bool (n,), which of them may be pieces.

    Returns:
        bool (n,). The largest pieces are judged first, so that none loses against one that is gone.
    """
    boxes_xyxy, confidence = found[:, :4].astype(np.float64), found[:, 4]
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    pieces = np.flatnonzero(cut)
    keep = np.ones(len(found), dtype=bool)
    for piece in pieces[np.argsort(-areas[pieces], kind="stable")]:
        top_left = np.maximum(boxes_xyxy[piece, :2], boxes_xyxy[:, :2])
        bottom_right = np.minimum(boxes_xyxy[piece, 2:], boxes_xyxy[:, 2:])
        shared = (bottom_right - top_left).clip(0).prod(1)
        rival = keep & (window_of != window_of[piece]) & (~cut | (areas > areas[piece]))
        rival &= confidence >= RIVAL_CONFIDENCE * confidence[piece]
        keep[piece] = not (rival & (shared > CONTAINED_SHARE * areas[piece])).any()
    return keep
