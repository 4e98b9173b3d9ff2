"""Frames of images and videos, damaged ones among them, and of the screen."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image, features

from utils.errors import UserError
from utils.images import check_image
from utils.media.capture import ScreenCapture, is_screen, parse_screen, read_frames
from utils.media.sources import find_sources, open_source

FRAMES = 40


def noise(seed: int = 0, width: int = 64, height: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def write_video(path: Path, codec: str = "mp4v", frames: int = FRAMES, fps: float = 25) -> Path:
    """A noisy texture that moves, so that every frame differs and takes room in the file."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (96, 64))
    texture = noise(1, 96, 64)
    for index in range(frames):
        writer.write(np.roll(texture, 2 * index, axis=1))
    writer.release()
    return path


def encode(path: Path, codec: str, **options: str) -> Path:
    """The same texture in what OpenCV does not write."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(FRAMES):
            image = np.roll(noise(1, 96, 64), 2 * index, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode())
    return path


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_as_other_images(tmp_path):
    Image.fromarray(noise(1, 96, 64)[:, :, ::-1]).resize((48, 32)).save(tmp_path / "a.avif", quality=95)
    data = (tmp_path / "a.avif").read_bytes()
    (tmp_path / "cut.avif").write_bytes(data[: len(data) // 2])
    whole, damaged = read_frames(find_sources(tmp_path))
    assert whole.image.shape == (32, 48, 3) and not whole.error
    assert damaged.error
    assert check_image(tmp_path / "a.avif") == (48, 32, "avif")


@pytest.mark.parametrize(
    ("name", "codec"), [("a.webm", "libvpx"), ("a.ts", "mpeg2video"), ("a.mts", "libx264"), ("a.3gp", "mpeg4")]
)
def test_videos_of_other_containers_are_read_whole(tmp_path, name, codec):
    path = encode(tmp_path / name, codec)
    frames = list(read_frames(find_sources(path)))
    assert [frame.error for frame in frames] == [""] * FRAMES
    assert [frame.time for frame in frames] == pytest.approx([n / 25 for n in range(FRAMES)], abs=2e-3)


def test_images_of_every_kind_arrive_as_8_bit_bgr(tmp_path):
    rgb = Image.fromarray(noise()[:, :, ::-1])
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    cv2.imwrite(str(tmp_path / "deep.png"), noise().astype(np.uint16) * 257)
    rgb.save(tmp_path / "moving.webp", save_all=True, append_images=[rgb.rotate(180)])
    frames = list(read_frames(find_sources(tmp_path)))
    assert [frame.error for frame in frames] == [""] * 5
    assert all(frame.image.shape == (48, 64, 3) and frame.image.dtype == np.uint8 for frame in frames)


def test_exif_orientation_is_applied_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise()).save(tmp_path / "turned.jpg", exif=exif)
    (frame,) = read_frames(find_sources(tmp_path / "turned.jpg"))
    assert frame.image.shape == (64, 48, 3)


def test_damaged_images_arrive_with_the_reason_and_the_others_whole(tmp_path):
    cv2.imwrite(str(tmp_path / "good.jpg"), noise())
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    cv2.imwrite(str(tmp_path / "strip.png"), noise(width=3000, height=1))
    frames = {Path(frame.path).name: frame for frame in read_frames(find_sources(tmp_path))}
    assert frames["good.jpg"].error == "" and frames["good.jpg"].image is not None
    for name, reason in (("cut.jpg", "truncated"), ("empty.png", "empty"), ("text.jpg", ""), ("strip.png", "3000x1")):
        assert reason in frames[name].error != ""
        assert frames[name].image is None
    assert frames["cut.jpg"].label.startswith("image 1/5 ")


def test_video_frames_are_numbered_from_1_with_the_source_s_rate(tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames=7, fps=12.5)
    frames = list(read_frames([str(path)]))
    assert [frame.number for frame in frames] == list(range(1, 8))
    assert {(frame.count, frame.fps, frame.image.shape) for frame in frames} == {(7, 12.5, (64, 96, 3))}
    assert frames[2].label == f"video 1/1 (3/7) {path}"


def test_frames_say_when_their_video_shows_them(tmp_path):
    even = write_video(tmp_path / "clip.mp4", frames=7, fps=12.5)
    assert [frame.time for frame in read_frames([str(even)], vid_stride=2)] == pytest.approx([0, 0.16, 0.32, 0.48])
    first, *others = [Image.fromarray(noise(seed)) for seed in range(4)]
    first.save(tmp_path / "uneven.gif", save_all=True, append_images=others, duration=[100, 500, 200, 100])
    assert [frame.time for frame in read_frames([str(tmp_path / "uneven.gif")])] == pytest.approx([0, 0.1, 0.6, 0.8])


def test_times_rise_by_a_frame_where_the_file_states_none(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", frames=4, fps=12.5)
    open_video = cv2.VideoCapture

    class Timeless:
        def __init__(self, path: str) -> None:
            self.video = open_video(path)
            self.grab, self.retrieve, self.release = self.video.grab, self.video.retrieve, self.video.release

        def get(self, key: int) -> float:
            return 0.0 if key == cv2.CAP_PROP_POS_MSEC else self.video.get(key)

    monkeypatch.setattr(cv2, "VideoCapture", Timeless)
    assert [frame.time for frame in read_frames([str(path)])] == pytest.approx([0, 0.08, 0.16, 0.24])


def test_vid_stride_takes_every_so_many_frames_under_their_own_numbers(tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames=8)
    every, third = list(read_frames([str(path)])), list(read_frames([str(path)], vid_stride=3))
    assert [frame.number for frame in third] == [1, 4, 7]
    np.testing.assert_array_equal(third[1].image, every[3].image)


def test_animated_gif_is_read_as_a_video(tmp_path):
    images = [Image.fromarray(noise(seed)) for seed in range(3)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    assert [frame.error for frame in read_frames([str(tmp_path / "a.gif")])] == ["", "", ""]


@pytest.mark.parametrize("content", [b"", b"no video"])
def test_file_that_is_no_video_arrives_as_one_damaged_frame(tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    (frame,) = read_frames([str(tmp_path / "bad.mp4")])
    assert frame.image is None
    assert "cannot be opened as a video" in frame.error


def test_video_that_ends_early_is_read_to_its_end_and_the_shortage_is_told(tmp_path):
    data = write_video(tmp_path / "clip.avi", "MJPG").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) * 6 // 10])
    *frames, last = read_frames([str(tmp_path / "cut.avi")])
    assert 15 <= len(frames) <= 30
    assert all(frame.image is not None for frame in frames)
    assert last.error == f"{FRAMES - len(frames)} of {FRAMES} declared frames are missing or cannot be decoded"


def cut(path: Path, first: int, last: int) -> Path:
    """Hides all frames but these (from 1), as programs do that cut without encoding anew; at 25 a second."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # the edits' number is before it, then a duration in ms and a beginning in 1/12800 s
    data[at : at + 8] = struct.pack(">II", (last - first + 1) * 40, (first - 1) * 512)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("first", "last"), [(1, 40), (11, 40), (1, 30), (18, 33)])
def test_frames_that_a_video_hides_are_not_missing(tmp_path, first, last):
    path = write_video(tmp_path / "clip.mp4")
    whole = [frame.image for frame in read_frames([str(path)])]
    frames = list(read_frames([str(cut(path, first, last))]))
    assert [frame.error for frame in frames] == [""] * (last - first + 1)
    assert all(map(np.array_equal, [frame.image for frame in frames], whole[first - 1 : last]))


def test_frames_that_a_video_shows_and_lacks_are_told_where_it_hides_others(tmp_path):
    path = cut(write_video(tmp_path / "clip.mp4", frames=100), 21, 90)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) * 3 // 5] = bytes(len(data) * 3 // 5 - len(data) // 2)
    path.write_bytes(data)
    *frames, last = read_frames([str(path)])
    assert 30 < len(frames) < 70
    assert last.error == f"{70 - len(frames)} of 70 declared frames are missing or cannot be decoded"


def test_frames_that_are_stored_in_another_order_than_shown_are_hidden_by_their_times(tmp_path):
    encode(tmp_path / "clip.mp4", "libx264", bf="3", g="20")
    path = cut(tmp_path / "clip.mp4", 1, 12)  # times begin with two frames of delay
    frames = list(read_frames([str(path)]))
    assert b"ctts" in path.read_bytes()
    assert [frame.error for frame in frames] == [""] * 10


@pytest.mark.parametrize("vid_stride", [1, 2])
def test_frames_behind_a_damaged_stretch_are_read_once_and_the_lost_ones_counted(tmp_path, vid_stride):
    path = write_video(tmp_path / "clip.mp4", frames=100)
    whole = {frame.number: frame.image for frame in read_frames([str(path)], vid_stride)}
    data = bytearray(path.read_bytes())
    damage = slice(len(data) // 3, len(data) * 2 // 5)
    data[damage] = bytes(damage.stop - damage.start)
    path.write_bytes(data)
    *frames, last = read_frames([str(path)], vid_stride)
    numbers = [frame.number for frame in frames]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 1
    assert numbers[-1] == max(whole)
    np.testing.assert_array_equal(frames[-1].image, whole[numbers[-1]])
    lost = 100 - len(set(numbers)) * vid_stride
    assert 7 <= lost < 60
    assert abs(int(last.error.split()[0]) - lost) <= 2 * (vid_stride - 1)
    assert last.error.endswith(" of 100 declared frames are missing or cannot be decoded")


MONITORS = [
    {"left": 0, "top": 0, "width": 300, "height": 100},
    {"left": 0, "top": 0, "width": 100, "height": 100},
    {"left": 100, "top": 20, "width": 200, "height": 80},
]


class ScreenShotError(Exception):
    pass


class FakeDisplay:
    """A desktop whose blue is the column and whose green is the row; it refuses after three images."""

    def __init__(self) -> None:
        self.monitors, self.left = MONITORS, 3

    def grab(self, place: dict[str, int]) -> np.ndarray:
        if not self.left:
            raise ScreenShotError("gone")
        self.left -= 1
        image = np.full((place["height"], place["width"], 4), 255, np.uint8)
        image[:, :, 0] = (place["left"] + np.arange(place["width"]))[None] % 256
        image[:, :, 1] = (place["top"] + np.arange(place["height"]))[:, None]
        return image

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
def test_real_display_gives_images_of_the_size_asked_for(monkeypatch):
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
