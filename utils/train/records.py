"""What a run writes beside its checkpoints: results.csv, TensorBoard's events, pictures of batches and of the curves.

Of several processes the first alone keeps records.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from utils.data.loader import Batch
from utils.images import read_image
from utils.train.loggers import ResultsCsv, epoch_values, open_tensorboard

BATCH_PICTURES = 3  # how many training batches are drawn


class Records:
    """The records of one run, in its folder."""

    def __init__(self, save_dir: Path, start_epoch: int, plots: bool) -> None:
        """Opens them; what the folder holds from `start_epoch` on is dropped once that epoch is recorded.

        Args:
            save_dir: the run's folder.
            start_epoch: the first epoch that will be recorded.
            plots: whether to draw pictures.
        """
        self.save_dir = save_dir
        self.plots = plots
        self._csv = ResultsCsv(save_dir / "results.csv", start_epoch)
        self._board = open_tensorboard(save_dir, start_epoch)

    def add_batch(self, iteration: int, images: Tensor, batch: Batch, model: nn.Module) -> None:
        """Draws one of the first batches, and the model's graph with the very first.

        Args:
            iteration: number of the batch since the run's start.
            images: (B, 3, H, W) float32 in 0 to 1, as the model had them.
            batch: what they came with.
            model: with `names`; left as it is.
        """
        if not self.plots or iteration >= BATCH_PICTURES:
            return
        from utils.draw import draw_batch

        drawn = (images * 255).round().to(torch.uint8)
        draw_batch(drawn, batch.targets, batch.paths, model.names, self.save_dir / f"train_batch{iteration}.jpg")
        if self._board and iteration == 0:
            self._board.log_graph(model, images)

    def add_epoch(self, epoch: int, items: list[float], validation: list[float], rates: list[float]) -> list[float]:
        """Records an epoch's figures and returns them as one row; see `utils.train.loggers.epoch_values`."""
        values = epoch_values(items, validation, rates)
        self._csv.append(epoch, values)
        if self._board:
            self._board.log_epoch(epoch, values)
        return values

    def finish(self, epoch: int) -> None:
        """Draws the curves of all epochs; all pictures of the folder go to TensorBoard, under the last epoch."""
        if not self.plots:
            return
        from utils.train.plots import plot_results

        plot_results(self.save_dir / "results.csv", self.save_dir / "results.png")
        if self._board:
            pictures = sorted(self.save_dir.glob("*.jpg")) + sorted(self.save_dir.glob("*.png"))
            self._board.log_images({file.name: read_image(file)[..., ::-1] for file in pictures}, epoch)

    def close(self) -> None:
        """Writes what TensorBoard still holds in memory."""
        if self._board:
            self._board.close()
