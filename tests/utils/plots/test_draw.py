"""Boxes, labels, crops and mosaics: colours, places and sizes worked out by hand; labels never leave the picture."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import UserError
from utils.media.counting import Counts, Tally
from utils.plots import boxes as draw
from utils.plots.boxes import Annotation

SIDE = 200
NOTHING = np.zeros((0, 6), np.float32)


def blank(height: int = SIDE, width: int = SIDE, value: int = 114) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_palette_is_yolov5s_in_both_channel_orders_and_repeats_after_20():
    assert draw.color(0) == (0x38, 0x38, 0xFF)
    assert draw.color(4, bgr=False) == (0xCF, 0xD2, 0x31)
    assert draw.color(23) == draw.color(3)
    assert len({draw.color(class_id) for class_id in range(20)}) == 20


def test_text_is_black_on_light_grounds_and_white_on_dark_ones():
    assert draw.text_color((255, 255, 255)) == draw.BLACK
    assert draw.text_color(draw.color(4)) == draw.BLACK  # yellow
    assert draw.text_color(draw.color(14)) == draw.WHITE  # dark blue


def label_pixels(box_xyxy, label="class name 0.87", picture=None):
    """Draws a label in white on an odd ground; returns how many pixels of pure ground and pure text there are."""
    picture = blank() if picture is None else picture
    ground = (120, 10, 60)
    draw.annotate(picture, [Annotation(box_xyxy, label, ground)], line_width=1, font_px=14)
    return int((picture == ground).all(2).sum()), int((picture > 250).all(2).sum())


@pytest.mark.parametrize("box", [(0, 0, 60, 60), (150, 0, 199, 60), (190, 190, 199, 199), (0, 100, 8, 199)])
def test_label_at_an_edge_shows_every_pixel_that_it_shows_in_the_middle(box):
    _, text_in_the_middle = label_pixels((40, 80, 160, 160))
    assert label_pixels(box)[1] == text_in_the_middle > 20


box_sides = st.integers(-20, SIDE + 20)


@settings(max_examples=60, deadline=None)
@given(box_sides, box_sides, box_sides, box_sides, st.integers(5, 2 * SIDE), st.integers(1, 12))
def test_labels_are_placed_inside_whatever_the_box(x1, y1, x2, y2, label_w, line_width):
    label_w = min(label_w, SIDE)
    nothing = np.zeros((0, 4), np.float32)
    x, y = draw._place_label((x1, y1, x2, y2), (label_w, 20), (SIDE, SIDE), line_width, nothing)
    assert 0 <= x <= SIDE - label_w
    assert 0 <= y <= SIDE - 20


def test_labels_of_equal_boxes_do_not_cover_each_other():
    placed = np.zeros((0, 4), np.float32)
    covered = np.zeros((SIDE, SIDE), int)
    for _ in range(4):
        x, y = draw._place_label((60, 80, 140, 140), (70, 16), (SIDE, SIDE), 2, placed)
        placed = np.concatenate([placed, [(x, y, x + 70, y + 16)]], dtype=np.float32)
        covered[y : y + 16, x : x + 70] += 1
    assert covered.max() == 1


def test_label_wider_than_the_picture_is_shortened_not_cut():
    picture = blank(60, 80)
    draw.annotate(
        picture, [Annotation((10, 30, 70, 55), "a name far too long for this picture", draw.color(14))], 1, 20
    )
    assert (picture[:, -2:] != (255, 255, 255)).any(2).all()  # no glyph runs into the border


def test_chinese_names_are_drawn_and_differ_from_one_another_and_from_question_marks():
    pictures = [blank() for _ in range(3)]
    for picture, name in zip(pictures, ("汽车", "行人", "??"), strict=True):
        draw.annotate(picture, [Annotation((20, 80, 160, 160), name, draw.color(14))], 2, 20)
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_hidden_labels_leave_only_the_outline():
    picture = draw.draw_detections(blank(), np.array([[50, 60, 150, 160, 0.9, 0]]), {0: "x"}, 1, hide_labels=True)
    inside_and_above = [picture[62:158, 52:148], picture[:57]]
    assert all((part == 114).all() for part in inside_and_above)
    assert (picture[60, 60:140] == draw.color(0)).all()


def test_confidence_is_shown_with_two_digits_and_can_be_hidden():
    detections = np.array([[0, 0, 9, 9, 0.876, 1], [0, 0, 9, 9, 0.5, 7]])
    assert draw.detection_labels(detections, ["a", "b"]) == ["b 0.88", "7 0.50"]
    assert draw.detection_labels(detections, {1: "b"}, hide_conf=True) == ["b", "7"]


def test_track_stands_before_the_name_and_gives_the_colour():
    tracked = np.array(
        [[50, 60, 90, 100, 0.876, 1, 3], [110, 60, 150, 100, 0.5, 1, -1], [110, 120, 150, 160, 0.5, 1, 23]]
    )
    assert draw.detection_labels(tracked, ["a", "b"]) == ["id:3 b 0.88", "b 0.50", "id:23 b 0.50"]
    assert draw.detection_labels(tracked[:1], ["a", "b"], hide_conf=True) == ["id:3 b"]
    picture = draw.draw_detections(blank(), tracked, ["a", "b"], 1, hide_labels=True)
    assert tuple(picture[60, 70]) == draw.color(3) == tuple(picture[120, 130]) != draw.color(1)
    assert tuple(picture[60, 130]) == draw.GRAY


def with_counts(points, detections=NOTHING, height=SIDE, width=SIDE):
    """Draws a line or zone with one crossing of class x and nothing else but the detections."""
    counts = Counts(tuple(points), (Tally(0, 1, 0),))
    return draw.draw_detections(blank(height, width), detections, {0: "x"}, counts=counts)


def yellow(picture):
    return (picture == draw.COUNTING_COLOR).all(2)


def test_line_is_drawn_with_an_arrow_to_the_side_that_is_in():
    down, up = with_counts([(20, 100), (180, 100)]), with_counts([(180, 100), (20, 100)])
    assert yellow(down)[100, 20:181].all()
    assert yellow(up)[100, 20:181].all()
    assert yellow(down)[105:125].any() and not yellow(down)[:95].any()  # right of a line to the right is below
    assert yellow(up)[75:95].any() and not yellow(up)[105:].any()
    assert (down[126:150, 80:120] == draw.WHITE).all(2).any()  # "in"


@pytest.mark.parametrize("points", [[(20, 199), (180, 199)][::-1], [(20, 199), (180, 199)], [(199, 180), (199, 60)]])
def test_arrow_s_word_stays_in_the_picture(points):
    zone = with_counts([(0, 60), (50, 60), (50, 120)])  # has no word, only the numbers at the top
    assert not (zone[40:] == draw.WHITE).all(2).any()
    assert (with_counts(points)[40:] == draw.WHITE).all(2).any()


def test_zone_is_drawn_closed():
    picture = yellow(with_counts([(40, 80), (160, 80), (160, 160), (40, 160)]))
    assert picture[80, 40:161].all() and picture[160, 40:161].all() and picture[80:161, 40].all()
    assert not picture[90:150, 50:150].any()


def test_labels_keep_off_the_numbers_and_boxes_do_not_strike_them():
    box = np.array([[2, 2, 150, 150, 0.9, 0]])
    plain, crowded = (with_counts([(20, 190), (180, 190)], found) for found in (NOTHING, box))
    panel = (plain[:60] == draw.WHITE).all(2)
    assert panel.any()
    assert (crowded[:60][panel] == draw.WHITE).all()


@pytest.mark.parametrize("height, width", [(1, 1), (8, 300), (300, 8), (40, 60)])
def test_numbers_are_drawn_on_pictures_of_any_size(height, width):
    for points in ([(0, 0), (width, height)], [(1e6, 0), (0, 1e6)], [(0, 0), (1e6, 0), (0, 1e6)]):
        assert with_counts(points, height=height, width=width).shape == (height, width, 3)


def test_crop_is_2_percent_and_10_px_larger_and_clipped():
    image = np.arange(100 * 120 * 3, dtype=np.uint32).reshape(100, 120, 3)
    # 40 x 40 at (30, 40): sides 40 * 1.02 + 10 = 50.8, from 4.6 to 55.4 and from 14.6 to 65.4, cut to whole px
    np.testing.assert_array_equal(draw.crop_box(image, (10, 20, 50, 60)), image[14:65, 4:55])
    np.testing.assert_array_equal(draw.crop_box(image, (100, 80, 120, 100)), image[74:100, 94:120])
    assert draw.crop_box(image, (120, 100, 120, 100)).size > 0


def mosaic_batch():
    """Three 40 x 60 images, one colour each (RGB), without labels."""
    images = np.zeros((3, 3, 40, 60), np.uint8)
    images[0, 0], images[1, 1], images[2, 2] = 255, 255, 255
    return images


def test_mosaic_is_filled_column_by_column_on_white():
    mosaic = draw.draw_batch(mosaic_batch(), np.zeros((0, 6), np.float32), None, ["x"])
    assert mosaic.shape == (80, 120, 3)
    middles = [mosaic[20, 30], mosaic[60, 30], mosaic[20, 90], mosaic[60, 90]]
    assert [tuple(middle) for middle in middles] == [(0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255)]


def test_mosaic_is_the_same_for_arrays_tensors_and_floats_and_is_scaled_to_the_limit():
    images, labels = mosaic_batch(), np.array([[1, 0, 0.5, 0.5, 0.5, 0.5]], np.float32)
    expected = draw.draw_batch(images, labels, ["a.jpg", "b.jpg", "c.jpg"], ["x"])
    for kind in (torch.from_numpy(images), torch.from_numpy(images).float() / 255):
        same = draw.draw_batch(kind, torch.from_numpy(labels), ["a.jpg", "b.jpg", "c.jpg"], ["x"])
        np.testing.assert_array_equal(same, expected)
    assert draw.draw_batch(images, labels, None, ["x"], max_side=60).shape == (40, 60, 3)


def test_mosaic_draws_labels_in_their_own_tile_and_only_confident_detections():
    images = np.full((2, 3, 100, 100), 40, np.uint8)
    bare = draw.draw_batch(images, np.zeros((0, 6), np.float32), None, ["x"])
    labels = draw.draw_batch(images, np.array([[1, 0, 0.5, 0.5, 0.6, 0.6]], np.float32), None, ["x"])
    tile = labels[100:200, :100]
    assert (labels[:100] == bare[:100]).all()
    assert tuple(tile[20, 50]) == draw.color(0)  # the box's upper side: 50 - 30
    below, above = np.array([[20, 20, 80, 80, 0.25, 0]]), np.array([[20, 20, 80, 80, 0.26, 0]])
    np.testing.assert_array_equal(draw.draw_batch(images, [below, below], None, ["x"]), bare)
    assert (draw.draw_batch(images, [above, above], None, ["x"]) != bare).any()


def test_mosaic_shows_at_most_so_many_images():
    images = np.zeros((9, 3, 32, 32), np.uint8)
    assert draw.draw_batch(images, np.zeros((0, 6), np.float32), None, ["x"], max_images=4).shape == (64, 64, 3)


def test_file_name_stands_in_the_tile_and_labels_keep_off_it():
    images = np.full((1, 3, 300, 300), 128, np.uint8)
    named = draw.draw_batch(images, np.zeros((0, 6), np.float32), ["folder/picture.jpg"], ["x"])
    assert (named[1:10, 1:60] != 128).any()
    both = draw.draw_batch(images, [np.array([[0, 0, 280, 280, 0.9, 0]])], ["folder/picture.jpg"], ["x"])
    np.testing.assert_array_equal(both[4:8, 4:60], named[4:8, 4:60])


def test_pictures_are_saved_and_what_prevents_it_is_said(tmp_path):
    draw.save_image(tmp_path / "图片.png", blank())
    assert (tmp_path / "图片.png").stat().st_size > 0
    with pytest.raises(UserError, match="picture.xyz: pictures cannot be written in this format"):
        draw.save_image(tmp_path / "picture.xyz", blank())
    with pytest.raises(UserError, match=r"a\.jpg: cannot be written"):
        draw.save_image(tmp_path / "missing" / "a.jpg", blank())


def test_feature_grid_has_the_cells_that_were_asked_for():
    maps = np.random.default_rng(0).normal(size=(40, 10, 20)).astype(np.float32)
    maps[3] = np.nan
    assert draw.feature_grid(maps).shape == (4 * (80 + 4) + 4, 8 * (160 + 4) + 4, 3)
    assert draw.feature_grid(maps[:3]).shape == (80 + 8, 3 * 164 + 4, 3)
