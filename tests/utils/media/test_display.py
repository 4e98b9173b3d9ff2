"""Windows: why none can be opened, in words; and a real one on a virtual screen, photographed."""

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from utils.media import display

ROOT = Path(__file__).resolve().parents[2]
linux_only = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="X11's display")
# What a process of its own does: OpenCV may end it, and so does the end of its display.
SHOW = """
import sys, time
import numpy as np
from utils.media.display import Window, display_problem
{imports}
assert display_problem() == "", display_problem()
window = Window()
red = np.full((90, 120, 3), (0, 0, 255), np.uint8)
{body}
"""
PHOTOGRAPH = """
green = np.full((50, 80, 3), (0, 255, 0), np.uint8)
def seen(color):
    with mss.MSS() as screen:
        photo = np.asarray(screen.grab(screen.monitors[0]))[..., :3]
    return (photo == color).all(axis=2).any() if color else photo.any()
def within_seconds(condition):
    return any(time.sleep(0.02) or condition() for _ in range(200))
with window:
    print(within_seconds(lambda: window.show("street/0", red) and seen((0, 0, 255))))
    print(within_seconds(lambda: window.show("\u7b2c\u4e8c", green) and seen((0, 255, 0))))
print(within_seconds(lambda: cv2.waitKey(10) and not seen(None)))
"""
PRESS_Q = """
libraries = [ctypes.CDLL(ctypes.util.find_library(name)) for name in ("X11", "Xtst")]
libraries[0].XOpenDisplay.restype = ctypes.c_void_p
server = ctypes.c_void_p(libraries[0].XOpenDisplay(None))
code = libraries[0].XKeysymToKeycode(server, ord("q"))
print(window.show("street/0", red))
cv2.moveWindow("street/0", 0, 0)
for _ in range(200):
    libraries[1].XTestFakeMotionEvent(server, -1, 50, 50, 0)  # keys go to the window below the pointer
    for pressed in (1, 0):
        libraries[1].XTestFakeKeyEvent(server, code, pressed, 0)
    libraries[0].XSync(server, 0)
    time.sleep(0.02)
    if not window.show("street/0", red):
        print("ended")
        break
"""


@pytest.fixture(scope="module")
def virtual_screen():
    """The name of a display that exists: a screen in memory."""
    program = shutil.which("Xvfb")
    if program is None:
        pytest.skip("Xvfb is not installed")
    reading, writing = os.pipe()
    line = [program, "-displayfd", str(writing), "-screen", "0", "640x480x24", "-nolisten", "tcp"]
    server = subprocess.Popen(line, pass_fds=[writing], stderr=subprocess.DEVNULL)
    os.close(writing)
    with os.fdopen(reading) as numbers:
        number = numbers.readline().strip()
    assert number, "Xvfb did not start"
    yield f":{number}"
    server.terminate()
    server.wait(timeout=20)


def show_on(screen, imports, body):
    code = SHOW.format(imports=imports, body=body)
    environment = {**os.environ, "DISPLAY": screen, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@linux_only
def test_a_image_is_on_the_screen(virtual_screen):
    pytest.importorskip("mss")
    done = show_on(virtual_screen, "import cv2, mss", PHOTOGRAPH)
    assert done.stdout == "True\n" * 3, done.stderr
    assert done.stderr == "", "Qt's complaints about fonts are not the user's"


@linux_only
def test_q_ends(virtual_screen):
    if ctypes.util.find_library("Xtst") is None:
        pytest.skip("libXtst is not installed")
    done = show_on(virtual_screen, "import ctypes, ctypes.util, cv2", PRESS_Q)
    assert done.stdout == "True\nended\n", done.stderr


@linux_only
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set)"),
        ({"DISPLAY": "nowhere.invalid:7"}, "the display nowhere.invalid:7 cannot be used ("),
    ],
)
def test_without_a_display_the_reason_is_told(monkeypatch, variables, said):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert display.display_problem().startswith(said)


@linux_only
def test_a_display_that_does_not_answer_is_told(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.setattr(display, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(display, "PROBE_TIMEOUT_S", 0.2)
    assert display.display_problem() == "the display :7 has not answered for 0.2 seconds"


def test_an_opencv_without_windows_is_told(monkeypatch):
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "General:\n  GUI:                           NONE\n")
    assert "install opencv-python in place of opencv-python-headless" in display.display_problem()


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        ("\n  GUI:                           QT5\n    QT:   YES", True),
        ("\n  GUI:                           COCOA\n", True),
        ("\n  GUI:                           WIN32UI\n", True),
        ("\n  GUI:                           NONE\n", False),
        ("\n  Media I/O:\n", False),
    ],
)
def test_the_build_says_whether_there_are_windows(build, expected):
    assert display.has_windows(build) is expected


def test_a_new_window_fits_on_a_screen_and_keeps_the_ratio():
    assert display.window_size(480, 640) == (640, 480)
    assert display.window_size(2160, 3840) == (1280, 720)
    assert display.window_size(1440, 720) == (360, 720)
    assert display.window_size(1, 20000) == (1280, 1)
