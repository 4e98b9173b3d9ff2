"""Pixels: HSV against a per-pixel reference, flips, mixup, Albumentations; parameters from hyperparameters."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.augmentations import pixels as augment
from utils.augmentations.mosaic import Sample
from utils.augmentations.pixels import (
    NO_DRAWS,
    AugmentParams,
    PixelDraws,
    albumentations_available,
    albumentations_transform,
    draw_pixels,
    finish_pixels,
    flip_boxes,
    mixup,
)
from utils.augmentations.warp import Objects


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


def test_no_draws_give_the_channels_apart():
    image = random_image(13, 17)
    assert np.array_equal(finish_pixels(image, NO_DRAWS), planes(image))


def test_hsv_follows_the_definition_of_the_colour_space():
    image = random_image(20, 20)
    gains = np.array([1.01, 0.7, 1.2])
    got = finish_pixels(image, PixelDraws(gains, False, False, ()))
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
    got = finish_pixels(image, PixelDraws(np.ones(3), False, False, ()))
    assert np.abs(got.astype(int) - planes(image)).max() <= 5


def test_strips_join_without_a_trace(monkeypatch):
    image = random_image(50, 41)
    draws = PixelDraws(np.array([1.0, 1.3, 0.8]), True, True, ())
    whole = finish_pixels(image, draws)
    monkeypatch.setattr(augment, "STRIP_PIXELS", 7 * 41)
    assert np.array_equal(finish_pixels(image, draws), whole)


@settings(deadline=None, max_examples=20)
@given(st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 40))
def test_flips_are_their_own_inverse_and_mirror_as_arrays_do(flip_ud, flip_lr, height, width):
    image = random_image(height, width)
    draws = PixelDraws(None, flip_ud, flip_lr, ())
    flipped = finish_pixels(image, draws)
    expected = image[:: -1 if flip_ud else 1, :: -1 if flip_lr else 1]
    assert np.array_equal(flipped, planes(expected))
    assert np.array_equal(finish_pixels(np.ascontiguousarray(flipped.transpose(1, 2, 0)), draws), planes(image))


@given(st.booleans(), st.booleans())
def test_boxes_flip_with_the_image(flip_ud, flip_lr):
    boxes = np.float32([[0.25, 0.125, 0.5, 0.25], [0.5, 0.75, 0.25, 0.5]])
    flipped = flip_boxes(boxes, flip_ud, flip_lr)
    assert np.array_equal(flipped[:, 0], 1 - boxes[:, 0] if flip_lr else boxes[:, 0])
    assert np.array_equal(flipped[:, 1], 1 - boxes[:, 1] if flip_ud else boxes[:, 1])
    assert np.array_equal(flip_boxes(flipped, flip_ud, flip_lr), boxes)


def test_draws_keep_to_their_probabilities():
    params = AugmentParams(hsv_h=0.1, hsv_s=0.7, hsv_v=0.4, fliplr=0.5, flipud=0.1)
    generator = np.random.default_rng(0)
    draws = [draw_pixels(params, generator, albumentations=False) for _ in range(2000)]
    gains = np.array([each.hsv_gains for each in draws])
    assert np.allclose(gains.min(axis=0), [0.9, 0.3, 0.6], atol=0.01)
    assert np.allclose(gains.max(axis=0), [1.1, 1.7, 1.4], atol=0.01)
    assert abs(np.mean([each.flip_lr for each in draws]) - 0.5) < 0.04
    assert abs(np.mean([each.flip_ud for each in draws]) - 0.1) < 0.03
    assert draw_pixels(AugmentParams(), generator, albumentations=False) == NO_DRAWS


def test_albumentations_alters_no_other_draw_and_is_rare():
    params = AugmentParams(hsv_s=0.7, fliplr=0.5)
    hits = 0
    for seed in range(1000):
        without = draw_pixels(params, np.random.default_rng(seed), albumentations=False)
        with_it = draw_pixels(params, np.random.default_rng(seed), albumentations=True)
        assert np.array_equal(without.hsv_gains, with_it.hsv_gains)
        assert without[1:3] == with_it[1:3]
        hits += len(with_it.transforms)
    assert 20 <= hits <= 65  # 4 transforms of 1 %


def test_mixup_blends_and_joins():
    first = Sample(np.full((8, 8, 3), 200, np.uint8), Objects(np.float32([1]), np.float32([[0, 0, 4, 4]]), []))
    second = Sample(np.full((8, 8, 3), 100, np.uint8), Objects(np.float32([2]), np.float32([[2, 2, 8, 8]]), []))
    shares = []
    for seed in range(300):
        blended = mixup(first, second, np.random.default_rng(seed))
        assert (blended.image == blended.image[0, 0]).all()
        shares.append((blended.image[0, 0, 0] - 100) / 100)
    assert blended.objects.classes.tolist() == [1, 2]
    assert blended.objects.boxes_xyxy_px.tolist() == [[0, 0, 4, 4], [2, 2, 8, 8]]
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
