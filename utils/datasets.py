"""YOLOv5 6.1's name for `utils.dataloaders`."""

from utils import dataloaders
from utils.dataloaders import *  # noqa: F403 - the same names

__all__ = dataloaders.__all__
