"""Images in windows on the screen: whether one can be opened at all, and showing them.

OpenCV ends the whole process when it is asked for a window and there is no display, so `display_problem` is asked
first. Not here: capturing the screen, drawing boxes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import cv2
import numpy as np

from utils.errors import printable

PROBE = "import cv2; cv2.namedWindow('probe', cv2.WINDOW_NORMAL); cv2.destroyAllWindows()"
PROBE_TIMEOUT_S = 30  # an X server at the far end of a network may take its time
LARGEST_PX = (1280, 720)  # width and height of a new window; the user may enlarge it
QUIT_KEY = "q"


def display_problem() -> str:
    """Says in words why no window can be opened here; empty where one can.

    Under Linux a process of its own opens and closes one (a fifth of a second): only that shows that the display
    answers, that it lets this user in, and that OpenCV's window library loads.
    """
    if not has_windows(cv2.getBuildInformation()):
        return "this OpenCV was built without windows; install opencv-python in place of opencv-python-headless"
    if sys.platform in ("win32", "darwin"):
        return ""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set)"
    shown = f"the display {os.environ.get('DISPLAY') or os.environ['WAYLAND_DISPLAY']}"
    try:
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"{shown} has not answered for {PROBE_TIMEOUT_S} seconds"
    if probe.returncode:
        said = [line.strip() for line in probe.stderr.splitlines() if line.strip() and "QFontDatabase" not in line]
        return f"{shown} cannot be used" + (f" ({said[0]})" if said else "")
    return ""


def has_windows(build_information: str) -> bool:
    """Reads from OpenCV's build information whether it can open windows."""
    library = re.search(r"^\s*GUI:\s*(\S+)", build_information, re.MULTILINE)
    return library is not None and library[1] != "NONE"


class Window:
    """One window for every title, resizable.

    All calls must come from one thread, on macOS from the main thread. Make one only where `display_problem` is empty;
    as a context manager it closes its windows at the end.
    """

    def __init__(self) -> None:
        self._titles: set[str] = set()
        os.environ.setdefault("QT_LOGGING_RULES", "default.warning=false")  # OpenCV's wheels come without Qt's fonts

    def show(self, title: str, image: np.ndarray) -> bool:
        """Shows `image` (h, w, 3), BGR uint8, in the window of that title, opened if there is none yet.

        Returns:
            Whether to go on: False once the user has pressed `q` in any of the windows.
        """
        title = printable(title)
        if title not in self._titles:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
            cv2.resizeWindow(title, *window_size(*image.shape[:2]))
            self._titles.add(title)
        cv2.imshow(title, image)
        return cv2.waitKey(1) & 0xFF != ord(QUIT_KEY)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the windows that were opened."""
        for title in self._titles:
            cv2.destroyWindow(title)
        self._titles.clear()


def window_size(height: int, width: int) -> tuple[int, int]:
    """Returns (width, height) in pixels of a window for an image: its own, or scaled down to `LARGEST_PX`."""
    scale = min(1.0, LARGEST_PX[0] / width, LARGEST_PX[1] / height)
    return max(round(width * scale), 1), max(round(height * scale), 1)
