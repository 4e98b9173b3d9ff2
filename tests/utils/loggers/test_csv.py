"""results.csv byte for byte, its repair after an interruption, and TensorBoard's event files."""

import errno
import importlib.util
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.files import ROOT
from utils.loggers.csv import COLUMNS, ResultsCsv, epoch_values, open_tensorboard

HEADER = (
    "               epoch,      train/box_loss,      train/obj_loss,      train/cls_loss,   metrics/precision,"
    "      metrics/recall,     metrics/mAP_0.5,metrics/mAP_0.5:0.95,        val/box_loss,        val/obj_loss,"
    "        val/cls_loss,               x/lr0,               x/lr1,               x/lr2"
)
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard here")


def values(epoch):
    return [epoch + column / 100 for column in range(13)]


def written(path, epochs, start=0):
    table = ResultsCsv(path, start)
    for epoch in epochs:
        table.append(epoch, values(epoch))
    return path.read_text()


def test_header_and_row_byte_for_byte(tmp_path):
    table = ResultsCsv(tmp_path / "results.csv")
    table.append(12, [0.123456789, 1e-7, 1234567.0, *[0.5] * 10])
    row = "                  12,             0.12346,               1e-07,          1.2346e+06"
    row += ",                 0.5" * 10
    assert (tmp_path / "results.csv").read_bytes() == f"{HEADER}\n{row}\n".encode()


def test_values_are_put_in_the_columns_order():
    row = dict(zip(COLUMNS, epoch_values(torch.tensor([1, 2, 3]), range(4, 11), (11, 12, 13)), strict=True))
    assert (row["train/cls_loss"], row["metrics/precision"], row["val/box_loss"], row["x/lr2"]) == (3, 4, 8, 13)
    with pytest.raises(ValueError, match="13 values"):
        epoch_values([1, 2], range(7), range(3))


@pytest.mark.parametrize("cut", [*range(0, 1500, 37), 1489])
def test_file_cut_anywhere_and_resumed_equals_one_never_cut(tmp_path, cut):
    """The checkpoint says which epoch comes next; the file may hold less of it, or more."""
    path = tmp_path / "results.csv"
    text = written(path, range(5))
    whole_rows = max(text[:cut].count("\n") - 1, 0)
    path.write_text(text[:cut])
    assert written(path, range(whole_rows, 5), start=whole_rows) == text


def test_rows_of_the_interrupted_epoch_and_repetitions_are_dropped(tmp_path):
    path = tmp_path / "results.csv"
    text = written(path, range(5))
    lines = text.splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1], "garbage, 1, 2\n", lines[3]]))
    assert written(path, [3, 4], start=3) == text


@pytest.mark.parametrize(("start", "rows"), [(0, [0]), (3, [0, 1, 2, 3])])
def test_rows_go_only_when_the_first_new_one_comes(tmp_path, start, rows):
    """A new run in an old folder starts over, a resumed one goes on; one that is stopped before has cost nothing."""
    path = tmp_path / "results.csv"
    text = written(path, range(5))
    table = ResultsCsv(path, start)
    assert path.read_text() == text
    table.append(start, values(start))
    assert [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:]] == rows


def test_a_disk_that_fills_up_while_a_run_is_resumed_keeps_all_rows(tmp_path, monkeypatch):
    """The first row rewrites the file; what it held must not be lost before the new one is whole."""
    path = tmp_path / "results.csv"
    text = written(path, range(5))
    write_text = Path.write_text

    def half(self, content, *arguments, **keywords):
        write_text(self, content[: len(content) // 2], *arguments, **keywords)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(UserError, match=r"results\.csv: cannot be written \(No space left on device\)"):
        ResultsCsv(path, 3).append(3, values(3))
    assert path.read_text() == text and [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_unwritable_file_is_named(tmp_path):
    table = ResultsCsv(tmp_path / "results.csv")
    table.append(0, values(0))
    table.path.unlink()
    table.path.mkdir()
    with pytest.raises(UserError, match=r"results\.csv: cannot be written"):
        table.append(1, values(1))
    with pytest.raises(UserError, match=r"results\.csv: cannot be"):
        ResultsCsv(tmp_path / "missing" / "results.csv").append(0, values(0))


@needs_tensorboard
def test_tensorboard_holds_scalars_graph_and_pictures(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO", logger="yolov5")
    board = open_tensorboard(tmp_path / "exp")
    for epoch in range(3):
        board.log_epoch(epoch, values(epoch))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    board.log_graph(model, torch.rand(2, 3, 8, 8))
    board.log_images({"F1_curve": np.zeros((4, 6, 3), np.uint8)}, epoch=2)
    board.close()
    events = EventAccumulator(str(tmp_path / "exp"))
    events.Reload()
    assert events.Tags()["scalars"] == list(COLUMNS)
    assert [event.value for event in events.Scalars("x/lr2")] == pytest.approx([0.12, 1.12, 2.12])
    assert events.Tags()["graph"] and events.Tags()["images"] == ["F1_curve"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and model.training
    assert f"tensorboard --logdir {tmp_path}" in caplog.text


@needs_tensorboard
def test_tensorboard_does_not_import_tensorflow(tmp_path):
    """It takes ten seconds and 400 MB, and whoever exports has it."""
    script = f"import sys; from utils.loggers.csv import open_tensorboard; board = open_tensorboard({str(tmp_path)!r})"
    script += "; board.log_epoch(0, range(13)); board.close(); sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
    assert list(tmp_path.glob("events.out.*"))


@needs_tensorboard
def test_tensorboard_of_a_resumed_run_hides_the_interrupted_epoch(tmp_path, monkeypatch):
    """Files are in order by the second of their names, as runs one after the other have them."""
    seconds = itertools.count(time.time(), 1)
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logged(start, epochs):
        board = open_tensorboard(tmp_path, start)
        for epoch in epochs:
            board.log_epoch(epoch, values(epoch))
        board.close()
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        return [event.step for event in events.Scalars("x/lr0")]

    assert logged(0, range(3)) == [0, 1, 2]
    assert logged(1, ()) == [0, 1, 2]  # stopped in its first epoch
    assert logged(2, range(2, 4)) == [0, 1, 2, 3]
    assert logged(0, range(2)) == [0, 1]  # another run in the folder


@needs_tensorboard
@pytest.mark.parametrize("kind", [OSError, type("UnavailableError", (Exception,), {"__module__": "tensorflow.python"})])
def test_an_event_file_that_cannot_be_written_is_one_warning(kind, tmp_path, caplog, capfd, monkeypatch):
    """The writer's thread fails first, then what is called after it."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(*_):
        raise kind("No space left on device")

    hook = threading.excepthook
    board = open_tensorboard(tmp_path / "exp")
    monkeypatch.setattr(RecordWriter, "write", refuse)
    for epoch in range(30):  # more than the writer's queue takes
        board.log_epoch(epoch, values(epoch))
    board.log_images({"a": np.zeros((4, 6, 3), np.uint8)}, epoch=2)
    board.close()
    assert caplog.text.count("the event file cannot be written (No space left on device)") == 1
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is hook


def test_without_tensorboard_nothing_is_opened_and_it_is_said(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="yolov5")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert open_tensorboard(tmp_path) is None
    assert "not installed" in caplog.text
    assert list(tmp_path.iterdir()) == []
