"""YOLOv5's `utils.torch_utils`: the names that scripts import from there."""

from utils.compat.torch_tools import (
    EarlyStopping,
    ModelEMA,
    copy_attr,
    date_modified,
    de_parallel,
    device_count,
    fuse_conv_and_bn,
    git_describe,
    initialize_weights,
    is_parallel,
    model_info,
    prune,
    scale_img,
    select_device,
    smart_inference_mode,
    sparsity,
    time_sync,
)
from utils.dataloaders.scripts import torch_distributed_zero_first

__all__ = [
    "EarlyStopping",
    "ModelEMA",
    "copy_attr",
    "date_modified",
    "de_parallel",
    "device_count",
    "fuse_conv_and_bn",
    "git_describe",
    "initialize_weights",
    "is_parallel",
    "model_info",
    "prune",
    "scale_img",
    "select_device",
    "smart_inference_mode",
    "sparsity",
    "time_sync",
    "torch_distributed_zero_first",
]
