"""YOLOv5's names that scripts import from `utils.general`: geometry and files from their rooms, and small helpers.

`scale_coords`, `scale_boxes`, `clip_coords` and `clip_boxes` work in place, as scripts expect; those of `utils.boxes`
return new boxes. Nothing here is used by this program itself.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import random
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from utils import boxes, log
from utils.boxes import xywh2xyxy, xywhn2xyxy, xyxy2xywh, xyxy2xywhn
from utils.checkpoint import load_checkpoint, strip_checkpoint
from utils.cli import echo_options
from utils.dataloaders.config import DATASETS_DIR, SPLITS, YAML_SUFFIXES, load_spec
from utils.dataloaders.sampling import class_weights, image_weights
from utils.downloads import download_file, fetch, file_name_of
from utils.errors import UserError, check_img_size, make_divisible
from utils.eval.coco import COCO80_TO_91
from utils.files import ROOT, find_file, increment_path, read_yaml
from utils.log import colorstr
from utils.media.display import display_problem
from utils.nms import non_max_suppression
from utils.torch_utils import time_sync

__all__ = [
    "DATASETS_DIR",
    "LOGGER",
    "Profile",
    "ROOT",
    "check_dataset",
    "check_file",
    "check_img_size",
    "check_imshow",
    "check_requirements",
    "check_suffix",
    "check_yaml",
    "clip_boxes",
    "clip_coords",
    "coco80_to_coco91_class",
    "colorstr",
    "cv2",
    "download",
    "get_latest_run",
    "increment_path",
    "init_seeds",
    "intersect_dicts",
    "labels_to_class_weights",
    "labels_to_image_weights",
    "make_divisible",
    "methods",
    "non_max_suppression",
    "one_cycle",
    "print_args",
    "scale_boxes",
    "scale_coords",
    "strip_optimizer",
    "xywh2xyxy",
    "xywhn2xyxy",
    "xyxy2xywh",
    "xyxy2xywhn",
]

Array = Any  # np.ndarray or torch.Tensor

LOGGER: logging.Logger  # made by `__getattr__`


def __getattr__(name: str) -> Any:
    """Returns LOGGER, set up, to scripts that log by it; importing this module sets up nothing."""
    if name != "LOGGER":
        raise AttributeError(f"module 'utils.general' has no attribute '{name}'")
    log.setup_logging()
    return log.LOGGER


class Profile(contextlib.ContextDecorator):
    """Measures the time of a `with` block or a function, a GPU's work included.

    Attributes:
        t: seconds of all times together.
        dt: seconds of the last time.
    """

    def __init__(self, t: float = 0.0) -> None:
        self.t, self.dt, self.start = t, 0.0, 0.0

    def __enter__(self) -> Profile:
        self.start = time_sync()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.dt = time_sync() - self.start
        self.t += self.dt


def init_seeds(seed: int = 0, deterministic: bool = False) -> None:
    """Seeds the generators of Python, NumPy and torch that are shared by all, for the calling script's own use.

    This program draws from generators of its own (`--seed`), except for new models' weights: those are torch's.

    Args:
        seed: the seed.
        deterministic: let torch choose algorithms that give the same result every time.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def methods(instance: Any) -> list[str]:
    """Returns the names of an object's public methods."""
    return [name for name in dir(instance) if callable(getattr(instance, name)) and not name.startswith("__")]


def print_args(name: str | Mapping[str, Any], opt: Namespace | None = None) -> None:
    """Logs options on one line: `print_args("detect", opt)`, or 7.0's `print_args(vars(opt))`."""
    if isinstance(name, Mapping):
        echo_options(Path(sys.argv[0]).stem, Namespace(**name))
    else:
        echo_options(name, opt)


def intersect_dicts(da: Mapping[str, Tensor], db: Mapping[str, Tensor], exclude: Sequence[str] = ()) -> dict:
    """Returns what of `da` is in `db` too, in the same shape; keys that contain a text of `exclude` are left out."""
    return {
        key: value
        for key, value in da.items()
        if key in db and db[key].shape == value.shape and not any(text in key for text in exclude)
    }


def one_cycle(y1: float = 0.0, y2: float = 1.0, steps: int = 100) -> Callable[[float], float]:
    """Returns a function that goes from y1 to y2 in `steps` along half a cosine."""
    return lambda x: y1 + (y2 - y1) * (1 - math.cos(math.pi * x / steps)) / 2


def labels_to_class_weights(labels: Sequence[np.ndarray], nc: int = 80) -> Tensor:
    """Returns weights (nc,) float64, inverse to how often each class occurs, that sum to 1.

    Args:
        labels: for each image rows (n, 5), the class in column 0.
        nc: number of classes.
    """
    classes = np.concatenate([np.zeros(0), *(rows[:, 0] for rows in labels)])
    return torch.from_numpy(class_weights(classes, nc) / nc)


def labels_to_image_weights(
    labels: Sequence[np.ndarray], nc: int = 80, class_weights: np.ndarray | None = None
) -> np.ndarray:
    """Returns each image's weight (N,), the sum of its labels' class weights; all ones where none has any.

    Args:
        labels: for each image rows (n, 5), the class in column 0.
        nc: number of classes.
        class_weights: (nc,); ones by default.
    """
    weights = np.ones(nc) if class_weights is None else np.asarray(class_weights, dtype=np.float64)
    classes = np.concatenate([np.zeros(0), *(rows[:, 0] for rows in labels)])
    return image_weights(classes, np.cumsum([0, *map(len, labels)]), weights * nc, maps=np.zeros(nc))


def check_imshow(warn: bool = True) -> bool:
    """Tells whether a window can be opened, and warns, saying why, when it cannot."""
    problem = display_problem()
    if problem and warn:
        log.LOGGER.warning(f"WARNING: no windows: {problem}")
    return not problem


def check_requirements(
    requirements: str | Path | Iterable[str] = ROOT / "requirements.txt", exclude: Sequence[str] = ()
) -> bool:
    """Warns of packages that are missing or of the wrong version, with the command that installs them.

    Args:
        requirements: a requirements file; one requirement such as `onnx>=1.12`; or several.
        exclude: names of packages to leave out.

    Returns:
        Whether all are there.

    Raises:
        UserError: no such file.
    """
    from packaging.requirements import Requirement

    if isinstance(requirements, (str, Path)):
        file = Path(requirements)
        if file.suffix == ".txt" and not file.is_file():
            raise UserError(f"{file}: no such requirements file.")
        requirements = file.read_text(encoding="utf-8").splitlines() if file.is_file() else [str(requirements)]
    missing = []
    for line in requirements:
        text = line.partition("#")[0].strip()
        wanted = Requirement(text) if text and not text.startswith("-") else None  # -: an option of pip's
        if not wanted or wanted.name in exclude or wanted.marker and not wanted.marker.evaluate():
            continue
        try:
            met = wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            met = False
        missing += [] if met else [f'"{text}"']
    if missing:
        log.LOGGER.warning(f"WARNING: packages are missing or of another version: pip install {' '.join(missing)}")
    return not missing


def check_suffix(
    file: str | Path | Sequence[str | Path] = "yolov5s.pt", suffix: str | Sequence[str] = (".pt",), msg: str = ""
) -> None:
    """Refuses files of other suffixes than those given; what has none passes.

    Raises:
        UserError: naming the file and the suffixes.
    """
    allowed = [suffix] if isinstance(suffix, str) else list(suffix)
    for name in [file] if isinstance(file, (str, Path)) else file:
        own = Path(name).suffix.lower()
        if any(allowed) and own and own not in allowed:
            raise UserError(f"{msg}{name}: a file ending in {' or '.join(allowed)} is expected.")


def check_file(file: str | Path, suffix: str | Sequence[str] = "") -> str:
    """Returns the path of a file: as given, downloaded from a URL into the working folder, or found by its bare name.

    Raises:
        UserError: another suffix, no such file, or several of that name.
    """
    check_suffix(file, suffix)
    text = str(file)
    if not text or Path(text).exists():
        return text
    if text.startswith(("http://", "https://")):
        target = Path(file_name_of(text))
        return str(target if target.is_file() else download_file(text, target))
    return str(find_file(text))


def check_yaml(file: str | Path, suffix: Sequence[str] = YAML_SUFFIXES) -> str:
    """Returns the path of a YAML file; see `check_file`."""
    return check_file(file, suffix)


def check_dataset(data: str | Path | Mapping[str, Any], autodownload: bool = True) -> dict[str, Any]:
    """Reads a data set YAML and makes sure that its images are there.

    Args:
        data: the file's path or bare name, a zip or a URL of one, or its content.
        autodownload: whether missing data may be fetched from the URLs under `download`.

    Returns:
        The YAML's content, with `path`; `train`, `val` and `test` as absolute paths (text, or a list of several);
        `nc`; and `names`, a list.

    Raises:
        UserError: see `utils.dataloaders.config.load_spec`.
    """
    spec = load_spec(data, download=autodownload)
    content = dict(data) if isinstance(data, Mapping) else dict(read_yaml(spec.source))
    for split in SPLITS:
        places = [str(place) for place in getattr(spec, split)]
        content[split] = places[0] if len(places) == 1 else places or None
    return {**content, "path": spec.root, "nc": spec.nc, "names": list(spec.names.values())}


def download(url: str | Iterable[str], dir: str | Path = ".", unzip: bool = True, threads: int = 1) -> None:
    """Downloads one or several files into a folder; archives are unpacked there and removed with `unzip`.

    Args:
        url: http or https URLs.
        dir: made if need be.
        unzip: whether to unpack.
        threads: how many are downloaded at once.

    Raises:
        UserError: one of them failed.
    """
    folder = Path(dir)

    def get(address: str) -> None:
        if unzip:
            fetch(address, folder)
        else:
            download_file(address, folder / file_name_of(address))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(get, [url] if isinstance(url, str) else url))  # raises what went wrong


def get_latest_run(search_dir: str | Path = ".") -> str:
    """Returns the newest `last*.pt` below a folder; empty where there is none."""
    found = sorted(Path(search_dir).rglob("last*.pt"), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else ""


def strip_optimizer(f: str | Path = "best.pt", s: str | Path = "") -> None:
    """Reduces a checkpoint to what inference needs, in place or into the file `s`.

    Raises:
        UserError: not a checkpoint of this program's, or it cannot be written.
    """
    target = Path(s or f)
    if s:
        load_checkpoint(f)  # before anything is written
        shutil.copyfile(f, target)
    strip_checkpoint(target)
    log.LOGGER.info(f"Optimizer stripped from {f},{f' saved as {s},' if s else ''} {target.stat().st_size / 1e6:.1f}MB")


def coco80_to_coco91_class() -> list[int]:
    """Returns COCO's category number (of 91) for each of the 80 classes."""
    return list(COCO80_TO_91)


def scale_coords(
    img1_shape: Sequence[int], coords: Array, img0_shape: Sequence[int], ratio_pad: Sequence | None = None
) -> Array:
    """Takes corners (n, 4 or more) back from a letterboxed image, in place; see `boxes.scale_boxes`."""
    coords[:, :4] = boxes.scale_boxes(img1_shape, coords[:, :4], img0_shape, ratio_pad)
    return coords


def clip_coords(boxes_xyxy: Array, shape: Sequence[int]) -> None:
    """Limits corners (n, 4 or more) to an image of (height, width), in place."""
    boxes_xyxy[:, :4] = boxes.clip_boxes(boxes_xyxy[:, :4], shape)


scale_boxes, clip_boxes = scale_coords, clip_coords  # 7.0's names
