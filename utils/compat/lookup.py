"""Names that are found when they are asked for, and names of YOLOv5's that are left out, each with the reason.

`look_up` stands as `__getattr__` in the modules that scripts import from. `docs/imports.md` has the same lists.
"""

from __future__ import annotations

from typing import Any

from utils.compat.environment import script_logger, user_config_dir

_NO_FONTS = "nothing is fetched for drawing; text needs no font file"
_NO_COPY = "no recipe calls it"
_DRAW_YOURSELF = "draw it from the data that you have; training and validation write their own pictures"

LEFT_OUT = {
    "utils.activations": {
        "FReLU": "no model here uses it",
        "AconC": "no model here uses it",
        "MetaAconC": "no model here uses it",
    },
    "utils.augmentations": {
        "Albumentations": "training adds its transforms by itself where the library is installed",
        "replicate": _NO_COPY,
        "copy_paste": "utils.augmentations.mosaic does it while it composes a mosaic",
        "cutout": _NO_COPY,
        "box_candidates": "utils.augmentations.warp.box_candidates has fixed limits and boxes in rows",
    },
    "utils.datasets": {
        "get_hash": "utils.dataloaders.labels.cache_key looks at times too, so that no edit goes unseen",
        "create_folder": "it empties an existing folder",
        "flatten_recursive": "shutil.copytree and pathlib do it",
        "extract_boxes": "detect.py --save-crop cuts objects out",
        "verify_image_label": "utils.dataloaders.labels.scan_images checks images and labels",
        "dataset_stats": "utils.dataloaders.labels.load_labels returns a table that holds every count",
    },
    "utils.downloads": {
        "gdrive_download": "Google Drive's pages change too often; download in a browser",
        "gsutil_getsize": "it runs what a command prints",
    },
    "utils.general": {
        "FONT": _NO_FONTS,
        "check_font": _NO_FONTS,
        "check_git_status": "nothing goes online unless you ask for it",
        "Timeout": "signals work in the main thread of Unix alone",
        "try_except": "it hides errors",
        "print_mutation": "evolution is not part of this program",
        "apply_classifier": "no script calls it; crop with utils.plots.save_one_box and classify the crops",
    },
    "utils.metrics": {
        "plot_pr_curve": "ap_per_class(plot=True) draws all four curves",
        "plot_mc_curve": "ap_per_class(plot=True) draws all four curves",
    },
    "utils.plots": {
        "check_pil_font": _NO_FONTS,
        "hist2d": "numpy.histogram2d does it",
        "butter_lowpass_filtfilt": "scipy.signal does it",
        "plot_lr_scheduler": _DRAW_YOURSELF,
        "plot_val_txt": _DRAW_YOURSELF,
        "plot_targets_txt": _DRAW_YOURSELF,
        "plot_val_study": "val.py --task study draws it",
        "plot_evolve": "evolution is not part of this program",
        "profile_idetection": "it reads the logs of a phone app that is not part of this program",
    },
    "utils.torch_utils": {
        "profile": "torch.utils.benchmark does it; models/yolo.py --profile times a model's layers",
        "find_modules": "it reads an attribute that no model has",
    },
}
LEFT_OUT["utils.dataloaders"] = LEFT_OUT["utils.datasets"]


ON_DEMAND = {"utils.general": {"CONFIG_DIR": user_config_dir, "LOGGER": script_logger}}


def look_up(module: str, name: str) -> Any:
    """Returns a module's name that is made on demand.

    Raises:
        ImportError: the name is left out; says why.
        AttributeError: any other name.
    """
    make = ON_DEMAND.get(module, {}).get(name)
    if make is not None:
        return make()
    reason = LEFT_OUT[module].get(name)
    if reason is not None:
        raise ImportError(f"{module}.{name} is left out: {reason} (docs/imports.md).")
    raise AttributeError(f"module '{module}' has no attribute '{name}'")
