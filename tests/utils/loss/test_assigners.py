"""Anchor matching against worked scenes and against a plain loop over labels, anchors and cells."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.loss.assigners import match_targets

ANCHOR = torch.tensor([[[2.0, 2.0]]])  # one layer, one anchor of 2 x 2 cells


def match_one(x, y, w=2.0, h=2.0, grid=(16, 16), anchors=ANCHOR, anchor_t=4.0):
    """Matches one label, given in cells."""
    ny, nx = grid
    target = torch.tensor([[0, 0, x / nx, y / ny, w / nx, h / ny]])
    return match_targets(target, anchors, [grid], anchor_t)[0]


def cells_of(match):
    return list(zip(match.cell_x.tolist(), match.cell_y.tolist(), strict=True))


def test_two_nearest_neighbours_join_in():
    """x = 5.2 lies in the left half of its cell, y = 5.7 in the lower half."""
    match = match_one(5.2, 5.7)
    assert cells_of(match) == [(5, 5), (4, 5), (5, 6)]
    expected = torch.tensor([[0.2, 0.7, 2, 2], [1.2, 0.7, 2, 2], [0.2, -0.3, 2, 2]])
    torch.testing.assert_close(match.box_xywh, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (5.5, 5.5, [(5, 5)]),  # the middle of a cell
        (0.2, 0.2, [(0, 0)]),  # no cell to the left or above
        (1.25, 8.5, [(1, 8), (0, 8)]),
        (1.0, 8.5, [(1, 8), (1, 8)]),  # on a border: not more than one cell from the left edge, its own cell twice
        (15.8, 15.8, [(15, 15)]),
        (16.0, 16.0, [(15, 15)] * 3),  # a centre on the far edge still has a cell
        (14.9, 8.5, [(14, 8), (15, 8)]),
    ],
)
def test_cells_that_learn_a_label(x, y, expected):
    assert cells_of(match_one(x, y)) == expected


def test_box_of_a_clamped_cell_is_relative_to_that_cell():
    torch.testing.assert_close(match_one(16.0, 8.5).box_xywh, torch.tensor([[1.0, 0.5, 2, 2]] * 2))


@pytest.mark.parametrize(("width", "matches"), [(7.99, True), (8.0, False), (0.51, True), (0.5, False), (0.0, False)])
def test_sides_must_differ_by_less_than_anchor_t_times(width, matches):
    assert bool(len(match_one(5.5, 5.5, w=width).cls)) is matches


def test_rows_come_own_cells_first_then_left_up_right_down_each_by_anchor_then_label():
    anchors = torch.tensor([[[2.0, 2.0], [3.0, 3.0]]])
    targets = torch.tensor([[0, 0, 5.2 / 16, 5.5 / 16, 0.125, 0.125], [1, 4, 9.2 / 16, 9.8 / 16, 0.125, 0.125]])
    match = match_targets(targets, anchors, [(16, 16)], 4.0)[0]
    rows = list(zip(match.image.tolist(), match.anchor.tolist(), cells_of(match), strict=True))
    own = [(0, 0, (5, 5)), (1, 0, (9, 9)), (0, 1, (5, 5)), (1, 1, (9, 9))]
    left = [(0, 0, (4, 5)), (1, 0, (8, 9)), (0, 1, (4, 5)), (1, 1, (8, 9))]
    down = [(1, 0, (9, 10)), (1, 1, (9, 10))]
    assert rows == own + left + down
    assert match.cls.tolist() == [0, 4, 0, 4, 0, 4, 0, 4, 4, 4]
    assert match.anchor_wh[2].tolist() == [3.0, 3.0]


def by_loops(targets, anchors_wh, ny, nx, anchor_t):
    """The rule read aloud, in double precision: a set of (label, anchor, cell x, cell y)."""
    rows = set()
    for label, (_, _, x, y, w, h) in enumerate(targets.tolist()):
        gx, gy, gw, gh = x * nx, y * ny, w * nx, h * ny
        for anchor, (aw, ah) in enumerate(anchors_wh.tolist()):
            if max(gw / aw, aw / gw, gh / ah, ah / gh) >= anchor_t:
                continue
            cell_x, cell_y = min(int(gx), nx - 1), min(int(gy), ny - 1)
            rows.add((label, anchor, cell_x, cell_y))
            if gx > 1 and gx - math.floor(gx) < 0.5:
                rows.add((label, anchor, cell_x - 1, cell_y))
            if gy > 1 and gy - math.floor(gy) < 0.5:
                rows.add((label, anchor, cell_x, cell_y - 1))
            if nx - gx > 1 and (nx - gx) % 1 < 0.5:
                rows.add((label, anchor, cell_x + 1, cell_y))
            if ny - gy > 1 and (ny - gy) % 1 < 0.5:
                rows.add((label, anchor, cell_x, cell_y + 1))
    return rows


# multiples of 1/64 with an odd numerator over grids that are powers of two: exact in float32, never on a boundary
coordinate = st.integers(0, 127).map(lambda k: (2 * k + 1) / 256)


@settings(max_examples=60, deadline=None)
@given(
    boxes=st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), max_size=12),
    grid=st.sampled_from([(8, 8), (16, 8), (4, 32)]),
)
def test_equals_a_loop_over_labels_anchors_and_cells(boxes, grid):
    ny, nx = grid
    anchors = torch.tensor([[[1.3, 1.7], [3.1, 2.3], [6.7, 9.1]]])
    targets = torch.tensor([[index, 0, *box] for index, box in enumerate(boxes)]).reshape(-1, 6).float()
    match = match_targets(targets, anchors, [grid], 4.0)[0]
    columns = (match.image, match.anchor, match.cell_x, match.cell_y)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(set(rows)) == len(rows)
    assert set(rows) == by_loops(targets, anchors[0], ny, nx, 4.0)
