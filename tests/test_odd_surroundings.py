"""The commands in surroundings that most people never meet: no standard streams, names in another encoding."""

import csv
import os
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

import detect
import export
import train
import val
from utils.errors import printable
from utils.files import native_path

pytestmark = pytest.mark.usefixtures("one_thread")


# as unzip, tar or FTP bring it from a system with this encoding; systems other than Linux take no such names
WORD = os.fsdecode("照片_".encode("gbk")) if sys.platform == "linux" else "name_"


def test_names_that_are_not_utf_8_and_closed_streams_stop_nothing(
    tiny_shapes, tiny_cfg, weights, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.stdout", None)  # as under pythonw, in windowed programs and services
    monkeypatch.setattr("sys.stderr", None)
    folder = tmp_path / WORD
    for split, count in (("train", 4), ("val", 2)):
        for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
            (folder / kind / split).mkdir(parents=True)
            for index in range(count):
                original = tiny_shapes.parent / kind / split / f"{index}{suffix}"
                (folder / kind / split / f"{WORD}{index}{suffix}").write_bytes(original.read_bytes())
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b, c, d]\n")
    video = cv2.VideoWriter(native_path(folder / "images" / "val" / f"{WORD}v.avi"), 0, 5, (64, 64))
    for _ in range(2):
        video.write(np.zeros((64, 64, 3), np.uint8))
    video.release()
    source = folder / "images" / "val"
    runs = folder / "runs"
    options = {"imgsz": 64, "device": "cpu", "project": str(runs)}
    data = {"data": str(folder / "data.yaml"), "workers": 0, "batch_size": 8}
    train.run(cfg=str(tiny_cfg), weights="", epochs=1, noplots=True, name="train", **data, **options)
    best = str(runs / "train" / "weights" / "best.pt")
    val.run(weights=best, name="val", save_txt=True, save_json=True, **data, **options)
    detect.run(source=str(source), weights=str(weights), name="detect", save_csv=True, **options)
    assert (runs / "train" / "weights" / "best.pt").is_file() and (runs / "val" / "val_batch0_pred.jpg").is_file()
    assert {path.name for path in (runs / "detect").iterdir()} >= {f"{WORD}0.jpg", f"{WORD}v.mp4"}
    with open(runs / "detect" / "predictions.csv", newline="", encoding="utf-8") as file:
        names = {row["Image Name"] for row in csv.DictReader(file)}
    assert f"{printable(WORD)}0.jpg" in names


def test_drawn_names_show_what_no_font_has_as_replacement_characters():
    from utils.plots.boxes import fit_text, text_width

    assert fit_text("a\ud800\x1b", 500, 20, 10) == ("a\ufffd\ufffd", 20)
    assert text_width("\udcd5", 20) == text_width("\ufffd", 20)


def test_class_names_bring_no_controls_to_tables_images_and_folders():
    from utils.media.writers import folder_names
    from utils.plots.boxes import class_name

    names = {0: "cat\x1b[2J\n\x9b", 1: "a\ud800/b"}
    assert [class_name(names, index) for index in names] == ["cat\ufffd[2J\ufffd\ufffd", "a\ufffd/b"]
    assert folder_names(names) == {0: "cat_[2J_\ufffd", 1: "a\ufffd_b"}


def test_commands_that_are_printed_to_be_copied_fit_a_shell(weights, data, tmp_path, caplog, monkeypatch):
    from utils.loggers import open_tensorboard
    from utils.train import fingerprint
    from utils.train.engine import Trainer

    caplog.set_level("INFO", "yolov5")
    file, data = tmp_path / "it's my run" / "best.pt", data.rename(data.with_name("my data.yaml"))
    file.parent.mkdir()
    shutil.copy(weights, file)
    (exported,) = export.run(weights=[file], include=["yolov5"], imgsz=64, data=str(data))
    board = open_tensorboard(file.parent / "exp")
    if board:
        board.close()
    monkeypatch.setattr(fingerprint, "fingerprint", lambda *_, **__: [SimpleNamespace(name="weights", digest="")] * 2)
    options = SimpleNamespace(seeds=1)
    stopped = SimpleNamespace(
        saved=(file, 0), world=SimpleNamespace(command="python train.py"), keeps=True, options=options
    )
    said = "\n".join([caplog.text, fingerprint.summary(file.parent), Trainer.how_to_resume(stopped)])
    commands = {
        r"Detect: +(.*)": ["python", "detect.py", "--weights", exported],
        r"Validate: +(.*)": ["python", "val.py", "--weights", exported, "--data", str(data)],
        r"Go on with: (.*)": ["python", "train.py", "--resume", str(file)],
        r"(python -m utils.train.fingerprint .*)\)": ["python", "-m", "utils.train.fingerprint", str(file.parent)],
    }
    if board:
        commands[r"(tensorboard --logdir .*), and view"] = ["tensorboard", "--logdir", str(file.parent)]
    for pattern, words in commands.items():
        assert shlex.split(re.search(pattern, said)[1]) == words
