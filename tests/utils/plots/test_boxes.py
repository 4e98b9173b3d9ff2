"""Boxes, labels, crops and mosaics by YOLOv5's names: colours, places and sizes worked out by hand."""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from utils import plots
from utils.boxes import Detections
from utils.errors import UserError
from utils.media.counting import Counts, Tally
from utils.plots import Annotator, boxes, colors, output_to_target, plot_images, save_one_box
from utils.plots.boxes import Annotation, draw_text

SIDE = 200
NO_TARGETS = np.zeros((0, 6), np.float32)
DARK_BLUE = colors(14, bgr=True)


def detections(*rows: list) -> Detections:
    return Detections.from_rows(np.array(rows, np.float32).reshape(len(rows), -1 if rows else 6))


def blank(height: int = SIDE, width: int = SIDE, value: int = 114) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_palette_is_yolov5s_in_both_channel_orders_and_repeats_after_20():
    assert colors(0) == (0xFF, 0x38, 0x38) and colors(4, bgr=True) == (0x31, 0xD2, 0xCF)
    assert colors(torch.tensor(21.0), True) == colors(1, True) == (0x97, 0x9D, 0xFF)
    assert plots.Colors.hex2rgb("#48F90A") == (72, 249, 10) and colors.n == len(set(colors.palette)) == 20


def test_text_is_black_on_light_grounds_and_white_on_dark_ones():
    assert boxes.readable_on((255, 255, 255)) == boxes.BLACK
    assert boxes.readable_on(colors(4, bgr=True)) == boxes.BLACK  # yellow
    assert boxes.readable_on(DARK_BLUE) == boxes.WHITE


def label_pixels(box_xyxy):
    """Draws a label in white on a dark ground; returns how many pixels of pure text there are."""
    image = Annotator(blank(), line_width=1, font_size=14).annotate([Annotation(box_xyxy, "class 0.87", (120, 10, 60))])
    return int((image > 250).all(2).sum())


@pytest.mark.parametrize("box", [(0, 0, 60, 60), (150, 0, 199, 60), (190, 190, 199, 199), (0, 100, 8, 199)])
def test_label_at_an_edge_shows_every_pixel_that_it_shows_in_the_middle(box):
    assert label_pixels(box) == label_pixels((40, 80, 160, 160)) > 20


box_sides = st.integers(-20, SIDE + 20)


@settings(max_examples=60, deadline=None)
@given(box_sides, box_sides, box_sides, box_sides, st.integers(5, 2 * SIDE), st.integers(1, 12))
def test_labels_are_placed_inside_whatever_the_box(x1, y1, x2, y2, label_w, line_width):
    label_w = min(label_w, SIDE)
    nothing = np.zeros((0, 4), np.float32)
    x, y = boxes._place_label((x1, y1, x2, y2), (label_w, 20), (SIDE, SIDE), line_width, nothing)
    assert 0 <= x <= SIDE - label_w
    assert 0 <= y <= SIDE - 20


def test_labels_of_equal_boxes_do_not_cover_each_other():
    placed = np.zeros((0, 4), np.float32)
    covered = np.zeros((SIDE, SIDE), int)
    for _ in range(4):
        x, y = boxes._place_label((60, 80, 140, 140), (70, 16), (SIDE, SIDE), 2, placed)
        placed = np.concatenate([placed, [(x, y, x + 70, y + 16)]], dtype=np.float32)
        covered[y : y + 16, x : x + 70] += 1
    assert covered.max() == 1


def test_label_wider_than_the_image_is_shortened_not_cut():
    image = blank(60, 80)
    Annotator(image, 1, 20).annotate([Annotation((10, 30, 70, 55), "a name far too long for this image", DARK_BLUE)])
    assert (image[:, -2:] != (255, 255, 255)).any(2).all()  # no glyph runs into the border


def test_chinese_names_are_drawn_and_differ_from_one_another_and_from_question_marks():
    car, walker, unknown = (
        Annotator(blank(), 2, 20).annotate([Annotation((20, 80, 160, 160), name, DARK_BLUE)])
        for name in ("汽车", "行人", "??")
    )
    assert not np.array_equal(car, walker)
    assert not np.array_equal(car, unknown)


def test_annotator_draws_in_place():
    image = blank(100, 120, 50)
    annotator = Annotator(image, line_width=2, example="cat")
    annotator.box_label([torch.tensor(value) for value in (20.0, 40, 80, 90)], "cat 0.50", color=(0, 0, 255))
    assert annotator.result() is image and image[65, 20].tolist() == [0, 0, 255]
    assert (image[20:38, 20:60] == (0, 0, 255)).all(axis=2).any()  # the label's ground, above the box
    assert image[65, 50].tolist() == [50, 50, 50]


@pytest.mark.parametrize(("top", "rows"), [(40, slice(20, 40)), (4, slice(6, 25))], ids=["above", "no room: inside"])
def test_annotator_honours_the_colour_of_text(top, rows):
    image = blank(100, 120, 50)
    Annotator(image, 2, 12).box_label((20, top, 80, 90), "cat", (0, 0, 255), txt_color=(0, 255, 0))
    assert (image[rows, 22:60, 1] > 200).any()


def test_annotator_draws_shapes_and_text():
    image = blank(100, 120, 50)
    annotator = Annotator(Image.fromarray(image))
    annotator.rectangle((10, 10, 20, 20), fill=(1, 2, 3))
    annotator.rectangle((40, 40, 60, 60), outline=(9, 9, 9), width=1)
    annotator.text((70, 70), "文字 text", txt_color=(255, 255, 255))
    drawn = annotator.result()
    assert drawn[15, 15].tolist() == [1, 2, 3] and drawn[40, 50].tolist() == [9, 9, 9] and drawn[50, 50, 0] == 50
    assert (drawn[70:95, 70:] > 150).any() and (image == 50).all()
    with pytest.raises(UserError, match="ascontiguousarray"):
        Annotator(image[..., ::-1])


def test_hidden_labels_leave_only_the_outline():
    image = boxes.draw_detections(blank(), detections([50, 60, 150, 160, 0.9, 0]), {0: "x"}, 1, hide_labels=True)
    inside_and_above = [image[62:158, 52:148], image[:57]]
    assert all((part == 114).all() for part in inside_and_above)
    assert (image[60, 60:140] == colors(0, bgr=True)).all()


def test_confidence_is_shown_with_two_digits_and_can_be_hidden():
    found = detections([0, 0, 9, 9, 0.876, 1], [0, 0, 9, 9, 0.5, 7])
    assert boxes.detection_labels(found, ["a", "b"]) == ["b 0.88", "7 0.50"]
    assert boxes.detection_labels(found, {1: "b"}, hide_conf=True) == ["b", "7"]


def test_track_stands_before_the_name_and_gives_the_colour():
    tracked = detections(
        [50, 60, 90, 100, 0.876, 1, 3], [110, 60, 150, 100, 0.5, 1, -1], [110, 120, 150, 160, 0.5, 1, 23]
    )
    assert boxes.detection_labels(tracked, ["a", "b"]) == ["id:3 b 0.88", "b 0.50", "id:23 b 0.50"]
    assert boxes.detection_labels(tracked[:1], ["a", "b"], hide_conf=True) == ["id:3 b"]
    image = boxes.draw_detections(blank(), tracked, ["a", "b"], 1, hide_labels=True)
    assert tuple(image[60, 70]) == colors(3, bgr=True) == tuple(image[120, 130]) != colors(1, bgr=True)
    assert tuple(image[60, 130]) == boxes.NO_TRACK_COLOR


def with_counts(points, found=None, height=SIDE, width=SIDE):
    """Draws a line or zone with one crossing of class x and nothing else but the detections."""
    counts = [Counts(tuple(points), (Tally(0, 1, 0),))]
    return boxes.draw_detections(blank(height, width), found or detections(), {0: "x"}, counts=counts)


def yellow(image):
    return (image == boxes.COUNTING_COLOR).all(2)


def test_line_is_drawn_with_an_arrow_to_the_side_that_is_in():
    down, up = with_counts([(20, 100), (180, 100)]), with_counts([(180, 100), (20, 100)])
    assert yellow(down)[100, 20:181].all()
    assert yellow(up)[100, 20:181].all()
    assert yellow(down)[105:125].any() and not yellow(down)[:95].any()  # right of a line to the right is below
    assert yellow(up)[75:95].any() and not yellow(up)[105:].any()
    assert (down[126:150, 80:120] == boxes.WHITE).all(2).any()  # "in"


@pytest.mark.parametrize("points", [[(20, 199), (180, 199)][::-1], [(20, 199), (180, 199)], [(199, 180), (199, 60)]])
def test_arrow_s_word_stays_in_the_picture(points):
    zone = with_counts([(0, 60), (50, 60), (50, 120)])  # has no word, only the numbers at the top
    assert not (zone[40:] == boxes.WHITE).all(2).any()
    assert (with_counts(points)[40:] == boxes.WHITE).all(2).any()


def test_several_lines_and_zones_are_drawn_with_their_names():
    zone, line = ((120, 120), (180, 120), (180, 180)), ((20, 150), (100, 150))
    counted = [Counts(zone, (Tally(0, 1, 1, 2.0, 2.0),), "door"), Counts(line, (), "gate")]
    image = boxes.draw_detections(blank(), detections(), {0: "x"}, counts=counted)
    assert yellow(image)[120, 125:178].any() and yellow(image)[150, 20:101].all()
    only = boxes.draw_detections(blank(), detections(), {0: "x"}, counts=counted[1:])
    rows = [(drawn[:110, :110] == boxes.WHITE).all(2).any(1).sum() for drawn in (image, only)]
    assert rows[0] > rows[1] > 0  # five lines of numbers, and two


def test_zone_is_drawn_closed():
    image = yellow(with_counts([(40, 80), (160, 80), (160, 160), (40, 160)]))
    assert image[80, 40:161].all() and image[160, 40:161].all() and image[80:161, 40].all()
    assert not image[90:150, 50:150].any()


def test_labels_keep_off_the_numbers_and_boxes_do_not_strike_them():
    box = detections([2, 2, 150, 150, 0.9, 0])
    plain, crowded = (with_counts([(20, 190), (180, 190)], found) for found in (None, box))
    panel = (plain[:60] == boxes.WHITE).all(2)
    assert panel.any()
    assert (crowded[:60][panel] == boxes.WHITE).all()


@pytest.mark.parametrize("height, width", [(1, 1), (8, 300), (300, 8), (40, 60)])
def test_numbers_are_drawn_on_images_of_any_size(height, width):
    for points in ([(0, 0), (width, height)], [(1e6, 0), (0, 1e6)], [(0, 0), (1e6, 0), (0, 1e6)]):
        assert with_counts(points, height=height, width=width).shape == (height, width, 3)


def test_crop_is_2_percent_and_10_px_larger_and_clipped():
    image = np.arange(100 * 120 * 3, dtype=np.uint32).reshape(100, 120, 3)

    def crop(*box):
        return save_one_box(box, image, BGR=True, save=False)

    # 40 x 40 at (30, 40): sides 40 * 1.02 + 10 = 50.8, from 4.6 to 55.4 and from 14.6 to 65.4, cut to whole px
    np.testing.assert_array_equal(crop(10, 20, 50, 60), image[14:65, 4:55])
    np.testing.assert_array_equal(crop(100, 80, 120, 100), image[74:100, 94:120])
    assert crop(120, 100, 120, 100).size > 0
    square = save_one_box([40, 40, 60, 50], image, gain=1, pad=0, square=True, BGR=True, save=False)
    np.testing.assert_array_equal(square, image[35:55, 40:60])


def test_crops_are_saved_under_numbers_and_turned_to_bgr(tmp_path):
    image = blank(100, 120, 50)
    image[..., 0] = 200
    for _ in range(2):
        crop = save_one_box(torch.tensor([[40.0, 40, 60, 50]]), image, file=tmp_path / "crops" / "cat" / "a.png")
    assert crop.shape == (21, 31, 3) and crop[0, 0].tolist() == [50, 50, 200]
    assert sorted(path.name for path in (tmp_path / "crops" / "cat").iterdir()) == ["a.jpg", "a2.jpg"]
    assert cv2.imread(str(tmp_path / "crops" / "cat" / "a.jpg"))[5, 5, 2] > 190


def mosaic_batch():
    """Three 40 x 60 images, one colour each (RGB), without labels."""
    images = np.zeros((3, 3, 40, 60), np.uint8)
    images[0, 0], images[1, 1], images[2, 2] = 255, 255, 255
    return images


def test_mosaic_is_filled_column_by_column_on_white():
    mosaic = plot_images(mosaic_batch(), NO_TARGETS, None, None)
    assert mosaic.shape == (80, 120, 3)
    middles = [mosaic[20, 30], mosaic[60, 30], mosaic[20, 90], mosaic[60, 90]]
    assert [tuple(middle) for middle in middles] == [(0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255)]


def test_mosaic_is_the_same_for_arrays_tensors_and_floats_and_is_scaled_to_the_limit():
    images, labels = mosaic_batch(), np.array([[1, 0, 0.5, 0.5, 0.5, 0.5]], np.float32)
    expected = plot_images(images, labels, ["a.jpg", "b.jpg", "c.jpg"], None, ["x"])
    for kind in (torch.from_numpy(images), torch.from_numpy(images).float() / 255):
        same = plot_images(kind, torch.from_numpy(labels), ["a.jpg", "b.jpg", "c.jpg"], None, {0: "x"})
        np.testing.assert_array_equal(same, expected)
    assert plot_images(images, labels, None, None, max_size=60).shape == (40, 60, 3)


def test_mosaic_draws_labels_in_their_own_tile_and_only_confident_detections(tmp_path):
    images = np.full((2, 3, 100, 100), 40, np.uint8)
    bare = plot_images(images, NO_TARGETS, None, None)
    plot_images(images, np.array([[1, 0, 0.5, 0.5, 0.6, 0.6]], np.float32), None, tmp_path / "labels.png", ["x"])
    labels = cv2.imread(str(tmp_path / "labels.png"))
    assert (labels[:100] == bare[:100]).all()
    assert tuple(labels[120, 50]) == colors(0, bgr=True)  # the box's upper side: 50 - 30
    for confidence, is_drawn in ((0.25, False), (0.26, True)):
        found = output_to_target([torch.zeros(0, 6), torch.tensor([[20.0, 20, 80, 80, confidence, 1]])])
        np.testing.assert_allclose(found, [[1, 1, 50, 50, 60, 60, confidence]])
        mosaic = plot_images(images, found, None, None, ["x"])
        assert (tuple(mosaic[120, 50]) == colors(1, bgr=True)) is is_drawn
        assert np.array_equal(mosaic, bare) is not is_drawn


def test_mosaic_shows_at_most_so_many_images():
    images = np.zeros((9, 3, 32, 32), np.uint8)
    assert plot_images(images, NO_TARGETS, None, None, max_subplots=4).shape == (64, 64, 3)


def test_file_name_stands_in_the_tile_and_labels_keep_off_it():
    images = np.full((1, 3, 300, 300), 128, np.uint8)
    named = plot_images(images, NO_TARGETS, ["folder/image.jpg"], None)
    assert (named[1:10, 1:60] != 128).any()
    both = plot_images(images, np.array([[0, 0, 0.46, 0.46, 0.93, 0.93]]), ["folder/image.jpg"], None, ["x"])
    np.testing.assert_array_equal(both[4:8, 4:60], named[4:8, 4:60])


def test_images_are_saved_and_what_prevents_it_is_said(tmp_path):
    boxes.save_image(tmp_path / "图片.png", blank())
    assert (tmp_path / "图片.png").stat().st_size > 0
    with pytest.raises(UserError, match="image.xyz: images cannot be written in this format"):
        boxes.save_image(tmp_path / "image.xyz", blank())
    with pytest.raises(UserError, match=r"a\.jpg: cannot be written"):
        boxes.save_image(tmp_path / "missing" / "a.jpg", blank())


def test_feature_grid_has_the_cells_that_were_asked_for():
    maps = np.random.default_rng(0).normal(size=(40, 10, 20)).astype(np.float32)
    maps[3] = np.nan
    assert boxes.feature_grid(maps).shape == (4 * (80 + 4) + 4, 8 * (160 + 4) + 4, 3)
    assert boxes.feature_grid(maps[:3]).shape == (80 + 8, 3 * 164 + 4, 3)


def test_features_are_saved(tmp_path):
    maps = torch.rand(1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    plots.feature_visualization(maps, "models.common.C3", 4, n=3, save_dir=tmp_path)
    plots.feature_visualization(maps, "models.yolo.Detect", 24, save_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage4_C3_features.npy", "stage4_C3_features.png"]
    assert np.array_equal(np.load(tmp_path / "stage4_C3_features.npy"), maps.numpy())


def test_text_of_other_fonts_is_rendered_once_and_blended_wherever_it_stands(monkeypatch):
    """As Pillow draws it into the whole image, beyond its edges too."""
    path = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    monkeypatch.setattr(boxes, "_font_for", lambda text: path)
    boxes._rendered.cache_clear()
    ground = np.random.default_rng(0).integers(0, 256, (40, 90, 3)).astype(np.uint8)
    for left, baseline in ((10, 30), (-12, 25), (70, 20), (5, 3), (20, 45), (200, 20)):
        drawn, mask = ground.copy(), Image.new("L", (90, 40))
        draw_text(drawn, "ქარგი", left, baseline, 18, (10, 200, 30))
        ImageDraw.Draw(mask).text((left, baseline), "ქარგი", 255, ImageFont.truetype(path, 18), anchor="ls")
        alpha = np.asarray(mask)[..., None] / 255
        expected = np.rint(ground * (1 - alpha) + np.array((10, 200, 30)) * alpha)
        assert np.abs(drawn - expected).max() <= 1
        assert (drawn != ground).any() == (left < 90)
    assert boxes._rendered.cache_info().misses == 1
