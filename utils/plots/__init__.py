"""Drawing: boxes on images (`boxes`), curves of a training run (`training`) and of an evaluation (`evaluation`)."""

from utils.plots.boxes import (
    Annotator,
    Colors,
    colors,
    feature_visualization,
    output_to_target,
    plot_images,
    save_one_box,
)
from utils.plots.evaluation import plot_val_study
from utils.plots.training import plot_evolve, plot_labels, plot_results

__all__ = [
    "Annotator",
    "Colors",
    "colors",
    "feature_visualization",
    "output_to_target",
    "plot_evolve",
    "plot_images",
    "plot_labels",
    "plot_results",
    "plot_val_study",
    "save_one_box",
]
