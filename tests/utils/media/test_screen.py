"""The screen as an input: what the text means, where the region lies, and one look at a real display."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from utils.errors import UserError
from utils.media.capture import ScreenCapture, is_screen, parse_screen
from utils.media.sources import open_source

MONITORS = [
    {"left": 0, "top": 0, "width": 300, "height": 100},
    {"left": 0, "top": 0, "width": 100, "height": 100},
    {"left": 100, "top": 20, "width": 200, "height": 80},
]


class ScreenShotError(Exception):
    pass


class FakeDisplay:
    """A desktop whose blue is the column and whose green is the row; it refuses after three pictures."""

    def __init__(self) -> None:
        self.monitors, self.left = MONITORS, 3

    def grab(self, place: dict[str, int]) -> np.ndarray:
        if not self.left:
            raise ScreenShotError("gone")
        self.left -= 1
        picture = np.full((place["height"], place["width"], 4), 255, np.uint8)
        picture[:, :, 0] = (place["left"] + np.arange(place["width"]))[None] % 256
        picture[:, :, 1] = (place["top"] + np.arange(place["height"]))[:, None]
        return picture

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture
def display(monkeypatch):
    exceptions = SimpleNamespace(ScreenShotError=ScreenShotError)
    monkeypatch.setitem(sys.modules, "mss.exception", exceptions)
    monkeypatch.setitem(sys.modules, "mss", SimpleNamespace(MSS=FakeDisplay, exception=exceptions))


@pytest.mark.parametrize(
    ("source", "area"),
    [
        ("screen", (0, ())),
        ("Screen 2", (2, ())),
        ("screen 10 20 30 40", (0, (10, 20, 30, 40))),
        ("screen 1 10 20 30 40", (1, (10, 20, 30, 40))),
    ],
)
def test_numbers_are_a_monitor_a_region_or_both(source, area):
    assert is_screen(source)
    assert parse_screen(source) == area


@pytest.mark.parametrize("source", ["screen 1 2", "screen 1 2 3", "screen 1 2 3 4 5 6", "screen -1", "screen 0 0 0 9"])
def test_other_numbers_are_refused_with_the_usage(source):
    with pytest.raises(UserError, match=r"screen \[NUMBER\] \[LEFT TOP WIDTH HEIGHT\]"):
        parse_screen(source)


@pytest.mark.parametrize(
    "source", ["screen --1", "screen 1.5", "screen 0x1", "screen ٣", f"screen {'9' * 5000}", "screens"]
)
def test_what_is_no_number_makes_no_screen(source):
    assert not is_screen(source)
    with pytest.raises(UserError, match="--source 'screen"):
        open_source(source)


@pytest.mark.parametrize(
    ("area", "corner", "shape"),
    [
        ((), (0, 0), (100, 300, 3)),
        ((2,), (100, 20), (80, 200, 3)),
        ((2, (5, 6, 70, 50)), (105, 26), (50, 70, 3)),
    ],
)
def test_region_is_counted_from_its_monitor_and_comes_as_bgr(display, area, corner, shape):
    capture = ScreenCapture(*area)
    assert capture.grab()
    image = capture.retrieve()
    assert (image.shape, image.dtype, image.flags.c_contiguous) == (shape, np.uint8, True)
    assert tuple(image[0, 0]) == (*corner, 255)
    assert tuple(image[-1, -1]) == ((corner[0] + shape[1] - 1) % 256, corner[1] + shape[0] - 1, 255)


@pytest.mark.parametrize(
    ("area", "message"),
    [
        ((3,), "there are 2 monitors, numbered from 1"),
        ((1, (50, 0, 51, 10)), "does not lie within monitor 1, which is 100x100 px"),
        ((1, (-1, 0, 5, 10)), "does not lie within"),
    ],
)
def test_what_is_not_on_the_desktop_is_refused(display, area, message):
    with pytest.raises(UserError, match=message):
        ScreenCapture(*area)


def test_screen_is_read_as_a_live_source_until_it_refuses(display):
    source = open_source("screen 2")
    *frames, last = [frame for (frame,) in source.read()]
    source.close()
    assert 1 <= len(frames) <= 3
    assert (last.error, last.image) == ("ended: it gives no frames any more", None)
    assert {(frame.path, frame.live, frame.image.shape) for frame in frames} == {("screen_2", True, (80, 200, 3))}
    assert source.report()[0].endswith("ended: it gives no frames any more")


def test_missing_library_is_told_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mss", None)
    with pytest.raises(UserError, match="--source screen needs the library mss: pip install mss"):
        open_source("screen")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there always is a display")
def test_absent_display_is_told(monkeypatch):
    pytest.importorskip("mss")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError, match="it cannot be read here.*Is there a display"):
        open_source("screen")


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="needs Xvfb, a display without a screen")
def test_real_display_gives_pictures_of_the_size_asked_for(monkeypatch):
    pytest.importorskip("mss")
    reader, writer = os.pipe()
    command = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "320x240x24", "-nolisten", "tcp"]
    with subprocess.Popen(command, pass_fds=(writer,), stderr=subprocess.DEVNULL) as server:
        os.close(writer)
        try:
            with os.fdopen(reader) as numbers:  # written once the display is ready
                monkeypatch.setenv("DISPLAY", f":{numbers.readline().strip()}")
            source = open_source("screen 0 16 8 200 100")
            (frame,) = next(source.read())
            source.close()
            assert frame.image.shape == (100, 200, 3)
        finally:
            server.terminate()
