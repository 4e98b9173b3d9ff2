"""YOLOv5's small helpers: geometry in place where scripts expect it, files, options, weights of classes."""

import importlib
import os
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import general, log
from utils.checkpoint import load_checkpoint
from utils.errors import UserError


def test_logging_is_set_up_when_a_script_asks_for_the_logger(monkeypatch, capsys):
    monkeypatch.setattr(log.LOGGER, "handlers", [])
    importlib.reload(general)
    assert not log.LOGGER.handlers
    general.LOGGER.info("seen")
    assert general.LOGGER is log.LOGGER and capsys.readouterr() == ("", "seen\n")
    with pytest.raises(ImportError):
        from utils.general import LOGER  # noqa: F401


def test_scale_coords_works_in_place_on_a_view():
    """A 720 x 1280 image stands in 384 x 640 with gain 0.5 and 12 px above and below."""
    rows = torch.tensor([[10.0, 22, 110, 72, 0.5, 3], [-5, 0, 700, 400, 0.5, 3]])
    returned = general.scale_coords((384, 640), rows[:, :4], (720, 1280, 3))
    assert torch.equal(rows[0], torch.tensor([20.0, 20, 220, 120, 0.5, 3]))
    assert torch.equal(rows[1, :4], torch.tensor([0.0, 0, 1280, 720]))
    assert returned.data_ptr() == rows.data_ptr()
    whole = np.array([[10.0, 22, 110, 72, 0.5, 3]])
    general.scale_boxes((384, 640), whole, (720, 1280), ((0.25, 0.25), (2.0, 10.0)))
    assert np.array_equal(whole, [[32, 48, 432, 248, 0.5, 3]])


def test_clip_coords_works_in_place():
    rows = np.array([[-1.0, -2, 90, 70, 0.5]])
    assert general.clip_coords(rows, (60, 80)) is None
    assert np.array_equal(rows, [[0, 0, 80, 60, 0.5]])
    assert general.clip_boxes is general.clip_coords


def test_suppression_takes_what_a_model_returns():
    """Two boxes of one class overlap by 81 / 119, the third is elsewhere; class 1 suppresses nothing of class 0."""
    boxes = torch.tensor([[50.0, 50, 10, 10], [51, 51, 10, 10], [90, 90, 10, 10], [50, 50, 10, 10]])
    scores = torch.tensor([[0.9, 1.0, 0], [0.8, 1, 0], [0.7, 1, 0], [0.6, 0, 1]])
    rows = torch.cat((boxes, scores), 1)[None]
    found = general.non_max_suppression((rows, [rows]), 0.25, 0.45)
    assert torch.allclose(found[0][:, 4], torch.tensor([0.9, 0.7, 0.6]))
    assert found[0][:, 5].tolist() == [0, 0, 1]
    assert len(general.non_max_suppression(rows, 0.25, 0.45, agnostic=True)[0]) == 2
    assert general.non_max_suppression(rows, 0.25, 0.45, classes=[1])[0][:, :4].tolist() == [[45, 45, 55, 55]]


def test_coco_categories():
    numbers = general.coco80_to_coco91_class()
    assert (numbers[0], numbers[11], numbers[79], len(numbers)) == (1, 13, 90, 80)


def test_one_cycle_goes_along_half_a_cosine():
    curve = general.one_cycle(1, 0.1, 10)
    assert [curve(step) for step in (0, 5, 10)] == pytest.approx([1, 0.55, 0.1])
    assert general.one_cycle()(25) == pytest.approx((1 - np.cos(np.pi / 4)) / 2)


def test_sides_are_rounded_up(caplog):
    assert (general.make_divisible(17, 8), general.make_divisible(16, torch.tensor([8.0, 16]))) == (24, 16)
    assert general.check_img_size(640, 32) == 640 and general.check_img_size([630, 50], torch.tensor(32)) == [640, 64]
    assert "must be a multiple" in caplog.text
    assert general.check_img_size(64, 32, floor=96) == 96


def test_print_args_takes_both_forms(caplog):
    with caplog.at_level("INFO", "yolov5"):
        general.print_args("detect", Namespace(conf=0.25, half=False))
        general.print_args({"conf": 0.5})
    assert [message.partition(": ")[2] for message in caplog.messages] == ["conf=0.25, half=False", "conf=0.5"]


def test_profile_adds_times_up():
    timer = general.Profile()
    for _ in range(2):
        with timer:
            sum(range(1000))
        first = timer.dt
    assert timer.t > first > 0

    @timer
    def work():
        return 3

    assert work() == 3 and timer.t > first


def test_init_seeds_makes_draws_repeat():
    state, python_state = torch.get_rng_state(), random.getstate()
    draws = []
    for _ in range(2):
        general.init_seeds(5)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    torch.set_rng_state(state)
    random.setstate(python_state)
    assert draws[0] == draws[1]


def test_intersect_dicts_compares_names_and_shapes():
    ours = {"a": torch.zeros(2), "b": torch.zeros(3), "anchor": torch.zeros(1), "c": torch.zeros(1)}
    theirs = {"a": torch.ones(2), "b": torch.ones(4), "anchor": torch.ones(1)}
    assert list(general.intersect_dicts(ours, theirs, exclude=["anchor"])) == ["a"]


def test_weights_of_classes_and_images():
    """Class 0 occurs three times, class 1 once, class 2 never (which counts as once)."""
    labels = [np.array([[0.0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]), np.zeros((0, 5)), np.array([[0.0] * 5, [1] * 5])]
    weights = general.labels_to_class_weights(labels, nc=3)
    assert torch.allclose(weights, torch.tensor([1 / 7, 3 / 7, 3 / 7], dtype=torch.float64))
    assert general.labels_to_image_weights(labels, 3, np.array([1.0, 10, 0])).tolist() == [2, 0, 11]
    assert general.labels_to_image_weights(labels, 3).tolist() == [2, 0, 2]


def test_methods_are_listed():
    class Hooks:
        number = 3

        def on_train_end(self):
            return self.number

    assert general.methods(Hooks()) == ["on_train_end"]


def test_requirements_are_reported_not_installed(caplog, tmp_path):
    assert general.check_requirements(exclude=("thop", "setuptools"))
    assert general.check_requirements("numpy>=1.26") and general.check_requirements(("pytest", "torch<99"))
    assert not caplog.messages
    file = tmp_path / "requirements.txt"
    lines = ["# first", "--extra-index-url https://example.com", "numpy>=99  # newest", "no-such-thing"]
    file.write_text("\n".join([*lines, "old; python_version<'3'"]))
    assert not general.check_requirements(file)
    assert caplog.messages[0].endswith('pip install "numpy>=99" "no-such-thing"')
    assert general.check_requirements(file, exclude=("numpy", "no-such-thing"))
    with pytest.raises(UserError, match="no such requirements file"):
        general.check_requirements(tmp_path / "none.txt")


def test_windows_are_not_opened_without_a_display(monkeypatch, caplog):
    monkeypatch.setattr(general, "display_problem", lambda: "there is no display")
    assert not general.check_imshow() and "there is no display" in caplog.text
    monkeypatch.setattr(general, "display_problem", str)
    assert general.check_imshow()


def test_files_are_looked_for_where_the_program_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.txt").touch()
    assert general.check_file("own.txt") == "own.txt" and general.check_file("") == ""
    assert Path(general.check_file("hyp.scratch-low.yaml")) == general.ROOT / "data/hyps/hyp.scratch-low.yaml"
    assert general.check_yaml("yolov5n.yaml").endswith("yolov5n.yaml")
    with pytest.raises(UserError, match=r"yolov5n.pt.*\.yaml or \.yml"):
        general.check_yaml("yolov5n.pt")
    with pytest.raises(UserError, match="nothing.yaml"):
        general.check_file("nothing.yaml")
    general.check_suffix(["a.pt", "b.PT", "c"], ".pt")
    with pytest.raises(UserError, match="weights: b.onnx"):
        general.check_suffix(["a.pt", "b.onnx"], (".pt",), msg="weights: ")


def test_a_data_set_is_returned_as_a_dict(tiny_shapes):
    data = general.check_dataset(tiny_shapes)
    assert data["nc"] == 4 and data["names"] == ["circle", "square", "triangle", "star"]
    assert data["train"] == str(tiny_shapes.parent / "images" / "train") and data["test"] is None
    both = {"train": [data["train"], data["val"]], "val": data["val"], "names": {0: "a"}, "extra": 7}
    again = general.check_dataset(both)
    assert again["train"] == [data["train"], data["val"]] and again["extra"] == 7 and again["names"] == ["a"]


def test_the_newest_run_is_found(tmp_path):
    assert general.get_latest_run(tmp_path) == ""
    for age, name in enumerate(("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
        os.utime(tmp_path / name / "last.pt", (age, age))
    assert general.get_latest_run(tmp_path) == str(tmp_path / "a" / "last.pt")


def test_strip_optimizer_writes_beside(weights, tmp_path):
    target = tmp_path / "small.pt"
    before = weights.read_bytes()
    general.strip_optimizer(weights, target)
    assert weights.read_bytes() == before
    assert load_checkpoint(target)["epoch"] == -1 and target.stat().st_size < 0.6 * len(before)
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(UserError, match="text file"):
        general.strip_optimizer(tmp_path / "text.pt", tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()
