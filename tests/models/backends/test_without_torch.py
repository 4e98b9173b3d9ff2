"""detect.py on exported models with everything heavy blocked: what it writes is what the checkpoint gives."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import detect

ROOT = Path(__file__).resolve().parents[3]
BLOCKED = ("torch", "torchvision", "pandas", "matplotlib", "seaborn", "thop")
PROGRAM = f"""
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError(f"{{name}} was imported")

sys.meta_path.insert(0, Blocker())
sys.argv = ["detect.py", *sys.argv[1:]]
runpy.run_path("detect.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory, images):
    """A picture of 96x64 px, which needs no scaling and no padding."""
    path = tmp_path_factory.mktemp("source") / "picture.png"
    cv2.imwrite(str(path), np.ascontiguousarray(images[0].transpose(1, 2, 0)[..., ::-1]))
    return path


@pytest.fixture(scope="module")
def expected(weights, picture, tmp_path_factory):
    """The label file of the checkpoint."""
    project = tmp_path_factory.mktemp("expected")
    options = {"imgsz": [64, 96], "device": "cpu", "save_txt": True, "save_conf": True, "nosave": True}
    detect.run(weights=str(weights), source=str(picture), project=str(project), **options)
    return np.loadtxt(project / "exp" / "labels" / "picture.txt", ndmin=2)


@pytest.mark.parametrize(
    "form", ["onnx", "onnx raw", "openvino", "ncnn", "rknn", "mnn", pytest.param("tflite", marks=pytest.mark.slow)]
)
def test_detections_are_the_checkpoints_with_nothing_heavy_imported(
    exported, rockchip, picture, expected, tmp_path, form
):
    path = exported(form.removesuffix(" raw"), **{"raw": True} if form.endswith(" raw") else {})
    line = [sys.executable, "-c", PROGRAM, "--weights", path, "--source", picture, "--project", tmp_path]
    line += ["--save-txt", "--save-conf", "--save-crop", "--save-csv"]
    environment = {**os.environ, "PYTHONPATH": str(rockchip)}
    done = subprocess.run(list(map(str, line)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Image size 64x96, the one that the model was exported for" in done.stderr
    found = np.loadtxt(tmp_path / "exp" / "labels" / "picture.txt", ndmin=2)
    assert len(found) == len(expected) > 0
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    np.testing.assert_allclose(found[:, 1:5], expected[:, 1:5], atol=1.01 / 64)  # a pixel, where rounding falls apart
    np.testing.assert_allclose(found[:, 5], expected[:, 5], atol=5e-3 if form == "tflite" else 1e-3)
    assert (tmp_path / "exp" / "picture.png").is_file()


def test_dnn_needs_no_runtime_at_all(exported, picture, expected, tmp_path):
    program = PROGRAM.replace("'torch',", "'torch', 'onnxruntime',")
    line = [sys.executable, "-c", program, "--weights", exported("onnx"), "--source", picture, "--project", tmp_path]
    done = subprocess.run(
        [*map(str, line), "--dnn", "--save-txt", "--nosave"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(np.loadtxt(tmp_path / "exp" / "labels" / "picture.txt", ndmin=2)) == len(expected)
