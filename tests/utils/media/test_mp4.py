"""The index of a written mp4: the frames' own times, and what shows that a file is not whole."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.media.mp4 import Mp4Error, frames_shown, set_times
from utils.media.sources import read_frames


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Six frames at 25 a second."""
    path = tmp_path / "a.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 48))
    for index in range(6):
        writer.write(np.roll(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8), index, axis=1))
    writer.release()
    return path


def times(path: Path) -> list[float]:
    return [frame.time for frame in read_frames([str(path)])]


def test_every_frame_is_shown_at_its_own_time(video):
    images = [frame.image for frame in read_frames([str(video)])]
    set_times(video, [7.0, 7.04, 7.5, 8.0, 60.0, 60.04], 100.0)
    assert times(video) == pytest.approx([0, 0.04, 0.5, 1, 53, 53.04])
    assert all(map(np.array_equal, images, [frame.image for frame in read_frames([str(video)])]))
    opened = cv2.VideoCapture(str(video))
    assert opened.get(cv2.CAP_PROP_FRAME_COUNT) / opened.get(cv2.CAP_PROP_FPS) == pytest.approx(93)


def test_times_of_the_rate_leave_the_index_as_it_was(video):
    before = video.read_bytes()
    set_times(video, np.arange(6) / 25, 6 / 25)
    at, old = before.index(b"moov") - 4, before[before.index(b"moov") - 4 :]
    length = struct.unpack(">I", old[:4])[0]
    assert video.read_bytes()[-length:] == old[:length] and video.read_bytes()[:at] == before[:at]


def test_absurd_times_leave_a_video_that_plays(video):
    set_times(video, [0, 0.04, 1e9, 2e9, 3e9, 4e9], 1e12)
    shown = times(video)
    assert len(shown) == 6 and shown[1] == pytest.approx(0.04) and shown == sorted(set(shown))


def test_long_videos_have_durations_of_eight_bytes(video):
    data = video.read_bytes()
    at = data.index(b"mdhd") + 4
    wide = bytes([1, 0, 0, 0]) + bytes(16) + data[at + 12 : at + 16] + bytes(4) + data[at + 16 : at + 24]
    grown = data[:at] + wide + data[at + 24 :]
    for kind in (b"mdhd", b"mdia", b"trak", b"moov"):
        place = grown.index(kind) - 4
        grown = (
            grown[:place]
            + struct.pack(">I", struct.unpack(">I", grown[place : place + 4])[0] + 12)
            + grown[place + 4 :]
        )
    video.write_bytes(grown)
    set_times(video, [0, 1, 2, 3, 4, 5], 100_000.0)
    opened = cv2.VideoCapture(str(video))
    assert opened.get(cv2.CAP_PROP_FRAME_COUNT) / opened.get(cv2.CAP_PROP_FPS) == pytest.approx(100_000)


def test_file_that_is_not_whole_is_refused_and_left_as_it_is(video):
    data, at = video.read_bytes(), video.read_bytes().index(b"mdat") - 4
    index = data[data.index(b"moov") - 4 :]
    for content, message in (
        (b"", "breaks off"),
        (data[:-5], "breaks off"),
        (data[: at + 8], "breaks off"),
        (data[:at] + struct.pack(">I", 1008) + b"mdat" + bytes(1000) + index, "only 5 of its 6 frames"),
        (data, "only 6 of its 7 frames"),
    ):
        video.write_bytes(content)
        with pytest.raises(Mp4Error, match=message):
            set_times(video, [0.0] * (7 if content == data else 6), 1.0)
        assert video.read_bytes() == content


def test_damaged_index_hides_nothing_and_breaks_nothing(video):
    data, generator = video.read_bytes(), np.random.default_rng(0)
    assert frames_shown(video) == 6
    at = data.index(b"moov") - 4
    for _ in range(80):
        damaged = bytearray(data)
        places = generator.integers(at, len(data), 4)
        for place in places:
            damaged[place] = generator.choice([0, 1, 127, 128, 255])
        video.write_bytes(damaged)
        assert frames_shown(video) in (None, *range(7))
    for content in (b"", data[:at], data[: at + 300], data[at:]):
        video.write_bytes(content)
        assert frames_shown(video) in (None, 6)
