"""Small helpers by YOLOv5's signatures: text, time, seeds, schedules, weights."""

import random
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from utils import general


def test_one_cycle_goes_along_half_a_cosine():
    curve = general.one_cycle(1, 0.1, 10)
    assert [curve(step) for step in (0, 5, 10)] == pytest.approx([1, 0.55, 0.1])
    assert general.one_cycle()(25) == pytest.approx((1 - np.cos(np.pi / 4)) / 2)


def test_make_divisible_rounds_up():
    assert (general.make_divisible(17, 8), general.make_divisible(16, torch.tensor([8.0, 16]))) == (24, 16)


def test_check_img_size_keeps_the_kind(caplog):
    assert general.check_img_size(640, 32) == 640 and general.check_img_size([630, 50], torch.tensor(32)) == [640, 64]
    assert "must be a multiple" in caplog.text
    assert general.check_img_size(64, 32, floor=96) == 96


def test_clean_str_replaces_special_characters():
    assert general.clean_str("rtsp://a:b@c?d=1") == "rtsp_//a_b_c_d_1"


def test_colorstr_styles_the_last_text(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert general.colorstr("red", "underline", "text") == "\033[31m\033[4mtext\033[0m"
    assert general.colorstr("text") == "\033[34m\033[1mtext\033[0m"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert general.colorstr("bright_cyan", "text") == "text"


def test_texts():
    assert general.is_ascii("abc") and not general.is_ascii(["abc", "é"])
    assert general.is_chinese("红绿灯") and not general.is_chinese("é")
    assert general.emojis("🚀 run") in ("🚀 run", " run")


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
