"""Test-time augmentation: rows that are counted by hand, boxes that come back where they are, more that is found."""

import cv2
import numpy as np
import pytest
import torch

from models.backends import load_backend
from models.deploy import rewrite
from models.yolo import Model, augmented_rows
from utils.nms import non_max_suppression

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("cfg", "side", "expected"),
    [
        # (25200 - 1200) of the first view, 18207 of the second at 544 px, (12348 - 9408) of the third at 448 px
        ("yolov5n.yaml", 640, 45147),
        # 704: 3 * 121 * (64 + 16 + 4 + 1) rows; 0.83 * 704 = 584.3, padded to 640; 0.67 * 704 = 471.7, padded to 512
        ("yolov5n6.yaml", 704, 3 * (121 * 84 + 100 * 85 + 64 * 21)),
        # 192 px, strides 16 and 32: 144 + 36 cells; 0.83: 160 px, 100 + 25; 0.67: 160 px
        ("yolov3-tiny.yaml", 192, 3 * (144 + 125 + 25)),
    ],
)
def test_rows_of_all_views_less_those_of_the_outer_levels(cfg, side, expected):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        rows, logits = Model(cfg, nc=1).eval()(torch.zeros(1, 3, side, side), augment=True)
    assert rows.shape == (1, expected, 6) and logits is None


def box_of_what_is_bright(images):
    """A detector of one level with a stride of 8: its first row is the box around all pixels above 0.5, sure of it."""
    rows = torch.zeros(1, images.shape[2] // 8 * (images.shape[3] // 8), 6)
    down, across = torch.where(images[0, 0] > 0.5)
    top, left, bottom, right = down.min(), across.min(), down.max() + 1, across.max() + 1
    rows[0, 0] = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, 1, 1])
    return rows


def test_boxes_come_back_where_they_are():
    """A bright box 64 x 40 around (72, 60) of an image 160 x 128 is reported from each view within a pixel or two."""
    images = torch.zeros(1, 3, 128, 160)
    images[:, :, 40:80, 40:104] = 1
    rows = augmented_rows(box_of_what_is_bright, images, [8.0])
    found = rows[0][rows[0, :, 4] == 1]
    assert len(found) == 3  # a model of one level keeps it in every view
    assert found[0].tolist() == [72, 60, 64, 40, 1, 1]
    np.testing.assert_allclose(found[1:, :4], [[72, 60, 64, 40]] * 2, atol=1.5)


def test_views_are_resized_then_padded_at_the_right_and_below():
    """128 x 160; by 0.83: 106 x 132, padded to 128 x 160; by 0.67: 85 x 107, padded to 96 x 128."""
    views = []

    def rows_of(images):
        views.append(images)
        return torch.zeros(1, images.shape[2] // 32 * (images.shape[3] // 32), 6)

    images = torch.ones(1, 3, 128, 160)
    augmented_rows(rows_of, images, [32.0])
    assert views[0] is images
    for view, (height, width), shape in zip(views[1:], ((106, 132), (85, 107)), ((128, 160), (96, 128)), strict=True):
        assert view.shape == (1, 3, *shape)
        torch.testing.assert_close(view[:, :, :height, :width], torch.ones(1, 3, height, width))
        padding = torch.cat((view[:, :, height:].flatten(), view[:, :, :, width:].flatten()))
        assert padding.allclose(torch.tensor(0.447))


def test_the_outer_views_leave_out_what_the_others_see_better():
    """Rows carry their level's stride as objectness: 32 is missing from the first view, 8 from the last."""

    def rows_of(images):
        cells = [(images.shape[2] // stride) * (images.shape[3] // stride) for stride in (8, 16, 32)]
        strides = torch.repeat_interleave(torch.tensor([8.0, 16.0, 32.0]), torch.tensor(cells))
        rows = torch.ones(1, len(strides), 6)
        rows[..., 2], rows[..., 4] = images.shape[3], strides
        return rows

    rows = augmented_rows(rows_of, torch.zeros(1, 3, 64, 96), torch.tensor([8.0, 16.0, 32.0]))[0]
    widths = {"first": 96.0, "second": 96 / 0.83, "third": 96 / 0.67}  # 0.83 * 96 is padded to 96, 0.67 * 96 as well
    strides_of = {view: rows[(rows[:, 2] - width).abs() < 0.1, 4].unique().tolist() for view, width in widths.items()}
    assert strides_of == {"first": [8, 16], "second": [8, 16, 32], "third": [16, 32]}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model("yolov5n-slimneck.yaml", nc=2).eval()


def test_the_rewritten_model_gives_the_models_own_rows(model):
    """GSConv's shuffles and batch norms are gone there; the views are the same."""
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected, _ = model(images, augment=True)
        inference = rewrite(model)
        torch.testing.assert_close(augmented_rows(inference, images, inference.stride), expected, rtol=1e-4, atol=1e-3)


def test_on_a_photograph_all_that_plain_detection_finds_is_found_and_the_layers_are_shown(golden_dir):
    image = cv2.imread(str(golden_dir / "images" / "zidane.jpg"))
    images = np.ascontiguousarray(cv2.resize(image, (640, 384))[..., ::-1].transpose(2, 0, 1))[None]
    backend = load_backend(golden_dir / "yolov5n-v6-coco.pt", "cpu")
    inputs = backend.preprocess(images)
    shown = []
    plain = backend.infer(inputs)
    augmented = backend.infer(inputs, lambda row, *_: shown.append(row), augment=True)
    assert shown == list(range(24))
    assert augmented.shape[1] > 1.5 * plain.shape[1] and augmented.dtype == torch.float32
    before, after = (non_max_suppression(rows, conf_thres=0.4)[0] for rows in (plain, augmented))
    assert len(before) >= 2
    for box in before:
        alike = after[(after[:, 5] == box[5]) & ((after[:, :4] - box[:4]).abs().max(1).values < 40)]
        assert len(alike) and alike[0, 4] > box[4] - 0.1
