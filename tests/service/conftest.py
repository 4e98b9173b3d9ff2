"""A small exported model; services of it in this process, and real servers in processes of their own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = {0: "cat", 1: "红绿灯"}
START_S = 60


@pytest.fixture(scope="session")
def exported(tmp_path_factory, draw) -> Path:
    """An ONNX file for images of any size and number, of a model that finds other boxes in every image."""
    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    import onnx
    import torch

    from models.yolo import Model

    class Rows(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images)[0]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model("yolov5n.yaml", nc=len(NAMES))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # measure: an untrained model answers all images alike
    with torch.no_grad():
        images = torch.from_numpy(np.stack([draw(seed, 64, 64) for seed in range(16)]))
        model.train()(images.permute(0, 3, 1, 2) / 255)
    model.eval()
    for conv in model.head.m:
        conv.bias.data.view(3, -1)[:, 4:] = torch.tensor([0.0, 1.0, 1.0])
        conv.weight.data *= 3
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    open_axes = {"images": {0: "b", 2: "h", 3: "w"}, "output": {0: "b", 1: "n"}}
    names = {"input_names": ["images"], "output_names": ["output"], "dynamic_axes": open_axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter that traces: torch 2.9 prefers the other
        torch.onnx.export(Rows(model).eval(), (torch.zeros(1, 3, 64, 64),), str(path), dynamo=False, **names)
    content = onnx.load(path)
    onnx.helper.set_model_props(content, {"names": str(NAMES), "stride": "32"})
    onnx.save(content, path)
    return path


class Server:
    """serve.py in a process of its own."""

    def __init__(self, *options: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "serve.py", "--port", "0", "--device", "cpu", *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines, self._ready, self.url = [], threading.Event(), ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_S) and self.url, self.log()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"Serving on (http://\S+)", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def log(self) -> str:
        return "".join(self.lines)

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        status = self.process.wait(START_S)
        self._reader.join()
        self.process.stderr.close()
        return status


@pytest.fixture(scope="module")
def start_server(exported):
    """Starts servers; stops what a test leaves running."""
    servers = []

    def start(*options: str) -> Server:
        servers.append(Server("--weights", str(exported), "--imgsz", "64", *options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def server(start_server) -> Server:
    return start_server("--max-image-mb", "0.5", "--max-pixels", "1e6")


@pytest.fixture(scope="module")
def client(server):
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=server.url, timeout=60) as opened:
        yield opened


@pytest.fixture
def in_process(exported):
    """Opens services in this process; yields a client."""
    testclient = pytest.importorskip("starlette.testclient")
    import serve
    from models.backends import load_backend
    from models.inference.predictor import Predictor
    from service.app import ServeConfig, create_app
    from utils.cli import options_from
    from utils.nms import NMSConfig

    @contextlib.contextmanager
    def start(kind=Predictor, backend=None, **options):
        config = ServeConfig(**vars(options_from(serve.build_parser(), options)))
        predictor = kind(backend or load_backend(exported, "cpu"), NMSConfig(max_det=1000), (64, 64))
        app = create_app(predictor, "tiny", config)
        with testclient.TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
            yield client

    return start


@pytest.fixture(scope="session")
def draw():
    """Makes images: coarse coloured blocks, so that JPEG keeps them, of any size."""

    def make(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
        blocks = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
        return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_CUBIC)

    return make


@pytest.fixture(scope="session")
def encoded(draw):
    """Makes the content of image files."""

    def make(seed: int = 0, height: int = 48, width: int = 64, suffix: str = ".png") -> bytes:
        return cv2.imencode(suffix, draw(seed, height, width))[1].tobytes()

    return make


@pytest.fixture(scope="module")
def expected(exported):
    """What detect.py finds in an image, as rows (k, 6)."""
    from models.backends import load_backend
    from models.inference.predictor import Predictor
    from utils.nms import NMSConfig

    backend = load_backend(exported, "cpu")

    def detect(image: np.ndarray, conf: float = 0.25, iou: float = 0.45) -> np.ndarray:
        return Predictor(backend, NMSConfig(conf, iou, 1000), (64, 64)).detect(image).rounded().rows

    return detect


@pytest.fixture(scope="session")
def agrees():
    """Compares an answer's records with detections (k, 6)."""

    def compare(records: list[dict], detections: np.ndarray) -> bool:
        keys = ("xmin", "ymin", "xmax", "ymax", "confidence", "class")
        rows = np.array([[record[key] for key in keys] for record in records]).reshape(-1, 6)
        return rows.shape == detections.shape and bool(np.allclose(rows, detections, atol=(1, 1, 1, 1, 1e-4, 0)))

    return compare
