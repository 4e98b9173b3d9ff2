"""Converters: hand-worked boxes, folders that appear whole, sources that stay as they are."""

import json
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from utils.dataloaders.config import load_spec
from utils.dataloaders.labels import read_label_file
from utils.dataloaders.paths import list_images
from utils.errors import UserError
from utils.images import image_size
from utils.tools import convert
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
        ("<object>", "not XML"),
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
        ({"annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 2]}]}, "not a usable COCO annotation"),
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


# --- the command

BOX_AND_TRIANGLE = "1 0.200000 0.300000 0.200000 0.400000\n0 0.500000 0.200000 0.900000 0.200000 0.900000 0.800000\n"


def as_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_content(annotations, names=("cat", "dog"), images=("a.jpg",)):
    return {
        "images": [{"id": i, "file_name": name, "width": 100, "height": 50} for i, name in enumerate(images)],
        "categories": [{"id": i, "name": name, "supercategory": "pet"} for i, name in enumerate(names, start=5)],
        "annotations": annotations,
    }


def write_coco_source(root):
    box = {"image_id": 0, "category_id": 6, "bbox": [10, 5, 20, 20], "segmentation": []}
    triangle = {"image_id": 0, "category_id": 5, "bbox": [50, 10, 40, 30], "segmentation": [[50, 10, 90, 10, 90, 40]]}
    as_json(root / "annotations" / "all.json", coco_content([box, triangle]))


def write_voc_source(root):
    polygon = "<polygon><x1>50</x1><y1>10</y1><x2>90</x2><y2>10</y2><x3>90</x3><y3>40</y3></polygon></object>"
    objects = voc_object("dog", (10, 5, 30, 25)) + voc_object("cat", (50, 10, 90, 40)).replace("</object>", polygon)
    (root / "a.xml").write_text(f"<annotation><size><width>100</width><height>50</height></size>{objects}</annotation>")


def write_labelme_source(root):
    shapes = [
        {"label": "dog", "points": [[30, 25], [10, 5]], "shape_type": "rectangle", "group_id": None, "flags": {}},
        {"label": "cat", "points": [[50, 10], [90, 10], [90, 40]], "shape_type": "polygon", "group_id": None},
    ]
    as_json(
        root / "a.json", {"shapes": shapes, "imagePath": "..\\pictures\\a.jpg", "imageWidth": 100, "imageHeight": 50}
    )


def write_cvat_source(root):
    labels = "<labels><label><name>cat</name></label><label><name>dog</name></label></labels>"
    (root / "annotations.xml").write_text(
        f'<annotations><version>1.1</version><meta><task>{labels}</task></meta><image id="0" name="pets/a.jpg" '
        'width="100" height="50"><box label="dog" xtl="10" ytl="5" xbr="30" ybr="25" occluded="0"/>'
        '<polygon label="cat" points="50.0,10.0;90.0,10.0;90.0,40.0"/></image></annotations>'
    )


def region(kind, value, **more):
    return {"type": kind, "value": value, "original_width": 100, "original_height": 50, **more}


def write_labelstudio_source(root):
    regions = [
        region("rectanglelabels", {"x": 10, "y": 10, "width": 20, "height": 40, "rectanglelabels": ["dog"]}),
        region("polygonlabels", {"points": [[50, 20], [90, 20], [90, 80]], "polygonlabels": ["cat"]}),
    ]
    task = {"id": 1, "data": {"image": "/data/upload/1/0a1b2c3d-a.jpg"}, "annotations": [{"result": regions}]}
    as_json(root / "export.json", [task])


def write_openimages_source(root):
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"
    rows = "a,x,/m/0d,1,0.1,0.3,0.1,0.5,0,0,0\nelsewhere,x,/m/0d,1,0.1,0.3,0.1,0.5,0,0,0\n"
    (root / "boxes.csv").write_text(header + rows + "a,x,/m/0c,1,0.5,0.9,0.2,0.8,0,0,0\n")
    (root / "class-descriptions-boxable.csv").write_text("/m/0c,cat\n/m/0d,dog\n")


def write_yolo_source(root):
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text(BOX_AND_TRIANGLE)
    (root / "texts" / "classes.txt").write_text("cat\ndog\n")


SOURCES = {
    "coco": write_coco_source,
    "voc": write_voc_source,
    "labelme": write_labelme_source,
    "cvat": write_cvat_source,
    "labelstudio": write_labelstudio_source,
    "openimages": write_openimages_source,
    "yolo": write_yolo_source,
}


@pytest.fixture
def source(tmp_path):
    """A folder with one image."""
    image_file(tmp_path / "source" / "a.jpg")
    return tmp_path / "source"


def run(*arguments):
    convert.main(convert.build_parser().parse_args([*map(str, arguments)]))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_format_is_recognised_and_gives_the_same_labels(source, tmp_path, kind):
    SOURCES[kind](source)
    (source / "README.txt").write_text("5 pictures\n")
    run(source, "--out", tmp_path / "out")
    expected = BOX_AND_TRIANGLE
    if kind == "openimages":  # boxes alone
        expected = "1 0.200000 0.300000 0.200000 0.400000\n0 0.700000 0.500000 0.400000 0.600000\n"
    assert (tmp_path / "out" / "labels" / "train" / "a.txt").read_text() == expected
    assert os.path.samefile(tmp_path / "out" / "images" / "train" / "a.jpg", source / "a.jpg")
    spec = load_spec(tmp_path / "out" / "data.yaml", need=["train"])
    assert spec.names == NAMES and spec.train == (tmp_path / "out" / "images" / "train",)


@pytest.mark.parametrize("kind", SOURCES)
def test_formats_are_told_apart_and_forced(source, tmp_path, kind):
    other = "cvat" if kind == "voc" else "voc"
    for one in (kind, other):
        SOURCES[one](source)
    with pytest.raises(UserError, match=f"several formats.*{kind}.*--from"):
        run(source, "--out", tmp_path / "out")
    run(source, "--out", tmp_path / "out", "--from", kind)
    assert len(numbers(tmp_path / "out" / "labels" / "train" / "a.txt")) == 2


def test_turned_boxes_become_polygons_and_ellipses_boxes(source, tmp_path):
    (source / "c.xml").write_text(
        '<annotations><image name="a.jpg" width="100" height="50">'
        '<box label="dog" xtl="40" ytl="20" xbr="60" ybr="30" rotation="90"/>'  # around (50, 25): 10 wide, 20 high
        '<ellipse label="cat" cx="50" cy="25" rx="20" ry="10" rotation="90"/></image></annotations>'
    )
    run(source, "--out", tmp_path / "cvat", "--names", "dog,cat")
    turned, ellipse = numbers(tmp_path / "cvat" / "labels" / "train" / "a.txt")
    assert turned == [0, 0.55, 0.3, 0.55, 0.7, 0.45, 0.7, 0.45, 0.3] and ellipse == [1, 0.5, 0.5, 0.2, 0.8]
    value = {"x": 50, "y": 20, "width": 20, "height": 40, "rotation": 90, "rectanglelabels": ["dog"]}  # around (50, 10)
    (source / "c.xml").unlink()
    task = {"data": {"image": "a.jpg"}, "annotations": [{"result": [region("rectanglelabels", value)]}]}
    as_json(source / "l.json", [task])
    run(source, "--out", tmp_path / "labelstudio")
    # 20 x 20 px below and right of (50, 10) turn clockwise to below and left of it
    assert numbers(tmp_path / "labelstudio" / "labels" / "train" / "a.txt") == [
        [0, 0.5, 0.2, 0.5, 0.6, 0.3, 0.6, 0.3, 0.2]
    ]


def area(xy):
    xs, ys = np.reshape(xy, (-1, 2)).T
    return abs(np.dot(xs, np.roll(ys, -1)) - np.dot(ys, np.roll(xs, -1))) / 2


def test_parts_are_joined_without_area(source, tmp_path, caplog):
    parts = [[0, 0, 10, 0, 10, 10], [50, 20, 70, 20, 70, 40], [20, 5, 30, 5, 30, 45, 20, 10]]
    assert area(convert.join_parts(parts)) == sum(map(area, parts)) == 50 + 200 + (5 + 40) / 2 * 10
    outline = {"image_id": 0, "category_id": 5, "bbox": [0, 0, 70, 45], "segmentation": parts}
    mask = {
        "image_id": 0,
        "category_id": 6,
        "bbox": [10, 5, 20, 20],
        "segmentation": {"counts": "x", "size": [50, 100]},
    }
    as_json(source / "a.json", coco_content([outline, mask]))
    run(source, "--out", tmp_path / "out")
    found = read_label_file(tmp_path / "out" / "labels" / "train" / "a.txt")
    np.testing.assert_allclose(found.rows, [[0, 0.35, 0.45, 0.7, 0.9], [1, 0.2, 0.3, 0.2, 0.4]], atol=1e-6)
    assert "1 objects in several parts" in caplog.text and "1 masks (RLE)" in caplog.text
    shapes = [{"label": "cat", "group_id": 3, "points": np.reshape(part, (-1, 2)).tolist()} for part in parts]
    (source / "a.json").unlink()
    as_json(source / "b.json", {"shapes": shapes, "imagePath": "a.jpg", "imageWidth": 100, "imageHeight": 50})
    run(source, "--out", tmp_path / "labelme")
    assert (
        numbers(tmp_path / "labelme" / "labels" / "train" / "a.txt")
        == numbers(tmp_path / "out" / "labels" / "train" / "a.txt")[:1]
    )


@pytest.mark.parametrize(
    ("xy", "expected"),
    [
        # the edges cross x = 0 at y = 0.2 and, a fifth of the way from 0.4 to 0.2, at 0.36
        ([0.2, 0.2, 0.2, 0.4, -0.8, 0.2], [0, 0.2, 0, 0.36, 0.2, 0.4, 0.2, 0.2]),
        ([0.5, 0.5, 1.5, 0.5, 1.5, 1.5, 0.5, 1.5], [0.5, 0.5, 1, 0.5, 1, 1, 0.5, 1]),
        ([1.5, 0.5, 1.7, 0.5, 1.6, 0.7], []),
        ([0.1, 0.5, 0.9, 0.5, 0.5, 0.5], []),
        ([-0.5, 0.2, 0.5, 1.2], [0, 0.2, 0.5, 1]),
        ([0.5, 0.5, 0.4, 0.6], []),
    ],
)
def test_clipping_keeps_what_lies_in_the_image(xy, expected):
    found = convert.clip(xy)
    assert len(found) == len(expected)
    points = [sorted(np.round(np.reshape(one, (-1, 2)), 9).tolist()) for one in (found, expected)]
    assert points[0] == points[1] and (len(xy) == 4 or not expected or math.isclose(area(found), area(expected)))


def test_marks_classes_and_losses(source, tmp_path, caplog):
    objects = (
        voc_object("dog", (10, 5, 30, 25), difficult=1)
        + voc_object("cat", (10, 5, 30, 25)).replace("<bndbox>", "<truncated>1</truncated><bndbox>")
        + voc_object("lion", (80, 30, 120, 70))
        + voc_object("cow", (1, 1, 9, 9))
    )
    (source / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    run(source, "--out", tmp_path / "one", "--classes", "lion=cat", "--drop", "cow")
    assert numbers(tmp_path / "one" / "labels/train/a.txt") == [[0, 0.2, 0.3, 0.2, 0.4], [0, 0.9, 0.8, 0.2, 0.4]]
    for text in (
        "1 objects marked 'difficult'",
        "a.jpg: dog",
        "1 marks 'truncated'",
        "1 objects of dropped",
        "cut off",
    ):
        assert text in caplog.text
    run(source, "--out", tmp_path / "two", "--leave-out", "truncated", "--names", "cow,dog,lion")
    assert [row[0] for row in numbers(tmp_path / "two" / "labels/train/a.txt")] == [1, 2, 0]
    run(source, "--out", tmp_path / "three", "--leave-out", "--to", "voc")
    text = (tmp_path / "three" / "Annotations" / "a.xml").read_text()
    assert text.count("<difficult>1") == 1 and text.count("<truncated>1") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop", "dgo"], "no class 'dgo'. Did you mean 'dog'"),
        (["--classes", "dog"], "old=new"),
        (["--names", "dog"], "has no 'cat'"),
        (["--drop", "dog,cat"], "no objects of any class"),
        (["--from", "voc"], "annotations of voc are expected"),
        (["--to", "voc", "--out", "VOC2030"], "pixels count from 1"),
        (["--val", "0.5"], "--val: sets training images aside"),  # of a single image
        (["--out", "."], "exists already"),
    ],
)
def test_options_that_do_not_fit_are_named_and_nothing_is_written(source, tmp_path, monkeypatch, options, message):
    write_coco_source(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        run(source, "--out", tmp_path / "out", *options)
    assert message in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_splits_by_folder_by_name_and_by_hand(tmp_path, caplog):
    box = {"image_id": 0, "category_id": 5, "bbox": [10, 5, 20, 20]}
    for folder, corner in (("train", 10), ("valid", 50)):  # Roboflow's layout, with the same image name in both
        image_file(tmp_path / "r" / folder / "a.jpg")
        content = coco_content([{**box, "bbox": [corner, 5, 20, 20]}], names=("cat", "dog", "pet"))
        as_json(tmp_path / "r" / folder / "_annotations.coco.json", content)
    run(tmp_path / "r", "--out", tmp_path / "one")
    assert [numbers(tmp_path / f"one/labels/{split}/a.txt")[0][1] for split in ("train", "val")] == [0.2, 0.6]
    assert load_spec(tmp_path / "one" / "data.yaml").names == NAMES  # 'pet' is a group without objects
    for name, corner in (("train", 10), ("val", 50)):  # COCO's own layout, and again the same image name in both
        image_file(tmp_path / "c" / f"{name}2017" / "a.jpg", width=100 + corner)
        for kind in ("instances", "person_keypoints"):
            as_json(tmp_path / "c" / "annotations" / f"{kind}_{name}2017.json", coco_content([box]))
    run(tmp_path / "c", "--out", tmp_path / "coco")
    assert len(numbers(tmp_path / "coco/labels/val/a.txt")) == 1
    assert [image_size(tmp_path / f"coco/images/{split}/a.jpg").width for split in ("train", "val")] == [110, 150]
    run(f"val={tmp_path / 'r/train'}", f"train={tmp_path / 'r/valid'}", "--out", tmp_path / "two")
    assert [numbers(tmp_path / f"two/labels/{split}/a.txt")[0][1] for split in ("train", "val")] == [0.6, 0.2]
    run(tmp_path / "one" / "data.yaml", "--out", tmp_path / "voc", "--to", "voc")  # one folder for all images
    assert (tmp_path / "voc/ImageSets/Main/val.txt").read_text() == "a-2\n"
    run(tmp_path / "voc", "--out", tmp_path / "back")
    assert numbers(tmp_path / "back/labels/val/a-2.txt") == [[0, 0.6, 0.3, 0.2, 0.4]]
    (tmp_path / "r/train/_annotations.coco.json").unlink()
    image_file(tmp_path / "r/train/test_1.jpg")
    as_json(tmp_path / "r/train/test_1.json", {"shapes": [], "imagePath": "test_1.jpg"})  # no image of a test split
    run(tmp_path / "r/train", "--out", tmp_path / "labelme", "--names", "cat")
    assert (tmp_path / "labelme/labels/train/test_1.txt").read_text() == ""
    caplog.clear()
    run(tmp_path / "r/valid", f"train={tmp_path / 'r/valid'}", "--out", tmp_path / "twice")
    assert "1 images that are in another split already" in caplog.text
    assert not (tmp_path / "twice/labels/train").exists()


def test_a_share_of_the_training_images_is_set_aside(source, tmp_path):
    write_coco_source(source)
    names = [f"{index}.jpg" for index in range(10)]
    as_json(source / "annotations" / "all.json", coco_content([], images=names))
    for name in names:
        shutil.copy(source / "a.jpg", source / name)
    chosen = []
    for out in ("one", "two"):
        run(source, "--out", tmp_path / out, "--val", "0.3")
        chosen.append(sorted(path.name for path in (tmp_path / out / "images" / "val").iterdir()))
        assert len(list((tmp_path / out / "images" / "train").iterdir())) == 7
    assert len(chosen[0]) == 3 and chosen[0] == chosen[1]


def test_images_are_copied_or_listed_where_they_are(source, tmp_path):
    write_labelme_source(source)
    run(source, "--out", tmp_path / "copied", "--images", "copy")
    copied = tmp_path / "copied" / "images" / "train" / "a.jpg"
    assert copied.read_bytes() == (source / "a.jpg").read_bytes() and not os.path.samefile(copied, source / "a.jpg")
    run(source, "--out", tmp_path / "listed", "--images", "list")
    spec = load_spec(tmp_path / "listed" / "data.yaml", need=["train"])
    assert list_images(spec.train) == [str(source / "a.jpg")]
    assert (source / "a.txt").read_text() == "1 0.200000 0.300000 0.200000 0.400000\n" + BOX_AND_TRIANGLE.partition(
        "\n"
    )[2]
    (source / "a.txt").write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(UserError, match=r"a\.txt exists, and would be overwritten"):
        run(source, "--out", tmp_path / "again", "--images", "list", "--from", "labelme")
    assert not (tmp_path / "again").exists() and (source / "a.txt").read_text() == "0 0.5 0.5 1 1\n"
    image_file(source / "a.png")
    as_json(source / "b.json", {"shapes": [], "imagePath": "a.png"})
    (source / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt is the label file of two images"):
        run(source, "--out", tmp_path / "again", "--images", "list")
    assert not (source / "a.txt").exists()


HOSTILE = {
    "deep.json": "[" * 100_000,
    "number.json": '{"shapes": [], "imagePath": "a.jpg", "imageWidth": ' + "9" * 10_000 + "}",
    "huge.json": json.dumps({"shapes": [], "imagePath": "a.jpg", "imageWidth": 10**400, "imageHeight": 1}),
    "nan.json": json.dumps(coco_content([{"image_id": 0, "category_id": 5, "bbox": [1, 2, math.nan, 3]}])),
    "types.json": json.dumps({"images": 5, "annotations": {}, "categories": "x"}),
    "keys.json": json.dumps([{"data": {"image": "a.jpg"}, "annotations": [{"result": [{"type": []}]}]}]),
    "name.json": json.dumps(coco_content([], names=("a\nb",))),
    "odd.json": json.dumps(coco_content([{"image_id": 0, "category_id": 5, "segmentation": [[1, 2, 3, 4, 5, 6, 7]]}])),
    "above.json": json.dumps(coco_content([], images=("../../../../etc/passwd", "/etc/passwd"))),
    "bomb.xml": '<!DOCTYPE annotation [<!ENTITY x "xxxxxxxx">]><annotation>&x;</annotation>',
    "outside.xml": '<!DOCTYPE annotation SYSTEM "file:///etc/passwd"><annotation/>',
    "undeclared.xml": "<annotation>&x;</annotation>",
    "open.xml": "<a>" * 100_000,
    "coding.xml": '<?xml version="1.0" encoding="no-such"?><annotation/>',
    "far.json": json.dumps(coco_content([{"image_id": 0, "category_id": 5, "bbox": [1, 2, 1e300, 3]}])),
    "points.xml": '<annotations><image name="a.jpg"><polygon label="x" points="1,2;3"/></image></annotations>',
    "nul.csv": "\0",
    "short.csv": "ImageID,LabelName,XMin,XMax,YMin,YMax\na,/m/0d\n",
    "field.csv": "ImageID,LabelName,XMin,XMax,YMin,YMax\na," + "x" * 200_000,
    "a.txt": "0 0.5 0.5 2 2\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_annotations_are_refused_in_a_line_and_nothing_is_written(source, tmp_path, name):
    (source / name).write_text(HOSTILE[name])
    (source / "classes.txt").write_text("cat\n")
    with pytest.raises(UserError) as error:
        run(source, "--out", tmp_path / "out")
    assert len(str(error.value)) < 2000 and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_too_large_for_the_memory_is_refused_unread(source, tmp_path, monkeypatch):
    write_coco_source(source)
    monkeypatch.setattr(convert, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"all\.json: larger than"):
        run(source, "--out", tmp_path / "out")


def test_sizes_that_do_not_fit_the_image_are_told(source, tmp_path, caplog):
    content = coco_content([])
    content["images"][0] |= {"width": 50, "height": 100}
    as_json(source / "a.json", content)
    run(source, "--out", tmp_path / "out")
    assert "1 images of other proportions" in caplog.text and "50 x 100, not 100 x 50" in caplog.text


FRACTION = st.integers(0, 10**6)


@st.composite
def label_lines(draw):
    """Label lines with six decimals: boxes within the image, and triangles that are not flat."""
    lines = []
    for label in draw(st.lists(st.integers(0, 1), max_size=4)):
        (left, right), (top, bottom) = (sorted(draw(st.tuples(FRACTION, FRACTION))) for _ in range(2))
        assume(right - left >= 2 and bottom - top >= 2)
        if draw(st.booleans()):
            values = [(left + right) // 2, (top + bottom) // 2, (right - left) // 2 * 2, (bottom - top) // 2 * 2]
        else:
            values = [left, top, right, top, right, bottom]
        lines.append(" ".join([str(label), *(f"{value / 1e6:.6f}" for value in values)]))
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize(("target", "size"), [("coco", (640, 427)), ("voc", (640, 427)), ("voc", (7, 3))])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=label_lines())
def test_labels_come_back_within_the_rounding_of_the_format(tmp_path, target, size, lines):
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    image_file(root / "yolo" / "images" / "a.png", *size)
    (root / "yolo" / "labels").mkdir()
    (root / "yolo" / "labels" / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    (root / "yolo" / "d.yaml").write_text("path: .\ntrain: images\nnames: [zebra, ant]\n")
    run(root / "yolo", "--out", root / "there", "--to", target)
    run(root / "there", "--out", root / "back", "--names", "zebra,ant")
    back = (root / "back" / "labels" / "train" / "a.txt").read_text().splitlines()
    assert [line.split()[0] for line in back] == [line.split()[0] for line in lines]
    for before, after in zip(lines, back, strict=True):
        before, after = (np.array(line.split()[1:], float) for line in (before, after))
        if target == "coco" or len(before) > 4:
            assert len(before) == len(after) and np.abs(before - after).max() < 1.6e-6
        else:  # corners are at most half a pixel off; boxes too small for that are a pixel wide
            corners = [[xy - wh / 2, xy + wh / 2] for xy, wh in ((one[:2], one[2:]) for one in (before, after))]
            limit = np.where(before[2:] * size < 1, 1, 0.5) / size
            assert (np.abs(np.subtract(*corners)) < limit + 2e-6).all()
            assert (after[2:] * size > 0.999).all()
