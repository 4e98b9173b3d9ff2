"""Mosaics: placement by hand, tiles drawn in place against a painted canvas, copy-paste on drawn shapes."""

import cv2
import numpy as np
import pytest

from utils.augmentations.mosaic import Tile, canvas_labels, choose_pastes, compose, place_four, place_nine
from utils.augmentations.pixels import AugmentParams
from utils.augmentations.warp import random_matrix, translation

SIZE = 160
NOTHING = np.zeros((0, 5), np.float32)


class Fixed:
    """A generator whose uniform draws are given."""

    def __init__(self, *values):
        self.values = np.array(values)

    def uniform(self, low, high, size):
        assert size == len(self.values) and (low <= self.values).all() and (self.values < high).all()
        return self.values


def smooth_image(seed, height, width):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 9), None, 0, 255, cv2.NORM_MINMAX)


def painted_canvas(tiles, side):
    canvas = np.full((side, side, 3), 114, np.uint8)
    for tile in tiles:
        for y in range(max(tile.y, 0), min(tile.y + tile.image.shape[0], side)):
            left, right = max(tile.x, 0), min(tile.x + tile.image.shape[1], side)
            if right > left:
                canvas[y, left:right] = tile.image[y - tile.y, left - tile.x : right - tile.x]
    return canvas


def seams_of(tiles, side):
    """1 beside the edges of tiles, else 0: where a canvas blends two images, tiles drawn one by one do not."""
    flat = [tile._replace(image=np.full_like(tile.image, number)) for number, tile in enumerate(tiles)]
    return (cv2.morphologyEx(painted_canvas(flat, side), cv2.MORPH_GRADIENT, np.ones((3, 3))).max(axis=2) > 0).astype(
        np.uint8
    )


def tiles_of(place, sizes_hw, seed=3):
    corners = place(sizes_hw, SIZE, np.random.default_rng(seed))
    return [
        Tile(smooth_image(number, h, w), NOTHING, [], x, y)
        for number, ((h, w), (x, y)) in enumerate(zip(sizes_hw, corners, strict=True))
    ]


def warped(tiles, seed, **ranges):
    """A mosaic through a warp that is drawn: its pixels, and the warp's matrix."""
    generator = np.random.default_rng(seed)
    matrix, gain = random_matrix((2 * SIZE,) * 2, (SIZE,) * 2, *AugmentParams(**ranges).warp, generator)
    return compose(tiles, matrix, gain, SIZE, 0.0, generator)[0], matrix


FOUR = [(160, 120), (90, 160), (160, 160), (130, 160)]
NINE = [(160, 120), (90, 160), (160, 100), (130, 160), (160, 160), (120, 160), (160, 90), (140, 160), (160, 110)]


def test_four_tiles_meet_at_the_centre():
    sizes_hw = [(60, 100), (100, 50), (80, 90), (100, 100)]
    corners = place_four(sizes_hw, 100, Fixed(70.9, 120.2))  # y, then x; both truncated
    assert corners == [(20, 10), (120, -30), (30, 70), (120, 70)]


def test_nine_tiles_follow_one_another_clockwise():
    sizes_hw = [(100, 80), (60, 100), (100, 70), (90, 100), (100, 100), (50, 100), (100, 40), (70, 100), (100, 30)]
    corners = place_nine(sizes_hw, 100, Fixed(10.5, 20.5))
    on_canvas = [(x + 20, y + 10) for x, y in corners]
    assert on_canvas == [
        (100, 100),
        (100, 40),
        (200, 0),  # beside the top one, which is 100 wide
        (180, 100),  # beside the centre, which is 80 wide
        (180, 190),  # below the right one, which is 90 high
        (80, 200),  # its right edge below the centre's: 100 + 80 - 100
        (40, 200),  # to the left of the bottom one: 180 - 100 - 40
        (0, 130),  # its lower edge beside the centre's: 100 + 100 - 70
        (70, 30),  # above the left one: 200 - 70 - 100
    ]


@pytest.mark.parametrize(("place", "sizes_hw"), [(place_four, FOUR), (place_nine, NINE)], ids=["four", "nine"])
@pytest.mark.parametrize(
    "ranges",
    [
        {"translate": 0.1, "scale": 0.5},
        {"translate": 0.1, "scale": 0.5, "degrees": 20.0, "shear": 10.0},
        {"translate": 0.1, "scale": 0.5, "degrees": 10.0, "perspective": 0.0008},
    ],
    ids=["upright", "turned", "perspective"],
)
def test_tiles_drawn_in_place_equal_a_painted_and_warped_canvas(place, sizes_hw, ranges):
    for seed in range(4):
        tiles = tiles_of(place, sizes_hw, seed)
        image, matrix = warped(tiles, seed, **ranges)
        canvas = painted_canvas(tiles, 2 * SIZE)
        reference = cv2.warpPerspective(canvas, matrix, (SIZE, SIZE), borderValue=(114, 114, 114))
        difference = np.abs(image.astype(int) - reference).max(axis=2)
        seams = seams_of(tiles, 2 * SIZE)
        near_seam = cv2.warpPerspective(seams, matrix, (SIZE, SIZE), borderValue=1)
        near_seam = cv2.dilate(near_seam, np.ones((3, 3), np.uint8)) > 0
        assert near_seam.mean() < 0.25
        assert difference[~near_seam].max() <= 5 and np.quantile(difference[~near_seam], 0.99) <= 1
        assert difference.mean() < 1.0


@pytest.mark.parametrize("degrees", [0.0, 30.0])
def test_touching_tiles_leave_no_gap(degrees):
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    tiles = [Tile(white, NOTHING, [], x, y) for x, y in ((0, 0), (SIZE, 0), (0, SIZE), (SIZE, SIZE))]
    for seed in range(10):
        image, _ = warped(tiles, seed, degrees=degrees, scale=0.2, translate=0.1)
        assert (image[40:-40, 40:-40] == 255).all()


def test_without_ranges_the_middle_of_the_canvas_is_the_image():
    tiles = tiles_of(place_four, FOUR)
    image, _ = warped(tiles, 0)
    half = SIZE // 2
    assert np.array_equal(image, painted_canvas(tiles, 2 * SIZE)[half:-half, half:-half])


def test_labels_move_with_their_tiles_and_are_clipped_to_the_canvas():
    image = np.zeros((50, 100, 3), np.uint8)
    polygon = np.float32([[10, 10], [60, 10], [60, 40]])
    first, second = np.float32([[3, 10, 10, 60, 40]]), np.float32([[5, 0, 0, 100, 50]])
    labels, segments = canvas_labels([Tile(image, first, [polygon], -20, 30), Tile(image, second, [], 150, 170)], 200)
    assert labels.tolist() == [[3, 0, 40, 40, 70], [5, 150, 170, 200, 200]]
    assert segments[0].tolist() == [[0, 40], [40, 40], [40, 70]] and segments[1].shape == (0, 2)
    assert first.tolist() == [[3, 10, 10, 60, 40]]  # the data set's own are left


def test_only_objects_whose_mirror_image_hides_little_are_pasted():
    labels = np.float32(
        [
            [0, 10, 10, 50, 50],  # mirrored to 150..190: hides half of the next
            [1, 170, 10, 210, 50],  # mirrored to -10..30: hides half of the first
            [2, 20, 100, 60, 140],  # mirrored to 140..180: free
            [3, 0, 190, 0, 200],  # nothing of it is on the canvas
        ]
    )
    polygon, none = np.ones((4, 2), np.float32), np.zeros((0, 2), np.float32)

    def chosen(labels, segments, width, probability):
        return choose_pastes(labels, segments, width, probability, np.random.default_rng(0))

    assert chosen(labels, [polygon] * 4, 200, 1.0) == [2]
    assert chosen(labels, [], 200, 1.0) == []
    assert chosen(labels, [none, none, polygon, none], 200, 0.5) == []  # round(0.5 * 1) is 0
    beside = np.float32([[0, 10, 10, 50, 50], [1, 12, 10, 52, 50]])
    assert len(chosen(beside, [polygon] * 2, 400, 1.0)) == 1  # pasted ones do not hide one another


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_copy_paste_equals_pasting_on_the_painted_canvas(scale):
    side = 2 * SIZE
    photo = smooth_image(1, SIZE, SIZE)
    triangle = np.float32([[70, 90], [150, 100], [110, 150]])
    cv2.fillPoly(photo, [triangle.astype(np.int32)], (250, 20, 20))
    labels = np.float32([[7, *triangle.min(axis=0), *triangle.max(axis=0)]])
    tile, other = Tile(photo, labels, [triangle], 0, 60), Tile(smooth_image(2, SIZE, SIZE), NOTHING, [], SIZE, 60)
    matrix = translation(SIZE / 2, SIZE / 2) @ np.diag([scale, scale, 1]) @ translation(-SIZE, -SIZE)

    image, kept = compose([tile, other], matrix, scale, SIZE, 1.0, np.random.default_rng(0))

    canvas = painted_canvas([tile, other], side)
    mask = np.zeros((side, side), np.uint8)
    cv2.fillPoly(mask, [(triangle + [0, 60]).astype(np.int32)], 1)
    pasted = np.where(mask[:, ::-1, None] > 0, canvas[:, ::-1], canvas)
    reference = cv2.warpPerspective(pasted, matrix, (SIZE, SIZE), borderValue=(114, 114, 114))
    difference = np.abs(image.astype(int) - reference).max(axis=2)
    assert (difference > 12).mean() < 0.02  # the polygon's outline, to a pixel
    red = (image[..., 0] > 200) & (image[..., 1] < 60)
    x = np.nonzero(red.any(axis=0))[0]
    assert (x < SIZE / 2).any() and (x >= SIZE / 2).any()

    assert kept[:, 0].tolist() == [7, 7]
    y_px, x_px = np.nonzero(red & (np.arange(SIZE) >= SIZE / 2))
    assert np.abs(kept[1, 1:] - [x_px.min(), y_px.min(), x_px.max() + 1, y_px.max() + 1]).max() <= 2.5
