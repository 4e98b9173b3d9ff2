"""What `--source` may be: files and live inputs told apart, lists, addresses of files, videos served over HTTP."""

import http.server
import logging
import math
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.errors import UserError
from utils.media import sources
from utils.media.sources import LoadImages, LoadStreams, is_live, live_inputs, open_source
from utils.media.streams import Patience

FRAMES = 40


@pytest.fixture(scope="module")
def video(tmp_path_factory, numbered) -> Path:
    """A video of numbered pictures that can be read without jumping about in it."""
    path = tmp_path_factory.mktemp("video") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (numbered.WIDTH, numbered.HEIGHT))
    for number in range(1, FRAMES + 1):
        writer.write(numbered.draw(number))
    writer.release()
    return path


class FileHandler(http.server.BaseHTTPRequestHandler):
    """Answers every path with what `server.content` has under its last part; `/cut/` breaks off in the middle."""

    def log_message(self, *_arguments) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        folder, name = self.path.partition("?")[0].rsplit("/", 1)
        self.server.asked.append(self.path)
        data = self.server.content.get(name)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if folder.endswith("cut") else data)


@pytest.fixture
def server(video):
    """Serves `clip.avi` and, as `live`, the same without a suffix."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FileHandler) as server:
        server.content, server.asked = {"clip.avi": video.read_bytes(), "live": video.read_bytes()}, []
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cameras(monkeypatch):
    """Cameras 0 and 1, which show ten frames and then nothing more; others cannot be opened."""
    monkeypatch.setattr(sources, "open_camera", FakeCamera)


class FakeCamera:
    fps, frame_count, is_recording = 30.0, 10, True

    def __init__(self, index: int) -> None:
        if index > 1:
            raise UserError(f"Failed to open camera {index}: there is none")
        self.index, self.number = index, 0

    def grab(self) -> bool:
        self.number += 1
        return self.number <= self.frame_count

    def retrieve(self) -> np.ndarray:
        return np.full((2, 2, 3), 100 * self.index + self.number, np.uint8)

    def release(self) -> None:
        """Nothing to give back."""


def read_all(source) -> list:
    try:
        return [frame for frames in source.read() for frame in frames]
    finally:
        source.close()


@pytest.mark.parametrize(
    ("source", "live"),
    [
        *[("0", True), ("12", True), ("rtsp://a/b", True), ("RTMP://a/b", True), ("http://a:8080/", True)],
        *[("http://a/video.mjpg", True), ("https://a/index.m3u8", True), ("screen", True), ("screen 1 0 0 9 9", True)],
        *[("https://www.youtube.com/watch?v=x", True), ("https://youtu.be/x.mp4", True)],
        *[("http://a/b.JPG", False), ("https://a/b.mp4?token=1", False), ("clip.mp4", False), ("-1", False)],
        *[("screens", False), ("screen shots", False), ("1.5", False), ("²", False), ("rtsp:/a", False)],
        *[("C:\\a\\b.mp4", False), ("ftp://a/b", False), ("http://[a/b", False)],
    ],
)
def test_live_inputs_are_told_by_their_form(source, live):
    assert is_live(source) is live


def test_results_are_filed_under_distinct_names_without_secrets():
    named = [
        "0",
        "rtsp://user:secret@10.0.0.5:554/stream1?key=secret",
        "rtsp://10.0.0.5:554/stream1",
        "https://www.youtube.com/watch?v=Ab-1",
        "screen 1 0 0 64 48",
    ]
    assert [source.name for source in live_inputs(named)] == [
        "0",
        "rtsp_10_0_0_5_554_stream1",
        "rtsp_10_0_0_5_554_stream1-2",
        "https_www_youtube_com_watch_v_Ab-1",
        "screen_1_0_0_64_48",
    ]


def test_files_are_read_as_ever_one_a_list(tmp_path, video):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "b.jpg").write_text("no image")
    source = open_source(tmp_path)
    assert isinstance(source, LoadImages)
    assert source.live is False
    assert [Path(path).name for path in source.inputs] == ["a.png", "b.jpg"]
    batches = list(source.read())
    assert [[bool(frame.error) for frame in frames] for frames in batches] == [[False], [True]]
    source.close()
    assert source.report() == []
    assert [frame.number for frame in read_all(open_source(video, vid_stride=15))] == [1, 16, 31]


def test_camera_is_opened_by_its_number_even_where_a_file_has_that_name(cameras, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").touch()
    source = open_source("1", vid_stride=4)
    assert isinstance(source, LoadStreams)
    assert source.inputs == ["1"]
    assert [(frame.image[0, 0, 0], frame.label) for frame in read_all(source)] == [(101, "0"), (105, "0"), (109, "0")]


@pytest.mark.parametrize("suffix", ["txt", "streams"])
def test_list_of_live_inputs_is_read_side_by_side(cameras, tmp_path, suffix):
    path = tmp_path / f"list.{suffix}"
    path.write_text("# the hall\n0\n\n1\n")
    source = open_source(path)
    frames = read_all(source)
    assert source.inputs == ["0", "1"]
    assert [frame.image[0, 0, 0] for frame in frames if frame.label == "0"] == [*range(1, 11)]
    assert [frame.image[0, 0, 0] for frame in frames if frame.label == "1"] == [*range(101, 111)]
    assert {frame.file_count for frame in frames} == {2}


@pytest.mark.parametrize(("seconds", "give_up_s"), [(20.0, 20.0), (0.0, math.inf)])
def test_live_inputs_are_given_up_after_the_seconds_asked_for_or_never(tmp_path, monkeypatch, seconds, give_up_s):
    monkeypatch.setattr(sources, "LoadStreams", lambda _entries, vid_stride, patience: patience)
    (tmp_path / "list.txt").write_text("0\n1\n")
    for source in ("0", tmp_path / "list.txt"):
        assert open_source(source, stream_timeout_s=seconds) == Patience(give_up_s=give_up_s)


def test_list_of_files_may_name_addresses_of_files(tmp_path, monkeypatch, server, video):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.streams").write_text(f"{video}\n{server.address}/sub/clip.avi?size=1\n")
    source = open_source("list.streams")
    assert source.inputs == [str(video), str(tmp_path / "clip.avi")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0", "a.mp4"], r"lists both live inputs \('0'\) and files \('a.mp4'\)"),
        (["rtsp://u:secret@h/1", "http://h/a.jpg"], r"live inputs \('rtsp://h/1'\) and files \('http://h/a.jpg'\)"),
        (["http://g/a.jpg", "http://h/A.jpg"], "http://g/a.jpg and http://h/A.jpg would both be saved as A.jpg"),
        (["0", "7", "8"], "Failed to open camera 7: there is none\nFailed to open camera 8"),
        (["# nothing"], "no images or videos found there"),
        (["a.jpg", "~\0.jpg"], "cannot be read as a list of paths .*NUL"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(cameras, tmp_path, lines, message):
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://host/a.mp4", "is not a URL that can be read: it must begin with rtsp://, rtmp://, http://, https://"),
        ("gone.mp4", "no file, folder, glob or list file"),
        ("gone.txt", "no file, folder, glob or list file"),
        ("9", "Failed to open camera 9"),
        ("rtsp://user:secret@127.0.0.1:1/a?key=secret", r"^Failed to open rtsp://127.0.0.1:1/a: no video came"),
        ("screen 1 2", "the screen is given as"),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_is_read(cameras, source, message):
    with pytest.raises(UserError, match=message):
        open_source(source)


def test_address_of_a_file_is_fetched_once_and_read(tmp_path, monkeypatch, caplog, server, numbered):
    monkeypatch.chdir(tmp_path)
    source = open_source(f"{server.address}/some/clip.avi?token=secret")
    assert source.inputs == [str(tmp_path / "clip.avi")]
    assert [numbered.read(frame.image) for frame in read_all(source)] == [*range(1, FRAMES + 1)]
    assert os.listdir() == ["clip.avi"]
    with caplog.at_level(logging.INFO, "yolov5"):
        open_source(f"{server.address}/other/clip.avi")
    assert len(server.asked) == 1
    assert f"Using {tmp_path / 'clip.avi'}, which is there already" in caplog.text


@pytest.mark.parametrize("path", ["/cut/clip.avi", "/gone.jpg"])
def test_file_that_does_not_come_whole_leaves_nothing_behind(tmp_path, monkeypatch, server, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cut short|404"):
        open_source(server.address + path)
    assert os.listdir() == []


@pytest.mark.parametrize("vid_stride", [1, 3])
def test_video_served_without_a_suffix_is_read_as_a_stream_to_its_end(server, numbered, vid_stride):
    source = open_source(f"{server.address}/live", vid_stride)
    frames = read_all(source)
    assert [numbered.read(frame.image) for frame in frames] == [*range(1, FRAMES + 1, vid_stride)]
    assert {(frame.fps, frame.live, frame.label) for frame in frames} == {(25.0, True, "0")}
    assert source.report()[0].startswith(f"http_127_0_0_1_{server.server_port}_live: {len(frames)} frames received")
    assert "ended" not in source.report()[0]


def test_video_that_breaks_off_again_and_again_gives_what_came_once_and_says_what_is_missing(server, numbered):
    source = open_source(f"{server.address}/cut/live")
    *frames, last = read_all(source)
    numbers = [numbered.read(frame.image) for frame in frames]
    assert last.error == f"ended: only {len(numbers)} of its {FRAMES} frames come"
    assert numbers == [*range(1, len(numbers) + 1)]
    assert 10 <= len(numbers) <= FRAMES // 2
    assert source.report()[0].endswith(f"ended: only {len(numbers)} of its {FRAMES} frames come")


def test_youtube_page_is_read_through_the_address_that_it_leads_to(monkeypatch, server):
    monkeypatch.setattr(sources, "resolve_youtube", {"https://youtu.be/x": f"{server.address}/live"}.get)
    source = open_source("https://youtu.be/x")
    assert source.inputs == ["https_youtu_be_x"]
    assert len(read_all(source)) == FRAMES
