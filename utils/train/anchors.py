"""AutoAnchor: do a model's anchors suit the labels, and better ones when they do not.

Sizes are looked at in pixels of the training image; only what is written into the model is divided by the strides.
K-means on the labels' sizes gives a start, random changes that raise the fitness do the rest. All randomness comes
from the generator handed in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from utils.dataloaders.labels import LabelTable
from utils.errors import UserError
from utils.log import LOGGER, colorstr

GOOD_BPR = 0.98
SMALL_PX = 3  # labels with a side below this are warned of
USED_PX = 2  # labels with no side of at least this are left out, and no anchor side goes below it
SAMPLE = 50_000  # labels that the search looks at; anchors are judged on all
MUTATION_PROBABILITY = 0.9
MUTATION_SIGMA = 0.1
MUTATION_RANGE = (0.3, 3.0)
RESTARTS = 10
MAX_STEPS = 30  # of one k-means run


class AnchorFit(NamedTuple):
    """How well anchors suit labels."""

    bpr: float  # best possible recall: share of labels that match at least one anchor
    aat: float  # anchors above threshold: how many anchors a label matches on average


class AnchorCheck(NamedTuple):
    """What `check_anchors` found and did."""

    before: AnchorFit
    after: AnchorFit  # the same as `before` when the anchors were kept
    replaced: bool


def label_sizes_px(
    sizes_wh: np.ndarray, offsets: np.ndarray, boxes_wh_norm: np.ndarray, imgsz: int, jitter: np.ndarray | None = None
) -> np.ndarray:
    """Returns the labels' widths and heights in pixels of images whose longer side is `imgsz`.

    Args:
        sizes_wh: (N, 2) widths and heights of the images.
        offsets: (N + 1,) image i has the labels offsets[i] to offsets[i + 1].
        boxes_wh_norm: (M, 2) widths and heights of the labels as fractions of their image.
        imgsz: longer side of a training image.
        jitter: (N,) factors, one an image.

    Returns:
        (M, 2) float64.
    """
    shapes = sizes_wh.astype(np.float64)
    shapes *= imgsz / shapes.max(axis=1, keepdims=True)
    if jitter is not None:
        shapes *= jitter[:, None]
    return np.repeat(shapes, np.diff(offsets), axis=0) * boxes_wh_norm


def anchor_fit(sizes_px: np.ndarray, anchors_px: np.ndarray, threshold: float) -> AnchorFit:
    """Judges (k, 2) anchors on (M, 2) labels, M > 0; a side may be up to `threshold` times the other's."""
    ratios = _log_ratios(np.log(sizes_px), anchors_px)
    matching = ratios < np.log(threshold)
    return AnchorFit(float(matching.any(axis=0).mean()), float(matching.sum(axis=0).mean()))


def _log_ratios(log_sizes: np.ndarray, anchors_px: np.ndarray) -> np.ndarray:
    """Returns (k, M): the logarithm of the larger side ratio of each anchor (k, 2) and label (M, 2), 0 if alike."""
    with np.errstate(divide="ignore"):  # placeholder anchors have sides of 0, and match nothing
        log_anchors = np.log(anchors_px)
    width = np.abs(log_sizes[None, :, 0] - log_anchors[:, :1])
    height = np.abs(log_sizes[None, :, 1] - log_anchors[:, 1:])
    return np.maximum(width, height)


def _fitness(log_sizes: np.ndarray, anchors_px: np.ndarray, threshold: float) -> float:
    """Returns the mean, over labels (M, 2), of the best anchor's closeness (1 = same sides), 0 below the threshold."""
    best = _log_ratios(log_sizes, anchors_px).min(axis=0)
    return float(np.where(best < np.log(threshold), np.exp(-best), 0.0).mean())


def kmeans(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns `count` centres (count, d) of points (n, d) by Lloyd's iteration: the best of ten k-means++ starts.

    `points` must hold at least `count` different ones.
    """
    best, best_distance = points[:count], np.inf
    for _ in range(RESTARTS):
        centres = _spread_start(points, count, generator)
        nearest = np.full(len(points), -1)
        for _ in range(MAX_STEPS):
            # squared distances less the points' own squares, which decide nothing
            distances = (centres**2).sum(axis=1) - 2 * points @ centres.T
            former, nearest = nearest, distances.argmin(axis=1)
            if np.array_equal(former, nearest):
                break
            members = np.bincount(nearest, minlength=count)
            sums = [np.bincount(nearest, weights=column, minlength=count) for column in points.T]
            filled = members > 0  # a centre that lost all its points stays where it is
            centres[filled] = np.stack(sums, axis=1)[filled] / members[filled, None]
        distance = distances.min(axis=1).sum()
        if distance < best_distance:
            best, best_distance = centres, distance
    return best


def _spread_start(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Picks `count` of the points, each with a probability that grows with its distance to those picked (k-means++)."""
    picked = [int(generator.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    while len(picked) < count:
        distance = np.minimum(distance, ((points - points[picked[-1]]) ** 2).sum(axis=1))
        picked.append(int(generator.choice(len(points), p=distance / distance.sum())))
    return points[picked].copy()


def kmean_anchors(
    sizes_px: np.ndarray,
    count: int,
    imgsz: int,
    threshold: float,
    generator: np.random.Generator,
    generations: int = 1000,
) -> np.ndarray:
    """Returns `count` anchors (count, 2) in pixels, smallest area first, that suit labels (M, 2) in pixels.

    Args:
        sizes_px: widths and heights of the labels in the training image, M > 0.
        count: anchors of all layers together.
        imgsz: side of the training image; bounds random anchors where the labels are too few for k-means.
        threshold: the side ratio up to which a label and an anchor match.
        generator: the only source of randomness.
        generations: random changes tried.
    """
    small = int((sizes_px < SMALL_PX).any(axis=1).sum())
    if small:
        LOGGER.warning(
            f"{_prefix()}WARNING: {small} of {len(sizes_px)} labels are less than {SMALL_PX} pixels wide or high"
        )
    used = sizes_px[(sizes_px >= USED_PX).any(axis=1)]
    if len(used) > SAMPLE:
        used = used[np.sort(generator.choice(len(used), SAMPLE, replace=False))]
    if len(np.unique(used, axis=0)) < count:
        LOGGER.warning(f"{_prefix()}WARNING: fewer than {count} different label sizes, starting from random anchors")
        anchors = np.sort(generator.random(count * 2)).reshape(count, 2) * imgsz
    else:
        spread = used.std(axis=0)
        spread[spread == 0] = 1.0  # all labels of one width, or of one height
        anchors = kmeans(used / spread, count, generator) * spread
    if len(used):
        anchors = _evolve(used, anchors, threshold, generator, generations)
    return anchors[np.argsort(anchors.prod(axis=1), kind="stable")]


def _evolve(
    sizes_px: np.ndarray, anchors_px: np.ndarray, threshold: float, generator: np.random.Generator, generations: int
) -> np.ndarray:
    """Returns anchors (k, 2) after keeping, of many random changes, those that raise the fitness on labels (M, 2)."""
    log_sizes = np.log(np.maximum(sizes_px, np.finfo(np.float64).tiny)).astype(np.float32)
    best, best_fitness = anchors_px, _fitness(log_sizes, anchors_px.astype(np.float32), threshold)
    for _ in range(generations):
        candidate = np.maximum(best * _mutation(best.shape, generator), USED_PX)
        fitness = _fitness(log_sizes, candidate.astype(np.float32), threshold)
        if fitness > best_fitness:
            best, best_fitness = candidate, fitness
    return best


def _mutation(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Returns factors around 1, at least one of them different from it."""
    while True:
        changed = generator.random(shape) < MUTATION_PROBABILITY
        factors = changed * generator.random() * generator.standard_normal(shape) * MUTATION_SIGMA + 1
        factors = factors.clip(*MUTATION_RANGE)
        if (factors != 1).any():
            return factors


def check_anchors(
    table: LabelTable, detect: nn.Module, threshold: float, imgsz: int, generator: np.random.Generator
) -> AnchorCheck:
    """Fits new anchors into a model, in place, when its own suit the labels badly.

    Args:
        table: labels of the training images.
        detect: the model's last layer: anchors (nl, na, 2) in cells, stride (nl,).
        threshold: the side ratio up to which a label and an anchor match (`anchor_t`).
        imgsz: side of the training image in pixels.
        generator: the only source of randomness.

    Raises:
        UserError: there are no labels.
    """
    boxes_wh_norm = table.rows[:, 3:5]
    if len(boxes_wh_norm) == 0:
        raise UserError("AutoAnchor: the training images have no labels.")
    strides = np.asarray(detect.stride.tolist(), dtype=np.float64)
    anchors_px = detect.anchors.detach().double().cpu().numpy() * strides[:, None, None]
    jitter = generator.uniform(0.9, 1.1, size=len(table.sizes_wh))
    sizes_px = label_sizes_px(table.sizes_wh, table.offsets, boxes_wh_norm, imgsz, jitter)
    before = anchor_fit(sizes_px, anchors_px.reshape(-1, 2), threshold)
    placeholder = are_placeholders(anchors_px)
    if before.bpr > GOOD_BPR and not placeholder:
        LOGGER.info(f"{_prefix()}{_told(before)} The model's anchors are a good fit to the data.")
        return AnchorCheck(before, before, replaced=False)
    LOGGER.info(f"{_prefix()}{_told(before)} The model's anchors fit the data badly, looking for better ones...")
    plain_px = label_sizes_px(table.sizes_wh, table.offsets, boxes_wh_norm, imgsz)
    found_px = kmean_anchors(plain_px, anchors_px.size // 2, imgsz, threshold, generator)
    after = anchor_fit(sizes_px, found_px, threshold)
    if after.bpr <= before.bpr and not placeholder:
        LOGGER.info(f"{_prefix()}{_told(after)} No better anchors found, keeping the model's.")
        return AnchorCheck(before, before, replaced=False)
    ordered_px = order_by_stride(found_px.reshape(anchors_px.shape), strides)
    detect.anchors.copy_(torch.from_numpy(ordered_px / strides[:, None, None]))
    sides = ", ".join(f"{width:.0f},{height:.0f}" for width, height in ordered_px.reshape(-1, 2))
    LOGGER.info(f"{_prefix()}{_told(after)} New anchors in the model, in pixels: {sides}")
    return AnchorCheck(before, after, replaced=True)


def are_placeholders(anchors_px: np.ndarray) -> bool:
    """Tells whether anchors (nl, na, 2) are what a YAML's `anchors: <int>` starts from: no sizes that anyone chose."""
    return bool((anchors_px <= 0).any())


def order_by_stride(anchors_px: np.ndarray, strides: np.ndarray) -> np.ndarray:
    """Returns anchors (nl, na, 2) in pixels with the layers in such an order that larger strides have larger ones."""
    areas = anchors_px.prod(axis=2).mean(axis=1)
    reversed_order = (areas[-1] - areas[0]) * (strides[-1] - strides[0]) < 0
    return anchors_px[::-1].copy() if reversed_order else anchors_px


def _told(fit: AnchorFit) -> str:
    """Says a fit in the words of the log."""
    return f"{fit.aat:.2f} anchors/target, {fit.bpr:.3f} Best Possible Recall (BPR)."


def _prefix() -> str:
    """Begins a line of the log."""
    return colorstr("AutoAnchor: ")
