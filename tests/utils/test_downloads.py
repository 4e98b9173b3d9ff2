"""Downloads from a server of the test's own."""

import hashlib
import io
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from utils import downloads, general
from utils.downloads import RELEASES, Release, attempt_download, download_file, fetch, safe_download
from utils.errors import UserError

PAYLOAD = bytes(range(256)) * 4000
DATE = "Mon, 01 Jan 2024 00:00:00 GMT"
VERSIONS = {  # what a path says of the file's version; others say an entity tag
    "/flaky-dated.bin": {"Last-Modified": DATE},
    "/flaky-weak.bin": {"ETag": 'W/"v1"', "Last-Modified": DATE},
    "/flaky-weak-alone.bin": {"ETag": 'W/"v1"'},
    "/flaky-unknown.bin": {},
}


class Handler(BaseHTTPRequestHandler):
    """Serves PAYLOAD in ways that paths name."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append((self.headers.get("Range"), self.headers.get("If-Range")))
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if self.path == "/gone.bin":
            self.send_error(404)
        elif self.path == "/to-a-file":
            self.reply(302, b"", Location="file:///etc/passwd")
        elif self.path == "/elsewhere":
            self.reply(302, b"", Location=self.server.elsewhere)
        elif self.path.startswith("/flaky"):
            self.break_off_or_go_on(start)
        elif self.path.startswith("/short"):
            said = {"ETag": '"v1"', "Content-Range": f"bytes {start}-{len(PAYLOAD) - 1}/{len(PAYLOAD)}"}
            self.reply(206 if start else 200, PAYLOAD[start:], send=PAYLOAD[start : start + 1000], **said)
        elif self.path.startswith("/zip"):
            self.reply(200, zip_bytes({"set/a.txt": b"a", "set/b/c.txt": b"c"}))
        else:
            self.reply(200, PAYLOAD)

    def break_off_or_go_on(self, start):
        """Sends a part at first, then what is asked for, more or less."""
        now = {"Content-Range": f"bytes {start}-{len(PAYLOAD) - 1}/{len(PAYLOAD)}"} if start else {}
        if len(self.server.requests) == 1:
            self.reply(200, PAYLOAD, send=PAYLOAD[:100_000], **VERSIONS.get(self.path, {"ETag": '"v1"'}))
        elif self.path.startswith("/flaky-replaced"):  # by another of the same length
            if "-heeds" in self.path and self.headers["If-Range"] != '"v2"':
                start, now = 0, {}
            self.reply(206 if start else 200, PAYLOAD[::-1][start:], ETag='"v2"', **now)
        elif self.path.startswith("/flaky-restart"):
            self.reply(200, PAYLOAD)
        elif self.path.startswith("/flaky-elsewhere") and start:  # not the part that was asked for
            self.reply(206, PAYLOAD[50_000:], **{"Content-Range": f"bytes 50000-{len(PAYLOAD) - 1}/{len(PAYLOAD)}"})
        else:
            self.reply(206 if start else 200, PAYLOAD[start:], **now)

    def reply(self, status, body, send=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if send is None else send)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        running.url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def zip_bytes(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_arrives_whole_with_its_hash_checked(server, tmp_path):
    digest = hashlib.sha256(PAYLOAD).hexdigest()
    target = download_file(f"{server.url}/x.bin", tmp_path / "new" / "x.bin", digest.upper())
    assert target.read_bytes() == PAYLOAD and everything_in(tmp_path) == ["new", "new/x.bin"]


PART = "bytes=100000-"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/flaky.bin", [(PART, '"v1"')]),
        ("/flaky-restart.bin", [(PART, '"v1"')]),
        ("/flaky-dated.bin", [(PART, DATE)]),
        ("/flaky-weak.bin", [(PART, DATE)]),
        ("/flaky-weak-alone.bin", [(None, None)]),
        ("/flaky-unknown.bin", [(None, None)]),
        ("/flaky-elsewhere.bin", [(PART, '"v1"'), (None, None)]),
    ],
)
def test_an_interrupted_transfer_goes_on_where_the_file_is_known_to_be_the_same(server, tmp_path, path, asked):
    assert download_file(f"{server.url}{path}", tmp_path / "x.bin").read_bytes() == PAYLOAD
    assert server.requests == [(None, None), *asked]


@pytest.mark.parametrize("path", ["/flaky-replaced.bin", "/flaky-replaced-heeds.bin"])
def test_halves_of_two_files_are_not_joined(server, tmp_path, path):
    """The server replaces the file while it is fetched; one of the two does not look at If-Range."""
    assert download_file(f"{server.url}{path}", tmp_path / "x.bin").read_bytes() == PAYLOAD[::-1]


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [
        ("/x.bin", "0" * 64, "is not the known file"),
        ("/short.bin", None, "cut short 4 times"),
        ("/gone.bin", None, "the server answered 404"),
        ("/to-a-file", None, "answered 302"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(server, tmp_path, path, sha256, message):
    with pytest.raises(UserError, match=message) as error:
        download_file(f"{server.url}{path}", tmp_path / "new" / "x.bin", sha256)
    assert "\n" not in str(error.value) and everything_in(tmp_path) == []


def test_a_redirection_to_ftp_is_not_followed(server, tmp_path):
    """The standard library's own opener would follow it."""
    with socket.create_server(("127.0.0.1", 0)) as ftp:
        ftp.setblocking(False)
        server.elsewhere = f"ftp://127.0.0.1:{ftp.getsockname()[1]}/x.bin"
        with pytest.raises(UserError, match="unknown url type: ftp"):
            download_file(f"{server.url}/elsewhere", tmp_path / "x.bin")
        with pytest.raises(BlockingIOError):
            ftp.accept()  # nobody has connected
    assert everything_in(tmp_path) == []


def test_offline_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached.*Offline"):
        download_file("http://127.0.0.1:1/x.bin", tmp_path / "x.bin")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/x", "x.bin", "https://", "https://h/a b", "http://[x/y"]
)
def test_what_is_no_http_url_is_refused(tmp_path, url):
    with pytest.raises(UserError, match="is not a URL"):
        download_file(url, tmp_path / "x.bin")


def test_an_archive_is_unpacked_and_removed(server, tmp_path):
    fetch(f"{server.url}/zip/set.zip?raw=1", tmp_path / "data")
    fetch(f"{server.url}/zip?id=1", tmp_path / "more", name="named.zip")
    assert everything_in(tmp_path / "data") == ["set", "set/a.txt", "set/b", "set/b/c.txt"]
    assert everything_in(tmp_path / "more") == everything_in(tmp_path / "data")


def test_a_page_instead_of_an_archive_is_refused(server, tmp_path):
    with pytest.raises(UserError, match="neither a zip nor a tar archive"):
        fetch(f"{server.url}/page.zip", tmp_path / "data")
    assert everything_in(tmp_path) == []


def test_released_weights_are_checked_against_the_list(server, tmp_path, monkeypatch):
    digest = hashlib.sha256(PAYLOAD).hexdigest()
    monkeypatch.setitem(RELEASES, "yolov5n.pt", Release(f"{server.url}/yolov5n.pt", digest))
    target = tmp_path / "it's mine" / "yolov5n.pt"
    assert attempt_download(target) == str(target) and target.read_bytes() == PAYLOAD
    assert attempt_download(target) == str(target) and len(server.requests) == 1
    monkeypatch.setitem(RELEASES, "yolov5s.pt", Release(f"{server.url}/yolov5s.pt", "1" * 64))
    with pytest.raises(UserError, match="not the known file"):
        attempt_download(tmp_path / "yolov5s.pt")
    with pytest.raises(UserError, match="not one of the released weights.*Did you mean 'yolov5m6.pt'"):
        attempt_download("yolo5m6.pt")
    with pytest.raises(UserError, match="releases of other/repo are not known"):
        attempt_download("model.pt", repo="other/repo")


def test_names_of_yolov5_download(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert attempt_download(f"{server.url}/weights.pt?auth=1") == "weights.pt"
    assert attempt_download("weights.pt") == "weights.pt" and len(server.requests) == 1
    safe_download("copy.pt", f"{server.url}/gone.bin", f"{server.url}/weights.pt", min_bytes=1e5)
    assert Path("copy.pt").read_bytes() == PAYLOAD
    with pytest.raises(UserError, match="only 1024000 bytes came.*Fetch it by hand"):
        safe_download("bad.pt", f"{server.url}/x.bin", min_bytes=1e7, error_msg="Fetch it by hand.")
    assert not Path("bad.pt").exists()
    general.download([f"{server.url}/zip/data.zip", f"{server.url}/x.bin"], dir="there", threads=2)
    assert everything_in(tmp_path / "there") == ["set", "set/a.txt", "set/b", "set/b/c.txt", "x.bin"]
    general.download(f"{server.url}/zip/data.zip", unzip=False)
    assert zipfile.is_zipfile("data.zip")
    assert general.check_file(f"{server.url}/other.bin") == "other.bin"


def test_the_release_list_is_complete():
    assert {name[6:-3] for name in RELEASES} == {f"{size}{p6}" for size in "nsmlx" for p6 in ("", "6")}
    assert all(url.endswith(f"/{name}") and len(sha256) == 64 for name, (url, sha256) in RELEASES.items())
    assert len({release.sha256 for release in RELEASES.values()}) == len(RELEASES)


def test_a_full_disk_is_told_before_it_is_full(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="GB are needed"):
        download_file(f"{server.url}/x.bin", tmp_path / "x.bin")
    assert everything_in(tmp_path) == []
