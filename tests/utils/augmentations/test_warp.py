"""Random perspective: matrices, labels, polygons, the filter, drawing."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.augmentations import random_perspective
from utils.augmentations.pixels import AugmentParams
from utils.augmentations.warp import (
    box_candidates,
    draw_warped,
    random_matrix,
    rotation,
    shearing,
    tilting,
    translation,
    warp_labels,
    warp_points,
)

STILL = {"degrees": 0, "translate": 0, "scale": 0, "shear": 0}


def warped(*boxes, polygons=(), matrix, output_wh):
    """The classes (0, 1, ...) and boxes that are left of some boxes."""
    labels = np.float32([[number, *box] for number, box in enumerate(boxes)])
    kept = warp_labels(labels, polygons, matrix, 1.0, output_wh)
    return kept[:, 0].tolist(), kept[:, 1:]


def test_positive_angles_turn_counter_clockwise_as_opencv_does():
    expected = np.vstack([cv2.getRotationMatrix2D((0, 0), 30, 1.5), [0, 0, 1]])
    assert np.allclose(rotation(30, 1.5), expected)
    (point,), _ = warp_points(np.float32([[1, 0]]), rotation(90, 2))
    assert np.allclose(point, [0, -2])  # up on the screen


@given(st.lists(st.floats(-400, 400), min_size=2, max_size=2), st.data())
def test_points_go_through_the_matrices_from_right_to_left(xy, data):
    number = data.draw
    dx, dy, angle, scale, slope_x, slope_y, tilt = (
        number(st.floats(*limits))
        for limits in ((-99, 99), (-99, 99), (-180, 180), (0.1, 2), (-40, 40), (-40, 40), (-0.001, 0.001))
    )
    matrix = translation(dx, dy) @ shearing(slope_x, slope_y) @ rotation(angle, scale) @ tilting(tilt, 0)
    (point,), _ = warp_points(np.array([xy]), matrix)
    x, y = np.array(xy)
    a, radians = scale, np.radians(angle)
    x_turned, y_turned = (
        a * (np.cos(radians) * x + np.sin(radians) * y),
        a * (np.cos(radians) * y - np.sin(radians) * x),
    )
    x_sheared = x_turned + np.tan(np.radians(slope_x)) * y_turned
    y_sheared = y_turned + np.tan(np.radians(slope_y)) * x_turned
    depth = 1 + tilt * x
    expected = np.array([x_sheared + dx * depth, y_sheared + dy * depth]) / depth
    assert np.allclose(point, expected, atol=1e-6)


def test_what_is_drawn_keeps_to_its_ranges_and_fills_them():
    ranges = AugmentParams(degrees=10, translate=0.1, scale=0.5, shear=5).warp
    generator = np.random.default_rng(0)
    matrices, gains = zip(*(random_matrix((200, 100), (100, 50), *ranges, generator) for _ in range(400)), strict=True)
    assert 0.5 <= min(gains) < 0.52 and 1.48 < max(gains) <= 1.5
    centers = np.array([warp_points(np.array([[100.0, 50.0]]), matrix)[0][0] for matrix in matrices])
    assert np.allclose([centers.min(axis=0), centers.max(axis=0)], [[40, 20], [60, 30]], atol=0.5)


def test_perspective_without_ranges_moves_nothing():
    im = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    labels = np.array([[2.0, 10, 10, 30, 30]])
    same, kept = random_perspective(im, labels, **STILL)
    assert np.array_equal(same, im) and np.allclose(kept, labels)
    larger, kept = random_perspective(im, labels, **STILL, border=(5, 10))
    assert larger.shape == (50, 80, 3) and np.allclose(kept, [[2, 20, 15, 40, 35]])
    assert np.array_equal(larger[5:-5, 10:-10], im) and (larger[0] == 114).all()
    assert random_perspective(im)[1].shape == (0, 5)


def test_a_turned_box_is_the_box_around_its_corners_and_a_polygon_gives_a_tighter_one():
    diamond = np.float32([[0, -20], [20, 0], [0, 20], [-20, 0]])
    matrix, square = translation(100, 100) @ rotation(45, 1), [-20, -20, 20, 20]
    _, (tight, plain) = warped(square, square, polygons=[diamond, diamond[:0]], matrix=matrix, output_wh=(200, 200))
    half, reach = 20 / np.sqrt(2), 20 * np.sqrt(2)
    assert np.allclose(tight, [100 - half, 100 - half, 100 + half, 100 + half], atol=0.1)
    assert np.allclose(plain, [100 - reach, 100 - reach, 100 + reach, 100 + reach])


def test_points_of_a_polygon_outside_the_image_do_not_count():
    triangle = np.float32([[10, 10], [90, 10], [10, 90]])
    still = {"matrix": np.eye(3), "output_wh": (50, 100)}
    _, boxes = warped([10, 10, 90, 90], polygons=[triangle], **still)
    assert np.allclose(boxes, [[10, 10, 50, 90]], atol=0.2)
    assert warped([60, 10, 90, 90], polygons=[triangle + 60], **still)[0] == []


def test_what_lies_behind_the_horizon_is_dropped():
    boxes = [10, 10, 40, 40], [90, 10, 120, 40], [150, 10, 180, 40]
    assert warped(*boxes, matrix=tilting(-0.01, 0), output_wh=(300, 300))[0] == [0]  # depth 0 at x = 100


def test_the_filter_by_hand():
    before = np.float32([[0, 0, 10, 10]] * 5)
    after = np.float32(
        [
            [0, 0, 10, 1.1],  # too low
            [0, 0, 3, 3],  # 9 % of the area
            [0, 0, 3.3, 3.3],  # 10.9 %
            [0, 0, 250, 2.4],  # 104 : 1
            [0, 0, 2, 9],  # not wider than 2
        ]
    )
    assert box_candidates(before, after, 0.10).tolist() == [False, False, True, False, False]
    assert box_candidates(before, after, np.array([0.01] * 5)).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("matrix", [rotation(0, 1), rotation(90, 1), np.diag([-1.0, 1, 1])])
def test_drawing_touches_only_what_the_image_reaches(matrix):
    image = np.full((10, 20, 3), 200, np.uint8)
    output = np.full((60, 60, 3), 7, np.uint8)
    draw_warped(image, translation(30, 30) @ matrix, output)
    assert (output == 200).all(axis=2).sum() == 200
    assert (output == 7).all(axis=2).sum() == 3600 - 200
    elsewhere = np.full((60, 60, 3), 7, np.uint8)
    draw_warped(image, translation(500, 500) @ matrix, elsewhere)
    assert (elsewhere == 7).all()
