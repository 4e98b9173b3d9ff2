"""benchmarks/neck.py runs as a command and reports every model in both forms; what its shares are of."""

import json
import subprocess
import sys

import pytest

from benchmarks.neck import share_of
from utils.files import ROOT

pytestmark = pytest.mark.slow
MODELS = ["yolov5n", "yolov5n-slimneck:relu"]


def test_the_command_prints_and_writes_costs_and_times(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    report = tmp_path / "neck.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "neck.py"), "--models", *MODELS, "--imgsz", "64"]
    command += ["--repeats", "1", "--threads", "1", "--runtimes", "onnxruntime-int8", "torch", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    assert [runtime["runtime"] for runtime in result["runtimes"]] == ["onnxruntime-int8", "torch"]
    trained, rewritten = result["models"][::2], result["models"][1::2]
    assert [entry["model"] for entry in trained] == MODELS
    for before, after in zip(trained, rewritten, strict=True):
        assert before["model"] == after["model"]
        assert before["model"] in done.stdout
        assert before["parameters"] == after["parameters"]
        assert after["nodes"] < before["nodes"]
        assert after["gflops"] < before["gflops"]
    for runtime in result["runtimes"]:
        assert runtime["version"] in done.stdout
        assert len(runtime["ms"]) == 2 * len(MODELS)
        assert all(spent_ms > 0 for spent_ms in runtime["ms"])
        assert {len(times) for times in runtime["loads_ms"]} == {2 * len(MODELS)}


def test_a_share_is_of_the_times_of_one_load():
    slower = {"loads_ms": [[10.0, 8.0], [20.0, 18.0], [40.0, 32.0]]}  # each load, more than the models differ by
    assert share_of(slower, 1, 0) == (0.8, pytest.approx(0.05))
