"""AutoAnchor: the measure by hand, k-means on clusters, when a model's anchors are kept and when replaced."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils import autoanchor
from utils.autoanchor import anchor_fit, check_anchor_order, check_anchors, kmean_anchors, kmeans, label_sizes_px
from utils.dataloaders.labels import NO_LABELS, NO_POINTS, LabelTable, PathList, table_of
from utils.errors import UserError

STRIDES = (8.0, 16.0, 32.0)
SIDES = [10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326]  # the usual anchors
PIXELS = np.array(SIDES, float).reshape(3, 3, 2)


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="yolov5")
    return caplog


def generator(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def dataset_of(sizes_px, imgsz=640):
    """Labels of the given sizes (M, 2), four in each square image of `imgsz`."""
    count = len(sizes_px)
    images = -(-count // 4)
    rows = np.full((count, 5), 0.5, np.float32)
    rows[:, 3:5] = np.reshape(sizes_px, (count, 2)) / imgsz
    table = LabelTable(
        image_paths=PathList.from_strings([f"{index}.jpg" for index in range(images)]),
        sizes_wh=np.full((images, 2), imgsz, np.int32),
        rows=rows,
        offsets=np.minimum(np.arange(images + 1) * 4, count),
        seg_points=np.zeros((0, 2), np.float32),
        seg_offsets=np.zeros(count + 1, np.int64),
    )
    return SimpleNamespace(table=table)


def detect_of(anchors_px, strides=STRIDES):
    stride = torch.tensor(strides)
    anchors = torch.tensor(np.array(anchors_px), dtype=torch.float32) / stride.view(-1, 1, 1)
    return SimpleNamespace(anchors=anchors, stride=stride)


def check(sizes_px, detect):
    check_anchors(dataset_of(sizes_px), SimpleNamespace(model=[detect]))


def pixels_of(detect):
    return (detect.anchors * detect.stride.view(-1, 1, 1)).numpy()


def small_labels(count=400, seed=0):
    """Sizes of 4 to 12 pixels: too small for the usual anchors."""
    return generator(seed).uniform(4, 12, size=(count, 2))


def test_fit_by_hand():
    """10x10 matches both anchors below a ratio of 4, 30x10 the larger one alone, 100x10 none."""
    sizes = np.array([[10, 10], [30, 10], [100, 10]], float)
    assert anchor_fit(sizes, np.array([[5, 5], [20, 20]], float), 4.0) == pytest.approx((2 / 3, 1.0))


def test_label_sizes_by_hand():
    """A 200x100 image at 640 is 640x320; its jitter is its own."""
    rows = np.array([[0, 0, 0, 0.5, 0.5], [0, 0, 0, 0.1, 1.0], [0, 0, 0, 0.25, 0.5]])
    labels = [NO_LABELS._replace(rows=part, polygons=[NO_POINTS] * len(part)) for part in (rows[:2], rows[2:])]
    table = table_of("ab", [(200, 100), (50, 50)], labels)
    sizes = label_sizes_px(table, 640, jitter=np.array([1.0, 0.9]))
    assert sizes == pytest.approx(np.array([[320, 160], [64, 320], [144, 288]], float))


def test_kmeans_finds_clusters():
    centres = np.array([[10, 10], [50, 20], [20, 60], [100, 100]], float)
    points = np.concatenate([centre + generator(1).normal(0, 1, (200, 2)) for centre in centres])
    found = kmeans(points, 4, generator())
    assert found[np.argsort(found.prod(axis=1))] == pytest.approx(centres[np.argsort(centres.prod(axis=1))], abs=0.5)


def test_anchors_are_sorted_by_area_and_suit_the_labels_better_than_the_usual_ones():
    sizes = small_labels() * [1.0, 8.0]
    anchors = kmean_anchors(dataset_of(sizes), 9, 640, 2.0)
    assert anchors.shape == (9, 2) and (np.diff(anchors.prod(axis=1)) >= 0).all() and anchors.min() >= 2
    assert anchor_fit(sizes, anchors, 2.0)[0] > 0.98 > anchor_fit(sizes, PIXELS.reshape(-1, 2), 2.0)[0]


def test_evolution_raises_the_mean_closeness():
    """Closeness of a label: smaller over larger side, the worse of the two directions, of its best anchor."""
    sizes = np.exp(generator(3).normal(3.5, 0.9, size=(500, 2)))

    def closeness(anchors):
        ratio = sizes[:, None] / anchors[None]
        return np.minimum(ratio, 1 / ratio).min(axis=2).max(axis=1).mean()

    start = kmean_anchors(dataset_of(sizes), gen=0)
    assert closeness(kmean_anchors(dataset_of(sizes))) > closeness(start) + 0.01


def test_the_seed_decides_alone():
    dataset, before = dataset_of(small_labels()), np.random.get_state()
    first, again, other = (kmean_anchors(dataset, 6, gen=50, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == np.random.get_state()[2]


def test_a_data_set_may_be_named_by_its_yaml(tiny_shapes, log):
    found = kmean_anchors(str(tiny_shapes), n=9, img_size=64, gen=20)
    assert found.shape == (9, 2) and 5 < found.mean() < 64 and "Anchors in pixels: " in log.text


@pytest.mark.parametrize("sizes", [small_labels(1), small_labels(3), np.stack((np.full(50, 20), np.arange(10, 60)), 1)])
def test_few_sizes_and_labels_of_one_width_still_give_anchors(sizes, log):
    anchors = kmean_anchors(dataset_of(np.repeat(sizes, 20, axis=0)), gen=20)
    assert anchors.shape == (9, 2) and np.isfinite(anchors).all() and (anchors > 0).all()
    assert ("fewer than 9 different label sizes" in log.text) == (len(sizes) < 9)


def test_tiny_labels_are_warned_of(log):
    kmean_anchors(dataset_of(np.concatenate([small_labels(50), [[1.0, 9.0], [2.5, 2.5]]])), gen=1)
    assert "2 of 52 labels are less than 3 pixels wide or high" in log.text


def test_a_sample_of_many_labels_serves_all_of_them(monkeypatch):
    """Of 20,000 labels the search sees 2,000, and its anchors match the others as well."""
    monkeypatch.setattr(autoanchor, "SAMPLE", 2_000)
    sizes = np.exp(generator().normal(3.5, 0.9, size=(20_000, 2)))
    assert anchor_fit(sizes, kmean_anchors(dataset_of(sizes)), 4.0)[0] > 0.98


def test_good_anchors_are_kept(log):
    detect = detect_of(PIXELS)
    before = detect.anchors.clone()
    check(generator().uniform(15, 300, size=(400, 2)), detect)
    assert torch.equal(detect.anchors, before)
    assert "AutoAnchor: " in log.text and "good fit" in log.text


@pytest.mark.parametrize("strides", [STRIDES, STRIDES[::-1]])
def test_bad_anchors_are_replaced_in_place_in_cells_larger_ones_at_larger_strides(strides, log):
    """In cells, anchors of 4 to 12 pixels are smaller on coarse layers: the order must be settled in pixels."""
    detect, sizes = detect_of(PIXELS * 8, strides), small_labels()
    buffer = detect.anchors
    check(sizes, detect)
    assert detect.anchors is buffer
    pixels = pixels_of(detect)
    assert anchor_fit(sizes, pixels.reshape(-1, 2), 4.0)[0] > 0.98
    assert pixels.prod(2).mean(1).argsort().tolist() == torch.tensor(strides).argsort().tolist()
    assert "Best Possible Recall (BPR). New anchors" in log.text


def test_anchors_that_are_no_better_are_not_taken_over(monkeypatch, log):
    """Half the labels match the model's anchors; the search comes back with anchors that match none."""
    monkeypatch.setattr(autoanchor, "kmean_anchors", lambda *_, **__: np.full((9, 2), 5000.0))
    detect = detect_of(np.full((3, 3, 2), 30.0))
    before = detect.anchors.clone()
    check(np.array([[30.0, 30.0], [600.0, 600.0]] * 8), detect)
    assert torch.equal(detect.anchors, before)
    assert "0.500 Best Possible Recall" in log.text and "keeping the model's" in log.text


def test_placeholders_always_become_real_anchors(log):
    """Labels of 4 pixels match the placeholders 2x3 and 4x5 perfectly: even so they must go."""
    detect = detect_of(np.tile(np.arange(6, dtype=float).reshape(1, 3, 2), (3, 1, 1)))
    check(generator().uniform(3, 5, size=(100, 2)), detect)
    assert "1.000 Best Possible Recall" in log.text and (detect.anchors > 0).all()


@pytest.mark.parametrize("order", [1, -1])
def test_reversed_anchors_are_turned_round_and_ordered_ones_left(order):
    detect = detect_of(PIXELS[::order])
    check_anchor_order(detect)
    assert np.array_equal(pixels_of(detect), PIXELS)


def test_no_labels():
    with pytest.raises(UserError, match="no labels"):
        check(np.zeros((0, 2)), detect_of(PIXELS))
