"""AutoAnchor: do a model's anchors suit the labels, and better ones when they do not.

Sizes are compared in pixels of the training image; only what is written into the model is divided by the strides.
K-means on the labels' sizes gives a start, random changes that raise the fitness do the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.dataloaders.config import load_spec
from utils.dataloaders.labels import LabelTable, load_labels
from utils.errors import UserError
from utils.log import LOGGER, colorstr

if TYPE_CHECKING:
    from torch import nn

GOOD_BPR = 0.98
SMALL_PX = 3  # labels with a side below this are warned of
USED_PX = 2  # labels with no side of at least this are left out, and no anchor side goes below it
SAMPLE = 50_000  # labels that the search looks at; anchors are judged on all
MUTATION_PROBABILITY = 0.9
MUTATION_SIGMA = 0.1
MUTATION_RANGE = (0.3, 3.0)
RESTARTS = 10
MAX_STEPS = 30  # of one k-means run


def check_anchor_order(m: nn.Module) -> None:
    """Reverses the anchors (nl, na, 2) of a detection layer, in place, where large ones stand at small strides (nl)."""
    strides = m.stride.to(m.anchors).view(-1, 1, 1)
    anchors_px = m.anchors * strides
    areas = anchors_px.prod(dim=2).mean(dim=1)
    if (areas[-1] - areas[0]) * (m.stride[-1] - m.stride[0]) < 0:
        LOGGER.info(f"{_prefix()}Reversing the order of the anchors' layers")
        m.anchors.copy_(anchors_px.flip(0) / strides)


def check_anchors(dataset: Any, model: nn.Module, thr: float = 4.0, imgsz: int = 640, seed: int = 0) -> None:
    """Fits new anchors into a model, in place, when its own suit the labels badly.

    Args:
        dataset: training images and their labels (`LoadImagesAndLabels.table`).
        model: bare, or wrapped for several processes; its last layer has anchors (nl, na, 2) in cells, stride (nl,).
        thr: the side ratio up to which a label and an anchor match (hyperparameter `anchor_t`).
        imgsz: side of the training image, px.
        seed: the only source of randomness.

    Raises:
        UserError: there are no labels.
    """
    table, detect = dataset.table, getattr(model, "module", model).model[-1]
    if len(table.rows) == 0:
        raise UserError("AutoAnchor: the training images have no labels.")
    generator = _generator(seed)
    strides = detect.stride.double().cpu().numpy().reshape(-1, 1, 1)
    anchors_px = detect.anchors.detach().double().cpu().numpy() * strides
    sizes_px = label_sizes_px(table, imgsz, jitter=generator.uniform(0.9, 1.1, size=len(table.sizes_wh)))
    bpr, aat = anchor_fit(sizes_px, anchors_px.reshape(-1, 2), thr)
    found = f"{_prefix()}{aat:.2f} anchors/target, {bpr:.3f} Best Possible Recall (BPR)."
    placeholders = (anchors_px <= 0).any()  # what a YAML's `anchors: 3` starts from
    if bpr > GOOD_BPR and not placeholders:
        LOGGER.info(f"{found} The model's anchors are a good fit to the data.")
        return
    LOGGER.info(f"{found} The model's anchors fit the data badly, looking for better ones...")
    new_px = kmean_anchors(dataset, anchors_px.size // 2, imgsz, thr, verbose=False, seed=generator)
    new_bpr, new_aat = anchor_fit(sizes_px, new_px, thr)
    found = f"{_prefix()}{new_aat:.2f} anchors/target, {new_bpr:.3f} Best Possible Recall (BPR)."
    if new_bpr <= bpr and not placeholders:
        LOGGER.info(f"{found} No better anchors found, keeping the model's.")
        return
    import torch  # only here, so that judging anchors needs none

    detect.anchors.copy_(torch.from_numpy(new_px.reshape(anchors_px.shape) / strides))
    check_anchor_order(detect)
    LOGGER.info(f"{found} New anchors in the model, in pixels: {_sides(new_px)}")


def kmean_anchors(
    dataset: Any = "data/coco128.yaml",
    n: int = 9,
    img_size: int = 640,
    thr: float = 4.0,
    gen: int = 1000,
    verbose: bool = True,
    seed: int | np.random.Generator = 0,
) -> np.ndarray:
    """Returns anchors (n, 2) float64 in px, smallest area first, that suit a data set's labels.

    Args:
        dataset: as for `check_anchors`, or a data set YAML, whose training images are taken.
        n: anchors of all layers together.
        img_size: side of the training image, px.
        thr: the side ratio up to which a label and an anchor match.
        gen: random changes tried.
        verbose: log the result.
        seed: the only source of randomness.
    """
    if isinstance(dataset, (str, Path)):
        spec = load_spec(dataset, need=("train",))
        table = load_labels(spec.train, spec)
    else:
        table = dataset.table
    generator = seed if isinstance(seed, np.random.Generator) else _generator(seed)
    sizes_px = label_sizes_px(table, img_size)
    small = int((sizes_px < SMALL_PX).any(axis=1).sum())
    if small:
        LOGGER.warning(
            f"{_prefix()}WARNING: {small} of {len(sizes_px)} labels are less than {SMALL_PX} pixels wide or high"
        )
    used = sizes_px[(sizes_px >= USED_PX).any(axis=1)]
    if len(used) > SAMPLE:
        used = used[np.sort(generator.choice(len(used), SAMPLE, replace=False))]
    if len(np.unique(used, axis=0)) < n:
        LOGGER.warning(f"{_prefix()}WARNING: fewer than {n} different label sizes, starting from random anchors")
        anchors = np.sort(generator.random(n * 2)).reshape(n, 2) * img_size
    else:
        spread = used.std(axis=0)
        spread[spread == 0] = 1.0  # all labels of one width, or of one height
        anchors = kmeans(used / spread, n, generator) * spread
    if len(used):
        anchors = _evolve(used, anchors, thr, gen, generator)
    anchors = anchors[np.argsort(anchors.prod(axis=1), kind="stable")]
    if verbose:
        LOGGER.info(f"{_prefix()}Anchors in pixels: {_sides(anchors)}")
    return anchors


def label_sizes_px(table: LabelTable, imgsz: int, jitter: np.ndarray | None = None) -> np.ndarray:
    """Returns the labels' widths and heights (M, 2) float64 in pixels of images whose longer side is `imgsz`.

    Args:
        table: N images and their M labels.
        imgsz: longer side of a training image.
        jitter: (N,) factors, one an image.
    """
    shapes = table.sizes_wh.astype(np.float64)
    shapes *= imgsz / shapes.max(axis=1, keepdims=True)
    if jitter is not None:
        shapes *= jitter[:, None]
    return shapes[table.owners] * table.rows[:, 3:5]


def anchor_fit(sizes_px: np.ndarray, anchors_px: np.ndarray, thr: float) -> tuple[float, float]:
    """Judges (k, 2) anchors on (M, 2) labels, M > 0; a side may be up to `thr` times the other's.

    Returns:
        Best possible recall, the share of labels that match an anchor; how many anchors a label matches on average.
    """
    with np.errstate(divide="ignore"):  # labels without a side match nothing
        matching = _log_ratios(np.log(sizes_px), anchors_px) < np.log(thr)
    return float(matching.any(axis=0).mean()), float(matching.sum(axis=0).mean())


def _log_ratios(log_sizes: np.ndarray, anchors_px: np.ndarray) -> np.ndarray:
    """Returns (k, M): the logarithm of the larger side ratio of each anchor (k, 2) and label (M, 2), 0 if alike."""
    with np.errstate(divide="ignore"):  # placeholders have sides of 0, and match nothing
        log_anchors = np.log(anchors_px)
    width = np.abs(log_sizes[None, :, 0] - log_anchors[:, :1])
    height = np.abs(log_sizes[None, :, 1] - log_anchors[:, 1:])
    return np.maximum(width, height)


def kmeans(points: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns `count` centres (count, d) of points (n, d) by Lloyd's iteration: the best of ten k-means++ starts.

    `points` must hold at least `count` different ones.
    """
    best, best_distance = points[:count], np.inf
    for _ in range(RESTARTS):
        picked = [int(generator.integers(len(points)))]
        to_picked = np.full(len(points), np.inf)
        while len(picked) < count:  # the farther from those picked, the likelier
            to_picked = np.minimum(to_picked, ((points - points[picked[-1]]) ** 2).sum(axis=1))
            picked.append(int(generator.choice(len(points), p=to_picked / to_picked.sum())))
        centres = points[picked].copy()
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


def _evolve(
    sizes_px: np.ndarray, anchors_px: np.ndarray, thr: float, generations: int, generator: np.random.Generator
) -> np.ndarray:
    """Returns anchors (k, 2) after keeping, of many random changes, those that raise the fitness on labels (M, 2)."""
    log_sizes = np.log(np.maximum(sizes_px, np.finfo(np.float64).tiny)).astype(np.float32)

    def fitness(anchors: np.ndarray) -> float:
        """The mean, over labels, of the best anchor's closeness (1 = same sides), 0 beyond the threshold."""
        nearest = _log_ratios(log_sizes, anchors.astype(np.float32)).min(axis=0)
        return float(np.where(nearest < np.log(thr), np.exp(-nearest), 0.0).mean())

    best, best_fitness = anchors_px, fitness(anchors_px)
    for _ in range(generations):
        factors = np.ones_like(best)
        while (factors == 1).all():
            changed = generator.random(best.shape) < MUTATION_PROBABILITY
            factors = changed * generator.random() * generator.standard_normal(best.shape) * MUTATION_SIGMA + 1
            factors = factors.clip(*MUTATION_RANGE)
        candidate = np.maximum(best * factors, USED_PX)
        candidate_fitness = fitness(candidate)
        if candidate_fitness > best_fitness:
            best, best_fitness = candidate, candidate_fitness
    return best


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 2])))


def _sides(anchors_px: np.ndarray) -> str:
    return ", ".join(f"{width:.0f},{height:.0f}" for width, height in anchors_px)


def _prefix() -> str:
    return colorstr("AutoAnchor: ")
