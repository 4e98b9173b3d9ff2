"""YOLOv5's `utils.downloads`: the names that scripts import from there."""

from utils.compat.files import attempt_download, safe_download

__all__ = [
    "attempt_download",
    "safe_download",
]
