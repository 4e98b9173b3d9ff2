"""Label rules, the scan, and the messages that stop a run."""

import logging
import multiprocessing
import os
import pickle
import re

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.dataloaders import labels as labels_module
from utils.dataloaders.config import DataSpec, load_spec
from utils.dataloaders.labels import PathList, load_labels, read_label_file, scan_images
from utils.dataloaders.paths import list_images
from utils.errors import UserError
from utils.process import process_map


def make_image(path, width=32, height=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), noise)
    return path


def make_set(root, labels):
    """Writes one image per entry; a label of None is a missing file."""
    for index, text in enumerate(labels):
        make_image(root / "images" / f"{index:03}.jpg")
        if text is not None:
            (root / "labels").mkdir(exist_ok=True)
            (root / "labels" / f"{index:03}.txt").write_text(text)
    return root / "images"


def spec_of(nc, root):
    return DataSpec(root / "data.yaml", root, (), (), (), {index: str(index) for index in range(nc)})


def read(tmp_path, text, mode="w"):
    path = tmp_path / "labels.txt"
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    return read_label_file(path)


def test_box_and_polygon_rows_are_told_apart_line_by_line(tmp_path):
    parsed = read(tmp_path, "0 0.5 0.5 0.2 0.4\n\n2 0.1 0.2 0.5 0.2 0.3 0.8\n1 0 0 1 0 1 1 0 1\n")
    expected = [[0, 0.5, 0.5, 0.2, 0.4], [2, 0.3, 0.5, 0.4, 0.6], [1, 0.5, 0.5, 1, 1]]
    np.testing.assert_allclose(parsed.rows, expected, atol=1e-6)
    assert [len(polygon) for polygon in parsed.polygons] == [0, 3, 4]
    np.testing.assert_allclose(parsed.polygons[1], [[0.1, 0.2], [0.5, 0.2], [0.3, 0.8]], atol=1e-6)
    assert not parsed.problems and parsed.rows.dtype == np.float32


def test_repeated_rows_are_dropped_with_their_polygons_and_the_order_stays(tmp_path):
    text = "3 0.9 0.9 0.1 0.1\n1 0 0 1 0 1 1\n0 0.2 0.2 0.1 0.1\n1 0 0 1 0 1 1\n3 0.9 0.9 0.1 0.1\n"
    parsed = read(tmp_path, text)
    assert parsed.rows[:, 0].tolist() == [3, 1, 0] and parsed.duplicates == 2
    assert [len(polygon) for polygon in parsed.polygons] == [0, 3, 0]


def test_further_bad_lines_are_counted(tmp_path):
    images = make_set(tmp_path, ["0 1 1 1\n0 2 2 2 2\n", "9\n"])
    with pytest.raises(UserError, match=r"000\.txt, line 1: .* 3 such lines in 2 file\(s\)"):
        load_labels([images])


def test_rounding_beyond_the_edges_is_clipped(tmp_path):
    parsed = read(tmp_path, "0 1.0000001 -0.00005 0.5 1.00009\n")
    assert not parsed.problems
    assert parsed.rows[0].tolist() == [0, 1, 0, 0.5, 1]
    assert read(tmp_path, "0 1.0002 0.5 0.5 0.5").problems


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    parsed = read(tmp_path, b"\xef\xbb\xbf0 0.5 0.5 0.1 0.1\r\n1 0.5 0.5 0.2 0.2\r\n")
    assert parsed.rows[:, 0].tolist() == [0, 1] and not parsed.problems


@given(st.binary(max_size=200), st.sampled_from([None, (0, 2), (1, 2)]))
def test_no_bytes_make_the_reader_fail_or_pass_a_bad_number(tmp_path_factory, content, kpt_shape):
    path = tmp_path_factory.mktemp("labels") / "any.txt"
    path.write_bytes(content)
    parsed = read_label_file(path, kpt_shape)
    assert np.isfinite(parsed.rows).all() and len(parsed.rows) == len(parsed.polygons)
    assert not len(parsed.rows) or (parsed.rows[:, 1:].min() >= 0 and parsed.rows[:, 1:].max() <= 1)


def poses(keypoints, each, rows=6):
    """Label lines of boxes with keypoints within them, about a fifth not labelled, and the boxes (n, 5)."""
    generator = np.random.default_rng(0)
    lines, boxes = "", []
    for index in range(rows):
        width, height = generator.uniform(0.2, 0.6, 2)
        x, y = generator.uniform((width / 2, height / 2), (1 - width / 2, 1 - height / 2))
        points = generator.uniform((x - width / 2, y - height / 2), (x + width / 2, y + height / 2), (keypoints, 2))
        visible = generator.integers(0, 3, (keypoints, 1)) * (generator.random((keypoints, 1)) < 0.9)
        points = np.where(visible > 0, points, 0)
        numbers = np.concatenate((points, visible), axis=1) if each == 3 else points
        boxes.append([index % 2, x, y, width, height])
        lines += f"{index % 2} " + " ".join(f"{n:.6f}" for n in (x, y, width, height, *numbers.flat)) + "\n"
    return lines, np.float32(boxes)


@pytest.mark.parametrize(("keypoints", "each"), [(17, 3), (4, 3), (17, 2), (8, 2)])
def test_boxes_with_keypoints_are_read_where_the_yaml_tells_of_them_and_refused_else(tmp_path, keypoints, each):
    text, boxes = poses(keypoints, each)
    (tmp_path / "d.yaml").write_text(f"train: images\nval: images\nnames: [a, b]\nkpt_shape: [{keypoints}, {each}]\n")
    images = make_set(tmp_path, [text, "1 0.5 0.5 0.25 0.5\n"])
    remedy = rf"{keypoints} keypoints.* write 'kpt_shape: \[{keypoints}, {each}\]' into the data"
    with pytest.raises(UserError, match=f"(?i)000.txt.*{remedy}"):
        load_labels([images])
    for _ in range(2):  # the second time from the cache
        table = load_labels([images], load_spec(tmp_path / "d.yaml"))
        np.testing.assert_allclose(table.rows, [*boxes, [1, 0.5, 0.5, 0.25, 0.5]], atol=1e-6)
        assert not len(table.seg_points)
    with pytest.raises(UserError, match=f"(?i)000.txt.*{remedy}"):
        load_labels([images])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 .5 .5 .2 .2 .4 .4 .6", "8 numbers; a box has 5, and 6 more with kpt_shape [3, 2]"),
        ("0 .5 .5 .2 .2 .4 .4 .6 .4 x .6", "'x' is not a number"),
        ("0 .5 1.5 .2 .2 .4 .4 .6 .4 .6 .6", "'1.5' is beyond 1"),
    ],
)
def test_lines_that_do_not_fit_the_kpt_shape_are_refused(tmp_path, line, reason):
    images = make_set(tmp_path, [f"0 .5 .5 .2 .2 .4 .4 .6 .4 -1 7\n{line}\n"])
    with pytest.raises(UserError, match=rf"000\.txt, line 2: .*{re.escape(reason)}"):
        load_labels([images], kpt_shape=(3, 2))


def polygon(corners, angle, centre, radius):
    turns = angle + np.arange(corners) * 2 * np.pi / corners
    points = np.add(centre, radius * np.stack((np.cos(turns), np.sin(turns)), 1))
    return "0 " + " ".join(f"{value:.6f}" for value in points.flat) + "\n"


@pytest.mark.parametrize("corners", [3, 4, 6, 8])
def test_polygons_of_equal_length_are_no_keypoints(tmp_path, corners):
    generator = np.random.default_rng(corners)
    spots = [*generator.uniform(0.3, 0.7, (20, 2)), *[(0.5, 0.5)] * 10]
    lines = [polygon(corners, generator.uniform(0, 6), spot, generator.uniform(0.02, 0.3)) for spot in spots]
    table = load_labels([make_set(tmp_path, ["".join(lines)])])
    assert len(table.rows) == 30 and len(table.seg_points) == 30 * corners


def test_squares_in_the_middle_and_stars_from_their_middle_are_no_keypoints(tmp_path):
    """What follows lies within the first four numbers' box, or around the first point; keypoints do both."""
    squares = [polygon(4, angle, (0.5, 0.5), 0.1) for angle in np.linspace(0, 1.5, 8)]
    stars = [f"0 0.8 0.8 {polygon(9, angle, (0.8, 0.8), 0.19)[2:]}" for angle in np.linspace(0, 1, 8)]
    for folder, lines in (("squares", squares), ("stars", stars)):
        assert len(load_labels([make_set(tmp_path / folder, ["".join(lines)])]).rows) == 8


def test_polygons_that_look_like_keypoints_are_read_where_the_yaml_says_so(tmp_path):
    images = make_set(tmp_path, [poses(5, 2)[0]])
    with pytest.raises(UserError, match=r"'kpt_shape: \[0, 2\]' if they are polygons"):
        load_labels([images])
    assert len(load_labels([images], kpt_shape=(0, 2)).seg_points) == 6 * 7


def test_missing_and_empty_label_files_are_background(tmp_path):
    table = load_labels([make_set(tmp_path, ["0 0.5 0.5 0.1 0.1\n", None, "", "\n"])])
    assert table.counts == (3, 1, 2, 0, 4)
    assert [len(table.labels(index)) for index in range(4)] == [1, 0, 0, 0]


def test_unusable_images_are_left_out_counted_and_named(tmp_path, caplog):
    images = make_set(tmp_path, ["0 0.5 0.5 0.1 0.1\n"] * 6)
    (images / "001.jpg").write_bytes(b"")
    whole = (images / "002.jpg").read_bytes()
    (images / "002.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "003.jpg").write_bytes(b"\xff\xd8 not a picture")
    make_image(images / "004.jpg", width=2000, height=1)
    (tmp_path / "labels" / "003.txt").write_text("bad label of an image that is left out")
    with caplog.at_level(logging.WARNING, logger="yolov5"):
        table = load_labels([images])
        again = load_labels([images])
    assert [os.path.basename(path) for path in table.image_paths] == ["000.jpg", "005.jpg"]
    assert table.counts == again.counts == (2, 0, 0, 4, 6)
    for name in ("001.jpg", "002.jpg", "003.jpg", "004.jpg"):
        assert sum(name in record.message for record in caplog.records) == 2  # from the scan, and from the cache
    assert (images / "002.jpg").read_bytes() == whole[: len(whole) // 2]  # nothing is mended in place


def test_class_beyond_nc_names_range_file_and_line(tmp_path):
    images = make_set(tmp_path, ["0 0.5 0.5 0.1 0.1\n", "2 0.5 0.5 0.1 0.1\n\n3 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.2 0.1\n"])
    with pytest.raises(UserError) as error:
        load_labels([images], spec_of(3, tmp_path))
    message = str(error.value)
    assert message.startswith("Label class 3 exceeds nc=3: allowed are 0 to 2")
    assert f"{tmp_path / 'labels' / '001.txt'}, line 3" in message and "2 such labels" in message
    assert len(load_labels([images], spec_of(8, tmp_path)).rows) == 4


def test_single_class_makes_all_labels_class_0_polygons_too(tmp_path):
    images = make_set(tmp_path, ["5 0.5 0.5 0.1 0.1\n7 0 0 1 0 1 1\n"])
    table = load_labels([images], spec_of(1, tmp_path), single_cls=True)
    assert table.rows[:, 0].tolist() == [0, 0] and [len(one) for one in table.segments(0)] == [0, 3]


def test_no_labels_at_all_shows_the_path_rule_and_labels_beside_the_images_where_they_belong(tmp_path):
    with pytest.raises(UserError, match="All 2 label files are empty"):
        load_labels([make_set(tmp_path / "empty", ["", ""])])
    images = make_set(tmp_path, [None, None, None])
    with pytest.raises(UserError) as error:
        load_labels([images])
    assert str(tmp_path / "labels" / "000.txt") in str(error.value) and "'/images/'" in str(error.value)
    for name in ("001", "002"):
        (images / f"{name}.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    words = f"2 label files stand beside their images, such as {images / '001.txt'}: move them to {tmp_path / 'labels'}"
    with pytest.raises(UserError, match=re.escape(words)):
        load_labels([images])


def test_processes_find_the_same_as_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(labels_module, "POOL_FROM", 1)
    monkeypatch.setattr(labels_module, "CHUNK", 3)
    texts = ["0 0.5 0.5 0.1 0.1\n1 0 0 1 0 1 1\n", None, "", "2 0.25 0.25 0.5 0.5\n"] * 4
    images = list_images([make_set(tmp_path, texts)])
    alone, pooled = scan_images(images, workers=0), scan_images(images, workers=2)
    assert list(alone.image_paths) == list(pooled.image_paths) and alone.counts == pooled.counts
    for name in ("sizes_wh", "rows", "offsets", "seg_points", "seg_offsets"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(pooled, name))
    assert alone.sizes_wh[0].tolist() == [32, 24]


def test_a_spawned_process_can_scan(tmp_path):
    images = list_images([make_set(tmp_path, ["0 0.5 0.5 0.1 0.1\n", None])])
    context = multiprocessing.get_context("spawn")  # what Windows and macOS use
    ((table, problems),) = process_map(labels_module.scan_chunk, [images], 2, context)
    assert table.counts == (1, 1, 0, 0, 2) and table.rows[0, :3].tolist() == [0, 0.5, 0.5] and not problems


def test_subset_keeps_labels_and_polygons_with_their_images(tmp_path):
    texts = ["0 0.5 0.5 0.1 0.1\n", "1 0 0 1 0 1 1\n1 0.5 0.5 0.1 0.1\n", "", "3 0 0 0.5 0 0.5 0.5 0 0.5\n"]
    table = scan_images(list_images([make_set(tmp_path, texts)]))
    picked = table.subset([3, 1, 1])
    assert [os.path.basename(path) for path in picked.image_paths] == ["003.jpg", "001.jpg", "001.jpg"]
    assert [picked.labels(index)[:, 0].tolist() for index in range(3)] == [[3], [1, 1], [1, 1]]
    assert [[len(one) for one in picked.segments(index)] for index in range(3)] == [[4], [3, 0], [3, 0]]
    assert len(table.subset([])) == 0


def test_path_list_is_flat_and_survives_pickling():
    paths = ["/a/图像.jpg", "/b/plain.jpg", "/c/\udcff.jpg"]
    packed = pickle.loads(pickle.dumps(PathList.from_strings(paths)))
    assert list(packed) == paths and packed[-1] == paths[-1] and list(packed[1:]) == paths[1:]
    with pytest.raises(IndexError):
        packed[3]


def test_real_data_sets_are_read_whole(datasets_dir):
    table = scan_images(list_images([datasets_dir / "bccd" / "images" / split for split in ("train", "val", "test")]))
    assert table.counts == (364, 0, 0, 0, 364)
    lines = sum(len(path.read_text().splitlines()) for path in (datasets_dir / "bccd" / "labels").rglob("*.txt"))
    assert len(table.rows) + sum(int(message.split(": ")[1].split()[0]) for message in table.messages) == lines
    assert (table.sizes_wh == [640, 480]).all()
