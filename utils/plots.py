"""YOLOv5's `utils.plots`: the names that scripts import from there."""

from functools import partial

from utils.compat.lookup import look_up
from utils.compat.plots import (
    Annotator,
    Colors,
    colors,
    feature_visualization,
    output_to_target,
    plot_images,
    plot_labels,
    plot_results,
    save_one_box,
)

__all__ = [
    "Annotator",
    "Colors",
    "colors",
    "feature_visualization",
    "output_to_target",
    "plot_images",
    "plot_labels",
    "plot_results",
    "save_one_box",
]

__getattr__ = partial(look_up, __name__)
