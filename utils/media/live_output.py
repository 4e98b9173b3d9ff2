"""Showing annotated frames live, to others: `--live-out`, as MJPEG from this process, or through FFmpeg.

`http://HOST:PORT/NAME` is served here (MJPEG, for browsers, VLC, OpenCV); `rtsp://`, `rtmp://` and `udp://` are sent to
a server or a receiver, and `FOLDER/NAME.m3u8` is an HLS playlist for a web server, by the program ffmpeg. Viewers never
hold the detection up: whoever is too slow misses frames.
"""

from __future__ import annotations

import contextlib
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import cv2
import numpy as np

from utils.errors import UserError
from utils.images import VID_FORMATS
from utils.log import LOGGER
from utils.media.sources import suffix_of, without_secrets

JPEG_QUALITY = 80
RETRY_S = 5.0  # after which a broken output is tried again
BOUNDARY = "frame"
H264 = (
    "-c:v libx264 -preset veryfast -tune zerolatency -pix_fmt yuv420p -vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -g 50".split()
)
HLS = "-f hls -hls_time 2 -hls_list_size 6 -hls_flags delete_segments -force_key_frames expr:gte(t,n_forced*2)".split()
FFMPEG_OUTPUTS = {  # what ffmpeg is told of a scheme, "" for a file
    "rtsp": [*H264, "-f", "rtsp", "-rtsp_transport", "tcp"],
    "rtmp": [*H264, "-f", "flv"],
    "udp": [*H264, "-f", "mpegts"],
    "": [*H264, *HLS],
}


class LiveOutput(Protocol):
    """Where frames of one input go."""

    problem: str  # why nothing arrives now; empty where it does

    def show(self, image: np.ndarray) -> None:
        """Takes the next frame, uint8 (h, w, 3) BGR, which stays as it is; never waits."""

    def close(self) -> None:
        """Ends it."""


def check_live_output(url: str, inputs: Sequence[str], live: bool) -> None:
    """Refuses, before anything is opened, what `open_live_output` could not open.

    Args:
        url: `--live-out`'s.
        inputs: what is shown; several need `{name}` in it.
        live: whether they are live inputs.

    Raises:
        UserError: an image among the inputs, an address of another kind, one address for several inputs, or no ffmpeg
            where it is needed.
    """
    scheme = url.partition("://")[0] if "://" in url else ""
    if not (scheme in ("http", *FFMPEG_OUTPUTS) if scheme else url.endswith(".m3u8")):
        kinds = "http://HOST:PORT/NAME (MJPEG), rtsp://..., rtmp://..., udp://... or a file NAME.m3u8 (HLS)"
        raise UserError(f"--live-out '{url}': expected {kinds}.")
    port = re.search(r":(\d{1,5})$", url.split("/")[2]) if scheme == "http" else None
    if scheme == "http" and not (port and 0 < int(port[1]) < 2**16):
        raise UserError(f"--live-out '{url}': give a port as well, such as http://127.0.0.1:8090/live.")
    image = None if live else next((path for path in inputs if suffix_of(path) not in VID_FORMATS), None)
    if image:
        raise UserError(f"--live-out shows videos and streams, and {image} is an image: leave --live-out out.")
    if len(inputs) > 1 and "{name}" not in url:
        raise UserError(f"--live-out '{url}': there are {len(inputs)} inputs, put {{name}} where each has its own.")
    if scheme != "http" and not shutil.which("ffmpeg"):
        raise UserError(
            f"--live-out '{url}' needs the program ffmpeg: install it (apt install ffmpeg), or use http://."
        )


def open_live_output(url: str, name: str, fps: float) -> LiveOutput:
    """Opens one input's output.

    Args:
        url: as `check_live_output` has found it good; `{name}` in it becomes the input's name.
        name: the input's.
        fps: frames a second that are to come, about.

    Raises:
        UserError: the port is taken, or may not be used.
    """
    url = url.replace("{name}", name)
    return MjpegServer.of(url) if url.startswith("http://") else FfmpegOutput(url, fps)


class MjpegServer:
    """Serves the frames of one input, or of several on one port, to any number of viewers."""

    _servers: dict[tuple[str, int], http.server.ThreadingHTTPServer] = {}

    def __init__(self, server: http.server.ThreadingHTTPServer, path: str) -> None:
        self.problem = ""
        self._server, self._path = server, path
        self._jpeg, self._number, self._changed = b"", 0, threading.Condition()

    @classmethod
    def of(cls, url: str) -> MjpegServer:
        """Opens the address, or adds a path to the server that is there already."""
        parts = urlsplit(url)
        place = (parts.hostname or "127.0.0.1", parts.port)
        if place not in cls._servers:
            try:
                server = http.server.ThreadingHTTPServer(place, _MjpegHandler)
            except OSError as error:
                raise UserError(f"--live-out {url}: cannot be served there ({error.strerror}).") from error
            server.daemon_threads, server.outputs = True, {}
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
            cls._servers[place] = server
        output = cls(cls._servers[place], parts.path or "/")
        cls._servers[place].outputs[output._path] = output
        LOGGER.info(f"Live: {url}")
        return output

    def show(self, image: np.ndarray) -> None:
        """Takes the next frame."""
        _, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
        with self._changed:
            self._jpeg, self._number = data.tobytes(), self._number + 1
            self._changed.notify_all()

    def wait(self, number: int) -> tuple[bytes, int]:
        """Returns the newest frame as soon as it is another than `number`; nothing once the output is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._number != number)
            return self._jpeg, self._number

    def close(self) -> None:
        """Sends the viewers away; the last output of a port gives it back."""
        with self._changed:
            self._jpeg, self._number = b"", -1
            self._changed.notify_all()
        self._server.outputs.pop(self._path)
        if not self._server.outputs:
            self._servers.pop(next(place for place, server in self._servers.items() if server is self._server))
            self._server.shutdown()
            self._server.server_close()


class _MjpegHandler(http.server.BaseHTTPRequestHandler):
    timeout = 30  # seconds until a viewer that takes nothing is given up

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        output = self.server.outputs.get(unquote(urlsplit(self.path).path))
        if output is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        number = 0
        with contextlib.suppress(OSError):  # the viewer has gone
            while True:
                jpeg, number = output.wait(number)
                if not jpeg:
                    return
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + jpeg + b"\r\n")


class FfmpegOutput:
    """Hands frames to ffmpeg, which is started again where it ends: a server that is not there yet may come."""

    def __init__(self, url: str, fps: float) -> None:
        """Prepares it; ffmpeg starts with the first frame, whose size it needs."""
        self.problem = ""
        self._url, self._fps = url, fps or 25.0
        self._newest: np.ndarray | None = None
        self._changed, self._closed = threading.Condition(), False
        self._process: subprocess.Popen | None = None
        if "://" not in url:
            Path(url).parent.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def show(self, image: np.ndarray) -> None:
        """Takes the next frame in place of one that ffmpeg has not taken yet."""
        with self._changed:
            self._newest = image.copy()
            self._changed.notify()

    def close(self) -> None:
        """Hands over the last frame and lets ffmpeg end its output; one that hangs is ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(RETRY_S)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _next(self) -> np.ndarray | None:
        """Waits for a frame; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._closed)
            image, self._newest = self._newest, None
            return image

    def _run(self) -> None:
        image = self._next()
        while image is not None:
            image = self._send(image)
            if image is not None and self.problem:
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, RETRY_S):
                        return

    def _send(self, image: np.ndarray) -> np.ndarray | None:
        """Sends frames of one size until there are no more (None), or one cannot be sent, which it returns."""
        height, width = image.shape[:2]
        scheme = self._url.partition("://")[0] if "://" in self._url else ""
        command = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "bgr24"]
        command += ["-use_wallclock_as_timestamps", "1", "-framerate", f"{self._fps:g}", "-s", f"{width}x{height}"]
        command += ["-i", "pipe:0", *FFMPEG_OUTPUTS[scheme], self._url]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        # a session of its own: Ctrl-C is for this process, which then ends the output properly
        self._process = process = subprocess.Popen(command, start_new_session=True, **streams)
        said: list[bytes] = []
        reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reader.start()
        with contextlib.suppress(OSError):  # ffmpeg has ended
            while image is not None and image.shape[:2] == (height, width):
                process.stdin.write(image.tobytes())
                process.stdin.flush()
                image = self._next()
        with contextlib.suppress(OSError):
            process.stdin.close()
        status = process.wait()
        reader.join()
        reason = b"".join(said[:1]).decode(errors="replace").rpartition("] ")[2].strip() or f"ffmpeg's status {status}"
        if status and not self.problem:
            LOGGER.warning(f"WARNING: --live-out {without_secrets(self._url)}: {reason}. Trying again and again")
        self.problem = reason if status else ""
        return image
