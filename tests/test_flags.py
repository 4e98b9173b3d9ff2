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
from utils.errors import UserError

SMALL = {"cfg": "yolov5n-slimneck.yaml", "imgsz": 64, "batch_size": 4, "device": "cpu", "workers": 0, "epochs": 3}
SMALL |= {"noplots": True, "noval": True, "amp": "off"}
SWITCHES = {
    "rect": True,
    "image_weights": True,
    "multi_scale": True,
    "single_cls": True,
    "quad": True,
    "cos_lr": True,
    "label_smoothing": 0.1,
    "optimizer": "AdamW",
    "seed": 1,
    "amp": "bf16",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def eight_images(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set YAML: eight of the training pictures, two for validation."""
    folder = tmp_path_factory.mktemp("eight")
    for split, count in (("train", 8), ("val", 2)):
        pictures = [tiny_shapes.parent / "images" / split / f"{index}.jpg" for index in range(count)]
        (folder / f"{split}.txt").write_text("".join(f"{path}\n" for path in pictures))
    data = folder / "eight.yaml"
    data.write_text(f"path: {folder}\ntrain: train.txt\nval: val.txt\nnames: [circle, square, triangle, star]\n")
    return data


def figures(folder: Path) -> list[list[float]]:
    """The training losses and learning rates of every epoch."""
    rows = (folder / "results.csv").read_text().splitlines()[1:]
    cells = [[float(cell) for cell in row.split(",")] for row in rows]
    return [row[1:4] + row[-3:] for row in cells]


@pytest.fixture(scope="module")
def plain_figures(eight_images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    project = tmp_path_factory.mktemp("plain")
    return figures(Path(train.run(data=str(eight_images), project=str(project), **SMALL).save_dir))


@pytest.mark.slow
@pytest.mark.parametrize(("switch", "value"), SWITCHES.items(), ids=SWITCHES)
def test_every_switch_changes_the_training(switch, value, plain_figures, eight_images, tmp_path):
    options = train.run(data=str(eight_images), project=str(tmp_path), **{**SMALL, switch: value})
    changed = figures(Path(options.save_dir))
    assert np.isfinite(changed).all() and changed != plain_figures


def test_the_same_options_give_the_same_figures_and_good_anchors_need_no_look(
    plain_figures, eight_images, tmp_path, caplog
):
    caplog.set_level("INFO", "yolov5")
    again = {"data": str(eight_images), "project": str(tmp_path), "name": "again", "exist_ok": True, **SMALL}
    assert Path(train.run(**again).save_dir) == tmp_path / "again"
    assert figures(tmp_path / "again") == plain_figures and "AutoAnchor: " in caplog.text
    caplog.clear()
    assert Path(train.run(noautoanchor=True, **again).save_dir) == tmp_path / "again"
    assert figures(tmp_path / "again") == plain_figures and "AutoAnchor: " not in caplog.text


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        (
            {"batch_size": -1},
            r"--batch-size -1 fills the memory of a CUDA GPU; this run computes on cpu. Name a number",
        ),
        ({"sync_bn": True}, r"--sync-bn: PyTorch synchronises batch norm on CUDA GPUs, not on cpu"),
    ],
)
def test_what_only_a_gpu_has_is_refused_on_a_cpu_before_anything_is_written(switch, message, eight_images, tmp_path):
    with pytest.raises(UserError, match=message):
        train.run(data=str(eight_images), project=str(tmp_path / "runs"), **{**SMALL, **switch})
    assert not (tmp_path / "runs").exists()


def label_lines(folder: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text().splitlines() for path in sorted((folder / "labels").glob("*.txt"))}


def test_agnostic_nms_leaves_one_class_where_several_are_seen(golden_dir, tmp_path):
    """At a low threshold the golden picture has boxes of two classes on one object."""
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
