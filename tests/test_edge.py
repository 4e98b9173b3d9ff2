"""The small installation of requirements-edge.txt, and how soon detect.py answers on it."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_MEGABYTES = 400
HELP_CPU_S = 0.3
FIRST_DETECTION_CPU_S = 1.5

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(golden_dir, tmp_path_factory):
    """The golden checkpoint and its ONNX file of open size."""
    import export

    pytest.importorskip("onnx")
    weights = Path(shutil.copy(golden_dir / "yolov5n-v6-coco.pt", tmp_path_factory.mktemp("model") / "yolov5n.pt"))
    (path,) = export.run(weights=[str(weights)], include=["onnx"], dynamic=True, device="cpu")
    return weights, path


def detect(python, weights, source, project, *options):
    line = [python, "detect.py", "--weights", weights, "--source", source, "--project", project, *options]
    return subprocess.run(list(map(str, line)), cwd=ROOT, capture_output=True, text=True, timeout=300)


def labels(folder):
    return {path.name: np.loadtxt(path, ndmin=2) for path in sorted((folder / "exp" / "labels").iterdir())}


def cpu_s(work):
    """Returns the processor time of the commands that `work` runs; the least of three."""
    resource = pytest.importorskip("resource")

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    found = []
    for _ in range(3):
        before = spent()
        work()
        found.append(spent() - before)
    return min(found)


def test_help_answers_at_once():
    line = [sys.executable, "detect.py", "--help"]
    assert cpu_s(lambda: subprocess.run(line, cwd=ROOT, capture_output=True, check=True)) < HELP_CPU_S


def test_the_first_detection_comes_soon(model, golden_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = golden_dir / "images" / "bus.jpg"

    def one():
        assert detect(sys.executable, model[1], source, tmp_path).returncode == 0

    from models.backends import load_backend

    backend = load_backend(model[1], "cpu")
    inputs = backend.preprocess(np.zeros((1, 3, 640, 480), np.uint8))
    before = os.times()
    backend.infer(inputs)
    inference_s = sum(os.times()[:2]) - sum(before[:2])
    assert cpu_s(one) - inference_s < FIRST_DETECTION_CPU_S


# what requirements-edge.txt does not install: each command of argv[1:], in one process
WITHOUT = """
import importlib, logging, sys
for name in "torch torchvision pandas matplotlib seaborn thop tqdm tensorboard fastapi".split():
    sys.modules[name] = None  # as if it were not installed
from utils.cli import run_command
for line in sys.argv[1:]:
    sys.argv = line.split("|")
    logging.getLogger("yolov5").handlers.clear()
    script = importlib.import_module(sys.argv[0].removesuffix(".py"))
    print(f"status {run_command(script.main, script.build_parser())}", file=sys.stderr)
"""
PYTORCH = r"needs PyTorch \(torch is not installed\): pip install -r requirements.txt, or export the model"
LIBRARY = r"error: needs torch, which is not installed: pip install -r requirements.txt$"
NEEDS = {
    "detect.py|--weights|{}/best.pt|--source|data/images|--project|{}": PYTORCH,
    "detect.py|--weights|{}/best.pt|{}/best.pt|--source|data/images|--project|{}": PYTORCH,
    "detect.py|--weights|{}/best.torchscript|--source|data/images|--project|{}": PYTORCH,
    "detect.py|--weights|{}/best.engine|--source|data/images|--project|{}": PYTORCH,
    "serve.py|--weights|{}/best.pt": r"fastapi is not installed: pip install -r requirements-serve.txt",
    "val.py|--weights|{}/best.onnx|--data|coco128.yaml": LIBRARY,
    "export.py|--weights|{}/best.pt": LIBRARY,
    "train.py|--cfg|yolov5n.yaml|--data|coco128.yaml": LIBRARY,
    "utils.train.fingerprint|{}/best.pt": LIBRARY,
}


def test_what_needs_pytorch_says_so_in_one_line_where_it_is_absent(tmp_path):
    for suffix in ("pt", "torchscript", "engine", "onnx"):
        (tmp_path / f"best.{suffix}").write_bytes(b"weights")
    lines = [line.replace("{}", str(tmp_path)) for line in NEEDS]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *lines], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr.split("status 1\n")
    assert len(said) == len(NEEDS) + 1 and not said[-1], done.stderr
    for line, text in zip(NEEDS, said, strict=False):
        message = text.strip().splitlines()[-1]
        assert re.search(NEEDS[line], message), (line, text)


@pytest.mark.slow
def test_a_fresh_environment_detects_what_the_checkpoint_does(model, golden_dir, tmp_path):
    home = tmp_path / "edge"
    venv.create(home, with_pip=True)
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    line = [python, "-m", "pip", "install", "-q", "--no-compile", "-r", ROOT / "requirements-edge.txt"]
    installed = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=600)
    if installed.returncode:
        pytest.skip(f"pip cannot install here: {installed.stderr.strip().splitlines()[-1]}")
    megabytes = sum(path.lstat().st_size for path in home.rglob("*") if path.is_file()) / 1e6
    assert megabytes < MAX_MEGABYTES
    packages = subprocess.run([str(python), "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "torchvision", "pandas", "matplotlib"} & set(packages.split())

    done = detect(python, model[1], golden_dir / "images", tmp_path / "runs", "--save-txt", "--save-conf")
    assert done.returncode == 0, done.stderr
    done = detect(sys.executable, model[0], golden_dir / "images", tmp_path / "torch", "--save-txt", "--save-conf")
    assert done.returncode == 0, done.stderr
    found, expected = labels(tmp_path / "runs"), labels(tmp_path / "torch")
    assert found.keys() == expected.keys() and found
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name][:, 0], rows[:, 0])
        np.testing.assert_allclose(found[name][:, 1:], rows[:, 1:], atol=5e-3)
