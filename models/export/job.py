"""What an exporter is given: one rewritten model, what is said of it, and where files go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.backends.metadata import Metadata
from models.decode import RawMaps, head_for
from models.deploy import InferenceModel
from models.export.formats import Format


@dataclass(frozen=True)
class ExportJob:
    """One checkpoint to be exported to one format.

    Attributes:
        format: the line of the table of formats; tells apart those that one module writes.
        weights: the checkpoint; exports are written beside it.
        source: the trained `models.yolo.Model` as loaded, float32, on the CPU, its batch norm not folded.
        model: the same rewritten for inference, float32, on the CPU, with the decoder for raw rows of any image size.
        metadata: what goes into the file.
        options: of export.py, checked: `imgsz` is [h, w], and limits that were not given have their defaults.
        device: where formats that are made on a device are made: TorchScript and TensorRT.
        calibration: makes up to n letterboxed training images of `--data`, each uint8 (1, 3, h, w) RGB, for --int8.
    """

    format: Format
    weights: Path
    source: nn.Module
    model: InferenceModel
    metadata: Metadata
    options: argparse.Namespace
    device: torch.device
    calibration: Callable[[int], Sequence[np.ndarray]]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, channels, height, width of the example input."""
        return (self.metadata.batch, self.source.yaml["ch"], *self.metadata.shape_hw)

    @property
    def run_device(self) -> str:
        """The device to run the result on, as `--device` names it."""
        return str(self.device) if self.format.gpu else "cpu"

    def path(self, suffix: str) -> Path:
        """Returns the file or folder beside the checkpoint with this suffix."""
        return self.weights.with_name(self.weights.stem + suffix)

    def example(self) -> Tensor:
        """Returns a blank input, float32 `shape`."""
        return torch.zeros(self.shape)

    def head(self, normalised: bool = False) -> nn.Module:
        """Returns what follows the trunk as the options ask: raw maps, rows, or detections chosen in the graph.

        Args:
            normalised: boxes as fractions of the image's sides.
        """
        detect, metadata = self.source.detect, self.metadata
        if self.options.train:
            return RawMaps.of(detect)
        shape_hw = None if metadata.dynamic else metadata.shape_hw
        return head_for(detect, shape_hw, metadata.nms, self.options.topk_per_class, normalised)

    def with_head(self, head: nn.Module) -> InferenceModel:
        """Returns the rewritten model with another head, in evaluation mode; the trunk is shared."""
        return InferenceModel(self.model.trunk, head, self.model.names, self.model.stride).eval()
