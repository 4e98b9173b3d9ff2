"""The commands that everybody runs first, one after the other as a user types them: train, val, detect, export, hub.

What each of them does in detail is tested in the scripts' own files; here one's output is the next one's input.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(line: str, cwd: Path) -> str:
    """Runs `python <line>` in a folder and returns what it said; fails with that if the status is not 0."""
    script, *arguments = line.split()
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=280
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"python {line}\n{said}"
    return said


@pytest.mark.slow
def test_the_usual_sequence(tiny_shapes: Path, tmp_path: Path):
    pytest.importorskip("onnx")
    small = "--img 64 --device cpu"
    train = f"--cfg yolov5n.yaml --batch 32 --epochs 1 --workers 0 --noplots --project {tmp_path}/train"
    said = run(f"train.py {small} --data {tiny_shapes} {train}", tmp_path)
    assert "1 epochs completed in" in said and "results saved to" in said.lower()
    best = tmp_path / "train" / "exp" / "weights" / "best.pt"
    assert best.is_file()

    said = run(f"val.py {small} --weights {best} --batch 32 --workers 0 --project {tmp_path}/val", tmp_path)
    assert re.search(r"^\s+all\s+8\s+\d+", said, re.MULTILINE), said
    assert (tmp_path / "val" / "exp" / "confusion_matrix.png").is_file()

    said = run(f"detect.py {small} --weights {best} --source {ROOT}/data/images --project {tmp_path}/detect", tmp_path)
    assert re.search(r"^image 1/\d+ .*64x\d+ .*Done\.", said, re.MULTILINE), said
    written = sorted(path.name for path in (tmp_path / "detect" / "exp").iterdir())
    assert written == sorted(path.name for path in (ROOT / "data" / "images").iterdir())
    assert all(cv2.imread(str(tmp_path / "detect" / "exp" / name)) is not None for name in written)

    assert "Model Summary: 270 layers" in run("models/yolo.py --cfg yolov5n.yaml", tmp_path)

    said = run(f"export.py --img 64 --weights {best} --include torchscript onnx", tmp_path)
    for kind, suffix in (("TorchScript", ".torchscript"), ("ONNX", ".onnx")):
        assert re.search(rf"{kind}: export success", said, re.IGNORECASE), said
        assert best.with_suffix(suffix).stat().st_size > 1e6


@pytest.mark.slow
def test_the_hub_file_shows_itself(tmp_path: Path):
    said = run("hubconf.py", tmp_path)
    assert re.search(r"^image 1/\d+: \d+x\d+ ", said, re.MULTILINE), said
