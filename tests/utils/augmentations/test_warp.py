"""Random perspective: matrices, boxes, polygons, the filter, drawing."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.augmentations.pixels import AugmentParams
from utils.augmentations.warp import (
    Objects,
    Warp,
    box_candidates,
    draw_warp,
    draw_warped,
    perspective,
    rotation,
    shear,
    translation,
    warp_objects,
    warp_points,
)

IDENTITY = Warp(np.eye(3), 1.0)


def objects_of(*boxes, polygons=()):
    return Objects(np.arange(len(boxes), dtype=np.float32), np.float32(boxes).reshape(-1, 4), list(polygons))


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
    matrix = translation(dx, dy) @ shear(slope_x, slope_y) @ rotation(angle, scale) @ perspective(tilt, 0)
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
    ranges = AugmentParams(degrees=10, translate=0.1, scale=0.5, shear=5, perspective=0.0)
    generator = np.random.default_rng(0)
    warps = [draw_warp(ranges, (200, 100), (100, 50), generator) for _ in range(400)]
    scales = np.array([warp.scale for warp in warps])
    assert 0.5 <= scales.min() < 0.52 and 1.48 < scales.max() <= 1.5
    centers = np.array([warp_points(np.array([[100.0, 50.0]]), warp.matrix)[0][0] for warp in warps])
    assert np.allclose([centers.min(axis=0), centers.max(axis=0)], [[40, 20], [60, 30]], atol=0.5)


def test_without_ranges_nothing_changes():
    warp = draw_warp(AugmentParams(), (64, 48), (64, 48), np.random.default_rng(0))
    assert np.array_equal(warp.matrix, np.eye(3))
    kept = warp_objects(objects_of([1, 2, 30, 40]), warp, (64, 48))
    assert kept.boxes_xyxy_px.tolist() == [[1, 2, 30, 40]]
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    output = np.zeros_like(image)
    draw_warped(image, warp.matrix, output)
    assert np.array_equal(output, image)


def test_a_turned_box_is_the_box_around_its_corners():
    warp = Warp(translation(100, 100) @ rotation(45, 1), 1.0)
    kept = warp_objects(objects_of([-20, -20, 20, 20]), warp, (200, 200))
    reach = 20 * np.sqrt(2)
    assert np.allclose(kept.boxes_xyxy_px, [[100 - reach, 100 - reach, 100 + reach, 100 + reach]])


def test_a_polygon_gives_the_tighter_box_beside_plain_boxes():
    diamond = np.float32([[0, -20], [20, 0], [0, 20], [-20, 0]])
    warp = Warp(translation(100, 100) @ rotation(45, 1), 1.0)
    both = objects_of([-20, -20, 20, 20], [-20, -20, 20, 20], polygons=[diamond, diamond[:0]])
    kept = warp_objects(both, warp, (200, 200))
    half = 20 / np.sqrt(2)
    assert np.allclose(kept.boxes_xyxy_px[0], [100 - half, 100 - half, 100 + half, 100 + half], atol=0.1)
    assert kept.boxes_xyxy_px[1, 0] < 100 - 28


def test_points_of_a_polygon_outside_the_image_do_not_count():
    triangle = np.float32([[10, 10], [90, 10], [10, 90]])
    kept = warp_objects(objects_of([10, 10, 90, 90], polygons=[triangle]), IDENTITY, (50, 100))
    assert np.allclose(kept.boxes_xyxy_px, [[10, 10, 50, 90]], atol=0.2)
    gone = warp_objects(objects_of([60, 10, 90, 90], polygons=[triangle + 60]), IDENTITY, (50, 100))
    assert len(gone.classes) == 0


def test_what_lies_behind_the_horizon_is_dropped():
    warp = Warp(perspective(-0.01, 0), 1.0)  # depth 0 at x = 100
    kept = warp_objects(objects_of([10, 10, 40, 40], [90, 10, 120, 40], [150, 10, 180, 40]), warp, (300, 300))
    assert kept.classes.tolist() == [0]


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


boxes_in_canvas = st.lists(
    st.tuples(*[st.floats(0, 200, width=32)] * 2, *[st.floats(0, 200, width=32)] * 2).map(
        lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
    ),
    max_size=8,
)


@settings(deadline=None)
@given(boxes_in_canvas, st.integers(0, 2**31))
def test_warped_boxes_lie_in_the_image_and_have_an_area(boxes, seed):
    ranges = AugmentParams(degrees=45, translate=0.3, scale=0.9, shear=20, perspective=0.001)
    warp = draw_warp(ranges, (200, 200), (100, 80), np.random.default_rng(seed))
    kept = warp_objects(objects_of(*boxes), warp, (100, 80))
    x1, y1, x2, y2 = kept.boxes_xyxy_px.T
    assert ((x1 >= 0) & (y1 >= 0) & (x2 <= 100) & (y2 <= 80) & (x2 - x1 > 2) & (y2 - y1 > 2)).all()
    assert len(kept.classes) == len(kept.boxes_xyxy_px)


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
