"""What the whole suite shares: folders of golden numbers and real images, a small data set, weights, a camera."""

import contextlib
import http.server
import io
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Lets Ctrl-C reach the tests and their commands: what a shell starts in the background ignores it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / default))
    if not path.is_dir():
        pytest.skip(f"{path} is absent: set ${variable} to the folder")
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return _folder("GOLDEN_DIR", "../shared/golden")


@pytest.fixture(scope="session")
def datasets_dir() -> Path:
    return _folder("DATASETS_DIR", "../shared/datasets")


@pytest.fixture(scope="session")
def part_of_coco128(tmp_path_factory: pytest.TempPathFactory, datasets_dir: Path):
    """Makes a data set YAML of the first so many images."""
    from utils.files import read_yaml, write_yaml

    def make(count: int) -> Path:
        coco, folder = datasets_dir / "coco128", tmp_path_factory.mktemp("coco")
        images = sorted((coco / "images" / "train2017").glob("*.jpg"))[:count]
        (folder / "val.txt").write_text("\n".join(map(str, images)))
        names = read_yaml(coco / "coco128.yaml")["names"]
        file = folder / "data.yaml"
        write_yaml(file, {"path": str(folder), "train": "val.txt", "val": "val.txt", "names": names})
        return file

    return make


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set YAML: 24 training and 8 validation images of the embedded data set."""
    from utils.tools.shapes import SPLITS, label_text, scene_of

    root = tmp_path_factory.mktemp("shapes")
    for split, count in zip(SPLITS, (24, 8), strict=True):
        images, labels = (root / kind / split.name for kind in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            scene = scene_of(split, index)
            cv2.imwrite(str(images / f"{index}.jpg"), scene.image)
            (labels / f"{index}.txt").write_text(label_text(scene))
    yaml = root / "tiny.yaml"
    yaml.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [circle, square, triangle, star]\n")
    return yaml


@pytest.fixture(scope="session")
def tiny_cfg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model YAML of four layers and two levels, trained in a moment."""
    from tests.campaigns.interruptions import MODEL

    path = tmp_path_factory.mktemp("cfg") / "tiny.yaml"
    path.write_text(MODEL)
    return path


@pytest.fixture
def one_thread(monkeypatch):
    """Small models gain nothing from more, and lose much where the machine is busy."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for commands
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A small model of the classes cat and 红绿灯, sure of itself everywhere: there is always something to draw."""
    return save_weights(tmp_path_factory.mktemp("weights") / "tiny.pt", {0: "cat", 1: "红绿灯"})


@pytest.fixture(scope="session")
def more_weights():
    """Makes another such model at a path, of other classes, with another seed or of another YAML."""
    return save_weights


def save_weights(path: Path, names: dict[int, str], seed: int = 0, cfg: str = "yolov5n.yaml") -> Path:
    import torch

    from models.yolo import Model
    from utils.checkpoint import TRAINING_STATE, save_checkpoint

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(cfg, nc=len(names))
    if model.head.has_anchors:
        for conv in model.head.m:
            conv.bias.data.view(3, -1)[:, 4:] = torch.tensor([2.0, 2.5, *[1.0] * (len(names) - 1)])
    else:
        for conv in model.head.m[model.head.nl :]:  # of the classes
            torch.nn.init.constant_(conv.bias, 1.0)
    content = {"epoch": 3, "model": model.state_dict(), "yaml": model.yaml, "names": names, "nc": len(names)}
    content |= {"stride": model.stride.tolist(), "hyp": {}, "opt": {}, "data": None, "versions": {}, "date": ""}
    content |= {"format": "yolov5-slim", "format_version": 1, **dict.fromkeys(TRAINING_STATE), "updates": 7}
    save_checkpoint(path, content)
    return path


class Numbered:
    """Images that carry their number where compression does not harm it, on a texture that shows what is missing."""

    HEIGHT, WIDTH, BITS, CELL_PX = 96, 128, 8, 16

    def __init__(self):
        texture = np.random.default_rng(0).integers(60, 200, (12, 16, 3)).astype(np.uint8)
        self.texture = cv2.resize(texture, (self.WIDTH, self.HEIGHT))

    def draw(self, number: int) -> np.ndarray:
        """Draws image `number`, 0 to 255: bits as light or dark cells in the upper row, the rest moves."""
        image = np.roll(self.texture, 5 * number, axis=1)
        for bit in range(self.BITS):
            cell = image[: self.CELL_PX, bit * self.CELL_PX : (bit + 1) * self.CELL_PX]
            cell[:] = 230 if number >> bit & 1 else 25
        return image

    def read(self, image: np.ndarray) -> int:
        """Returns the number of an image that is whole: it must look as drawn, all over."""
        assert image.shape == (self.HEIGHT, self.WIDTH, 3)
        cells = image[4 : self.CELL_PX - 4].reshape(-1, self.BITS, self.CELL_PX, 3)[:, :, 4:-4]
        number = sum(1 << bit for bit in range(self.BITS) if cells[:, bit].mean() > 128)
        blocks = np.abs(image.astype(int) - self.draw(number)).reshape(6, 16, 8, 16, 3).mean((1, 3, 4))
        assert blocks.max() < 25, f"image {number} is damaged: {blocks.round()}"
        return number


@pytest.fixture(scope="session")
def numbered() -> Numbered:
    """Draws and reads images with numbers."""
    return Numbered()


class MjpegServer(http.server.ThreadingHTTPServer):
    """Sends numbered images, the numbers going on from connection to connection; `plan` says how each ends.

    A connection sends `frames` images and then: "cut" breaks off within the next one, "stall" keeps the line open
    in silence, "end" closes it, "corrupt" sends rubbish once and goes on to "end". "refuse" answers 503 at once.
    Where `go` was cleared, the plan begins when it is set; until then images come slowly.
    """

    daemon_threads = True

    def __init__(self, numbered, plan: list[str], frames: int = 12) -> None:
        super().__init__(("127.0.0.1", 0), MjpegHandler)
        self.numbered, self.plan, self.frames = numbered, list(plan), frames
        self.sent: list[list[int]] = []
        self.number, self.finished, self.go = 0, threading.Event(), threading.Event()
        self.go.set()
        self.address = f"http://127.0.0.1:{self.server_port}/camera"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.finished.set()
        self.go.set()
        self.shutdown()
        self.server_close()


class MjpegHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_arguments) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        ending = self.server.plan.pop(0) if self.server.plan else "refuse"
        if ending == "refuse":
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        sent = []
        self.server.sent.append(sent)
        while not self.server.go.is_set():
            sent.append(self.send_part())
            self.server.go.wait(0.2)
        for _ in range(self.server.frames):
            sent.append(self.send_part())
        if ending == "corrupt":
            self.send_part(lambda data: data[:200] + bytes(len(data) - 200))
            sent.append(self.send_part())
        elif ending == "cut":
            self.send_part(lambda data: data[: len(data) // 2], whole=False)
        elif ending == "stall":
            self.server.finished.wait(60)

    def send_part(self, change=bytes, whole: bool = True) -> int:
        self.server.number += 1
        data = cv2.imencode(".jpg", self.server.numbered.draw(self.server.number))[1].tobytes()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
        self.wfile.write(head.encode() + change(data) + b"\r\n" * whole)
        self.server.finished.wait(0.02)
        return self.server.number


@pytest.fixture
def mjpeg_server(numbered):
    """Starts servers that play a plan; see `MjpegServer`."""
    servers = []

    def start(plan: list[str]) -> MjpegServer:
        servers.append(MjpegServer(numbered, plan))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def process_as_before():
    """Gives signals and torch's switches back as they were: a program that ends leaves them as they are."""
    answers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch = sys.modules.get("torch")
    deterministic = torch and torch.are_deterministic_algorithms_enabled()
    yield
    for number, answer in answers.items():
        signal.signal(number, answer)
    if torch:
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def logger_as_before():
    """Gives the program's logger back as it was: a script run inside a test must not silence the next test."""
    logger = logging.getLogger("yolov5")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


class Outcome(NamedTuple):
    """What a command returned, and all that it said."""

    status: int
    said: str
    prog: str

    def assert_refused(self, *words: str) -> None:
        """It ended in a message of at most three lines with these words in it, and without a traceback."""
        assert self.status in (1, 2), self.said
        assert "Traceback" not in self.said
        _, _, message = self.said.partition(f"{self.prog}: error: ")
        assert message and len(message.strip().splitlines()) <= 3, self.said
        for word in words:
            assert word in message, message


@pytest.fixture(scope="session")
def command():
    """Runs a script's command line in this process: `command(train, "--epochs", 3)` is an `Outcome`."""
    from utils.cli import run_command

    def run(script, *arguments: object) -> Outcome:
        said, prog = io.StringIO(), f"{script.__name__}.py"
        logging.getLogger("yolov5").handlers.clear()
        line = mock.patch("sys.argv", [prog, *map(str, arguments)])
        with line, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                status = run_command(script.main, script.build_parser())
            except SystemExit as stop:  # argparse
                status = stop.code
        return Outcome(status, said.getvalue(), prog)

    return run


@pytest.fixture(scope="session")
def refusal():
    """Calls what must refuse: `refusal(load_labels, [images])` is its message, of at most three lines for a person."""
    from utils.errors import UserError

    def call(function, *arguments) -> str:
        with pytest.raises(UserError) as caught:
            function(*arguments)
        message = str(caught.value)
        assert len(message.splitlines()) <= 3 and len(message) < 1500, message
        return message

    return call


@pytest.fixture(scope="session", autouse=True)
def network_attempts():
    """Refuses connections to other machines and the look-up of their names in this process; lists what was tried."""
    attempts: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _local_only(getattr(socket.socket, name), attempts))
        patch.setattr(socket, "getaddrinfo", _local_names_only(socket.getaddrinfo, attempts))
        yield attempts


@pytest.fixture(autouse=True)
def no_network(network_attempts):
    """Fails a test that reached for the network, or whose fixtures did, even if it bore the refusal."""
    yield
    tried = list(network_attempts)
    network_attempts.clear()
    assert not tried, f"reached for the network: {tried}"


def _local_only(method, attempts: list[str]):
    """Wraps a method of sockets that takes an address last."""

    def checked(own, *arguments):
        host = arguments[-1][0] if isinstance(arguments[-1], tuple) else "localhost"  # text is a path: a local socket
        if not _is_local(host):
            attempts.append(str(arguments[-1]))
            raise ConnectionRefusedError(f"tests have no network: {host}")
        return method(own, *arguments)

    return checked


def _local_names_only(look_up, attempts: list[str]):
    """Wraps the look-up of names; those ending in `.invalid` exist nowhere and may be asked for."""

    def checked(host, *arguments, **options):
        name = host.decode() if isinstance(host, bytes) else host
        if _is_local(name):
            return look_up(host, *arguments, **options)
        if not name.endswith(".invalid"):
            attempts.append(name)
        raise socket.gaierror(socket.EAI_NONAME, f"tests have no network: {name}")

    return checked


def _is_local(host: str | None) -> bool:
    """Says whether a host is this machine."""
    if host in (None, "", "localhost", "0.0.0.0", "::", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture
def data(tiny_shapes, tmp_path):
    """A data set YAML of one's own to spoil."""
    shutil.copytree(tiny_shapes.parent, tmp_path / "data", ignore=shutil.ignore_patterns("*.cache.npz"))
    return tmp_path / "data" / tiny_shapes.name
