"""Options of which the other files do not show what they do: each is seen to change its run.

Training is the same to the bit for the same options; so a switch that leaves every figure as it was does nothing.
"""

from pathlib import Path

import cv2
import numpy as np
import pytest

import detect
import export
import train

SWITCHES = {
    "rect": True,
    "image_weights": True,
    "multi_scale": True,
    "single_cls": True,
    "quad": True,
    "cos_lr": True,
    "label_smoothing": 0.1,
    "box_loss": "eiou",
    "act": "relu",
    "optimizer": "Adam",
    "seed": 1,
    "amp": "bf16",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(tiny_shapes: Path, tiny_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Options of three epochs of a model of four layers over eight images."""
    folder = tmp_path_factory.mktemp("eight")
    for split, count in (("train", 8), ("val", 2)):
        images = [tiny_shapes.parent / "images" / split / f"{index}.jpg" for index in range(count)]
        (folder / f"{split}.txt").write_text("".join(f"{path}\n" for path in images))
    data = folder / "eight.yaml"
    data.write_text(f"path: {folder}\ntrain: train.txt\nval: val.txt\nnames: [circle, square, triangle, star]\n")
    options = {"cfg": str(tiny_cfg), "data": str(data), "imgsz": 64, "batch_size": 4, "epochs": 3, "workers": 0}
    return {**options, "device": "cpu", "noplots": True, "noval": True, "amp": "off"}


def figures(folder: Path) -> list[list[float]]:
    """The training losses and learning rates of every epoch."""
    rows = (folder / "results.csv").read_text().splitlines()[1:]
    cells = [[float(cell) for cell in row.split(",")] for row in rows]
    return [row[1:4] + row[-3:] for row in cells]


@pytest.fixture(scope="module")
def plain_figures(small: dict, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    return figures(Path(train.run(project=str(tmp_path_factory.mktemp("plain")), **small).save_dir))


@pytest.mark.parametrize(("switch", "value"), SWITCHES.items(), ids=SWITCHES)
def test_every_switch_changes_the_training(switch, value, plain_figures, small, tmp_path):
    options = train.run(project=str(tmp_path), **{**small, switch: value})
    changed = figures(Path(options.save_dir))
    assert np.isfinite(changed).all() and changed != plain_figures


def test_the_same_options_give_the_same_figures_and_good_anchors_need_no_look(plain_figures, small, tmp_path, caplog):
    caplog.set_level("INFO", "yolov5")
    again = {"project": str(tmp_path), "name": "again", "exist_ok": True, **small}
    for noautoanchor in (False, True):
        caplog.clear()
        assert Path(train.run(noautoanchor=noautoanchor, **again).save_dir) == tmp_path / "again"
        assert figures(tmp_path / "again") == plain_figures and ("AutoAnchor: " in caplog.text) != noautoanchor


def label_lines(folder: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text().splitlines() for path in sorted((folder / "labels").glob("*.txt"))}


def test_agnostic_nms_leaves_one_class_where_several_are_seen(golden_dir, tmp_path):
    """At a low threshold the golden image has boxes of two classes on one object."""
    options = {"weights": str(golden_dir / "yolov5n-v6-coco.pt"), "source": str(golden_dir / "images" / "bus.jpg")}
    options |= {"imgsz": [320], "conf_thres": 0.05, "device": "cpu", "save_txt": True, "nosave": True}
    for name, agnostic in (("apart", False), ("together", True)):
        detect.run(name=name, project=str(tmp_path), agnostic_nms=agnostic, **options)
    apart, together = (label_lines(tmp_path / name)["bus"] for name in ("apart", "together"))
    assert set(together) < set(apart)


def test_vid_stride_leaves_frames_out_and_segment_cuts_the_video(weights, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 48))
    for index in range(5):
        writer.write(np.random.default_rng(index).integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    options = {"weights": str(weights), "source": str(tmp_path / "clip.mp4"), "imgsz": [64], "device": "cpu"}
    detect.run(vid_stride=2, save_txt=True, segment=0.01, project=str(tmp_path / "runs"), **options)
    assert list(label_lines(tmp_path / "runs" / "exp")) == ["clip_1", "clip_3", "clip_5"]
    pieces = [cv2.VideoCapture(str(tmp_path / "runs" / "exp" / f"clip{part}.mp4")) for part in ("", "_part2")]
    assert [piece.get(cv2.CAP_PROP_FRAME_COUNT) for piece in pieces] == [2, 1]


def test_an_onnx_file_runs_in_opencv_and_half_says_that_it_is_not_for_it(weights, tmp_path, caplog):
    pytest.importorskip("onnx")
    checkpoint = tmp_path / "tiny.pt"
    checkpoint.write_bytes(weights.read_bytes())
    (exported,) = export.run(weights=[str(checkpoint)], include=["onnx"], imgsz=[64, 64])
    cv2.imwrite(str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    options = {"source": str(tmp_path / "a.png"), "project": str(tmp_path / "runs"), "save_txt": True, "nosave": True}
    caplog.set_level("INFO", "yolov5")
    detect.run(name="dnn", weights=exported, dnn=True, half=True, **options)
    assert "WARNING: --half: OpenCV computes in the precision of the file" in caplog.text
    detect.run(name="checkpoint", weights=str(checkpoint), device="cpu", half=True, imgsz=[64], **options)
    assert "WARNING: --half needs a CUDA device; computing in float32 on cpu." in caplog.text
    boxes = [np.loadtxt(label_lines(tmp_path / "runs" / name)["a"], ndmin=2) for name in ("dnn", "checkpoint")]
    assert len(boxes[0]) and boxes[0] == pytest.approx(boxes[1], abs=1 / 32)
