"""Letterbox by YOLOv5's signature against golden sizes; augmentations of single images."""

import csv

import numpy as np
import pytest

from utils import augmentations, dataloaders


def test_letterbox_agrees_with_the_golden_sizes(golden_dir):
    with open(golden_dir / "letterbox.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 20
    for row in rows:
        image = np.zeros((int(row["h"]), int(row["w"]), 3), np.uint8)
        options = {"auto": row["auto"] == "True", "scaleup": row["scaleup"] == "True"}
        im, ratio, (dw, dh) = augmentations.letterbox(image, (640, 640), **options)
        assert im.shape == (int(row["out_h"]), int(row["out_w"]), 3)
        assert ratio == pytest.approx((float(row["ratio_w"]), float(row["ratio_h"])), abs=1e-6)
        assert (dw, dh) == (float(row["pad_w_each_side"]), float(row["pad_h_each_side"]))
    assert dataloaders.letterbox is augmentations.letterbox


def test_letterbox_stretches_and_colours():
    image = np.zeros((10, 20, 3), np.uint8)
    im, ratio, pad = augmentations.letterbox(image, (40, 20), auto=False, scaleFill=True)
    assert im.shape == (40, 20, 3) and ratio == (1.0, 4.0) and pad == (0, 0)
    im, *_ = augmentations.letterbox(image, 32, (1, 2, 3), auto=False)
    assert im[0, 0].tolist() == [1, 2, 3] and im[16, 16].tolist() == [0, 0, 0]


def test_hsv_changes_in_place_and_by_its_generator():
    pictures = []
    for _ in range(2):
        im = np.full((4, 4, 3), (200, 100, 50), np.uint8)
        assert augmentations.augment_hsv(im, generator=np.random.default_rng(3)) is None
        pictures.append(im)
    assert np.array_equal(*pictures) and not (pictures[0] == (200, 100, 50)).all()
    im = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    augmentations.augment_hsv(im, 0, 0, 0)
    assert (im == (200, 100, 50)).all()


def test_hsv_reads_the_channels_as_bgr():
    """Blue in BGR has the hue 120 of 180; with saturation alone changed it stays blue."""
    im = np.full((4, 4, 3), (200, 20, 20), np.uint8)
    augmentations.augment_hsv(im, 0, 0.5, 0, generator=np.random.default_rng(0))
    blue, green, red = im[0, 0].tolist()
    assert blue == 200 and green == red != 20


def test_histogram_is_spread_out():
    im = np.random.default_rng(0).integers(100, 120, (64, 64, 3), dtype=np.uint8)
    for options in ({}, {"clahe": False}, {"bgr": True}):
        spread = augmentations.hist_equalize(im, **options)
        assert spread.std() > 1.5 * im.std() and spread.shape == im.shape


def test_perspective_without_ranges_moves_nothing():
    im = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    labels = np.array([[2.0, 10, 10, 30, 30]])
    still = {"degrees": 0, "translate": 0, "scale": 0, "shear": 0}
    same, kept = augmentations.random_perspective(im, labels, **still)
    assert np.array_equal(same, im) and np.allclose(kept, labels)
    larger, kept = augmentations.random_perspective(im, labels, **still, border=(5, 10))
    assert larger.shape == (50, 80, 3) and np.allclose(kept, [[2, 20, 15, 40, 35]])
    assert np.array_equal(larger[5:-5, 10:-10], im) and (larger[0] == 114).all()


def test_perspective_tightens_boxes_by_their_polygons():
    im, labels = np.zeros((100, 100, 3), np.uint8), np.array([[0.0, 20, 20, 80, 80]])
    diamond = np.array([[50.0, 20], [80, 50], [50, 80], [20, 50]])
    turn = {"degrees": 45, "translate": 0, "scale": 0, "shear": 0}
    boxed = augmentations.random_perspective(im, labels, **turn, generator=np.random.default_rng(1)).labels
    tight = augmentations.random_perspective(im, labels, [diamond], **turn, generator=np.random.default_rng(1)).labels
    assert np.ptp(tight[0, 1::2]) < np.ptp(boxed[0, 1::2])
    assert augmentations.random_perspective(im).labels.shape == (0, 5)


def test_mixup_blends_about_half_and_half():
    im, labels = np.zeros((8, 8, 3), np.uint8), np.array([[1.0, 0, 0, 4, 4]])
    blended, joined = augmentations.mixup(im, labels, im + 200, labels + 1, generator=np.random.default_rng(0))
    assert 50 < blended.mean() < 150 and np.array_equal(joined, np.concatenate((labels, labels + 1)))
