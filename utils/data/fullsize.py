"""Pictures in their full size for evaluation, one at a time: what is cut into tiles is not shrunk before.

Labels, EXIF orientation and worker processes are those of the usual loader. Not here: cutting (`utils.tiles`).
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch.utils.data import Dataset

from utils.data.dataset import Item, ShapeInfo
from utils.data.images_cache import ImageFiles
from utils.data.loader import DetectionLoader
from utils.data.order import SampleKey
from utils.data.table import LabelTable


class FullSizeFiles(ImageFiles):
    """The image files themselves, decoded at each call, never resized."""

    def __init__(self, table: LabelTable) -> None:
        """Reads the images of `table`."""
        super().__init__(table, int(table.sizes_wh.max(initial=1)), augment=False)

    def size_wh(self, index: int) -> tuple[int, int]:
        """Returns the (width, height) of image `index`."""
        width, height = self.table.sizes_wh[index].tolist()
        return width, height


class FullSizeDataset(Dataset):
    """Whole pictures with their boxes, in the table's order.

    Attributes:
        table: images and labels.
        batch_size: 1, since pictures differ in size.
        seed: of no effect, as nothing is random.
    """

    batch_size = 1
    seed = 0

    def __init__(self, table: LabelTable) -> None:
        """Makes a data set of N images."""
        self.table = table
        self._files = FullSizeFiles(table)

    def __len__(self) -> int:
        """Returns N."""
        return len(self.table)

    def __getitem__(self, key: SampleKey) -> Item:
        """Returns the item of a key.

        Raises:
            UserError: an image is gone or was damaged since the labels were read.
        """
        image = self._files.read(key.index)
        labels = self.table.labels(key.index)
        targets = np.concatenate((np.zeros((len(labels), 1), np.float32), labels), 1)
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        shape = ShapeInfo(image.shape[:2], (1.0, 1.0), (0.0, 0.0))
        return Item(torch.from_numpy(planes), torch.from_numpy(targets), self.table.image_paths[key.index], shape, key)


def full_size_loader(table: LabelTable, workers: int) -> DetectionLoader:
    """Makes a loader whose batches are single pictures (1, 3, h, w), each in its own size.

    Args:
        table: images and labels.
        workers: processes wanted; at most the machine's cores are started.
    """
    workers = min(os.cpu_count() or 1, workers)
    return DetectionLoader(FullSizeDataset(table), workers=workers, shuffle=False, quad=False)
