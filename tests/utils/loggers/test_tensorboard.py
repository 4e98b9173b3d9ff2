"""TensorBoard's event files: what they hold, and that a run does not depend on them."""

import importlib.util
import itertools
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from utils.files import ROOT
from utils.loggers.tensorboard import open_tensorboard

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard here")


def figures(epoch):
    return {"train/box_loss": epoch / 2, "x/lr0": epoch + 0.25}


def drawn(folder):
    """An image file whose left half is blue."""
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, :3] = 255, 0, 0  # BGR
    cv2.imwrite(str(folder / "F1_curve.png"), image)
    return [folder / "F1_curve.png"]


@needs_tensorboard
def test_tensorboard_holds_scalars_graph_and_images(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO", logger="yolov5")
    board = open_tensorboard(tmp_path / "exp")
    for epoch in range(3):
        board.log_epoch(epoch, figures(epoch))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    board.log_graph(model, torch.rand(2, 3, 8, 8))
    board.log_images(drawn(tmp_path), epoch=2)
    board.close()
    events = EventAccumulator(str(tmp_path / "exp"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/box_loss", "x/lr0"]
    assert [event.value for event in events.Scalars("x/lr0")] == [0.25, 1.25, 2.25]
    assert events.Tags()["graph"] and events.Tags()["images"] == ["F1_curve.png"]
    encoded = np.frombuffer(events.Images("F1_curve.png")[0].encoded_image_string, np.uint8)
    assert cv2.imdecode(encoded, cv2.IMREAD_COLOR)[0, 0].tolist() == [255, 0, 0]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and model.training
    assert f"tensorboard --logdir {tmp_path}" in caplog.text


@needs_tensorboard
def test_tensorboard_does_not_import_tensorflow(tmp_path):
    """It takes ten seconds and 400 MB, and whoever exports has it."""
    script = f"import sys; from utils.loggers import open_tensorboard; board = open_tensorboard({str(tmp_path)!r})"
    script += "; board.log_epoch(0, {'x/lr0': 1.0}); board.close(); sys.exit('tensorflow' in sys.modules)"
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
            board.log_epoch(epoch, figures(epoch))
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
        board.log_epoch(epoch, figures(epoch))
    board.log_images(drawn(tmp_path), epoch=2)
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
