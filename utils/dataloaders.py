"""The names that scripts import from `utils.dataloaders`, as newer YOLOv5 calls `utils.datasets`."""

from functools import partial

from utils import datasets
from utils.compat.lookup import look_up
from utils.datasets import *  # noqa: F403 - the same names

__all__ = datasets.__all__
__getattr__ = partial(look_up, __name__)
