"""Small helpers by YOLOv5 6.1's signatures: text, time, seeds, numbers, weights of classes."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import errors as checks
from utils.cli import echo_options
from utils.compat.torch_tools import time_sync
from utils.dataloaders.sampling import class_weights as weights_by_class
from utils.dataloaders.sampling import image_weights
from utils.log import on_terminal
from utils.train.optim import lr_factor

NUM_THREADS = min(8, max(1, (os.cpu_count() or 1) - 1))
_COLORS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_STYLES = {
    **{color: 30 + code for code, color in enumerate(_COLORS)},
    **{f"bright_{color}": 90 + code for code, color in enumerate(_COLORS)},
    **{"end": 0, "bold": 1, "underline": 4},
}
_SPECIAL_CHARACTERS = re.compile(r"[|@#!¡·$€%&()=?¿^*;:,¨´><+]")
_CHINESE = re.compile("[\u4e00-\u9fff]")


class Profile(contextlib.ContextDecorator):
    """Measures the time of a `with` block or a function, a GPU's work included.

    Attributes:
        t: seconds of all times together.
        dt: seconds of the last time.
    """

    def __init__(self, t: float = 0.0) -> None:
        """Starts from `t` seconds."""
        self.t, self.dt, self.start = t, 0.0, 0.0

    def __enter__(self) -> Profile:
        """Starts the clock."""
        self.start = time_sync()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stops the clock."""
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


def is_ascii(s: Any = "") -> bool:
    """Tells whether a text, or a list's texts, are made of ASCII characters."""
    return str(s).isascii()


def is_chinese(s: Any = "") -> bool:
    """Tells whether Chinese characters are in a text."""
    return _CHINESE.search(str(s)) is not None


def emojis(str: str = "") -> str:
    """Returns a text, on Windows without the characters that its consoles cannot show."""
    return str.encode().decode("ascii", "ignore") if platform.system() == "Windows" else str


def colorstr(*input: str) -> str:
    """Returns the last text in the styles before it, or in blue and bold: `colorstr("red", "underline", "text")`.

    Where stderr is not a terminal, unchanged.
    """
    *styles, text = input
    if not on_terminal():
        return str(text)
    codes = "".join(f"\033[{_STYLES[style]}m" for style in styles or ("blue", "bold"))
    return f"{codes}{text}\033[0m"


def clean_str(s: str) -> str:
    """Returns a text with `_` in place of special characters, fit for a file name or a window's title."""
    return _SPECIAL_CHARACTERS.sub("_", s)


def make_divisible(x: float, divisor: int | Tensor) -> int:
    """Returns the smallest multiple of `divisor` (of a tensor, its largest value) that is not below `x`."""
    return checks.round_up(x, int(divisor.max()) if isinstance(divisor, Tensor) else divisor)


def check_img_size(imgsz: int | Sequence[int], s: int | Tensor = 32, floor: int = 0) -> int | list[int]:
    """Rounds image sides up to multiples of the stride `s`, at least `floor`; warns when that changes them."""
    return checks.check_image_size(imgsz, int(s), floor)


def one_cycle(y1: float = 0.0, y2: float = 1.0, steps: int = 100) -> Callable[[float], float]:
    """Returns a function that goes from y1 to y2 in `steps` along half a cosine."""
    return lambda x: y1 + (y2 - y1) * (1 - lr_factor(x, steps, 0.0, cosine=True))


def labels_to_class_weights(labels: Sequence[np.ndarray], nc: int = 80) -> Tensor:
    """Returns weights (nc,) float64, inverse to how often each class occurs, that sum to 1.

    Args:
        labels: for each image rows (n, 5), the class in column 0.
        nc: number of classes.
    """
    classes = np.concatenate([np.zeros(0), *(rows[:, 0] for rows in labels)])
    return torch.from_numpy(weights_by_class(classes, nc) / nc)


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
    offsets = np.cumsum([0, *map(len, labels)])
    return image_weights(classes, offsets, weights * nc, maps=np.zeros(nc))
