"""RKNN models on the NPU of a Rockchip board, by its library rknn-toolkit-lite2: one image at a time.

A folder `*_rknn_model` holds the compiled model (.rknn), which fits one kind of chip, and `metadata.yaml`. The model
takes pixels as they are and gives maps that the host decodes (`models.raw`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from models.backends.base import ArrayBackend, find_part, require, without_half
from models.backends.metadata import Graph, Metadata, texts_of_yaml
from utils.errors import UserError
from utils.log import LOGGER

METADATA_FILE = "metadata.yaml"


def read_texts(path: Path) -> dict[str, str]:
    """Returns what a folder says of its model."""
    return texts_of_yaml(find_part(path, METADATA_FILE, "file of names and stride"))


class Network(Protocol):
    """What runs a compiled model: `rknnlite.api.RKNNLite` on a board, and where it is made the toolkit's simulator."""

    def inference(self, inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray] | None:
        """Returns the maps (1, channels, ny, nx), float32, for one image uint8 (1, h, w, 3) RGB; None for a failure."""


class RknnBackend(ArrayBackend):
    """A compiled model of a folder `*_rknn_model`."""

    batch = 1

    def __init__(self, path: Path, network: Network, device: str) -> None:
        """Takes a network that is ready to run.

        Args:
            path: the folder, for what it says of the model.
            network: runs it.
            device: where, in words.

        Raises:
            UserError: it does not say how its maps are decoded.
        """
        texts = read_texts(path)
        said = Metadata.from_texts(texts, path)
        if said is None or said.raw is None:
            raise UserError(f"--weights {path}: does not say how its outputs are decoded: export it with export.py.")
        self._network, self.device = network, device
        LOGGER.info(f"{path}: {device}")
        self.take_description(texts, Graph(1, *said.shape_hw, None, None), path)

    def preprocess(self, images: np.ndarray) -> np.ndarray:
        """Returns the images, uint8 (b, 3, h, w) RGB: the model divides by 255 itself."""
        return images

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the rows of an image uint8 (1, 3, h, w)."""
        outputs = self._network.inference(inputs=[np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))])
        if outputs is None:
            raise UserError("the NPU could not compute the model; the library's own message is above.")
        return self.rows(outputs)


def load(path: Path, device: str = "", half: bool = False) -> RknnBackend:
    """Loads a folder on the board's NPU.

    Raises:
        UserError: rknn-toolkit-lite2 is missing, this is no board or has another chip, or --device was given.
    """
    if device.strip():
        raise UserError(f"--device {device}: an RKNN model runs on the board's NPU alone: leave --device out.")
    without_half(half, "RKNN")
    model, chip = find_part(path, "*.rknn", "compiled model"), read_texts(path).get("chip", "a Rockchip chip")
    lite = require("rknnlite.api", "rknn-toolkit-lite2", f"{path}, which runs on a board with {chip},").RKNNLite()
    if lite.load_rknn(str(model)) or lite.init_runtime():
        raise UserError(
            f"--weights {path}: the NPU does not take it; the library's own message is above. It was compiled for "
            f"{chip}: for another chip, export it with --chip. The board's librknnrt.so must be as new as the toolkit."
        )
    return RknnBackend(path, lite, f"RKNN NPU ({chip})")
