"""Data sets: their description, files, labels and caches, the order of an epoch, batches.

YOLOv5's names are found when they are asked for: opening a data set's YAML on a small machine loads no PyTorch.
"""

import importlib
from typing import Any

_HOMES = {
    "utils.images": ("IMG_FORMATS", "VID_FORMATS", "exif_size", "exif_transpose", "letterbox"),
    "utils.dataloaders.paths": ("autosplit", "img2label_paths"),
    "utils.dataloaders.dataset": ("LoadImagesAndLabels",),
    "utils.dataloaders.loader": ("InfiniteDataLoader", "create_dataloader"),
    "utils.media.sources": ("LoadImages", "LoadScreenshots", "LoadStreams", "LoadWebcam"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            return sorted(value) if isinstance(value, frozenset) else value  # scripts join the formats as lists
    raise AttributeError(f"module 'utils.dataloaders' has no attribute '{name}'")
