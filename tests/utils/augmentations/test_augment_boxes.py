"""Augmented boxes: in the image, corners in order, each with its own class, and round what they were drawn round.

Every object has a class of its own, so that one which got another's class, or another's place, is noticed.
"""

from unittest import mock

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.augmentations import pixels as augment
from utils.augmentations import random_perspective
from utils.augmentations.mosaic import Tile, compose, place_four, place_nine
from utils.augmentations.pixels import AugmentParams, augment_pixels
from utils.augmentations.warp import random_matrix
from utils.dataloaders.dataset import LoadImagesAndLabels

SIZE = 96
seeds = st.integers(0, 2**31)
shares = st.floats(0, 1)
any_warp = st.builds(
    AugmentParams,
    degrees=st.floats(0, 180),
    translate=shares,
    scale=st.floats(0, 0.99),
    shear=st.floats(0, 60),
    perspective=st.floats(0, 0.004),
)
rigid_warp = st.builds(AugmentParams, degrees=st.floats(0, 180), translate=shares, scale=st.floats(0, 0.9))


def some_labels(generator, width, height, first_class):
    """Labels (n, 5) of up to five objects within width x height px, of the classes `first_class` and following."""
    corners = np.sort(generator.uniform(0, 1, (int(generator.integers(0, 6)), 2, 2)), axis=1) * [width, height]
    return np.float32([[first_class + number, *box.ravel()] for number, box in enumerate(corners)]).reshape(-1, 5)


def some_tiles(generator, place, polygons=False):
    """Tiles of a mosaic, each with objects of its own classes."""
    number = 4 if place is place_four else 9
    sizes_hw = [tuple(int(side) for side in generator.integers(SIZE // 3, SIZE + 1, 2)) for _ in range(number)]
    tiles = []
    for index, ((h, w), (x, y)) in enumerate(zip(sizes_hw, place(sizes_hw, SIZE, generator), strict=True)):
        labels = some_labels(generator, w, h, 10 * index)
        outlines = [box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2) for box in labels[:, 1:]] if polygons else []
        tiles.append(Tile(np.zeros((h, w, 3), np.uint8), labels, outlines, x, y))
    return tiles


def warped_box(box_xyxy, matrix, width, height):
    """The box round the four warped corners, clipped, and whether all of them lay inside; None behind the horizon."""
    x1, y1, x2, y2 = map(float, box_xyxy)
    points = [matrix @ [x, y, 1.0] for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]
    if min(point[2] for point in points) <= 1e-3:
        return None, False
    x, y = np.array([point[:2] / point[2] for point in points]).T
    inside = 0 <= x.min() and x.max() <= width and 0 <= y.min() and y.max() <= height
    return np.array(
        [*np.clip([x.min(), y.min()], 0, (width, height)), *np.clip([x.max(), y.max()], 0, (width, height))]
    ), inside


def check_each_is_where_it_belongs(kept, before, matrix, width, height, all_kept=False):
    """Compares what was kept with `before`, {class: box on the canvas}; `all_kept`: what stays whole stays."""
    _, x1, y1, x2, y2 = kept.T
    assert ((0 <= x1) & (x1 < x2) & (x2 <= width) & (0 <= y1) & (y1 < y2) & (y2 <= height)).all()
    classes = kept[:, 0].tolist()
    assert len(set(classes)) == len(classes) and set(classes) <= set(before)
    for class_id, box in zip(classes, kept[:, 1:], strict=True):
        expected, _ = warped_box(before[class_id], matrix, width, height)
        np.testing.assert_allclose(box, expected, atol=1e-2)
    for class_id, box in before.items() if all_kept else ():
        (x1, y1, x2, y2), inside = warped_box(box, matrix, width, height)
        wide, high = x2 - x1, y2 - y1
        if inside and min(wide, high) > 2.01 and max(wide / high, high / wide) < 99:
            assert class_id in classes


def on_canvas(tiles):
    """The boxes of all objects by class, on the canvas of a mosaic and clipped to it."""
    return {
        class_id: (np.float32(box) + np.float32([tile.x, tile.y] * 2)).clip(0, 2 * SIZE)
        for tile in tiles
        for class_id, *box in tile.labels.tolist()
    }


@settings(max_examples=60, deadline=None)
@given(seed=seeds, params=any_warp | rigid_warp, place=st.sampled_from([place_four, place_nine]))
def test_objects_of_a_mosaic_keep_their_classes_and_places(seed, params, place):
    generator = np.random.default_rng(seed)
    tiles = some_tiles(generator, place)
    matrix, gain = random_matrix((2 * SIZE,) * 2, (SIZE,) * 2, *params.warp, generator)
    _, kept = compose(tiles, matrix, gain, SIZE, 0.0, generator)
    rigid = params.shear == params.perspective == 0
    check_each_is_where_it_belongs(kept, on_canvas(tiles), matrix, SIZE, SIZE, all_kept=rigid)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, params=any_warp, share=shares)
def test_pasted_objects_lie_in_the_image_too_and_are_of_their_originals_classes(seed, params, share):
    generator = np.random.default_rng(seed)
    tiles = some_tiles(generator, place_four, polygons=True)
    matrix, gain = random_matrix((2 * SIZE,) * 2, (SIZE,) * 2, *params.warp, generator)
    _, kept = compose(tiles, matrix, gain, SIZE, share, generator)
    _, x1, y1, x2, y2 = kept.T
    assert ((0 <= x1) & (x1 < x2) & (x2 <= SIZE) & (0 <= y1) & (y1 < y2) & (y2 <= SIZE)).all()
    classes, counts = np.unique(kept[:, 0], return_counts=True)
    assert set(classes.tolist()) <= set(on_canvas(tiles)) and (counts <= 2).all()


@settings(max_examples=40, deadline=None)
@given(seed=seeds, params=any_warp | rigid_warp, border=st.tuples(st.integers(-20, 20), st.integers(-20, 20)))
def test_random_perspective_keeps_classes_and_places(seed, params, border):
    generator = np.random.default_rng(seed)
    width, height = (int(side) for side in generator.integers(60, 120, 2))
    labels = some_labels(generator, width, height, 3)
    out_w, out_h = width + 2 * border[1], height + 2 * border[0]
    blank, keyed = np.zeros((height, width, 3), np.uint8), np.random.default_rng(seed)
    image, kept = random_perspective(blank, labels, (), *params.warp, border=border, generator=keyed)
    assert image.shape == (out_h, out_w, 3)
    matrix, _ = random_matrix((width, height), (out_w, out_h), *params.warp, np.random.default_rng(seed))
    before = {class_id: np.float32(box) for class_id, *box in labels.tolist()}
    rigid = params.shear == params.perspective == 0
    check_each_is_where_it_belongs(kept, before, matrix, out_w, out_h, all_kept=rigid)


@st.composite
def images_with_a_box(draw):
    """A black image with one white box, and the box as whole numbers xyxy."""
    height, width = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x2, y2 = draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    return image, (x1, y1, x2, y2)


@settings(max_examples=60, deadline=None)
@given(images_with_a_box(), st.booleans(), st.booleans())
def test_a_flipped_box_is_round_the_flipped_object(drawn, flip_ud, flip_lr):
    image, (x1, y1, x2, y2) = drawn
    height, width = image.shape[:2]
    box = np.array([[(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]])
    always = AugmentParams(flipud=float(flip_ud), fliplr=float(flip_lr))
    planes, ((cx, cy, w, h),) = augment_pixels(image, box, always, np.random.default_rng(0))
    y, x = np.nonzero(planes[0])
    assert w > 0 and h > 0
    corners = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
    np.testing.assert_allclose(corners, [x.min(), y.min(), x.max() + 1, y.max() + 1], atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(images_with_a_box(), seeds, st.tuples(shares, shares, st.floats(0, 0.9)))
def test_changed_colours_stay_where_they_were(drawn, seed, ranges):
    """A pixel's new colour depends on its colour alone: the white box stays a box, of one colour, and black black."""
    image, (x1, y1, x2, y2) = drawn
    params = AugmentParams(hsv_h=ranges[0], hsv_s=ranges[1], hsv_v=ranges[2])
    changed, _ = augment_pixels(image, np.zeros((0, 4)), params, np.random.default_rng(seed))
    inside = np.zeros(image.shape[:2], bool)
    inside[y1:y2, x1:x2] = True
    assert (changed[:, ~inside] == 0).all() and (changed[:, inside] == changed[:, y1, x1, None]).all()
    assert changed[:, y1, x1].min() > 20


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(params=any_warp, seed=seeds, index=st.integers(0, 20), colours=shares, flips=shares)
def test_an_item_has_its_own_images_classes_whatever_happens_to_its_pixels(
    label_table, params, seed, index, colours, flips
):
    table = label_table.subset(np.arange(21))
    table.rows[:, 0] = np.arange(len(table.rows))  # no two labels of one class
    options = {name: getattr(params, name) for name in ("degrees", "translate", "scale", "shear", "perspective")}

    def targets(albumentations=False, **pixels):
        dataset = LoadImagesAndLabels(table, 64, augment=True, hyp={**options, **pixels}, seed=seed)
        dataset.albumentations = albumentations
        return dataset[index].targets

    plain = targets()
    classes = plain[:, 1].tolist()
    assert len(set(classes)) == len(classes) and set(classes) <= set(table.labels(index)[:, 0].tolist())
    assert targets(hsv_h=colours, hsv_s=colours, hsv_v=colours).equal(plain)  # colours move no box
    changed = []
    always = mock.patch.object(augment, "ALBUMENTATIONS", [(name, 1.1) for name, _ in augment.ALBUMENTATIONS])
    negative = mock.patch.object(
        augment, "albumentations_transform", lambda image, name, _: changed.append(name) or 255 - image
    )
    with always, negative:  # stands in for the library, whose transforms here move no pixel
        assert targets(albumentations=True).equal(plain) and len(changed) == len(augment.ALBUMENTATIONS)
    flipped = targets(fliplr=flips, flipud=flips)
    assert flipped[:, [1, 4, 5]].equal(plain[:, [1, 4, 5]])  # classes and sizes
    for column in (2, 3):
        same, turned = flipped[:, column] == plain[:, column], flipped[:, column] == 1 - plain[:, column]
        assert same.all() or turned.all()
