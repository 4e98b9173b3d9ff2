"""The check of a data set: each fault counted once and nothing else, copies found among real images, a clean copy."""

import html.parser
import re
import shutil

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from utils.dataloaders.config import load_spec
from utils.dataloaders.labels import load_labels
from utils.images import read_image
from utils.tools import check
from utils.tools.check import NEAR_BITS, nearest, perceptual_hash, similar_groups

MIDDLE = "0 0.5 0.5 0.25 0.25"


def run(command, *arguments):
    return command(check, *arguments)._replace(prog="utils.tools.check")


def found(outcome):
    """What the text says: title to count."""
    _, _, findings = outcome.said.partition("To mend")
    return {title: int(count) for count, title in re.findall(r"^ {1,6}(\d+)  (.+)$", findings, re.M)}


def texture(seed):
    """An image (80, 80, 3) unlike those of other seeds."""
    small = np.random.default_rng(seed).integers(0, 256, (10, 10, 3)).astype(np.uint8)
    return cv2.resize(small, (80, 80), interpolation=cv2.INTER_CUBIC)


def add(root, split, name, seed, lines=MIDDLE, **options):
    """Writes an image, and labels unless `lines` is None."""
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(texture(seed)).save(root / "images" / split / name, **options)
    if lines is not None:
        (root / "labels" / split / name).with_suffix(".txt").write_text(lines)


@pytest.fixture
def flawed(tmp_path):
    """A data set YAML with every fault once, of 80 px images."""
    root, exif = tmp_path / "flawed", Image.Exif()
    exif[0x0112] = 6
    add(root, "train", "plain.jpg", 0)
    shutil.copy(root / "images/train/plain.jpg", root / "images/train/again.jpg")
    (root / "labels/train/again.txt").write_text(f"1{MIDDLE[1:]}")
    add(root, "train", "turned.jpg", 1, exif=exif)
    add(root, "train", "cut.jpg", 2)
    (root / "images/train/cut.jpg").write_bytes((root / "images/train/plain.jpg").read_bytes()[:-200])
    add(root, "train", "unlabelled.jpg", 3, None)
    Image.new("RGB", (80, 80), (200, 40, 5)).save(root / "images/train/unlabelled.jpg")
    add(root, "train", "background.jpg", 4, "")
    add(root, "train", "repeated.jpg", 5, f"{MIDDLE}\n{MIDDLE}\n{MIDDLE}\n1 0.1 0.1 0.1 0.1")
    add(root, "train", "doubled.jpg", 6, f"{MIDDLE}\n0 0.5 0.5 0.25 0.251")
    add(root, "train", "mixed.jpg", 7, f"{MIDDLE}\n1 0.5 0.5 0.25 0.25")
    add(root, "train", "beyond.jpg", 8, "0 0.95 0.5 0.2 0.2\n0 0.1 0.2 0.3 0.2 0.3 0.6")
    add(root, "train", "tiny.jpg", 9, "0 0.5 0.5 0.004 0.1\n0 0.3 0.3 0 0.1")
    add(root, "train", "huge.jpg", 10, "1 0.5 0.5 0.98 0.98")
    add(root, "train", "class.jpg", 11, "7 0.5 0.5 0.1 0.1")
    add(root, "train", "line.jpg", 12, f"{MIDDLE}\n0 40 40 20 20")
    add(root, "train", "shared.jpg", 13)
    add(root, "train", "shared.png", 14)
    (root / "labels/train/classes.txt").write_text("cat\ndog\n")
    (root / "labels/train/stray.txt").write_text(MIDDLE)
    add(root, "val", "copy.jpg", 0)
    add(root, "val", "alike.jpg", 15)
    brighter = cv2.resize(np.clip(texture(4) * 1.1 + 6, 0, 255).astype(np.uint8), (120, 120))
    Image.fromarray(brighter).save(root / "images/val/alike.jpg", quality=50)
    add(root, "val", "new.jpg", 16)
    path = root / "flawed.yaml"
    path.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, '<b>dog', cow]\n")
    return path


def test_each_fault_is_counted_once_and_nothing_else(flawed, command):
    outcome = run(command, flawed, "--html", flawed.parent / "page.html")
    assert outcome.status == 1 and found(outcome) == {
        "images of train that cannot be used": 1,
        "label lines that break the rules": 1,
        "labels whose class is not among the 3 names": 1,
        "images of val that are copies of train images": 1,
        "images of val that look like train images": 1,
        "images of one colour": 1,
        "images of train that are copies of others in train": 1,
        "images of train without a label file": 1,
        "label files without an image": 1,
        "label files that several images share": 1,
        "background images of train (empty label files)": 1,
        "label lines that repeat an earlier one": 2,
        "boxes of one class in the same place (IoU above 0.9)": 1,
        "boxes of two classes in the same place (IoU above 0.9)": 1,
        "boxes without a width or height": 1,
        "boxes under 3 px at 640 px": 1,  # 0.004 x 640 = 2.56 px
        "boxes over 95% of the image": 1,
        "boxes that reach more than 0.5 px beyond the image": 1,  # 0.95 + 0.2 / 2 = 1.05
        "classes without a label in train": 1,
        "classes of train without a label in val": 1,
        "classes with fewer than 10 labels in train": 1,
        "images that their EXIF data turn": 1,
        "different sizes of images": 2,
        "anchors of yolov5s.yaml": 9,
    }
    said = outcome.said
    for words in (
        "images/train/cut.jpg: it is a truncated JPEG",
        "labels/train/line.txt, line 2: coordinate '40' is beyond 1",
        "labels/train/class.txt: class 7",
        "images/val/copy.jpg = images/train/again.jpg (with other labels)",
        "images/val/alike.jpg ~ images/train/background.jpg",
        "labels/train/beyond.txt: cat 4.0 px",  # 0.05 of 80
        "labels/train/mixed.txt: cat and <b>dog",
        "labels/train/tiny.txt: cat 2.6 px",
    ):
        assert words in said, words
    # 15 images, of which two have no labels; five have two labels each, the other eight one: 18, 1.2 an image
    assert re.search(r"^train +15 +13 +1 +1 +1 +18 +1\.2$", said, re.M), said


def test_lists_are_taken_at_their_word(tmp_path, command):
    add(tmp_path, "all", "a.jpg", 0, "0 0.5 0.5 0.4 0.4 0.5 0.5 2 0.6 0.6 1")
    add(tmp_path, "all", "b.jpg", 1, "")
    (tmp_path / "train.txt").write_text("images/all/a.jpg\nimages/none/gone.jpg\nimages/all/a.jpg\n")
    (tmp_path / "val.txt").write_text("images/all/b.jpg\n")
    (tmp_path / "d.yaml").write_text("path: .\ntrain: train.txt\nval: val.txt\ntest: images/later\nnames: [cat]\n")
    outcome = run(command, tmp_path / "d.yaml", "--html", tmp_path / "page.html")
    titles = found(outcome)
    assert titles["images that train lists more than once"] == titles["images of train that cannot be used"] == 1
    assert "images/none/gone.jpg: it cannot be read (No such file" in outcome.said
    assert titles["label lines that break the rules"] == 1 and "a box with 2 keypoints" in outcome.said
    assert "splits without a label: val" in titles and not re.search("^test ", outcome.said, re.M)


class Page(html.parser.HTMLParser):
    """Collects what a page refers to and its text, and sees that its elements are closed in order."""

    VOID = {"meta", "link", "img", "rect", "path", "br"}

    def __init__(self, text):
        super().__init__()
        self.links, self.text, self.open, self.tags = [], "", [], set()
        self.feed(text)
        assert not self.open

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_by_itself_and_quotes_what_it_shows(flawed, command):
    run(command, flawed, "--html", flawed.parent / "new" / "page.html")
    text = (flawed.parent / "new" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("data:") for link in page.links) and len(page.links) > 30
    assert not re.search(r"url\(|@import|<script", text) and "{{" not in text
    assert "cat and <b>dog" in page.text and "b" in page.tags and "<b>dog" not in text
    assert "images of val that look like train images" in page.text


def test_a_clean_set_is_nothing_to_mend(tiny_shapes, tmp_path, command):
    outcome = run(command, tiny_shapes, "--html", tmp_path / "page.html")
    assert outcome.status == 0 and "To mend: nothing" in outcome.said


def test_the_clean_copy_has_what_is_well_and_nothing_else(flawed, tmp_path, command):
    before = {path: path.read_bytes() for path in flawed.parent.rglob("*.*")}
    outcome = run(command, flawed, "--html", tmp_path / "page.html", "--fix", tmp_path / "fixed")
    assert outcome.status == 1
    assert (
        "13 train, 2 val images. Left out: 1 images that cannot be used, 2 whose labels break the rules, 1 that are "
        "copies of an earlier split's. Boxes: 1 clipped, 4 removed" in outcome.said
    )
    assert {path: path.read_bytes() for path in flawed.parent.rglob("*.*")} == before
    copy = tmp_path / "fixed" / "flawed.yaml"
    left = found(run(command, copy, "--html", tmp_path / "second.html"))
    wrong = re.compile(
        "cannot be used|break the rules|are copies of train|repeat an|of one class|beyond|without a width"
    )
    assert not [title for title in left if wrong.search(title)]
    labels = copy.parent / "labels" / "train"
    # clipped to 0.85 ... 1: centre 0.925, width 0.15; the polygon stays one
    assert (labels / "beyond.txt").read_text().splitlines() == [
        "0 0.925000 0.500000 0.150000 0.200000",
        "0 0.100000 0.200000 0.300000 0.200000 0.300000 0.600000",
    ]
    assert (labels / "doubled.txt").read_text() == "0 0.500000 0.500000 0.250000 0.250000\n"
    assert (labels / "mixed.txt").read_text() == (flawed.parent / "labels/train/mixed.txt").read_text()
    assert not (labels / "unlabelled.txt").exists() and (labels / "background.txt").read_text() == ""
    spec = load_spec(copy)
    assert len(load_labels(spec.train, spec)) == 13 and spec.names[1] == "<b>dog"
    for path in (copy.parent / "images").rglob("*.*"):
        assert path.read_bytes() == before[flawed.parent / path.relative_to(copy.parent)]


def test_an_interrupted_copy_leaves_nothing(flawed, tmp_path, command, monkeypatch):
    def stop(source, target, copy=shutil.copyfile):
        if "beyond" in str(source):
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(check.shutil, "copyfile", stop)
    (tmp_path / "there").mkdir()
    outcome = run(command, flawed, "--html", tmp_path / "page.html", "--fix", tmp_path / "there" / "fixed")
    assert outcome.status == 130 and not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fix", "{}"), "exists. Give a new folder"),
        (("--fix", "{}/images/val/fixed"), "lies among the images"),
        (("--html", "{}/flawed.yaml/page.html"), "--html"),
        (("--html", "{}"), "is a folder"),
        (("--fix", "{}/flawed.yaml/fixed"), "--fix"),
        (("--cfg", "yolov5.yaml"), "--cfg 'yolov5.yaml'"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(flawed, command, arguments, words):
    outcome = run(command, flawed, *(argument.format(flawed.parent) for argument in arguments))
    outcome.assert_refused(words)
    assert "Reading images" not in outcome.said


def test_a_split_that_is_the_training_set_cannot_be_mended(tiny_shapes, data, tmp_path, command):
    content = yaml.safe_load(data.read_text())
    data.write_text(yaml.safe_dump(content | {"val": content["train"]}))
    outcome = run(command, data, "--html", tmp_path / "page.html", "--fix", tmp_path / "fixed")
    assert found(outcome)["images of val that are copies of train images"] == 24
    assert "would leave no image of val: all 24 are copies" in outcome.said and not (tmp_path / "fixed").exists()


def test_best_possible_recall_is_of_the_training_labels_at_the_image_size(tmp_path, command):
    # Longer side 80 -> 320 px: boxes of 32 and 96 px. An anchor of 16 px matches up to 64 px, one of 4 px up to 16 px.
    add(tmp_path, "train", "a.jpg", 0, "0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.3 0.3")
    add(tmp_path, "val", "b.jpg", 1, "0 0.5 0.5 0.1 0.1")
    (tmp_path / "d.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat]\n")
    (tmp_path / "m.yaml").write_text("anchors:\n  - [16, 16]\n  - [4, 4]\n")
    options = ("--cfg", tmp_path / "m.yaml", "--html", tmp_path / "p.html", "--imgsz", 320)
    assert (
        "recall 0.500 on the training labels at 320 px, 0.50 anchors per label"
        in run(command, tmp_path / "d.yaml", *options).said
    )


def variants(image):
    """Copies that a person calls the same image: re-encoded, smaller, stretched to a square, brighter, noisy."""
    noise = np.random.default_rng(0).normal(0, 8, image.shape)
    yield cv2.imdecode(cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 40))[1], cv2.IMREAD_COLOR)
    yield cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    yield cv2.resize(image, (416, 416))
    yield np.clip(image * 1.15 + 10, 0, 255).astype(np.uint8)
    yield np.clip(image + noise, 0, 255).astype(np.uint8)


def bits_between(one, other):
    return int(np.unpackbits(np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)).sum())


def test_copies_of_real_images_are_near_and_others_far(datasets_dir):
    paths = [
        path
        for name, step in (("coco128", 16), ("bccd", 40), ("plates", 90))
        for path in sorted((datasets_dir / name / "images").rglob("*.jpg"))[::step]
    ]
    images = [read_image(path, 512) for path in paths]
    hashes = [perceptual_hash(image) for image in images]
    for image, original in zip(images, hashes, strict=True):
        assert max(bits_between(perceptual_hash(copy), original) for copy in variants(image)) <= NEAR_BITS // 2 + 4
    others = [bits_between(one, other) for index, one in enumerate(hashes) for other in hashes[:index]]
    assert len(others) > 200 and min(others) > 1.2 * NEAR_BITS


def test_groups_and_neighbours_agree_with_all_pairs():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (60, 32)).astype(np.uint8)
    for target, source, flipped in ((7, 3, 48), (20, 7, 48), (33, 40, 49), (50, 51, 0)):  # 3 - 7 - 20: a chain
        bits = np.unpackbits(hashes[source])
        bits[flipped : 2 * flipped] ^= 1
        hashes[target] = np.packbits(bits)
        if target == 20:
            bits = np.unpackbits(hashes[7])
            bits[150 : 150 + flipped] ^= 1
            hashes[20] = np.packbits(bits)
    distances = np.unpackbits(hashes[:, None] ^ hashes[None], axis=2).sum(axis=2)
    assert distances[3, 20] > NEAR_BITS
    assert [group.tolist() for group in similar_groups(hashes)] == [[3, 7, 20], [50, 51]]
    indices, bits = nearest(hashes[:25], hashes[25:])
    np.testing.assert_array_equal(bits, distances[:25, 25:].min(axis=1))
    np.testing.assert_array_equal(distances[np.arange(25), 25 + indices], bits)
