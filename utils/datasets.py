"""YOLOv5's `utils.datasets`: the names that scripts import from there."""

from functools import partial

from utils.compat.augment import letterbox
from utils.compat.loaders import IMG_FORMATS, VID_FORMATS, LoadImages, LoadScreenshots, LoadStreams, LoadWebcam
from utils.compat.lookup import look_up
from utils.compat.training_data import (
    InfiniteDataLoader,
    LoadImagesAndLabels,
    create_dataloader,
    exif_size,
    exif_transpose,
    img2label_paths,
)
from utils.data.paths import autosplit

__all__ = [
    "IMG_FORMATS",
    "InfiniteDataLoader",
    "LoadImages",
    "LoadImagesAndLabels",
    "LoadScreenshots",
    "LoadStreams",
    "LoadWebcam",
    "VID_FORMATS",
    "autosplit",
    "create_dataloader",
    "exif_size",
    "exif_transpose",
    "img2label_paths",
    "letterbox",
]

__getattr__ = partial(look_up, __name__)
