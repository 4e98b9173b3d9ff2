"""Live output: frames as several viewers get them over MJPEG, HLS and RTSP through the real ffmpeg, mistakes named."""

import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest

from utils.errors import UserError
from utils.media import live_output
from utils.media.live_output import check_live_output, open_live_output

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")


@pytest.fixture
def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def grey(level: int, side: int = 64) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


def read_part(stream) -> np.ndarray:
    """Reads the next image of a multipart stream."""
    assert stream.readline() == b"--frame\r\n"
    head = [stream.readline() for _ in range(3)]
    image = stream.read(int(head[1].split(b":")[1]))
    stream.readline()
    return cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)


def test_viewers_each_get_the_newest_frame_and_are_sent_away_at_the_end(port):
    url = f"http://127.0.0.1:{port}/{{name}}.mjpg"
    hall, gate = (open_live_output(url, name, 10) for name in ("hall", "gate"))
    hall.show(grey(50))
    gate.show(grey(200))
    with (
        urllib.request.urlopen(f"http://127.0.0.1:{port}/hall.mjpg", timeout=10) as one,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/hall.mjpg", timeout=10) as two,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/gate.mjpg", timeout=10) as other,
    ):
        assert one.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
        assert [round(read_part(stream).mean()) for stream in (one, two, other)] == [50, 50, 200]
        hall.show(grey(90))
        assert [round(read_part(stream).mean()) for stream in (one, two)] == [90, 90]
        hall.close()
        assert one.read() == two.read() == b""
        gate.show(grey(10))
        assert round(read_part(other).mean()) == 10
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/hall.mjpg", timeout=10)
    gate.close()
    again = open_live_output(url, "hall", 10)  # the port was given back
    with pytest.raises(OSError), socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
    again.close()


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
        with pytest.raises(UserError, match=f"--live-out {url}: cannot be served there"):
            open_live_output(url, "x", 10)


@needs_ffmpeg
def test_hls_is_a_playlist_that_plays_what_was_shown(tmp_path):
    url = str(tmp_path / "web" / "{name}.m3u8")
    output = open_live_output(url, "hall", 20)
    end_s = time.monotonic() + 60
    while not (tmp_path / "web" / "hall0.ts").exists():  # until then ffmpeg starts
        assert time.monotonic() < end_s
        output.show(grey(40, 65))  # encoders want even sides
        time.sleep(0.05)
    for _ in range(30):
        output.show(grey(200, 65))
        time.sleep(0.05)
    output.close()
    assert output.problem == ""
    assert (tmp_path / "web" / "hall.m3u8").read_text().endswith("#EXT-X-ENDLIST\n")
    decode = ["ffmpeg", "-loglevel", "error", "-i", str(tmp_path / "web" / "hall.m3u8"), str(tmp_path / "%03d.png")]
    subprocess.run(decode, check=True, timeout=60, stdin=subprocess.DEVNULL)
    frames = [cv2.imread(str(path)) for path in sorted(tmp_path.glob("*.png"))]
    assert len(frames) > 3 and frames[0].shape == (66, 66, 3)
    assert abs(frames[0][:64, :64].mean() - 40) < 6 and abs(frames[-1][:64, :64].mean() - 200) < 6


@needs_ffmpeg
def test_rtsp_is_tried_again_until_the_server_is_there(tmp_path, port, monkeypatch, caplog):
    monkeypatch.setattr(live_output, "RETRY_S", 0.3)
    url = f"rtsp://127.0.0.1:{port}/live"
    output = open_live_output(url, "hall", 20)
    ended = threading.Event()

    def show():
        while not ended.wait(0.05):
            output.show(grey(120))

    shower = threading.Thread(target=show)
    shower.start()
    try:
        end_s = time.monotonic() + 60
        while not output.problem:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        assert f"--live-out {url}" in caplog.text and "refused" in output.problem
        receiver = ["ffmpeg", "-loglevel", "error", "-rtsp_flags", "listen", "-i", url, "-frames:v", "3"]
        subprocess.run([*receiver, str(tmp_path / "%d.png")], timeout=60, check=True, stdin=subprocess.DEVNULL)
    finally:
        ended.set()
        shower.join()
        output.close()
    assert abs(cv2.imread(str(tmp_path / "3.png")).mean() - 120) < 4


@pytest.mark.parametrize(
    ("url", "inputs", "message"),
    [
        ("ftp://host/x", ["a.mp4"], "expected http://HOST:PORT/NAME"),
        ("live.mp4", ["a.mp4"], "expected http://HOST:PORT/NAME"),
        ("http://127.0.0.1/x", ["a.mp4"], "give a port"),
        ("http://127.0.0.1:8090/x", ["a.mp4", "b.mp4"], "2 inputs, put {name}"),
        ("http://127.0.0.1:8090/x", ["a.mp4", "b.jpg"], "b.jpg is an image"),
    ],
)
def test_mistakes_are_told_before_anything_is_opened(url, inputs, message):
    with pytest.raises(UserError, match="--live-out") as error:
        check_live_output(url, inputs, live=False)
    assert message in str(error.value)


def test_ffmpeg_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs the program ffmpeg: install it"):
        check_live_output("rtsp://host/x", ["gate"], live=True)
    check_live_output("http://127.0.0.1:8090/{name}", ["gate", "hall"], live=True)
