"""Pixels: HSV against a per-pixel reference, flips, mixup, Albumentations; parameters from hyperparameters."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.augmentations import augment_hsv, hist_equalize, mixup
from utils.augmentations import pixels as augment
from utils.augmentations.pixels import (
    AugmentParams,
    albumentations_available,
    albumentations_transform,
    augment_pixels,
    draw_gains,
    to_planes,
)


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def planes(image):
    return image.transpose(2, 0, 1)


def test_parameters_come_from_mappings_and_objects_and_ignore_other_keys():
    class Hyp:
        def __init__(self):
            self.lr0, self.mosaic, self.hsv_h = 0.01, 1, 0.015

    expected = AugmentParams(mosaic=1.0, hsv_h=0.015)
    assert AugmentParams.from_hyp(Hyp()) == expected
    assert AugmentParams.from_hyp({"lr0": 0.01, "mosaic": 1, "hsv_h": 0.015}) == expected


def test_hsv_follows_the_definition_of_the_colour_space():
    image = random_image(20, 20)
    gains = np.array([1.01, 0.7, 1.2])
    got = to_planes(image, gains)
    for y in range(20):
        for x in range(20):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[y, x] / 255))
            levels = np.floor([round(hue * 180) % 180 * gains[0] % 180, round(saturation * 255) * gains[1], 0])
            level_v = min(np.floor(round(value * 255) * gains[2]), 255)
            rgb = colorsys.hsv_to_rgb(levels[0] / 180, min(levels[1], 255) / 255, level_v / 255)
            # hue in 2 degree steps and saturation in 1/255 are what OpenCV keeps in 8 bits
            assert np.abs(got[:, y, x] - np.array(rgb) * 255).max() <= 9


def test_gains_of_one_leave_colours_within_rounding():
    image = random_image(30, 30)
    got = to_planes(image, np.ones(3))
    assert np.abs(got.astype(int) - planes(image)).max() <= 5


def test_strips_join_without_a_trace(monkeypatch):
    image = random_image(50, 41)
    draws = np.array([1.0, 1.3, 0.8]), True, True
    whole = to_planes(image, *draws)
    monkeypatch.setattr(augment, "STRIP_PIXELS", 7 * 41)
    assert np.array_equal(to_planes(image, *draws), whole)


@settings(deadline=None, max_examples=20)
@given(st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 40))
def test_flips_mirror_as_arrays_do(flip_ud, flip_lr, height, width):
    image = random_image(height, width)
    expected = image[:: -1 if flip_ud else 1, :: -1 if flip_lr else 1]
    assert np.array_equal(to_planes(image, None, flip_ud, flip_lr), planes(expected))


def test_hsv_changes_in_place_and_by_its_generator_and_reads_bgr():
    """Blue in BGR has the hue 120 of 180; with saturation alone changed it stays blue."""
    images = []
    for _ in range(2):
        im = np.full((4, 4, 3), (200, 20, 20), np.uint8)
        assert augment_hsv(im, 0, 0.5, 0, generator=np.random.default_rng(0)) is None
        images.append(im)
    blue, green, red = images[0][0, 0].tolist()
    assert np.array_equal(*images) and blue == 200 and green == red != 20
    augment_hsv(im, 0, 0, 0)
    assert np.array_equal(*images)


def test_histogram_is_spread_out():
    im = np.random.default_rng(0).integers(100, 120, (64, 64, 3), dtype=np.uint8)
    for options in ({}, {"clahe": False}, {"bgr": True}):
        spread = hist_equalize(im, **options)
        assert spread.std() > 1.5 * im.std() and spread.shape == im.shape


def test_draws_keep_to_their_probabilities():
    generator, image = np.random.default_rng(0), np.uint8([[[1, 1, 1], [2, 2, 2]], [[3, 3, 3], [4, 4, 4]]])
    gains = np.array([draw_gains(0.1, 0.7, 0.4, generator) for _ in range(2000)])
    assert np.allclose(gains.min(axis=0), [0.9, 0.3, 0.6], atol=0.01)
    assert np.allclose(gains.max(axis=0), [1.1, 1.7, 1.4], atol=0.01)
    params, box = AugmentParams(fliplr=0.5, flipud=0.1), np.float32([[0.25, 0.25, 0.5, 0.5]])
    flips = {1: (), 2: ("lr",), 3: ("ud",), 4: ("ud", "lr")}  # by what comes to the upper left
    seen = []
    for _ in range(2000):
        pixels, ((x, y, w, h),) = augment_pixels(image, box, params, generator)
        seen.append(flips[pixels[0, 0, 0]])
        assert (x, y, w, h) == (0.75 if "lr" in seen[-1] else 0.25, 0.75 if "ud" in seen[-1] else 0.25, 0.5, 0.5)
    assert abs(np.mean(["lr" in each for each in seen]) - 0.5) < 0.04
    assert abs(np.mean(["ud" in each for each in seen]) - 0.1) < 0.03
    assert np.array_equal(augment_pixels(image, box, AugmentParams(), generator)[0], planes(image))


def test_albumentations_alters_no_other_draw_and_is_rare(monkeypatch):
    params, box, image, applied = AugmentParams(hsv_s=0.7, fliplr=0.5), np.zeros((0, 4)), random_image(2, 2), []
    monkeypatch.setattr(augment, "albumentations_transform", lambda image, *name_seed: applied.append(1) or image)
    for seed in range(1000):
        without = augment_pixels(image, box, params, np.random.default_rng(seed))
        with_it = augment_pixels(image, box, params, np.random.default_rng(seed), albumentations=True)
        assert np.array_equal(without[0], with_it[0])
    assert 20 <= len(applied) <= 65  # 4 transforms of 1 %


def test_mixup_blends_and_joins():
    first, second = np.full((8, 8, 3), 200, np.uint8), np.full((8, 8, 3), 100, np.uint8)
    shares = []
    for seed in range(300):
        blended, labels = mixup(first, np.ones((1, 5)), second, np.zeros((2, 5)), np.random.default_rng(seed))
        assert (blended == blended[0, 0]).all() and labels[:, 0].tolist() == [1, 0, 0]
        shares.append((blended[0, 0, 0] - 100) / 100)
    assert abs(np.mean(shares) - 0.5) < 0.02
    assert abs(np.std(shares) - np.sqrt(1 / (4 * 65))) < 0.01  # of Beta(32, 32)


@pytest.mark.parametrize(("version", "used"), [("2.0.8", True), ("1.4.3", False), (None, False)])
def test_albumentations_is_used_where_it_can_be_seeded(monkeypatch, caplog, version, used):
    def installed(name):
        if version is None:
            raise augment.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(augment.importlib.metadata, "version", installed)
    monkeypatch.setattr(augment.LOGGER, "propagate", True)
    with caplog.at_level("INFO", logger="yolov5"):
        assert albumentations_available("train: ") is used
    said = " ".join(record.getMessage() for record in caplog.records)
    assert ("MedianBlur (p=0.01)" in said) is used
    assert ("not used" in said) is (version == "1.4.3")


@pytest.mark.parametrize("name", [name for name, _ in augment.ALBUMENTATIONS])
def test_albumentations_transforms_depend_on_their_seed_alone(name):
    pytest.importorskip("albumentations", reason="optional")
    image = random_image(32, 48)
    state = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    first, again = (albumentations_transform(image, name, 5) for _ in range(2))
    assert np.array_equal(first, again) and first.shape == image.shape and first.dtype == np.uint8
    assert not np.array_equal(first, image)
    assert np.array_equal(np.random.get_state()[1], state[0]) and torch.equal(torch.random.get_rng_state(), state[1])
