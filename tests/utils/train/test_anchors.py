"""AutoAnchor: the measure by hand, k-means on clusters, when a model's anchors are kept and when replaced."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.dataloaders.labels import LabelTable, PathList
from utils.errors import UserError
from utils.train.anchors import (
    anchor_fit,
    check_anchors,
    kmean_anchors,
    kmeans,
    label_sizes_px,
    order_by_stride,
)

STRIDES = (8.0, 16.0, 32.0)
SIDES = [10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326]  # the usual anchors
PIXELS = np.array(SIDES, float).reshape(3, 3, 2)


def generator(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def table_of(sizes_px, imgsz=640, labels_an_image=4):
    """Labels of the given sizes (M, 2) in square images of `imgsz`."""
    count = len(sizes_px)
    images = -(-count // labels_an_image)
    rows = np.zeros((count, 5), np.float32)
    rows[:, 1:3] = 0.5
    rows[:, 3:5] = sizes_px / imgsz
    return LabelTable(
        image_paths=PathList.from_strings([f"{index}.jpg" for index in range(images)]),
        sizes_wh=np.full((images, 2), imgsz, np.int32),
        rows=rows,
        offsets=np.minimum(np.arange(images + 1) * labels_an_image, count),
        seg_points=np.zeros((0, 2), np.float32),
        seg_offsets=np.zeros(count + 1, np.int64),
    )


def detect_of(anchors_px, strides=STRIDES):
    stride = torch.tensor(strides)
    anchors = torch.tensor(np.asarray(anchors_px), dtype=torch.float32) / stride.view(-1, 1, 1)
    return SimpleNamespace(anchors=anchors, stride=stride)


def small_labels(count=400, seed=0):
    """Sizes of 4 to 12 pixels: too small for the usual anchors."""
    return generator(seed).uniform(4, 12, size=(count, 2))


def test_fit_by_hand():
    """10x10 matches both anchors below a ratio of 4, 30x10 the larger one alone, 100x10 none."""
    sizes = np.array([[10, 10], [30, 10], [100, 10]], float)
    fit = anchor_fit(sizes, np.array([[5, 5], [20, 20]], float), threshold=4.0)
    assert (fit.bpr, fit.aat) == (pytest.approx(2 / 3), pytest.approx(1.0))


def test_label_sizes_by_hand():
    """A 200x100 image at 640 is 640x320; its jitter is its own."""
    sizes = label_sizes_px(
        np.array([[200, 100], [50, 50]]),
        np.array([0, 2, 3]),
        np.array([[0.5, 0.5], [0.1, 1.0], [0.25, 0.5]]),
        640,
        jitter=np.array([1.0, 0.9]),
    )
    assert sizes == pytest.approx(np.array([[320, 160], [64, 320], [144, 288]], float))


def test_kmeans_finds_clusters():
    centres = np.array([[10, 10], [50, 20], [20, 60], [100, 100]], float)
    points = np.concatenate([centre + generator(1).normal(0, 1, (200, 2)) for centre in centres])
    found = kmeans(points, 4, generator())
    assert found[np.argsort(found.prod(axis=1))] == pytest.approx(centres[np.argsort(centres.prod(axis=1))], abs=0.5)


def test_anchors_are_sorted_by_area_and_suit_the_labels_better_than_the_usual_ones():
    sizes = small_labels() * [1.0, 8.0]
    anchors = kmean_anchors(sizes, 9, 640, 2.0, generator())
    areas = anchors.prod(axis=1)
    assert anchors.shape == (9, 2) and (np.diff(areas) >= 0).all() and anchors.min() >= 2
    assert anchor_fit(sizes, anchors, 2.0).bpr > 0.98 > anchor_fit(sizes, PIXELS.reshape(-1, 2), 2.0).bpr


def test_evolution_raises_the_mean_closeness():
    """Closeness of a label: smaller over larger side, the worse of the two directions, of its best anchor."""
    sizes = np.exp(generator(3).normal(3.5, 0.9, size=(500, 2)))

    def closeness(anchors):
        ratio = sizes[:, None] / anchors[None]
        return np.minimum(ratio, 1 / ratio).min(axis=2).max(axis=1).mean()

    start = kmean_anchors(sizes, 9, 640, 4.0, generator(), generations=0)
    assert closeness(kmean_anchors(sizes, 9, 640, 4.0, generator())) > closeness(start) + 0.01


def test_the_generator_decides_alone():
    sizes = small_labels()
    before = np.random.get_state()
    first = kmean_anchors(sizes, 6, 640, 4.0, generator(5), generations=50)
    assert np.array_equal(first, kmean_anchors(sizes, 6, 640, 4.0, generator(5), generations=50))
    assert not np.array_equal(first, kmean_anchors(sizes, 6, 640, 4.0, generator(6), generations=50))
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == np.random.get_state()[2]


@pytest.mark.parametrize("count", [1, 3])
def test_few_different_sizes_still_give_anchors(count, caplog):
    sizes = np.repeat(small_labels(count), 20, axis=0)
    anchors = kmean_anchors(sizes, 9, 640, 4.0, generator())
    assert anchors.shape == (9, 2) and np.isfinite(anchors).all() and (anchors > 0).all()
    assert "fewer than 9 different label sizes" in caplog.text


def test_labels_of_one_width_give_anchors():
    sizes = np.stack((np.full(50, 20.0), np.linspace(10, 60, 50)), axis=1)
    assert np.isfinite(kmean_anchors(sizes, 3, 640, 4.0, generator(), generations=20)).all()


def test_tiny_labels_are_warned_of(caplog):
    kmean_anchors(np.concatenate([small_labels(50), [[1.0, 9.0], [2.5, 2.5]]]), 9, 640, 4.0, generator(), generations=1)
    assert "2 of 52 labels are less than 3 pixels wide or high" in caplog.text


def test_a_sample_of_many_labels_serves_all_of_them(monkeypatch):
    """Of 20,000 labels the search sees 2,000, and its anchors match the others as well."""
    monkeypatch.setattr("utils.train.anchors.SAMPLE", 2_000)
    sizes = np.exp(generator().normal(3.5, 0.9, size=(20_000, 2)))
    anchors = kmean_anchors(sizes, 9, 640, 4.0, generator())
    assert anchor_fit(sizes, anchors, 4.0).bpr > 0.98


def test_good_anchors_are_kept(caplog):
    caplog.set_level(logging.INFO, logger="yolov5")
    detect = detect_of(PIXELS)
    before = detect.anchors.clone()
    result = check_anchors(table_of(generator().uniform(15, 300, size=(400, 2))), detect, 4.0, 640, generator())
    assert not result.replaced and torch.equal(detect.anchors, before)
    assert "AutoAnchor: " in caplog.text and "good fit" in caplog.text


def test_bad_anchors_are_replaced_in_place_in_cells(caplog):
    caplog.set_level(logging.INFO, logger="yolov5")
    detect = detect_of(PIXELS * 8)
    buffer = detect.anchors
    table = table_of(small_labels())
    result = check_anchors(table, detect, 4.0, 640, generator())
    assert result.replaced and result.after.bpr > result.before.bpr
    assert detect.anchors is buffer
    pixels = detect.anchors.double().numpy() * np.array(STRIDES).reshape(3, 1, 1)
    assert anchor_fit(table.rows[:, 3:5] * 640.0, pixels.reshape(-1, 2), 4.0).bpr > 0.98
    assert "Best Possible Recall (BPR). New anchors" in caplog.text


def test_anchors_that_are_no_better_are_not_taken_over(monkeypatch, caplog):
    """Half the labels match the model's anchors; the search comes back with anchors that match none."""
    caplog.set_level(logging.INFO, logger="yolov5")
    monkeypatch.setattr("utils.train.anchors.kmean_anchors", lambda *args: np.full((9, 2), 5000.0))
    detect = detect_of(np.full((3, 3, 2), 30.0))
    before = detect.anchors.clone()
    sizes = np.array([[30.0, 30.0], [600.0, 600.0]] * 8)
    result = check_anchors(table_of(sizes), detect, 4.0, 640, generator())
    assert result.before.bpr == 0.5 and not result.replaced and torch.equal(detect.anchors, before)
    assert "keeping the model's" in caplog.text


def test_placeholders_always_become_real_anchors():
    """Labels of 4 pixels match the placeholders 2x3 and 4x5 perfectly: even so they must go."""
    placeholders = np.tile(np.arange(6, dtype=float).reshape(1, 3, 2), (3, 1, 1))
    detect = detect_of(placeholders)
    result = check_anchors(table_of(generator().uniform(3, 5, size=(100, 2))), detect, 4.0, 640, generator())
    assert result.before.bpr > 0.98 and result.replaced
    assert (detect.anchors > 0).all()


@pytest.mark.parametrize("strides", [STRIDES, STRIDES[::-1]])
def test_larger_strides_get_larger_anchors(strides):
    """In cells, anchors of 4 to 12 pixels are smaller on coarse layers: the order must be settled in pixels."""
    detect = detect_of(PIXELS * 8, strides)
    assert check_anchors(table_of(small_labels()), detect, 4.0, 640, generator()).replaced
    areas = (detect.anchors * torch.tensor(strides).view(3, 1, 1)).prod(2).mean(1)
    assert areas.argsort().tolist() == torch.tensor(strides).argsort().tolist()


def test_order_by_stride_leaves_ordered_layers_alone():
    assert np.array_equal(order_by_stride(PIXELS, np.array(STRIDES)), PIXELS)
    assert np.array_equal(order_by_stride(PIXELS[::-1], np.array(STRIDES)), PIXELS)


def test_no_labels():
    with pytest.raises(UserError, match="no labels"):
        check_anchors(table_of(np.zeros((0, 2))), detect_of(PIXELS), 4.0, 640, generator())
