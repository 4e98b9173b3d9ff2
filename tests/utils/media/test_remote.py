"""Addresses: what counts as a file, what may be shown of them, and YouTube pages through (a stand-in for) yt-dlp."""

import sys
from types import SimpleNamespace

import pytest

from utils.errors import UserError
from utils.media.sources import is_file_address, is_youtube, name_of, resolve_youtube, without_secrets

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
    from utils.media.sources import _YOUTUBE_FORMAT

    with yt_dlp.YoutubeDL({"quiet": True}) as reader:
        assert callable(reader.build_format_selector(_YOUTUBE_FORMAT))
