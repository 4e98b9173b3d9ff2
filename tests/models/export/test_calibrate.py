"""Which images int8 is calibrated on, what they look like, and what is said of the ranges."""

import logging

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.export.calibrate import ActivationRange, calibration_batches, calibration_images, log_ranges, spread
from utils.errors import UserError


@pytest.fixture
def data(tmp_path):
    """Ten pictures 20 px wide and 10 high, numbered by their grey."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for number in range(10):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((10, 20, 3), (10 * number, 0, 255), np.uint8))
    path = tmp_path / "data.yaml"
    path.write_text("path: .\ntrain: images/train\nval: images/train\nnames: [dot]\n")
    return path


@pytest.mark.parametrize(("length", "count", "places"), [(10, 2, [2, 7]), (10, 5, [1, 3, 5, 7, 9]), (3, 8, [0, 1, 2])])
def test_places_are_the_middles_of_equal_stretches(length, count, places):
    assert spread(length, count) == places


@given(st.integers(1, 2000), st.integers(1, 400))
def test_places_are_different_and_in_order(length, count):
    places = spread(length, count)
    assert len(places) == min(length, count)
    assert places == sorted(set(places))
    assert 0 <= places[0] and places[-1] < length


def test_images_are_letterboxed_rgb_spread_over_the_training_set(data):
    images = calibration_images(data, (16, 16), 2)
    assert [(image.shape, image.dtype) for image in images] == [((1, 3, 16, 16), np.uint8)] * 2
    red, green, blue = images[0][0]
    assert (red[8, 8], green[8, 8], blue[8, 8]) == (255, 0, 20)
    assert (red[0] == 114).all() and (red[-1] == 114).all()  # 20x10 becomes 16x8 between bars of 4
    assert images[1][0, 2, 8, 8] == 70


def test_damaged_images_are_left_out_counted_and_named(data, caplog):
    (data.parent / "images/train/2.png").write_bytes(b"no picture")
    logging.getLogger("yolov5").propagate = True
    assert len(calibration_images(data, (16, 16), 5 * 2)) == 9
    assert "1 of 10 calibration images were left out" in caplog.text
    assert "2.png" in caplog.text


def test_no_readable_image_is_an_error(data):
    for path in (data.parent / "images/train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be calibrated"):
        calibration_images(data, (16, 16), 4)


def test_a_data_set_without_images_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "data.yaml"
    path.write_text("path: .\ntrain: images\nval: images\nnames: [dot]\n")
    with pytest.raises(UserError, match="No images found"):
        calibration_images(path, (16, 16), 4)


def test_batches_are_filled_up_with_the_first_images():
    images = [np.full((1, 3, 2, 2), value, np.uint8) for value in (0, 51, 255)]
    batches = list(calibration_batches(images, 2))
    assert [batch.dtype for batch in batches] == [np.float32] * 2
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[0, pytest.approx(0.2)], [1, 0]]


def test_the_summary_names_the_narrowest_and_widest_range(caplog):
    logging.getLogger("yolov5").propagate = True
    caplog.set_level(logging.DEBUG, "yolov5")
    ranges = [ActivationRange("stem", -1, 3), ActivationRange("images", 0, 1), ActivationRange("neck", -20, 40)]
    log_ranges(ranges, layers=7, images=64)
    summary, *table = caplog.messages
    assert "7 convolutions and 3 activations in int8, calibrated on 64 images" in summary
    assert "0 to 1 at images" in summary and "median width 4" in summary and "-20 to 40 at neck" in summary
    assert table == ["-1 to 3 at stem", "0 to 1 at images", "-20 to 40 at neck"]
