"""YOLOv5 6.1's name for `utils.dataloaders`."""

from functools import partial

from utils import dataloaders
from utils.compat.lookup import look_up
from utils.dataloaders import *  # noqa: F403 - the same names

__all__ = dataloaders.__all__
__getattr__ = partial(look_up, __name__)
