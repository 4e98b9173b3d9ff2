"""detect.py on live inputs: a camera that dies twice, one that is interrupted, several side by side."""

import http.server
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import pytest

import detect
from utils.cli import ReportedError
from utils.errors import UserError
from utils.media import sources
from utils.media.sources import LoadStreams, read_frames
from utils.media.streams import Patience

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def camera_server(mjpeg_server, monkeypatch):
    """Starts servers whose plans begin when detection does; an input is given up after a second and a half."""
    servers = []
    impatient = Patience(first_wait_s=0.01, longest_wait_s=0.05, give_up_s=1.5)

    class Impatient(LoadStreams):
        def __init__(self, entries, vid_stride, patience):
            super().__init__(entries, vid_stride=vid_stride, patience=impatient)

        def read(self):
            for server in servers:
                server.go.set()
            return super().read()

    def start(plan):
        servers.append(mjpeg_server(plan))
        servers[-1].go.clear()
        return servers[-1]

    monkeypatch.setattr(sources, "LoadStreams", Impatient)
    return start


@pytest.fixture
def file_server():
    """Serves bytes at paths; returns the address."""
    servers = []

    def serve(contents: dict[str, bytes]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_arguments) -> None:
                """Says nothing."""

            def do_GET(self) -> None:
                content = contents[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def options_for(weights, source, tmp_path) -> dict:
    options = {"weights": str(weights), "source": str(source), "project": str(tmp_path / "runs"), "device": "cpu"}
    return options | {"imgsz": [64], "max_det": 3}


def test_camera_that_dies_twice_is_detected_to_the_end_with_the_right_counts(weights, camera_server, tmp_path, caplog):
    caplog.set_level(logging.INFO, "yolov5")
    server = camera_server(["cut", "refuse", "end", "refuse", "refuse", "end"])
    with pytest.raises(
        ReportedError, match=r"^1 live input was lost:\n  http_\S+: ended: it could not be opened again"
    ):
        detect.run(**options_for(weights, server.address, tmp_path), save_txt=True)
    name = re.sub(r"\W+", "_", server.address)
    report = re.search(rf"{name}: (\d+) frames received, (\d+) used, (\d+) dropped", caplog.text)
    received, used, dropped = map(int, report.groups())
    assert received == used + dropped >= 36  # three sessions of 12 images
    assert used >= 9
    assert "1 undecodable, 2 reconnections; ended: it could not be opened again" in caplog.text
    folder = tmp_path / "runs" / "exp"
    played = list(read_frames([str(folder / f"{name}.mp4")]))
    labels = sorted(path.name for path in (folder / "labels").iterdir())
    assert len(played) == used
    assert labels == sorted(f"{name}_{number}.txt" for number in range(1, used + 1))
    assert f"{used} labels saved" in caplog.text
    assert len(re.findall(r"\b0: 64x64 3 cats, Done\.", caplog.text)) == used


def test_results_of_a_camera_are_its_own_new_whole_images(weights, camera_server, numbered, tmp_path):
    server = camera_server(["cut", "refuse", "stall", "corrupt"])
    options = {key: value for key, value in options_for(weights, server.address, tmp_path).items() if key != "project"}
    results, numbers = detect.run(**options, stream=True), []
    with pytest.raises(ReportedError, match="1 live input was lost"):
        numbers.extend(numbered.read(result.image) for result in results)
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == server.sent[-1][-1]


def test_list_of_cameras_is_detected_side_by_side(weights, camera_server, tmp_path, caplog):
    caplog.set_level(logging.INFO, "yolov5")
    servers = [camera_server(["end"]), camera_server(["end", "end"])]
    (tmp_path / "list.txt").write_text("".join(f"{server.address}\n" for server in servers))
    with pytest.raises(ReportedError, match="2 live inputs were lost"):
        detect.run(**options_for(weights, tmp_path / "list.txt", tmp_path), line_thickness=1)
    names = [re.sub(r"\W+", "_", server.address) for server in servers]
    for number, name in enumerate(names):
        used = int(re.search(rf"{name}: \d+ frames received, (\d+) used", caplog.text)[1])
        assert len(list(read_frames([str(tmp_path / "runs" / "exp" / f"{name}.mp4")]))) == used > 0
        assert len(re.findall(rf"\b{number}: 64x64 .*Done\.", caplog.text)) == used


def test_stream_that_is_not_there_is_told_before_a_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"Failed to open http://127\.0\.0\.1:9/camera"):
        detect.run(weights=str(tmp_path / "missing.pt"), source="http://127.0.0.1:9/camera")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_ends_a_camera_with_a_video_that_plays_and_its_counts(weights, mjpeg_server, tmp_path):
    server = mjpeg_server(["end"] * 200)
    line = [sys.executable, str(ROOT / "detect.py"), "--weights", str(weights), "--source", server.address]
    line += ["--img", "64", "--project", str(tmp_path / "runs"), "--device", "cpu", "--max-det", "3"]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(line, stderr=file, start_new_session=True)
        deadline = time.monotonic() + 60
        while log.read_text().count("Done.") < 8 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=60)
    said = log.read_text()
    assert status == 130, said
    assert "Traceback" not in said
    assert "interrupted. Results so far are in" in said
    used = int(re.search(r"frames received, (\d+) used", said)[1])
    (video,) = (tmp_path / "runs" / "exp").glob("*.mp4")
    played = list(read_frames([str(video)]))
    assert 8 <= len(played) <= used
    assert not any(frame.error for frame in played)


def test_recording_served_over_http_is_fetched_or_read_as_a_stream_without_losing_a_frame(
    weights, numbered, tmp_path, monkeypatch, caplog, file_server
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "yolov5")
    writer = cv2.VideoWriter("clip.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 10, (numbered.WIDTH, numbered.HEIGHT))
    for number in range(20):
        writer.write(numbered.draw(number))
    writer.release()
    content = (tmp_path / "clip.mp4").read_bytes()
    for path in ("/fetched.mp4", "/recording"):
        address = file_server({path: content}) + path
        detect.run(**options_for(weights, address, tmp_path), name=path[1:])
        (video,) = (tmp_path / "runs" / path[1:]).glob("*.mp4")
        assert len(list(read_frames([str(video)]))) == 20
    assert (tmp_path / "fetched.mp4").read_bytes() == content
    assert "video 1/1 (20/20)" in caplog.text and "20 frames received, 20 used, 0 dropped" in caplog.text
