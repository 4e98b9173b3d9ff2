"""Random perspective: 3x3 matrices, what they do to labels and polygons, and drawing an image through one.

Each warp is a small function that returns a matrix; their product is applied once, from the source image straight into
the output. Coordinates are (x, y) in pixels; labels are float32 (n, 5) [class, x1, y1, x2, y2]. What is random comes
from the generator that is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from utils.boxes import clip_boxes, resample_segments
from utils.images import PAD_COLOUR

SEGMENT_POINTS = 1000
MIN_SIDE_PX = 2  # a warped box must be wider and higher than this
MIN_AREA_SHARE = 0.10  # and keep more than this share of its area
MIN_AREA_SHARE_SEGMENT = 0.01  # boxes around a warped polygon are tight, so less may be left of them
MAX_ASPECT = 100
MIN_DEPTH = 1e-3  # points nearer to the horizon, or behind it, are not in the image


def random_perspective(
    im: np.ndarray,
    targets: np.ndarray | Sequence = (),
    segments: Sequence[np.ndarray] = (),
    degrees: float = 10,
    translate: float = 0.1,
    scale: float = 0.1,
    shear: float = 10,
    perspective: float = 0.0,
    border: tuple[int, int] = (0, 0),
    generator: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Warps an image about its centre, with its labels; those of which too little is left are dropped.

    Args:
        im: uint8 (h, w, 3); left as it is.
        targets: (n, 5) labels.
        segments: n polygons (k, 2) px, k = 0 where only the box is known; or none at all.
        degrees: largest rotation.
        translate: largest shift, as a fraction of the sides.
        scale: largest change of size, as a fraction.
        shear: largest shear, in degrees.
        perspective: largest tilt, per pixel.
        border: (top and bottom, left and right) px by which the output is larger, or with a minus smaller.
        generator: draws the warp; by default a new one that nothing seeds.

    Returns:
        The image, and the labels float32 (m, 5).
    """
    height, width = im.shape[:2]
    output_wh = (width + 2 * border[1], height + 2 * border[0])
    ranges = (degrees, translate, scale, shear, perspective)
    matrix, gain = random_matrix((width, height), output_wh, *ranges, generator or np.random.default_rng())
    labels = np.asarray(targets, dtype=np.float32).reshape(-1, 5)
    if not np.array_equal(matrix, np.eye(3)) or output_wh != (width, height):
        output = np.full((output_wh[1], output_wh[0], 3), PAD_COLOUR, dtype=np.uint8)
        draw_warped(im, matrix, output)
        im = output
    return im, warp_labels(labels, segments, matrix, gain, output_wh)


def translation(x: float, y: float) -> np.ndarray:
    """Returns the matrix (3, 3) that moves by (x, y)."""
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=np.float64)


def tilting(x: float, y: float) -> np.ndarray:
    """Returns the matrix (3, 3) that divides by 1 + x * px + y * py."""
    return np.array([[1, 0, 0], [0, 1, 0], [x, y, 1]], dtype=np.float64)


def rotation(degrees: float, scale: float) -> np.ndarray:
    """Returns the matrix (3, 3) that turns counter-clockwise on the screen about the origin, and scales."""
    cosine, sine = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]], dtype=np.float64)


def shearing(x_degrees: float, y_degrees: float) -> np.ndarray:
    """Returns the matrix (3, 3) that shears along x and along y."""
    x_slope, y_slope = math.tan(math.radians(x_degrees)), math.tan(math.radians(y_degrees))
    return np.array([[1, x_slope, 0], [y_slope, 1, 0], [0, 0, 1]], dtype=np.float64)


def random_matrix(
    canvas_wh: tuple[int, int],
    output_wh: tuple[int, int],
    degrees: float,
    translate: float,
    scale: float,
    shear: float,
    perspective: float,
    generator: np.random.Generator,
) -> tuple[np.ndarray, float]:
    """Draws a warp of a canvas about its centre, into an output of its own size.

    Each parameter is uniform: perspective within +-p, angle and shears within +-degrees, scale within 1 +- scale, and
    the canvas's centre falls within 0.5 +- translate of the output's sides.

    Returns:
        The matrix (3, 3) float64, canvas pixels to output pixels, and by how much it enlarges.
    """
    tilt_x, tilt_y = generator.uniform(-perspective, perspective, 2)
    angle = generator.uniform(-degrees, degrees)
    gain = generator.uniform(1 - scale, 1 + scale)
    shear_x, shear_y = generator.uniform(-shear, shear, 2)
    x_share, y_share = generator.uniform(0.5 - translate, 0.5 + translate, 2)
    matrix = (
        translation(x_share * output_wh[0], y_share * output_wh[1])
        @ shearing(shear_x, shear_y)
        @ rotation(angle, gain)
        @ tilting(tilt_x, tilt_y)
        @ translation(-canvas_wh[0] / 2, -canvas_wh[1] / 2)
    )
    return matrix, gain


def warp_points(points: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Takes points (k, 2) through a matrix (3, 3).

    Returns:
        The points (k, 2) float64 and which of them (k,) lie before the horizon; the others' places mean nothing.
    """
    homogeneous = points @ matrix[:, :2].T + matrix[:, 2]
    depth = homogeneous[:, 2]
    visible = depth > MIN_DEPTH
    return homogeneous[:, :2] / np.where(visible, depth, 1)[:, None], visible


def warp_labels(
    labels: np.ndarray, segments: Sequence[np.ndarray], matrix: np.ndarray, gain: float, output_wh: tuple[int, int]
) -> np.ndarray:
    """Takes labels (n, 5) through a warp and keeps those of which enough is left in the output.

    A box becomes the box around its four warped corners; where an object has a polygon, the box around those of its
    points (resampled to 1000) that fall into the output, which is tighter.

    Args:
        labels: float32 (n, 5) in pixels of the canvas.
        segments: n polygons (k, 2), k = 0 where only the box is known; or none at all.
        matrix: (3, 3), canvas to output.
        gain: by how much it enlarges.
        output_wh: size of the output, px.
    """
    if not len(labels):
        return labels
    boxes = labels[:, 1:]
    points, visible = warp_points(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2), matrix)
    points = points.reshape(-1, 4, 2)
    warped = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
    warped[~visible.reshape(-1, 4).all(axis=1)] = 0
    warped = clip_boxes(warped, output_wh[::-1])
    min_share = np.full(len(labels), MIN_AREA_SHARE)
    for row, polygon in enumerate(segments):
        if len(polygon):
            points, visible = warp_points(resample_segments([polygon], SEGMENT_POINTS)[0], matrix)
            points = points[visible & (points >= 0).all(axis=1) & (points <= output_wh).all(axis=1)]
            warped[row] = [*points.min(axis=0), *points.max(axis=0)] if len(points) else 0
            min_share[row] = MIN_AREA_SHARE_SEGMENT
    keep = box_candidates(boxes * gain, warped, min_share)
    return np.concatenate([labels[keep, :1], warped[keep].astype(np.float32)], axis=1)


def box_candidates(before_xyxy: np.ndarray, after_xyxy: np.ndarray, min_area_share: np.ndarray | float) -> np.ndarray:
    """Says which boxes (n,) are still worth training on.

    Args:
        before_xyxy: (n, 4) px, enlarged as much as the warp enlarges.
        after_xyxy: (n, 4) px, warped and clipped.
        min_area_share: (n,) or one number: the share of its area that a box must keep.
    """
    before_w, before_h = before_xyxy[:, 2] - before_xyxy[:, 0], before_xyxy[:, 3] - before_xyxy[:, 1]
    after_w, after_h = after_xyxy[:, 2] - after_xyxy[:, 0], after_xyxy[:, 3] - after_xyxy[:, 1]
    aspect = np.maximum(after_w / (after_h + 1e-16), after_h / (after_w + 1e-16))
    area_share = after_w * after_h / (before_w * before_h + 1e-16)
    return (after_w > MIN_SIDE_PX) & (after_h > MIN_SIDE_PX) & (area_share > min_area_share) & (aspect < MAX_ASPECT)


def draw_warped(image: np.ndarray, matrix: np.ndarray, output: np.ndarray) -> None:
    """Draws an image through a matrix into `output`, over what is there; pixels that it does not reach stay.

    An output pixel is the image's where it falls within half a pixel of it, so that images which touch on the canvas
    touch in the output, without gap or overlap.

    Args:
        image: uint8 (h, w, channels).
        matrix: (3, 3), image pixels to output pixels.
        output: uint8 (H, W, channels), changed in place.
    """
    upright = matrix[0, 1] == matrix[1, 0] == matrix[2, 0] == matrix[2, 1] == 0
    height, width = image.shape[:2]
    if upright:
        left, right = _reach(matrix[0, 0], matrix[0, 2], width, output.shape[1])
        top, bottom = _reach(matrix[1, 1], matrix[1, 2], height, output.shape[0])
    else:
        left, top, right, bottom = _quad_reach(matrix, width, height, output.shape[1], output.shape[0])
    if right <= left or bottom <= top:
        return
    region = output[top:bottom, left:right]
    local = translation(-left, -top) @ matrix
    size = (right - left, bottom - top)
    if upright:
        cv2.warpAffine(image, local[:2], size, dst=region, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return
    warped = cv2.warpPerspective(image, local, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    covered = cv2.warpPerspective(np.full((height, width), 255, np.uint8), local, size, flags=cv2.INTER_NEAREST)
    cv2.copyTo(warped, covered, region)


def _reach(gain: float, offset: float, length: int, limit: int) -> tuple[int, int]:
    """Output pixels [start, stop) whose sources lie in [-0.5, length - 0.5), for one axis of an upright matrix."""
    low, high = sorted((offset - 0.5 * gain, offset + (length - 0.5) * gain))
    return max(math.ceil(low), 0), min(math.ceil(high), limit)


def _quad_reach(matrix: np.ndarray, width: int, height: int, max_x: int, max_y: int) -> tuple[int, int, int, int]:
    """Output rectangle (left, top, right, bottom) around an image drawn through `matrix`."""
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5
    points, visible = warp_points(corners, matrix)
    if not visible.all():
        return 0, 0, max_x, max_y
    low, high = np.floor(points.min(axis=0)), np.ceil(points.max(axis=0)) + 1
    (left, top), (right, bottom) = np.clip(low, 0, (max_x, max_y)), np.clip(high, 0, (max_x, max_y))
    return int(left), int(top), int(right), int(bottom)
