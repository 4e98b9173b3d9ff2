"""Boxes: formats that lead back, overlaps against published numbers and brute force, NumPy and torch alike."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from utils import boxes
from utils.images import letterbox

pixels = st.floats(0, 2000, width=32)
sides = st.floats(0.5, 1000, width=32)


@st.composite
def corners_px(draw, rows=(0, 6)):
    """Boxes xyxy (n, 4), float64."""
    count = draw(st.integers(*rows))
    start = draw(hnp.arrays(np.float64, (count, 2), elements=pixels))
    size = draw(hnp.arrays(np.float64, (count, 2), elements=sides))
    return np.concatenate([start, start + size], axis=1)


def random_corners(count, seed, scale=100.0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, scale, (count, 2))
    return np.concatenate([start, start + rng.uniform(0.1, scale, (count, 2))], axis=1).astype(np.float32)


def test_formats_worked_by_hand():
    np.testing.assert_allclose(boxes.xyxy2xywh(np.array([[10.0, 20, 30, 60]])), [[20, 40, 20, 40]])
    np.testing.assert_allclose(boxes.xywh2xyxy(np.array([[20.0, 40, 20, 40]])), [[10, 20, 30, 60]])
    np.testing.assert_allclose(boxes.xywhn2xyxy(np.array([[0.5, 0.5, 0.5, 1]]), 100, 60, 7, 3), [[32, 3, 82, 63]])
    np.testing.assert_allclose(boxes.xyxy2xywhn(np.array([[25.0, 0, 75, 60]]), 100, 60), [[0.5, 0.5, 0.5, 1]])


def test_clipping_keeps_a_margin_when_asked():
    beyond = np.array([[-5.0, -5, 120, 70]])
    np.testing.assert_allclose(boxes.clip_boxes(beyond, (60, 100)), [[0, 0, 100, 60]])
    clipped = boxes.xyxy2xywhn(beyond, 100, 60, clip=True, eps=0.001)
    np.testing.assert_allclose(clipped, [[0.499995, 59.999 / 120, 0.99999, 59.999 / 60]])
    assert beyond[0, 0] == -5  # the caller's array stays


kinds = st.sampled_from([np.asarray, torch.from_numpy])


@given(corners_px(), kinds, st.integers(1, 2000), st.integers(1, 2000), st.floats(0, 99), st.floats(0, 99))
@settings(max_examples=60, deadline=None)
def test_each_format_leads_back(rows, kind, width, height, padw, padh):
    """Centre and size, read from the same numbers, to corners and back; in arrays and in tensors, padded or not."""
    centres = kind(rows)
    np.testing.assert_allclose(boxes.xyxy2xywh(boxes.xywh2xyxy(centres)), rows, atol=1e-9)
    there = boxes.xywhn2xyxy(centres, width, height, padw, padh)
    back = boxes.xyxy2xywhn(there - kind(np.array([padw, padh] * 2)), width, height)
    np.testing.assert_allclose(back, rows, rtol=1e-9, atol=1e-9)
    corners = boxes.xywh2xyxy(centres)
    assert bool((corners[:, 2:] >= corners[:, :2]).all())  # no size below 0 went in


@given(corners_px(), st.tuples(st.integers(1, 2000), st.integers(1, 2000)))
@settings(max_examples=50, deadline=None)
def test_clipped_boxes_lie_in_the_image_and_clipping_again_changes_nothing(corners, shape_hw):
    clipped = boxes.clip_boxes(corners - 500, shape_hw)
    assert clipped.shape == corners.shape
    assert (clipped >= 0).all() and (clipped <= np.tile(shape_hw[::-1], 2)).all()
    np.testing.assert_array_equal(boxes.clip_boxes(clipped, shape_hw), clipped)


def test_scaling_back_worked_by_hand():
    # 720x1280 at 640 without enlarging: half size (360x640), 12 px above and below to a multiple of 32.
    image = boxes.scale_boxes((384, 640), np.array([[100.0, 112, 200, 212]]), (720, 1280))
    np.testing.assert_allclose(image, [[200, 200, 400, 400]])
    recorded = ((0.25, 0.5), (10, 20))  # ratios (height, width), padding (width, height)
    np.testing.assert_allclose(
        boxes.scale_boxes((0, 0), np.array([[20.0, 30, 60, 70]]), (500, 500), recorded), [[20, 40, 100, 200]]
    )
    # 200x3000 at 640: 43x640, as 42.67 is no number of pixels; 10.5 px above. A quarter and a half of the height.
    image = boxes.scale_boxes((64, 640), np.array([[320, 21.25, 640, 32.0]]), (200, 3000))
    np.testing.assert_allclose(image, [[1500, 50, 3000, 100]])


@st.composite
def images_with_a_box(draw):
    """A black image with one white box, and the box xyxy."""
    height, width = draw(st.integers(40, 300)), draw(st.integers(40, 300))
    x1, y1 = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
    x2, y2 = draw(st.integers(x1 + 8, width)), draw(st.integers(y1 + 8, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    return image, np.array([x1, y1, x2, y2])


@given(images_with_a_box(), st.sampled_from([320, (256, 320)]), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_seen_in_a_letterboxed_image_leads_back_to_the_original(drawn, new_shape, auto, recorded):
    """As detection does it, without the loader's record, and as validation does, with it."""
    image, expected = drawn
    boxed = letterbox(image, new_shape, color=(0, 0, 0), auto=auto)
    y, x = np.nonzero(boxed.image[..., 0] > 127)
    seen = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]], np.float64)
    record = boxed.ratio_pad(image.shape) if recorded else None
    back = boxes.scale_boxes(boxed.image.shape[:2], seen, image.shape[:2], record)
    # a pixel for the drawing, half a one each for the resized size and the padding, which are whole numbers
    np.testing.assert_allclose(back[0], expected, atol=2 / boxed.ratio[0])


FUNCTIONS = {
    "xyxy2xywh": boxes.xyxy2xywh,
    "xywh2xyxy": boxes.xywh2xyxy,
    "xywhn2xyxy": lambda rows: boxes.xywhn2xyxy(rows, 640, 480, 3, 5),
    "xyxy2xywhn": lambda rows: boxes.xyxy2xywhn(rows, 640, 480, clip=True, eps=1e-3),
    "clip_boxes": lambda rows: boxes.clip_boxes(rows, (50, 60)),
    "scale_boxes": lambda rows: boxes.scale_boxes((384, 640), rows, (720, 1280)),
    "box_iou": lambda rows: boxes.box_iou(rows, rows[: len(rows) // 2]),
    "bbox_ioa": lambda rows: boxes.bbox_ioa(rows[:1].sum(0), rows),  # its first row, or zeros
}


@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_and_tensors_give_the_same_and_keep_their_kind(name, count):
    rows = random_corners(count, seed=count)
    from_array, from_tensor = FUNCTIONS[name](rows), FUNCTIONS[name](torch.from_numpy(rows))
    assert isinstance(from_array, np.ndarray) and isinstance(from_tensor, torch.Tensor)
    assert from_array.dtype == np.float32 and from_tensor.dtype == torch.float32
    assert from_array.shape == tuple(from_tensor.shape) and from_array.shape[0] == count
    np.testing.assert_allclose(from_array, from_tensor.numpy(), rtol=1e-6, atol=1e-6)
    if name not in ("box_iou", "bbox_ioa"):  # what stands behind a box is kept, and one box alone is taken
        wide = np.column_stack((rows, rows[:, :2] + 5))
        np.testing.assert_array_equal(FUNCTIONS[name](wide), np.column_stack((from_array, wide[:, 4:])))
        assert torch.equal(FUNCTIONS[name](torch.from_numpy(wide))[:, 4:], torch.from_numpy(wide[:, 4:]))
        assert all((FUNCTIONS[name](row) == whole).all() for row, whole in zip(rows, from_array, strict=True))


@given(
    hnp.arrays(np.int64, (5, 4), elements=st.integers(0, 12)), hnp.arrays(np.int64, (3, 4), elements=st.integers(0, 12))
)
@settings(max_examples=50, deadline=None)
def test_overlap_equals_counted_cells(first, second):
    def with_size(raw):
        return np.concatenate([raw[:, :2], raw[:, :2] + raw[:, 2:]], axis=1)  # sides of 0 included

    def painted(box):
        canvas = np.zeros((24, 24), bool)
        canvas[box[1] : box[3], box[0] : box[2]] = True
        return canvas

    first, second = with_size(first), with_size(second)
    expected = [
        [(painted(a) & painted(b)).sum() / max((painted(a) | painted(b)).sum(), 1) for b in second] for a in first
    ]
    np.testing.assert_allclose(boxes.box_iou(first.astype(float), second.astype(float)), expected, atol=1e-12)


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_sizes_are_laid_on_one_corner(kind):
    overlap = boxes.wh_iou(kind([[2.0, 4.0]]), kind([[2.0, 4.0], [4.0, 2.0], [1.0, 1.0]]))
    np.testing.assert_allclose(overlap, [[1, 4 / 12, 1 / 8]])


def test_share_covered_worked_by_hand():
    existing = np.array([[5.0, 5, 15, 15], [0, 0, 10, 10], [2, 2, 4, 4], [20, 20, 30, 30], [-10, 0, 10, 20]])
    shares = boxes.bbox_ioa(np.array([0.0, 0, 10, 10]), existing)
    np.testing.assert_allclose(shares, [0.25, 1, 1, 0, 0.25], atol=1e-6)


@pytest.mark.parametrize("kind", ["IoU", "GIoU", "DIoU", "CIoU"])
def test_every_coordinate_receives_a_finite_gradient(kind):
    first = torch.tensor([[5.0, 5, 4, 3], [2, 2, 1, 1]], requires_grad=True)
    second = torch.tensor([[6.0, 5.5, 5, 2], [9, 9, 1, 2]], requires_grad=True)
    boxes.bbox_iou(first, second, **({} if kind == "IoU" else {kind: True})).sum().backward()
    for gradient in (first.grad, second.grad):
        assert gradient.isfinite().all() and (gradient[0] != 0).all()
    assert kind == "IoU" or (first.grad[1, :2] != 0).all()  # boxes apart are pulled together


def test_the_aspect_weight_of_ciou_is_a_constant_to_the_gradient():
    box = torch.tensor([[0.0, 0, 2, 1]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.0, 0, 1, 2]], dtype=torch.float64)
    boxes.bbox_iou(box, target, CIoU=True).backward()
    iou_grad = torch.autograd.grad(boxes.bbox_iou(box, target), box)[0]
    difference = np.arctan(2.0) - np.arctan(0.5)
    v = 4 / np.pi**2 * difference**2
    alpha = v / (v - 1 / 3 + 1)
    # dv/dw = (8/pi^2)(atan(w/h) - atan(1/2)) * h / (w^2 + h^2), at w = 2, h = 1
    expected = iou_grad[0, 2].item() - alpha * 8 / np.pi**2 * difference * 1 / 5
    assert box.grad[0, 2].item() == pytest.approx(expected, abs=1e-6)


def test_a_polygon_is_resampled_along_its_closed_line():
    square = np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]])
    expected = [[0, 0], [2, 0], [4, 0], [4, 2], [4, 4], [2, 4], [0, 4], [0, 2], [0, 0]]
    (resampled,) = boxes.resample_segments([square], 9)
    np.testing.assert_allclose(resampled, expected)
    assert resampled.dtype == np.float32
    (many,) = boxes.resample_segments([square])
    assert many.shape == (1000, 2)
    np.testing.assert_allclose([many.min(axis=0), many.max(axis=0)], [[0, 0], [4, 4]], atol=0.01)


def test_numpy_boxes_and_images_need_no_torch():
    code = (
        "import sys, numpy as np\nfrom utils import boxes, images\n"
        "rows = np.array([[1.0, 2, 3, 4]])\n"
        "boxes.box_iou(boxes.scale_boxes((32, 32), boxes.xywh2xyxy(rows), (64, 64)), rows)\n"
        "images.letterbox(np.zeros((48, 64, 3), np.uint8))\n"
        "print(sorted({'torch', 'torchvision', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_detections_are_rows_taken_apart_and_some_of_them_are_detections_again():
    rows = np.float32([[1.4, 2, 3.6, 4, 0.75, 1], [5, 6, 7, 8, 0.5, 0]])
    for both in (rows, torch.from_numpy(rows)):
        found = boxes.Detections.from_rows(both)
        np.testing.assert_array_equal(found.rows, rows)
        assert len(found) == 2 and found.classes.tolist() == [1, 0] and found.track_ids is None
    assert found.rounded().boxes_xyxy[0].tolist() == [1, 2, 4, 4]
    tracked = boxes.Detections.from_rows(np.column_stack((rows, [7, -1])))
    for some in (tracked[:1], tracked[tracked.confidences > 0.6], tracked[[0]]):
        assert (some.classes.tolist(), some.track_ids.tolist(), len(some.boxes_xyxy)) == ([1], [7], 1)
    assert tracked[:0].rows.shape == (0, 7) and found[:0].rows.shape == (0, 6)
