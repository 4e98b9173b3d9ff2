"""Converters: hand-worked boxes, folders that appear whole, sources that stay as they are."""

import json
import logging
import math
import shutil

import cv2
import numpy as np
import pytest

from utils.dataloaders.config import load_spec
from utils.errors import UserError
from utils.tools.convert import convert_coco, convert_visdrone, convert_voc

NAMES = {0: "cat", 1: "dog"}


def image_file(path, width=100, height=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def numbers(path):
    return [[float(token) for token in line.split()] for line in path.read_text().splitlines()]


def voc_object(name, corners, difficult=None):
    tags = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, corners, strict=True))
    hard = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{hard}<bndbox>{box}</bndbox></object>"


def voc_tree(base, splits, objects, size=(100, 50)):
    """Writes a VOC tree in which every image has the same objects."""
    for split, stems in splits.items():
        for stem in stems:
            image_file(base / "JPEGImages" / f"{stem}.jpg")
            (base / "Annotations").mkdir(exist_ok=True)
            width, height = size
            text = f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"
            (base / "Annotations" / f"{stem}.xml").write_text(text)
        (base / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem} 1\n" for stem in stems))


def test_voc_boxes_classes_and_sets(tmp_path):
    objects = (
        voc_object("dog", (11, 6, 31, 26))
        + voc_object("cat", (91, 41, 121, 61), difficult=0)  # reaches beyond the image
        + voc_object("dog", (1, 1, 9, 9), difficult=1)
        + voc_object("cow", (1, 1, 9, 9))
    )
    voc_tree(tmp_path / "VOCdevkit" / "VOC2007", {"train": ["a", "b"], "test": ["c"]}, objects)
    voc_tree(tmp_path / "other" / "BCCD", {"val": ["d"]}, objects)
    assert convert_voc(tmp_path, NAMES) == 4
    found = {str(path.relative_to(tmp_path / "labels")) for path in (tmp_path / "labels").rglob("*.txt")}
    assert found == {"train2007/a.txt", "train2007/b.txt", "test2007/c.txt", "val/d.txt"}
    # VOC2007 counts pixels from 1: the dog's centre is ((11 + 31) / 2 - 1, (6 + 26) / 2 - 1) = (20, 15), size (20, 20)
    expected = [[1, 0.20, 0.30, 0.20, 0.40], [0, 0.95, 0.90, 0.10, 0.20]]
    np.testing.assert_allclose(numbers(tmp_path / "labels/train2007/a.txt"), expected, atol=1e-6)
    # others count from 0: centre (21, 16)
    np.testing.assert_allclose(numbers(tmp_path / "labels/val/d.txt")[0], [1, 0.21, 0.32, 0.20, 0.40], atol=1e-6)
    assert (tmp_path / "images/train2007/a.jpg").is_file()
    assert (tmp_path / "VOCdevkit/VOC2007/JPEGImages/a.jpg").is_file()  # linked, not moved
    assert convert_voc(tmp_path, NAMES) == 0  # finished sets are left alone


@pytest.mark.parametrize("size", [(0, 0), (1e-320, 50), (-1, 50), ("inf", 50), ("nan", 50)])
def test_voc_size_that_is_none_is_read_from_the_image_file(tmp_path, size):
    voc_tree(tmp_path / "VOC", {"train": ["a"]}, voc_object("cat", (0, 0, 50, 25)), size=size)
    convert_voc(tmp_path, NAMES)
    assert numbers(tmp_path / "labels/train/a.txt") == [[0, 0.25, 0.25, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("<object>", "not a usable VOC annotation"),
        (voc_object("cat", ("x", 1, 2, 3)), "not a usable VOC annotation"),
        (voc_object("cat", (1, 2, 3, "")), "not a usable VOC annotation"),
        (voc_object("cat", (1, 2, "nan", 4)), "not a usable VOC annotation .*a coordinate is nan"),
    ],
)
def test_a_broken_voc_annotation_is_named_and_leaves_nothing(tmp_path, objects, message):
    voc_tree(tmp_path / "VOC", {"train": ["a"]}, objects)
    with pytest.raises(UserError, match=f"a.xml: {message}"):
        convert_voc(tmp_path, NAMES)
    assert not (tmp_path / "images" / "train").exists() and not (tmp_path / "labels" / "train").exists()


def test_xml_entities_are_refused(tmp_path):
    voc_tree(tmp_path / "VOC", {"train": ["a"]}, "")
    bomb = '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;">]><annotation>&y;</annotation>'
    (tmp_path / "VOC" / "Annotations" / "a.xml").write_text(bomb)
    with pytest.raises(UserError, match="entities"):
        convert_voc(tmp_path, NAMES)


def test_a_set_without_images_is_passed_over_with_a_warning(tmp_path, caplog):
    voc_tree(tmp_path / "VOC", {"train": ["a"]}, voc_object("cat", (0, 0, 50, 25)))
    (tmp_path / "VOC" / "ImageSets" / "Main" / "test.txt").write_text("gone\n")
    with caplog.at_level(logging.WARNING, logger="yolov5"):
        assert convert_voc(tmp_path, NAMES) == 1
    assert "test.txt" in caplog.text and not (tmp_path / "images" / "test").exists()


def coco_file(path, images=("a.jpg",), categories=("Dog", "cow", "CAT"), width=100, **changes):
    annotations = [
        {"image_id": 0, "category_id": 1, "bbox": [10, 5, 20, 20], "iscrowd": 0},
        {"image_id": 0, "category_id": 3, "bbox": [90, 40, 30, 20]},
        {"image_id": 0, "category_id": 2, "bbox": [0, 0, 5, 5]},
        {"image_id": 0, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"image_id": 0, "category_id": 3, "bbox": [50, 25, 0, 5]},
    ]
    content = {
        "images": [{"id": i, "file_name": name, "width": width, "height": 50} for i, name in enumerate(images)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_coco_boxes_by_category_name(tmp_path):
    base = tmp_path / "SSLAD-2D" / "labeled"
    coco_file(base / "annotations" / "instance_train.json", images=("a.jpg", "b.jpg"))
    coco_file(base / "annotations" / "captions_train.json", annotations=3)
    for name in ("a", "b"):
        image_file(base / "train" / f"{name}.jpg")
    assert convert_coco(tmp_path, NAMES) == 2
    expected = [[1, 0.2, 0.3, 0.2, 0.4], [0, 0.95, 0.9, 0.1, 0.2]]
    np.testing.assert_allclose(numbers(tmp_path / "labels/train/a.txt"), expected, atol=1e-6)
    assert numbers(tmp_path / "labels/train/b.txt") == []
    assert (tmp_path / "images/train/b.jpg").is_file()
    assert convert_coco(tmp_path, NAMES) == 0


@pytest.mark.parametrize("width", [0, 1e-320, math.inf])
def test_coco_size_that_is_none_is_read_from_the_image_file(tmp_path, width):
    coco_file(tmp_path / "annotations" / "instances_train.json", width=width)
    image_file(tmp_path / "train" / "a.jpg")
    convert_coco(tmp_path, NAMES)
    np.testing.assert_allclose(numbers(tmp_path / "labels/train/a.txt")[0], [1, 0.2, 0.3, 0.2, 0.4], atol=1e-6)


def test_coco_images_that_stand_in_images_get_labels_beside_them(tmp_path):
    coco_file(tmp_path / "annotations" / "instances_val2017.json")
    image_file(tmp_path / "images" / "val2017" / "a.jpg")
    (tmp_path / "d.yaml").write_text(
        f"path: {tmp_path}\ntrain: images/val2017\nval: images/val2017\nnames: [cat, dog]\nconvert: coco\n"
    )
    found = load_spec(tmp_path / "d.yaml", download=False)
    assert found.val == (tmp_path / "images" / "val2017",)
    assert len(numbers(tmp_path / "labels/val2017/a.txt")) == 2
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["val2017"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ("pig",)}, "none of its categories"),
        ({"annotations": {}}, "must be lists"),
        ({"annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 2]}]}, "not a usable COCO file"),
        ({"annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 2, math.nan, 3]}]}, "a coordinate is nan"),
        ({"images": ("../a.jpg",)}, "lies outside the data set"),
        ({"images": ("a.jpg", "/etc/passwd")}, "lies outside the data set"),
        ({"images": ("a.jpg", "gone.jpg")}, "it is not there"),
    ],
)
def test_coco_files_that_make_no_sense_are_named(tmp_path, changes, message):
    coco_file(tmp_path / "annotations" / "instances_train.json", **changes)
    image_file(tmp_path / "train" / "a.jpg")
    with pytest.raises(UserError) as error:
        convert_coco(tmp_path, NAMES)
    assert message in str(error.value) and not (tmp_path / "labels" / "train").exists()


def test_coco_without_images_is_passed_over_with_a_warning(tmp_path, caplog):
    coco_file(tmp_path / "annotations" / "instances_test.json")
    with caplog.at_level(logging.WARNING, logger="yolov5"):
        assert convert_coco(tmp_path, NAMES) == 0
    assert "instances_test.json" in caplog.text


def test_visdrone_rows(tmp_path):
    base = tmp_path / "VisDrone2019-DET-val"
    image_file(base / "images" / "a.jpg")
    (base / "annotations").mkdir()
    rows = ["10,5,20,20,1,2,0,0", "0,0,5,5,0,1,0,0", "0,0,5,5,1,11,0,0", "90,40,30,20,1,1,0,0,"]
    (base / "annotations" / "a.txt").write_text("\n".join(rows))
    (base / "images" / "._a.jpg").touch()  # as macOS leaves them
    shutil.copytree(base, tmp_path / ".Trash-1000" / "files" / "set")
    assert convert_visdrone(tmp_path, NAMES) == 1
    expected = [[1, 0.2, 0.3, 0.2, 0.4], [0, 0.95, 0.9, 0.1, 0.2]]
    np.testing.assert_allclose(numbers(base / "labels" / "a.txt"), expected, atol=1e-6)
    assert convert_visdrone(tmp_path, NAMES) == 0


def test_visdrone_mistakes_are_named(tmp_path):
    base = tmp_path / "set"
    image_file(base / "images" / "a.jpg")
    (base / "annotations").mkdir()
    (base / "annotations" / "a.txt").write_text("1,2,three\n")
    with pytest.raises(UserError, match=r"a\.txt: not a usable VisDrone annotation"):
        convert_visdrone(tmp_path, NAMES)
    assert not (base / "labels").exists()


def test_a_data_set_in_voc_form_beside_its_yaml_is_converted_on_first_use(tmp_path):
    voc_tree(tmp_path / "raw", {"train": ["a"], "val": ["b"]}, voc_object("cat", (0, 0, 50, 25)))
    text = "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\nconvert: voc\n"
    (tmp_path / "d.yaml").write_text(text)
    found = load_spec(tmp_path / "d.yaml", download=False)
    assert found.root == tmp_path and math.isclose(numbers(tmp_path / "labels/val/b.txt")[0][1], 0.25)
