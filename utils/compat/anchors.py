"""AutoAnchor by YOLOv5 6.1's signatures, over `utils.train.anchors`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.compat.torch_tools import de_parallel
from utils.dataloaders.config import load_spec
from utils.dataloaders.dataset import DetectionDataset
from utils.dataloaders.labels import load_labels
from utils.log import LOGGER
from utils.train import anchors


def _generator(seed: int) -> np.random.Generator:
    """Returns the generator that the search draws from."""
    return np.random.Generator(np.random.Philox(seed))


def check_anchor_order(m: nn.Module) -> None:
    """Reverses the anchors of a detection layer, in place, where large ones stand at small strides."""
    strides = m.stride.view(-1, 1, 1).cpu().double().numpy()
    anchors_px = m.anchors.detach().cpu().double().numpy() * strides
    ordered_px = anchors.order_by_stride(anchors_px, strides.ravel())
    if ordered_px is not anchors_px:
        LOGGER.info("Reversing the order of the anchors' layers")
        m.anchors.copy_(torch.from_numpy(ordered_px / strides))


def check_anchors(
    dataset: DetectionDataset, model: nn.Module, thr: float = 4.0, imgsz: int = 640, seed: int = 0
) -> None:
    """Fits new anchors into a model, in place, when its own suit the labels badly.

    Args:
        dataset: images with labels.
        model: bare or wrapped for several GPUs.
        thr: the side ratio up to which a label and an anchor match.
        imgsz: side of the training image, px.
        seed: of the search.
    """
    anchors.check_anchors(dataset.table, de_parallel(model).model[-1], thr, imgsz, _generator(seed))


def kmean_anchors(
    dataset: DetectionDataset | str | Path = "data/coco128.yaml",
    n: int = 9,
    img_size: int = 640,
    thr: float = 4.0,
    gen: int = 1000,
    verbose: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """Returns n anchors (n, 2) in px, smallest area first, that suit a data set's labels.

    Args:
        dataset: a data set, or a YAML whose training images are taken.
        n: anchors of all layers together.
        img_size: side of the training image, px.
        thr: the side ratio up to which a label and an anchor match.
        gen: random changes tried.
        verbose: log the result.
        seed: of the search.
    """
    table = dataset.table if isinstance(dataset, DetectionDataset) else None
    if table is None:
        spec = load_spec(dataset, need=("train",))
        table = load_labels(spec.train, spec)
    sizes_px = anchors.label_sizes_px(table.sizes_wh, table.offsets, table.rows[:, 3:5], img_size)
    found_px = anchors.kmean_anchors(sizes_px, n, img_size, thr, _generator(seed), gen)
    if verbose:
        LOGGER.info("Anchors in px: " + ", ".join(f"{width:.0f},{height:.0f}" for width, height in found_px))
    return found_px
