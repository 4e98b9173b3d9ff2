"""Boxes by YOLOv5's conventions: in place where it is, columns kept, golden IoU, letterboxed and back."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils import general, metrics

CORNERS = np.array([[10.0, 20, 30, 60, 0.9, 5], [0, 0, 8, 4, 0.5, 1]])
CENTRES = np.array([[20.0, 40, 20, 40, 0.9, 5], [4, 2, 8, 4, 0.5, 1]])


@pytest.fixture(params=[np.array, torch.tensor], ids=["numpy", "torch"])
def kind(request):
    return request.param


def test_formats_keep_the_columns_behind_the_box_and_leave_their_argument(kind):
    rows = kind(CORNERS)
    turned = general.xyxy2xywh(rows)
    assert type(turned) is type(rows) and np.array_equal(np.asarray(turned), CENTRES)
    assert np.array_equal(np.asarray(general.xywh2xyxy(kind(CENTRES))), CORNERS)
    assert np.array_equal(np.asarray(rows), CORNERS)
    assert np.array_equal(np.asarray(general.xyxy2xywh(rows[0, :4])), CENTRES[0, :4])


def test_normalised_formats(kind):
    norm = general.xyxy2xywhn(kind(CORNERS), w=100, h=200)
    assert np.allclose(np.asarray(norm)[0], [0.2, 0.2, 0.2, 0.2, 0.9, 5])
    assert np.allclose(np.asarray(general.xywhn2xyxy(norm, 100, 200, padw=3, padh=1))[0, :4], [13, 21, 33, 61])
    outside = general.xyxy2xywhn(kind([[-10.0, 0, 150, 50]]), w=100, h=100, clip=True, eps=1e-3)
    assert np.allclose(np.asarray(outside), [[0.499995, 0.25, 0.99999, 0.5]])
    assert np.array_equal(np.asarray(general.xyn2xy(kind([[0.5, 0.25]]), 100, 200, 2, 1)), [[52, 51]])


def test_scale_coords_works_in_place_on_a_view():
    """A 720 x 1280 picture stands in 384 x 640 with gain 0.5 and 12 px above and below."""
    rows = torch.tensor([[10.0, 22, 110, 72, 0.5, 3], [-5, 0, 700, 400, 0.5, 3]])
    returned = general.scale_coords((384, 640), rows[:, :4], (720, 1280, 3))
    assert torch.equal(rows[0], torch.tensor([20.0, 20, 220, 120, 0.5, 3]))
    assert torch.equal(rows[1, :4], torch.tensor([0.0, 0, 1280, 720]))
    assert returned.data_ptr() == rows.data_ptr()
    whole = np.array([[10.0, 22, 110, 72, 0.5, 3]])
    general.scale_boxes((384, 640), whole, (720, 1280), ((0.25, 0.25), (2.0, 10.0)))
    assert np.array_equal(whole, [[32, 48, 432, 248, 0.5, 3]])


def test_clip_coords_works_in_place(kind):
    rows = kind([[-1.0, -2, 90, 70]])
    assert general.clip_coords(rows, (60, 80)) is None
    assert np.array_equal(np.asarray(rows), [[0, 0, 80, 60]])
    assert general.clip_boxes is general.clip_coords


@pytest.mark.parametrize("name", ["IoU", "GIoU", "DIoU", "CIoU"])
def test_bbox_iou_agrees_with_the_golden_values(golden_dir, name):
    golden = json.loads((golden_dir / "iou.json").read_text())
    first, second = (torch.tensor(golden[f"box{number}_xywh"]) for number in (1, 2))
    wanted = torch.tensor(golden[next(key for key in golden if key.lower() == name.lower())])
    option = {} if name == "IoU" else {name: True}
    found = metrics.bbox_iou(first.T, second, x1y1x2y2=False, **option)
    assert torch.allclose(found, wanted.reshape(found.shape), atol=1e-5)
    one = metrics.bbox_iou(general.xywh2xyxy(first[0]), general.xywh2xyxy(second), **option)
    assert torch.allclose(one[0], found[0], atol=1e-5) and one.shape == (len(second),)


def test_wh_iou_lays_sizes_on_one_corner(kind):
    overlap = metrics.wh_iou(kind([[2.0, 4.0]]), kind([[2.0, 4.0], [4.0, 2.0], [1.0, 1.0]]))
    assert np.allclose(np.asarray(overlap), [[1, 4 / 12, 1 / 8]])


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


def test_segments():
    triangle = np.array([[10.0, 10], [30, 10], [10, 50]])
    assert np.array_equal(general.segments2boxes([triangle]), [[20, 30, 20, 40]])
    assert np.array_equal(general.segment2box(np.array([[-5.0, 5], [20, 10], [40, 90]]), 100, 50), [20, 10, 20, 10])
    assert np.array_equal(general.segment2box(np.array([[-5.0, 5]]), 100, 50), np.zeros(4))
    (points,) = general.resample_segments([triangle], n=4)
    assert np.array_equal(points, [*triangle, triangle[0]])  # the closed polygon, at whole steps


@given(st.lists(st.tuples(*[st.floats(0, 500)] * 2, *[st.floats(1, 100)] * 2), min_size=1, max_size=5))
def test_letterboxed_and_back_is_the_same_box(boxes_xywh):
    corners = general.xywh2xyxy(np.array(boxes_xywh))
    inside = np.clip(corners, 0, [[640, 480] * 2])
    gain = min(320 / 480, 320 / 640)
    padded = inside * gain + np.array([[0, 40] * 2])
    assert np.allclose(general.scale_coords((320, 320), padded, (480, 640)), inside, atol=1e-6)


def test_coco_categories():
    numbers = general.coco80_to_coco91_class()
    assert (numbers[0], numbers[11], numbers[79], len(numbers)) == (1, 13, 90, 80)
