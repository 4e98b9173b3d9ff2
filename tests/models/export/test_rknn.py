"""RKNN folders: what the toolkit is given, parity on its simulator, and its failures in plain words."""

import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import export
from models.backends.metadata import Metadata
from models.export import rknn as exporter
from models.heads import Head
from models.yolo import Detect
from utils.errors import UserError
from utils.files import ROOT, read_yaml, write_yaml

SHAPE_HW = [64, 96]


@pytest.fixture
def weights(small_weights, tmp_path):
    """A copy of its own of the small checkpoint with anchors."""
    return Path(shutil.copy(small_weights["anchors"], tmp_path / "best.pt"))


@pytest.fixture
def run(weights, caplog, tmp_path, monkeypatch):
    """A function that exports to RKNN; returns the paths and what was logged."""
    monkeypatch.setenv("STAND_IN_NOTES", str(tmp_path))

    def run(**options):
        caplog.clear()
        with caplog.at_level("INFO", "yolov5"):
            paths = export.run(**{"weights": str(weights), "include": "rknn", "imgsz": SHAPE_HW, **options})
        return [Path(path) for path in paths], caplog.text

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set YAML of five images with the checkpoint's classes; the first image has a red upper half."""
    folder = tmp_path_factory.mktemp("ants")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number in range(5):
        image = np.random.default_rng(number).integers(0, 255, (64, 96, 3), np.uint8)
        if number == 0:
            image[:32] = (0, 0, 255)  # BGR
        cv2.imwrite(str(folder / "images" / f"{number}.png"), image)
        (folder / "labels" / f"{number}.txt").write_text("1 0.5 0.5 0.4 0.4\n")
    names = ["ant", "bee", "fly"]
    write_yaml(folder / "ants.yaml", {"path": str(folder), "train": "images", "val": "images", "names": names})
    return folder / "ants.yaml"


@pytest.mark.parametrize("head", ["anchors", "bins"])
def test_the_simulators_boxes_are_compared_with_the_checkpoints(rockchip, run, small_weights, weights, head):
    shutil.copy(small_weights[head], weights)
    (folder,), log = run()
    assert folder == weights.with_name("best_rknn_model")
    assert sorted(part.name for part in folder.iterdir()) == ["metadata.yaml", "model.rknn"]
    assert f"{folder}: rknn-toolkit2's simulator of rk3588" in log
    assert "RKNN: parity with best.pt on 6 images: scores within" in log and "failure" not in log
    assert "raw boxes in place" in log and "not compared" not in log
    texts = {name: str(text) for name, text in read_yaml(folder / "metadata.yaml").items()}
    said = Metadata.from_texts(texts, folder)
    assert (said.precision, said.shape_hw, said.versions["rknn-toolkit2"]) == ("float16", (64, 96), "9.8.7")
    assert bool(said.raw.anchors) == (head == "anchors") and texts["chip"] == "rk3588"
    assert not [part for part in weights.parent.iterdir() if part.name.startswith(".")]


def test_nothing_is_left_running_or_lying_about(rockchip, run, tmp_path, monkeypatch):
    ended, close = [], exporter.Toolkit.close
    monkeypatch.setattr(exporter.Toolkit, "close", lambda toolkit: ended.append(close(toolkit)))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run(), run(chip="rk9999")
    assert len(ended) == 2 and not list(scratch.iterdir())


def test_a_model_that_the_simulator_computes_otherwise_fails(rockchip, run, monkeypatch):
    monkeypatch.setenv("STAND_IN", "colours")
    paths, log = run()
    assert len(paths) == 1 and re.search("RKNN: parity failure: .* of the detections has no counterpart", log)


def test_int8_is_calibrated_on_letterboxed_images_and_its_map_measured(rockchip, run, data, tmp_path):
    (folder,), log = run(int8=True, data=str(data), chip="rk3566")
    assert folder.name == "best-int8_rknn_model"
    images = [cv2.imread(str(tmp_path / f"{number}.png")) for number in range(5)]
    assert {image.shape for image in images} == {(64, 96, 3)}
    assert images[0][:32].mean((0, 1)).tolist() == [0, 0, 255]  # as PNG files have it
    assert "RKNN: mAP50-95 on" in log and "loss 0.0000" in log and "failure" not in log
    said = read_yaml(folder / "metadata.yaml")
    assert said["chip"] == "rk3566" and '"precision": "int8"' in said["metadata"]


def test_where_the_simulator_does_not_run_it_is_compiled_only_and_that_is_said(rockchip, run, monkeypatch):
    monkeypatch.setenv("STAND_IN", "no simulator")
    (folder,), log = run()
    assert (folder / "model.rknn").is_file()
    assert "WARNING: RKNN: compiled only, as the simulator does not run here. rknn-toolkit2 (" in log
    assert "): librknnc.so has no simulator" in log
    assert "WARNING: RKNN: parity was not checked: it runs on its own device only." in log
    assert "Not run here, and so not compared with the checkpoint: best_rknn_model" in log


@pytest.mark.parametrize(
    ("fault", "chip", "reason"),
    [
        ("", "rk9999", r"for rk9999 \(--chip\)\. rknn-toolkit2 \(.*python\): Invalid 'rk9999'!\n"),
        ("unable", "rk3588", r"for rk3588 \(--chip\)\. rknn-toolkit2 \(.*python\): build: no such operator!\n"),
    ],
)
def test_what_the_toolkit_refuses_is_said_in_one_line(rockchip, run, weights, monkeypatch, fault, chip, reason):
    monkeypatch.setenv("STAND_IN", fault)
    paths, log = run(chip=chip)
    assert paths == []
    assert re.search(f"RKNN: export failure: cannot be compiled {reason}", log), log
    assert not weights.with_name("best_rknn_model").exists()


@pytest.mark.parametrize(("fault", "reason"), [("illness", "): out of memory"), ("death", "): it ended with status 3")])
def test_a_simulator_that_fails_on_the_way_is_a_failure(rockchip, run, monkeypatch, fault, reason):
    monkeypatch.setenv("STAND_IN", fault)
    paths, log = run()
    assert len(paths) == 1
    assert re.search(rf"RKNN: parity failure: rknn-toolkit2 \(.*python{re.escape(reason)}", log), log


def test_rknn_is_raw_and_others_are_not_unless_they_are_told(rockchip, run, weights):
    paths, log = run(include=["onnx", "rknn"])
    assert [path.name for path in paths] == ["best.onnx", "best_rknn_model"]
    assert log.count("raw boxes in place") == 2 and "failure" not in log
    paths, log = run(include=["onnx", "rknn"], raw=True)
    assert [path.name for path in paths] == ["best-raw.onnx", "best_rknn_model"] and "failure" not in log


def test_what_an_npu_cannot_have_is_refused(rockchip, run, monkeypatch):
    paths, log = run(batch_size=2)
    assert paths == [] and "--batch-size 2: RKNN takes one image at a time here: leave it at 1" in log
    with pytest.raises(UserError, match="--chip a b: is no name of a chip, such as rk3588"):
        run(chip="a b")
    with pytest.raises(UserError, match="--chip has no effect here: it is for the formats rknn"):
        run(chip="rk3588", include="onnx")
    monkeypatch.setattr(Detect, "raw_head", Head.raw_head)
    paths, log = run()
    assert paths == [] and "leaves decoding to the host, and nothing here decodes Detect" in log


def test_an_environment_without_the_toolkit_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RKNN_PYTHON", sys.executable)
    if exporter.missing_packages(("rknn",)):
        paths, log = run()
        assert paths == [] and "it is not there, or not all that it needs (No module named 'rknn" in log
    (tmp_path / "python").write_text("no program")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("RKNN_PYTHON", str(tmp_path / "python"))
    paths, log = run()
    assert paths == [] and f"RKNN: export failure: {tmp_path / 'python'}: cannot be started (Exec format error)" in log


def test_the_toolkit_is_found_where_make_installs_it_or_it_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(exporter, "missing_packages", list)
    monkeypatch.setenv("RKNN_PYTHON", "/no/such/python")
    with pytest.raises(UserError, match=r"rknn-toolkit2 \(RKNN_PYTHON=/no/such/python is no program\), .*`make rknn`"):
        exporter.find_python()
    monkeypatch.delenv("RKNN_PYTHON")
    with pytest.raises(UserError, match=r"needs Rockchip's rknn-toolkit2, .*`make rknn` installs it into \.venv-rknn"):
        exporter.find_python()
    program = tmp_path / ".venv-rknn" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    assert exporter.find_python() == str(program)
    monkeypatch.setattr(exporter, "missing_packages", lambda _: [])
    assert exporter.find_python() == sys.executable


@pytest.mark.slow
def test_the_real_toolkits_simulator_agrees(run, golden_dir, weights, monkeypatch):
    program = ROOT / ".venv-rknn" / "bin" / "python"
    if not program.exists():
        pytest.skip("make rknn has not been run")
    monkeypatch.setenv("RKNN_PYTHON", str(program))
    shutil.copy(golden_dir / "yolov5n-v6-coco.pt", weights.with_name("coco.pt"))
    (folder,), log = run(weights=str(weights.with_name("coco.pt")), imgsz=[160, 160])
    assert (folder / "model.rknn").stat().st_size > 1e6
    assert "RKNN: parity with coco.pt on 6 images" in log and "failure" not in log and "not compared" not in log
