"""What `--source` may be: files, lists, addresses, live inputs; in which order it is read, and what is refused."""

import http.server
import logging
import math
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from utils.errors import UserError
from utils.media import sources
from utils.media.sources import (
    LoadImages,
    LoadStreams,
    find_sources,
    is_file_address,
    is_live,
    is_youtube,
    live_inputs,
    name_of,
    open_source,
    read_frames,
    resolve_youtube,
    without_secrets,
)
from utils.media.streams import Patience

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.png", "C.JPG"):
        cv2.imwrite(str(tmp_path / name), noise())
    write_video(tmp_path / "0.mp4", frames=2)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "sub").mkdir()
    cv2.imwrite(str(tmp_path / "sub" / "deep.jpg"), noise())
    return tmp_path


def names(paths: list[str]) -> list[str]:
    assert all(os.path.isabs(path) for path in paths)
    return [Path(path).name for path in paths]


def test_folder_gives_its_own_images_sorted_then_its_videos(folder):
    assert names(find_sources(folder)) == ["C.JPG", "a.png", "b.jpg", "0.mp4"]


def test_glob_is_sorted_and_goes_deeper_only_when_told(folder):
    assert names(find_sources(folder / "*.jpg")) == ["b.jpg"]
    assert names(find_sources(f"{folder}/**/*.jpg")) == ["b.jpg", "deep.jpg"]


@pytest.mark.parametrize("name", ["C.JPG", "x[1].jpg"])
def test_file_is_taken_as_it_is_in_upper_case_and_where_its_name_looks_like_a_glob(folder, name):
    cv2.imwrite(str(folder / name), noise())
    assert names(find_sources(folder / name)) == [name]


def test_list_file_keeps_its_order_and_resolves_against_both_folders(folder, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    cv2.imwrite(str(elsewhere / "here.jpg"), noise())
    monkeypatch.chdir(elsewhere)
    lines = ["# a comment", "./b.jpg", "", "here.jpg", str(folder / "a.png"), "sub/deep.jpg", "./b.jpg", "gone.jpg"]
    (folder / "list.txt").write_text("\n".join(lines))
    paths = find_sources(folder / "list.txt")
    assert names(paths) == ["b.jpg", "here.jpg", "a.png", "deep.jpg", "gone.jpg"]
    assert [bool(frame.error) for frame in read_frames(paths)] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("b.jgp", r"no file, folder, glob or list file \(.txt\) at .*b\.jgp\. Did you mean 'b\.jpg'"),
        ("notes.md", "not an image or a video by its suffix"),
        ("*.webp", "no images or videos found there"),
        ("rtsp://camera/1", "no file, folder, glob"),
        ("0", "no file, folder, glob"),
    ],
)
def test_what_is_no_source_is_refused_with_what_was_tried(folder, monkeypatch, source, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        find_sources(source)


def test_images_that_cannot_be_read_are_counted_and_named(folder, caplog):
    for name in ("phone.HEIC", "scan.jp2", "table.csv"):
        (folder / name).touch()
    assert names(find_sources(folder)) == ["C.JPG", "a.png", "b.jpg", "0.mp4"]
    said = f"WARNING: --source '{folder}': 2 images are left out, such as {folder / 'phone.HEIC'}: files of these kinds"
    assert f"{said} (heic, jp2) are not read. Convert them to JPEG or PNG." in caplog.text
    with pytest.raises(UserError, match="images of this kind are not read.*Convert it to JPEG or PNG"):
        find_sources(folder / "phone.HEIC")


def test_empty_folder_and_empty_list_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("\n# nothing\n")
    for source in ("empty", "list.txt"):
        with pytest.raises(UserError, match="no images or videos found there.*Images: avif, bmp"):
            find_sources(tmp_path / source)


def test_folder_of_folders_is_refused_with_the_way_to_read_them_all(folder):
    with pytest.raises(UserError, match="Subfolders are not searched: give ") as refusal:
        (folder / "outer").mkdir()
        shutil.move(folder / "sub", folder / "outer" / "sub")
        find_sources(folder / "outer")
    advised = str(refusal.value).split("give '")[1].split("'")[0]
    assert names(find_sources(advised)) == ["deep.jpg"]


def test_links_to_nothing_and_to_themselves_are_reported_like_damaged_images(folder):
    (folder / "dead.jpg").symlink_to(folder / "gone.jpg")
    (folder / "round.jpg").symlink_to(folder / "round.jpg")
    frames = list(read_frames(find_sources(folder)))
    assert {Path(frame.path).name for frame in frames if frame.error} == {"dead.jpg", "round.jpg"}
    assert len(frames) == 7


@pytest.fixture(scope="module")
def video(tmp_path_factory, numbered) -> Path:
    """A video of numbered images that can be read without jumping about in it."""
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


PAGE = "https://www.youtube.com/watch?v=abc"


class YoutubeDLError(Exception):
    pass


@pytest.fixture
def pages(monkeypatch):
    """Lets a test say what yt-dlp finds on the page, or which error it raises; keeps the options it was given."""
    asked = SimpleNamespace(found=None, options=None)

    class YoutubeDL:
        def __init__(self, options: dict) -> None:
            asked.options = options

        def __enter__(self) -> "YoutubeDL":
            return self

        def __exit__(self, *_exception) -> None:
            """Nothing to close."""

        def extract_info(self, page: str, download: bool):
            assert (page, download) == (PAGE, False)
            asked.options["logger"].error("what the library prints")
            if isinstance(asked.found, Exception):
                raise asked.found
            return asked.found

    utils = SimpleNamespace(YoutubeDLError=YoutubeDLError)
    monkeypatch.setitem(sys.modules, "yt_dlp", SimpleNamespace(YoutubeDL=YoutubeDL, utils=utils))
    return asked


@pytest.mark.parametrize(
    ("address", "is_file"),
    [
        *[("http://a/b.jpg", True), ("HTTPS://a/b.MP4?x=1", True), ("http://a/b.jpg/video", False)],
        *[("rtsp://a/b.mp4", False), ("http://a/b.m3u8", False), ("http://a/?file=b.jpg", False), ("a/b.jpg", False)],
        *[("http://a/live.flv", False), ("http://a/live.ts?x=1", False), ("http://a/live.webm", False)],
        *[("http://a/b.avif", True), ("http://a/b.3gp", True)],
    ],
)
def test_files_are_told_by_the_suffix_of_the_path(address, is_file):
    assert is_file_address(address) is is_file


@pytest.mark.parametrize(
    ("address", "known"),
    [
        *[(PAGE, True), ("https://youtu.be/abc", True), ("http://m.YouTube.com/live/abc", True)],
        *[("https://notyoutube.com/abc", False), ("https://a/youtube.com/", False), ("youtube.com/abc", False)],
    ],
)
def test_youtube_is_told_by_the_host_alone(address, known):
    assert is_youtube(address) is known


def test_passwords_and_keys_are_not_shown():
    assert without_secrets("rtsp://user:se@cret@10.0.0.5:554/a/b?key=1#x") == "rtsp://10.0.0.5:554/a/b"
    assert without_secrets(PAGE) == PAGE


def test_names_are_fit_for_files_of_every_system():
    assert name_of("http://[::1]:80/a b/../c.cgi") == "http_1_80_a_b_c_cgi"
    assert name_of("rtsp://相机/街") == "rtsp_相机_街"
    assert len(name_of("http://a/" + "b" * 300)) == 100


def test_page_gives_the_address_of_its_video(pages, capfd):
    pages.found = {"url": "https://video.example/1", "title": "x"}
    assert resolve_youtube(PAGE) == "https://video.example/1"
    assert pages.options["noplaylist"] and "avc1" in pages.options["format"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (YoutubeDLError("ERROR: Failed to resolve (caused by X)\nmore"), "watch.v=abc: Failed to resolve .offline"),
        ({"entries": []}, "not the page of one video"),
        (None, "not the page of one video"),
    ],
)
def test_page_without_a_video_is_told(pages, found, message):
    pages.found = found
    with pytest.raises(UserError, match=message):
        resolve_youtube(PAGE)


def test_missing_library_is_told_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    with pytest.raises(UserError, match="needs yt-dlp, which finds a page's video: pip install yt-dlp"):
        resolve_youtube(PAGE)


def test_the_library_takes_the_options_that_it_is_given():
    yt_dlp = pytest.importorskip("yt_dlp")
    assert issubclass(yt_dlp.utils.DownloadError, yt_dlp.utils.YoutubeDLError)
    with yt_dlp.YoutubeDL({"quiet": True}) as reader:
        assert callable(reader.build_format_selector(sources._YOUTUBE_FORMAT))
