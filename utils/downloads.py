"""YOLOv5's `utils.downloads`: the names that scripts import from there."""

from functools import partial

from utils.compat.files import attempt_download, safe_download
from utils.compat.lookup import look_up

__all__ = [
    "attempt_download",
    "safe_download",
]

__getattr__ = partial(look_up, __name__)
