"""Splits: classes in proportion, groups that stay together, the same lists again, and YAMLs that the program reads."""

import re
from collections import Counter

import cv2
import numpy as np
import pytest

from utils.dataloaders.config import load_spec
from utils.dataloaders.paths import list_images
from utils.tools import split as command_module
from utils.tools.split import group_names, stratify


def generator(seed=0):
    return np.random.Generator(np.random.Philox(seed))


@pytest.fixture
def frames(tmp_path):
    """Six videos of four frames; class 0 is in all frames, class 1 in those of the first three videos alone."""
    for kind in ("images", "labels"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for video in range(6):
        for frame in range(4):
            name = f"clip{video}_{frame:03}"
            cv2.imwrite(str(tmp_path / "set" / "images" / f"{name}.jpg"), np.full((16, 16, 3), 40 * video, np.uint8))
            lines = ["0 0.5 0.5 0.2 0.2", *["1 0.3 0.3 0.2 0.2"] * (video < 3)]
            (tmp_path / "set" / "labels" / f"{name}.txt").write_text("\n".join(lines))
    return tmp_path / "set"


def run(command, *arguments):
    outcome = command(command_module, *arguments)
    assert outcome.status == 0, outcome.said
    return outcome


def videos_of(images):
    return Counter(re.search(r"clip\d", image)[0] for image in images)


def test_the_rarest_class_is_dealt_out_first_and_to_where_it_lacks():
    # Class 1 (2 images) goes first, one to each half; class 0 (4 more) follows: 3 of its 6 images in each.
    per_class = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [1, 0], [1, 0]])
    for seed in range(10):
        subsets = stratify(per_class, np.ones(6, int), (0.5, 0.5), generator(seed))
        assert Counter(subsets[:2]) == {0: 1, 1: 1} and Counter(subsets) == {0: 3, 1: 3}


def test_every_class_is_nearer_to_its_share_than_at_random():
    images = generator(3).random((600, 12)) < np.geomspace(0.4, 0.01, 12)  # frequent to rare, several in an image
    shares, sizes = (0.7, 0.2, 0.1), np.ones(600, int)

    def worst(subsets):
        got = np.stack([images[subsets == part].sum(0) for part in range(3)])
        return np.abs(got - np.outer(shares, images.sum(0))).max()

    subsets = stratify(images.astype(int), sizes, shares, generator())
    at_random = [worst(generator(seed).choice(3, 600, p=shares)) for seed in range(20)]
    assert worst(subsets) <= 3 < min(at_random)
    assert np.abs(np.bincount(subsets) - 600 * np.array(shares)).max() <= 6


def test_a_group_counts_as_its_images():
    # One group of 6 images and six single ones: the large one fills a half alone.
    sizes = np.array([1, 1, 1, 6, 1, 1, 1])
    for per_class in (sizes[:, None], np.zeros((7, 1), int)):  # all with class 0; all background
        for seed in range(5):
            subsets = stratify(per_class, sizes, (0.5, 0.5), generator(seed))
            assert [subsets[3]] * 6 == [1 - part for part in np.delete(subsets, 3)]


def test_groups_are_what_the_pattern_encloses():
    paths = ["/d/train/a_1.jpg", "/d/train/a_2.jpg", "/d/val/a_3.jpg", "/d/val/b.jpg"]
    assert group_names(paths, r"(\w)_\d") == ["group a", "group a", "group a", "val/b.jpg"]
    assert len(set(group_names(paths, r"^\w+/"))) == 2
    assert len(set(group_names(paths))) == 4


def test_frames_of_a_video_stay_together_and_nothing_moves(frames, tmp_path, command):
    before = {path: path.read_bytes() for path in frames.rglob("*.*")}
    said = run(
        *(command, frames / "images", "--val", 0.34, "--group-by", r"clip\d", "--names", "car", "bus"),
        *("--project", tmp_path / "runs"),
    ).said
    spec = load_spec(tmp_path / "runs" / "exp" / "data.yaml", download=False)
    train, val = (list_images(part) for part in (spec.train, spec.val))
    assert sorted(train + val) == sorted(map(str, (frames / "images").iterdir())) and spec.names == {0: "car", 1: "bus"}
    assert set(videos_of(train).values()) == set(videos_of(val).values()) == {4} and len(val) == 8
    assert min(videos_of(val)) < "clip3" <= max(videos_of(val)), "one video with class 1 and one without"
    assert re.search(r"^bus +8 +4$", said, re.M)
    assert {path: path.read_bytes() for path in before} == before


def test_the_seed_decides(frames, tmp_path, command):
    for seed in (1, 1, 2):
        run(command, frames / "images", "--project", tmp_path / "runs", "--seed", seed)
    first, again, other = ((tmp_path / "runs" / name / "val.txt").read_text() for name in ("exp", "exp2", "exp3"))
    assert first == again != other


def test_folds_validate_every_image_once_and_leave_the_test_images_alone(frames, tmp_path, command):
    for kind in ("images", "labels"):
        (frames / kind / "test").mkdir()
        for path in (frames / kind).glob("clip5*"):
            path.rename(path.parent / "test" / path.name)
    (frames / "d.yaml").write_text(
        "path: .\ntrain: train.txt\nval: train.txt\ntest: images/test\nnames: [car, bus]\nkpt_shape: [0, 2]\n"
    )
    (frames / "train.txt").write_text("".join(f"./images/{path.name}\n" for path in (frames / "images").glob("*.jpg")))
    run(command, frames / "d.yaml", "--folds", 4, "--project", frames / "runs")
    validated = []
    for fold in range(1, 5):
        spec = load_spec(frames / "runs" / "exp" / f"data-fold{fold}.yaml", need=("train", "val", "test"))
        train, val = (list_images(part) for part in (spec.train, spec.val))
        assert len(val) == 5 and not set(train) & set(val) and spec.kpt_shape == (0, 2)
        assert spec.test == (frames / "images" / "test",)
        validated += val
    assert len(validated) == len(set(validated)) == 20
    run(command, frames / "d.yaml", "--test", 0.5, "--project", frames / "runs")
    spec = load_spec(frames / "runs" / "exp2" / "data.yaml", need=("test",))
    assert len(list_images(spec.test)) == 12, "half of all 24: with --test the former test images are divided too"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--group-by", "("), "not a regular expression"),
        (("--group-by", "video"), "found in none of the 24 images"),
        (("--val", 0.6, "--test", 0.4), "must remain for training"),
        (("--val", 0.2, "--folds", 3), "give one of them"),
        (("--folds", 7, "--group-by", r"clip\d"), "24 images in 6 groups leave none for 'fold"),
        (("--names", "car"), "1 names for labels with classes up to 1"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_no_folder(frames, tmp_path, command, arguments, words):
    outcome = command(command_module, frames / "images", "--project", tmp_path / "runs", *arguments)
    outcome._replace(prog="utils.tools.split").assert_refused(words)
    assert not (tmp_path / "runs").exists()
