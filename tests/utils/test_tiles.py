"""Tiles: where windows lie, and how the detections of several windows become those of one image."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import box_iou
from utils.errors import UserError
from utils.nms import NMSConfig, suppress_again
from utils.tiles import Tiling, merge, windows

# Two tiles of 640 px that share 280 px, and the whole image.
WIDE = windows(640, 1000, Tiling(640, 0.4))
LEFT, RIGHT, WHOLE = range(3)


def merged(*found, iou_thres=0.45, agnostic=False, max_det=300, windows_xyxy=WIDE):
    """Detections of a wide image from (window, x1, y1, x2, y2, confidence, class) rows, as lists."""
    rows = [np.array([row[1:] for row in found if row[0] == window], np.float32) for window in range(len(windows_xyxy))]
    found = merge([row.reshape(-1, 6) for row in rows], windows_xyxy, NMSConfig(0, iou_thres, max_det, agnostic))
    return found.astype(np.float64).round(4).tolist()


def test_an_image_of_full_hd_is_cut_into_eight_tiles_and_looked_at_as_a_whole():
    # Steps of at most 512 px: 3 of 426.7 px cover 1280 px, 1 of 440 px covers those.
    expected = [(left, top, left + 640, top + 640) for top in (0, 440) for left in (0, 426, 853, 1280)]
    assert windows(1080, 1920, Tiling(640)).tolist() == [list(box) for box in [*expected, (0, 0, 1920, 1080)]]


def test_an_image_no_larger_than_a_tile_is_one_window_and_a_strip_is_cut_along_its_length():
    assert windows(600, 640, Tiling(640)).tolist() == [[0, 0, 640, 600]]
    assert windows(1500, 100, Tiling(1000, 0.5)).tolist() == [[0, 0, 100, 1000], [0, 500, 100, 1500], [0, 0, 100, 1500]]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(32, 400), st.floats(0, 0.899))
def test_tiles_cover_the_image_exactly_with_the_overlap_asked_for_and_no_more_than_needed(h, w, side, overlap):
    boxes = windows(h, w, Tiling(side, overlap))
    assert boxes[-1].tolist() == [0, 0, w, h]
    tiles = boxes[:-1] if len(boxes) > 1 else boxes
    corners = []
    for axis, length in ((0, w), (1, h)):
        assert set(tiles[:, axis + 2] - tiles[:, axis]) == {min(side, length)}
        starts = sorted(set(tiles[:, axis].tolist()))
        tile = min(side, length)
        assert starts[0] == 0 and starts[-1] == length - tile
        steps = np.diff(starts)
        assert np.ptp(steps) <= 1 if len(steps) else tile == length
        assert all(tile - step >= tile * overlap for step in steps)
        if len(steps) > 1:  # one tile less would not do
            assert (length - tile) / (len(steps) - 1) > tile - math.ceil(tile * overlap)
        corners.append(starts)
    assert sorted(map(tuple, tiles[:, :2].tolist())) == sorted((x, y) for x in corners[0] for y in corners[1])


@pytest.mark.parametrize(
    ("size", "overlap", "named"), [(31, 0.2, "--tile 31"), (64, 0.9, "--tile-overlap 0.9"), (64, -0.1, "-0.1")]
)
def test_tiles_that_cannot_be_are_refused(size, overlap, named):
    with pytest.raises(UserError, match=named):
        Tiling(size, overlap)


# The piece is 70 % of the object, by which IoU alone would drop the whole one, or 20 %, by which it would keep both.
@pytest.mark.parametrize("left", [500, 600])
def test_a_piece_loses_against_the_whole_object_of_the_next_tile_however_sure_it_is(left):
    piece, whole = (LEFT, left, 100, 640, 200, 0.9, 0), (RIGHT, left, 100, left + 200, 200, 0.5, 0)
    assert merged(piece, whole) == [[left, 100, left + 200, 200, 0.5, 0]]
    short_of_it = (LEFT, left, 100, 630, 200, 0.9, 0)  # models do not draw up to the very border
    assert merged(short_of_it, whole) == [[left, 100, left + 200, 200, 0.5, 0]]


@pytest.mark.parametrize(("right", "kept"), [(628, 1), (627, 2)])
def test_a_box_that_ends_well_before_the_border_is_no_piece(right, kept):
    """Of a tile of 640 px the last 12.8 are its border."""
    seen, larger = (LEFT, 560, 100, right, 200, 0.9, 0), (RIGHT, 560, 100, 900, 200, 0.5, 0)
    assert len(merged(seen, larger)) == kept


def test_an_object_larger_than_a_tile_comes_from_the_whole_image():
    pieces = (LEFT, 100, 50, 640, 600, 0.9, 0), (RIGHT, 360, 50, 950, 600, 0.8, 0)
    assert merged(*pieces, (WHOLE, 100, 50, 950, 600, 0.4, 0)) == [[100, 50, 950, 600, 0.4, 0]]


def test_of_two_pieces_the_one_that_holds_most_of_the_other_stays():
    # The object reaches from 300 to 700: 340 px of it in the left tile, 340 in the right one, 280 in both.
    small, large = (LEFT, 320, 100, 640, 200, 0.9, 0), (RIGHT, 360, 100, 700, 200, 0.8, 0)
    assert merged(small, large) == [[360, 100, 700, 200, 0.8, 0]]


def test_a_piece_loses_against_nothing_that_is_gone():
    # Of `left` the other piece holds 50 of 80 px, of `right` the whole object holds 130 of 250 px, and none of `left`.
    left, right = (LEFT, 560, 100, 640, 200, 0.9, 0), (RIGHT, 360, 100, 610, 200, 0.9, 0)
    whole = (WHOLE, 300, 100, 490, 200, 0.5, 0)
    assert merged(left, right) == [list(right[1:])]
    assert merged(left, right, whole) == [list(left[1:]), list(whole[1:])]


def test_an_object_inside_another_stays_unless_a_border_cuts_it():
    large = (WHOLE, 50, 0, 700, 400, 0.8, 0)
    inside, at_the_image_s_edge = (LEFT, 100, 100, 150, 150, 0.9, 0), (LEFT, 200, 0, 240, 40, 0.9, 0)
    at_the_tile_s_border = (LEFT, 600, 100, 640, 150, 0.9, 0)
    assert len(merged(large, inside, at_the_image_s_edge, at_the_tile_s_border)) == 3
    assert merged(large, at_the_tile_s_border) == [list(large[1:])]


def test_a_piece_stays_where_what_holds_it_holds_little_or_is_of_another_class_or_noise_or_of_its_own_window():
    piece = (LEFT, 600, 100, 640, 200, 0.9, 0)
    other_class = (RIGHT, 600, 100, 800, 200, 0.5, 1)
    assert len(merged(piece, other_class)) == 2
    assert merged(piece, other_class, agnostic=True) == [[600, 100, 800, 200, 0.5, 1]]
    assert len(merged(piece, (RIGHT, 600, 100, 800, 200, 0.22, 0))) == 2
    assert len(merged(piece, (RIGHT, 621, 100, 700, 200, 0.9, 0))) == 2  # 19 of 40 px
    assert len(merged(piece, (LEFT, 400, 100, 640, 200, 0.5, 0))) == 2


def test_the_same_object_in_several_windows_is_told_once_by_the_surest():
    seen = [(window, 450 + window, 100, 500 + window, 150, 0.5 + window / 10, 0) for window in (LEFT, RIGHT, WHOLE)]
    assert merged(*seen) == [[452, 100, 502, 150, 0.7, 0]]
    far = [(LEFT, 40 * place, 0, 40 * place + 20, 20, 0.3 + place / 100, 0) for place in range(5)]
    assert [row[4] for row in merged(*far, max_det=3)] == [0.34, 0.33, 0.32]


def test_windows_without_detections_are_none():
    empty = merge([np.zeros((0, 6), np.float32)] * 3, WIDE, NMSConfig())
    assert empty.shape == (0, 6) and empty.dtype == np.float32


def random_scene(seed):
    """Detections of nine windows, in whole px and tenths so that many of them tie."""
    generator = np.random.default_rng(seed)
    places = windows(200, 200, Tiling(100, 0.3))
    found = []
    for left, top, right, bottom in places:
        count = generator.integers(0, 12)
        sides = generator.integers(5, 60, (count, 2))
        corner = generator.integers((left, top), (right, bottom), (count, 2))
        boxes = np.concatenate((corner, np.minimum(corner + sides, (right, bottom))), 1)
        rest = np.stack((generator.integers(1, 10, count) / 10, generator.integers(0, 2, count)), 1)
        found.append(np.concatenate((boxes, rest), 1).astype(np.float32))
    return found, places


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_windows_and_detections_does_not_matter(seed, agnostic, shuffler):
    found, places = random_scene(seed)
    nms = NMSConfig(iou_thres=0.5, max_det=30, agnostic=agnostic)
    once = merge(found, places, nms)
    order = list(range(len(places)))
    shuffler.shuffle(order)
    again = merge([found[index][::-1] for index in order], places[order], nms)
    np.testing.assert_array_equal(once, again)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_what_is_kept_was_found_and_overlaps_nothing_else_of_its_class(seed):
    found, places = random_scene(seed)
    kept = merge(found, places, NMSConfig(iou_thres=0.5))
    everything = {tuple(row) for rows in found for row in rows.tolist()}
    assert set(map(tuple, kept.tolist())) <= everything
    assert (np.diff(kept[:, 4]) <= 0).all()
    same = kept[:, None, 5] == kept[None, :, 5]
    assert (np.where(same, box_iou(kept[:, :4], kept[:, :4]), 0) - np.eye(len(kept)) <= 0.5 + 1e-6).all()
    # In one window nothing is cut: only suppression is left.
    one = np.concatenate(found)
    ordered = one[np.lexsort((*one[:, :4].T, one[:, 5], -one[:, 4]))]
    nms = NMSConfig(iou_thres=0.5)
    np.testing.assert_array_equal(merge([one], places[-1:], nms), suppress_again(ordered, nms))
