"""Suggestions for misspelt names, and image sizes that fit a model's stride."""

import logging

import pytest

from utils.errors import UserError, check_image_size, did_you_mean, round_up


@pytest.mark.parametrize(
    ("name", "options", "suggestion"),
    [
        ("yolov5s.yml", ["yolov5s.yaml", "voc.yaml"], " Did you mean 'yolov5s.yaml'?"),
        ("LR0", ["lr0", "lrf", "momentum"], " Did you mean 'lr0'"),
        ("c3", ["C3", "C3TR", "Concat"], " Did you mean 'C3'"),
        ("zebra", ["lr0", "lrf"], ""),
        ("lr0", [], ""),
    ],
)
def test_nearest_names_are_suggested_whatever_their_case(name, options, suggestion):
    answer = did_you_mean(name, options)
    assert answer.startswith(suggestion) and bool(answer) == bool(suggestion)


@pytest.mark.parametrize(("value", "divisor", "expected"), [(1, 32, 32), (32, 32, 32), (33, 32, 64), (30.2, 2, 32)])
def test_round_up(value, divisor, expected):
    assert round_up(value, divisor) == expected


def test_a_size_that_fits_is_kept_silently(caplog):
    assert check_image_size(640, 32) == 640
    assert check_image_size((320, 640), 32) == [320, 640]
    assert not caplog.records


@pytest.mark.parametrize(
    ("size", "stride", "floor", "expected"),
    [(100, 32, 0, 128), (641, 64, 0, 704), (32, 32, 64, 64), ((100, 640), 32, 0, [128, 640])],
)
def test_a_size_that_does_not_fit_is_rounded_up_and_named(caplog, size, stride, floor, expected):
    with caplog.at_level(logging.WARNING, "yolov5"):
        assert check_image_size(size, stride, floor) == expected
    assert f"--img-size {size} " in caplog.text and str(expected) in caplog.text


@pytest.mark.parametrize("size", [0, -32, (640, 0)])
def test_a_side_below_one_pixel_is_refused(size):
    with pytest.raises(UserError, match="at least 1 pixel"):
        check_image_size(size, 32)
