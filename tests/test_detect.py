"""detect.py as a user runs it: golden boxes, files, console, mistakes, damage, interruption."""

import itertools
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

import detect
from utils.cli import ReportedError
from utils.dataloaders.config import load_spec
from utils.errors import UserError
from utils.media.sources import read_frames

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


def random_image(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def write_video(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for index in range(frames):
        writer.write(random_image(index))
    writer.release()
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    cv2.imwrite(str(folder / "b.jpg"), random_image(1))
    cv2.imwrite(str(folder / "a.png"), random_image(2, 90, 60))
    write_video(folder / "clip.mp4", 4)
    return folder


@pytest.fixture
def run(weights, source, tmp_path):
    """Detects in one image at 64 px on the CPU."""
    usual = {"weights": str(weights), "source": str(source / "b.jpg"), "project": str(tmp_path / "runs")}
    return lambda **options: detect.run(**{**usual, "imgsz": [64], "device": "cpu", "max_det": 3, **options})


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def command(*options: object, **keywords) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "detect.py"), *map(str, options)]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", timeout=120, **keywords)


def test_golden_boxes_come_out_as_label_files(golden_dir, tmp_path):
    golden = json.loads((golden_dir / "detections.json").read_text())
    detect.run(
        weights=str(golden_dir / "yolov5n-v6-coco.pt"), source=str(golden_dir / "images"), device="cpu",
        project=str(tmp_path), save_txt=True, save_conf=True, nosave=True,
    )  # fmt: skip
    for name, expected in golden["images"].items():
        width, height = cv2.imread(str(golden_dir / "images" / name)).shape[1::-1]
        rows = np.loadtxt(tmp_path / "exp" / "labels" / f"{Path(name).stem}.txt", ndmin=2)[::-1]
        wanted = np.array(expected["detections_x1y1x2y2_conf_cls"])
        assert len(rows) == len(wanted)
        np.testing.assert_array_equal(rows[:, 0], wanted[:, 5])
        np.testing.assert_allclose(rows[:, 5], wanted[:, 4], atol=1e-3)
        centre, size = rows[:, 1:3] * (width, height), rows[:, 3:5] * (width, height)
        np.testing.assert_allclose(np.hstack([centre - size / 2, centre + size / 2]), wanted[:, :4], atol=1.01)


def test_command_line_on_a_folder_writes_and_says_what_yolov5_does(weights, source, tmp_path):
    options = ["--weights", weights, "--source", source, "--img", "64", "--conf", "0.3", "--project", tmp_path / "runs"]
    done = command(*options, "--max-det", "3", "--save-txt", "--save-crop", "--save-csv", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "exp"
    pattern = r"(1 cat|\d cats)?(, )?(\d 红绿灯)?, Done\. \(\d\.\d{3}s\)"
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"detect: weights=['{weights}'], source={source}, ")
    for start in (
        f"image 1/3 {source / 'a.png'}: 64x64 ",
        f"image 2/3 {source / 'b.jpg'}: 64x64 ",
        f"video 3/3 (4/4) {source / 'clip.mp4'}: 64x64 ",
    ):
        (line,) = [line for line in lines if line.startswith(start)]
        assert re.fullmatch(pattern, line[len(start) :])
    speed = r"Speed: [\d.]+ms pre-process, [\d.]+ms inference, [\d.]+ms NMS per image at shape \(1, 3, 64, 64\)"
    assert re.fullmatch(speed, lines[-3])
    assert lines[-2:] == [f"Results saved to {folder}", f"6 labels saved to {folder / 'labels'}"]
    written = files(folder)
    assert {"a.png", "b.jpg", "clip.mp4", "predictions.csv", "labels/a.txt", "labels/clip_4.txt"} <= set(written)
    assert len([name for name in written if name.startswith("crops/")]) == 6 * 3
    assert len(list(read_frames([str(folder / "clip.mp4")]))) == 4
    assert len((folder / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 1 + 6 * 3


def test_runs_are_numbered_and_exist_ok_replaces(run, tmp_path):
    for _ in range(2):
        run(save_txt=True)
    first = (tmp_path / "runs" / "exp" / "labels" / "b.txt").read_text()
    assert len(first.splitlines()) == 3
    run(save_txt=True, exist_ok=True)
    assert sorted(entry.name for entry in (tmp_path / "runs").iterdir()) == ["exp", "exp2"]
    assert (tmp_path / "runs" / "exp" / "labels" / "b.txt").read_text() == first


def test_an_image_without_detections_is_saved_and_counted(run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "yolov5")
    run(conf_thres=1.0, save_txt=True)
    assert files(tmp_path / "runs" / "exp") == ["b.jpg"]
    assert re.search(r"b\.jpg: 64x64 Done\. \(", caplog.text)
    assert "0 labels saved" in caplog.text


def labels_of(folder: Path, name: str = "b") -> np.ndarray:
    return np.loadtxt(folder / "labels" / f"{name}.txt", ndmin=2)


def test_classes_overlap_and_max_det_narrow_the_result(run, tmp_path):
    usual = {"max_det": 1000, "conf_thres": 0.01, "nosave": True, "save_txt": True}
    for name, options in {
        "all": {},
        "one": {"classes": [1]},
        "few": {"max_det": 2},
        "loose": {"iou_thres": 1.0},
    }.items():
        run(name=name, **{**usual, **options})
    found = {name: labels_of(tmp_path / "runs" / name) for name in ("all", "few", "loose")}
    assert len(found["few"]) == 2 < len(found["all"]) < len(found["loose"])
    assert set(found["all"][:, 0]) == {0}  # the biases make class 0 the best everywhere
    assert not (tmp_path / "runs" / "one" / "labels" / "b.txt").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'1': b, '0': 007}", "64x64 3 007s, Done."),
        ("[猫, light]", "64x64 3 猫, Done."),
        ("[a, b, c]", "names 3 classes, the model has 2: the model's own names are used"),
        ("[yes, no]", "the name of class 0 is True, not text"),
    ],
)
def test_names_of_another_yaml_are_read_as_training_reads_them_and_shown_where_they_fit(
    run, tmp_path, caplog, text, said
):
    caplog.set_level(logging.INFO, "yolov5")
    path = tmp_path / "names.yaml"
    path.write_text(f"names: {text}\n", encoding="utf-8")
    try:
        load_spec(path, need=())
    except UserError as error:
        assert said in str(error)
        with pytest.raises(UserError, match=f"^{re.escape(str(error))}$"):
            run(data=path)
    else:
        run(data=path)
        assert said in caplog.text
        assert ("64x64 3 cats, Done." in caplog.text) == ("own names" in said)


def test_hidden_labels_and_line_width_change_the_image(run, tmp_path):
    looks = {"plain": {}, "no_conf": {"hide_conf": True}, "bare": {"hide_labels": True}, "thin": {"line_thickness": 1}}
    for name, options in looks.items():
        run(name=name, **options)
    images = [cv2.imread(str(tmp_path / "runs" / name / "b.jpg")) for name in looks]
    for one, other in itertools.combinations(images, 2):
        assert (one != other).any()


def test_visualize_writes_an_image_and_an_array_for_every_layer_but_detect(run, tmp_path):
    run(visualize=True, nosave=True)
    folder = tmp_path / "runs" / "exp" / "b"
    written = files(folder)
    assert len(written) == 2 * 24
    assert {"stage0_Conv_features.png", "stage9_SPPF_features.npy", "stage23_C3_features.png"} <= set(written)
    assert np.load(folder / "stage0_Conv_features.npy").shape == (1, 16, 32, 32)


def test_size_that_is_no_multiple_of_the_stride_is_rounded_up_and_said(run, caplog):
    caplog.set_level(logging.INFO, "yolov5")
    run(imgsz=[50, 90])
    assert "WARNING: --img-size [50, 90] must be a multiple of the model's stride 32" in caplog.text
    assert "per image at shape (1, 3, 64, 96)" in caplog.text


def test_damaged_inputs_are_named_counted_and_skipped_and_the_status_tells(weights, source, tmp_path):
    (source / "cut.jpg").write_bytes((source / "b.jpg").read_bytes()[:300])
    (source / "bad.mp4").write_bytes(b"no video")
    done = command("--weights", weights, "--source", source, "--img", 64, "--project", tmp_path / "runs")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    damage = r"2 damaged inputs were skipped.*\n.*cut\.jpg: is a truncated JPEG.*\n.*bad\.mp4: cannot be opened"
    assert re.search(damage, done.stderr)
    assert files(tmp_path / "runs" / "exp") == ["a.png", "b.jpg", "clip.mp4"]


def test_damage_reaches_callers_from_python_after_all_else_is_done(run, source, tmp_path):
    (source / "b.jpg").write_bytes(b"")
    (tmp_path / "runs" / "exp" / "a.png").mkdir(parents=True)  # where a result is to be
    told = r"1 damaged input was skipped(.|\n)*b\.jpg: is empty .*\n1 input was not written whole:\n.*a\.png: cannot"
    with pytest.raises(ReportedError, match=told):
        run(source=str(source), exist_ok=True)
    assert files(tmp_path / "runs" / "exp") == ["clip.mp4"]


def mistakes(weights: Path, source: Path, tmp_path: Path) -> list[tuple[dict, str]]:
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "best.onnx").touch()
    exported = tmp_path / "best.onnx"
    return [
        ({"source": str(source / "b.jgp")}, r"--source .*b\.jgp.*Did you mean 'b\.jpg'"),
        ({"weights": str(weights.with_name("tyni.pt"))}, r"tyni\.pt: no such file.*Did you mean 'tiny\.pt'"),
        ({"weights": str(tmp_path / "text.pt")}, r"text\.pt"),
        ({"weights": str(tmp_path / "empty.pt")}, r"empty\.pt"),
        ({"weights": str(tmp_path / "file")}, r"no runtime for files ending in ''"),
        ({"weights": str(exported), "visualize": True}, r"--visualize is for checkpoints \(\.pt\); .* is an export"),
        ({"weights": str(exported), "update": True}, r"--update is for checkpoints \(\.pt\)"),
        ({"dnn": True}, r"--dnn runs ONNX files in OpenCV"),
        ({"imgsz": [64, 64, 64]}, r"--imgsz 64 64 64: one side, or height and width"),
        ({"classes": [0, 2]}, r"--classes 2: the model has the classes 0 to 1"),
        ({"data": "nothing.yaml"}, r"--data 'nothing\.yaml'"),
        ({"device": "warp"}, r"--device 'warp'"),
        ({"project": str(tmp_path / "file")}, r"file.exp: cannot be the output folder"),
        ({"conf_thresh": 0.5}, r"unknown option 'conf_thresh'\. Did you mean 'conf_thres'"),
    ]


@pytest.mark.parametrize("index", range(14))
def test_mistakes_are_refused_with_what_is_wrong(run, weights, source, tmp_path, index):
    keywords, message = mistakes(weights, source, tmp_path)[index]
    with pytest.raises(UserError, match=message):
        run(**keywords)
    assert not (tmp_path / "runs").exists()


def test_mistake_on_the_command_line_is_one_message_and_status_1(tmp_path):
    done = command("--source", tmp_path / "missing.jpg")
    assert done.returncode == 1
    assert re.fullmatch(r"detect: .*\ndetect\.py: error: --source '.*missing\.jpg': no file.*\n", done.stderr)
    assert command("--conf-thres", "2").returncode == 2


def test_newest_weights_are_the_default_and_their_absence_is_told(run, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.cli.ROOT", tmp_path)
    with pytest.raises(UserError, match="no --weights given and none trained yet.*run train.py first"):
        run(weights=[])
    best = tmp_path / "runs" / "train" / "exp" / "weights" / "best.pt"
    best.parent.mkdir(parents=True)
    shutil.copy(weights, best)
    run(weights=[])
    assert files(tmp_path / "runs" / "exp") == ["b.jpg"]


def test_update_strips_the_weights_after_the_run(run, weights, tmp_path, caplog):
    caplog.set_level(logging.INFO, "yolov5")
    own = shutil.copy(weights, tmp_path / "own.pt")
    run(weights=str(own), update=True)
    assert Path(own).stat().st_size < 0.6 * weights.stat().st_size
    assert re.search(r"Optimizer stripped from .*own\.pt, \d+\.\dMB", caplog.text)
    run(weights=str(own))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_leaves_a_video_that_plays_and_status_130(weights, tmp_path):
    """A frame is told before it is handed to the writer: once the 21st is told, 20 are in the video for certain."""
    write_video(tmp_path / "long.mp4", 3000)
    line = [sys.executable, str(ROOT / "detect.py"), "--weights", str(weights), "--source", str(tmp_path / "long.mp4")]
    line += ["--img", "64", "--project", str(tmp_path / "runs"), "--device", "cpu"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True)
    stuck = threading.Timer(280, process.kill)  # however busy the machine is, importing takes less
    stuck.start()
    try:
        said = list(itertools.takewhile(lambda line: "(21/3000)" not in line, process.stderr))
        process.send_signal(signal.SIGINT)
        said += process.stderr
        status = process.wait()
    finally:
        stuck.cancel()
        process.kill()
        process.stderr.close()
    log = "".join(said)
    assert status == 130, log
    assert "Traceback" not in log and "Exception ignored" not in log
    assert log.endswith(f"interrupted. Results so far are in {tmp_path / 'runs' / 'exp'}\n")
    played = list(read_frames([str(tmp_path / "runs" / "exp" / "long.mp4")]))
    assert 20 <= len(played) < 3000
    assert not any(frame.error for frame in played)


def test_each_image_and_frame_is_a_line_of_json_on_stdout(weights, source, tmp_path):
    options = ("--source", source, "--imgsz", 64, "--device", "cpu", "--max-det", 3, "--project", tmp_path, "--nosave")
    done = command("--weights", weights, *options, "--stream-json", "--save-json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(Path(line["path"]).name, line["frame"]) for line in lines] == [
        *(("a.png", None), ("b.jpg", None)),
        *(("clip.mp4", number) for number in range(1, 5)),
    ]
    assert [line["time_s"] for line in lines[2:]] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert (lines[0]["width"], lines[0]["height"]) == (60, 90) and lines[0]["inference_ms"] > 0
    rows = json.loads((tmp_path / "exp" / "predictions.json").read_text())
    assert len(rows) == sum(len(line["detections"]) for line in lines) > 0
    one = lines[0]["detections"][0]
    assert one.keys() == {"class", "name", "confidence", "box"} and one["name"] in ("cat", "红绿灯")
    x1, y1, x2, y2 = one["box"]
    assert rows[0]["bbox"] == [x1, y1, x2 - x1, y2 - y1] and rows[0]["image_id"] == "a"
    assert "Results saved to" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_a_reader_that_leaves_ends_the_run_with_a_word(weights, source, tmp_path):
    options = ["--weights", weights, "--source", source, "--imgsz", 64, "--device", "cpu", "--project", tmp_path]
    line = [sys.executable, str(ROOT / "detect.py"), *map(str, options), "--nosave", "--stream-json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 1 and "stdout was closed by what reads it" in told and "Traceback" not in told
