"""Which files belong to a data set: folders, links that lead back, list files, labels beside images, splits."""

import logging
from pathlib import PureWindowsPath

import pytest

from utils.dataloaders.paths import autosplit, image_to_label_path, is_image, list_images
from utils.errors import UserError
from utils.media.sources import find_sources


@pytest.fixture
def said(caplog, monkeypatch):
    """Returns what the program has logged since the last call."""
    monkeypatch.setattr(logging.getLogger("yolov5"), "propagate", True)

    def lines():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    caplog.set_level(logging.INFO, "yolov5")
    return lines


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_hidden_files_and_folders_are_passed_over_and_said_once(tmp_path, said):
    top = make(tmp_path / ".home" / "images", "a.jpg", "deep/b.jpg", ".DS_Store", ".gitkeep", "deep/._b.jpg", "._a.jpg")
    make(top, ".ipynb_checkpoints/a-checkpoint.jpg", "deep/.Trash-1000/files/c.jpg")
    make(top, "A.PNG", "c.txt")
    assert list_images([top]) == [str(top / name) for name in ("A.PNG", "a.jpg", "deep/b.jpg")]
    assert said() == [f"{top}: 4 hidden files and folders are passed over, such as {top / '._a.jpg'}"]
    assert find_sources(top) == find_sources(top / "*") == [str(top / "A.PNG"), str(top / "a.jpg")]
    assert said() == [f"{top}: 1 hidden files are skipped, such as {top / '._a.jpg'}"]
    listing = tmp_path / "list.txt"
    listing.write_text(f"{top / 'a.jpg'}\n{top / '._a.jpg'}\n")
    assert list_images([listing]) == [str(top / "a.jpg")]
    assert len(said()) == 1


@pytest.mark.parametrize(
    ("name", "image"),
    [("a.JPG", True), ("x/.b/a.tif", True), (".a.jpg", False), (r"C:\x\._a.jpg", False), (".jpg", False)],
)
def test_a_name_tells_an_image(name, image):
    assert is_image(name) == image


def test_images_of_kinds_that_are_not_read_are_counted_and_named(tmp_path, said):
    top = make(tmp_path / "images", "a.jpg", "b.HEIC", "deep/c.jxl", "d.jp2", "a.txt", "notes.md", "._e.heic")
    assert list_images([top]) == [str(top / "a.jpg")]
    first = f"WARNING: {top}: 3 images are left out, such as {top / 'b.HEIC'}: files of these kinds "
    assert said() == [f"{first}(heic, jp2, jxl) are not read. Convert them to JPEG or PNG."]


def test_links_to_folders_are_followed_but_not_back_to_where_they_lie(tmp_path):
    outside = tmp_path / "outside"
    inside = tmp_path / "set" / "deep"
    for folder in (outside, inside):
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.jpg").touch()
    (inside / "up").symlink_to(tmp_path / "set")
    (inside / "here").symlink_to(inside)
    (inside / "elsewhere").symlink_to(outside)
    assert list_images([tmp_path / "set"]) == [str(inside / "deep.jpg"), str(inside / "elsewhere" / "outside.jpg")]


def test_lists_are_searched_from_their_own_folder_then_the_working_folder(tmp_path, monkeypatch, said):
    top = make(tmp_path, "here.jpg", "sets/sub/there.jpg", "abs.jpg", "sets/both.jpg", "both.jpg")
    monkeypatch.chdir(top)
    listing, absolute = top / "sets" / "train.txt", top / "abs.jpg"
    listing.write_text(f"./sub/a.jpg\nhere.jpg\nsub/there.jpg\n.\\sub\\win.jpg\n{absolute}\nnotes.md\nboth.jpg\n")
    expected = [top / name for name in ("sets/sub/a.jpg", "here.jpg", "sets/sub/there.jpg", "sets/sub/win.jpg")]
    assert list_images([listing]) == sorted(map(str, [*expected, absolute, top / "sets" / "both.jpg"]))
    no_image, twice = said()
    assert no_image == f"WARNING: {listing}: 1 lines name no image and are left out, such as 'notes.md'"
    assert twice.endswith(f"folder: {top / 'sets' / 'both.jpg'} is taken, not {top / 'both.jpg'}")


def test_sources_without_images_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="No images found in"):
        list_images([tmp_path / "images"])
    with pytest.raises(UserError, match="gone"):
        list_images([tmp_path / "gone"])


def test_label_paths_follow_the_last_images_folder():
    assert image_to_label_path("/d/images/x/images/a.b.jpg", "/") == "/d/images/x/labels/a.b.txt"
    assert image_to_label_path("/d/pictures/a.jpg", "/") == "/d/pictures/a.txt"
    windows = str(PureWindowsPath("D:/sets/images/train/a.jpg"))
    assert image_to_label_path(windows, "\\") == r"D:\sets\labels\train\a.txt"


def test_autosplit_covers_every_image_once_and_repeats(tmp_path):
    images = make(tmp_path / "images", *(f"{index:03}.jpg" for index in range(40)))
    make(tmp_path / "labels", *(f"{index:03}.txt" for index in range(30)))
    first = {split: path.read_text() for split, path in autosplit(images, (0.6, 0.2, 0.2)).items()}
    second = {split: path.read_text() for split, path in autosplit(images, (0.6, 0.2, 0.2)).items()}
    assert first == second and set(first) == {"train", "val", "test"}
    lines = sorted("".join(first.values()).splitlines())
    assert lines == [f"./images/{index:03}.jpg" for index in range(40)]
    assert list_images([tmp_path / "autosplit_val.txt"]) == [
        str(tmp_path / line[2:]) for line in first["val"].splitlines()
    ]
    written = autosplit(images, annotated_only=True)
    assert sum(len(path.read_text().splitlines()) for path in written.values()) == 30
    assert "test" not in written and not (tmp_path / "autosplit_test.txt").exists()
    with pytest.raises(UserError, match="weights"):
        autosplit(images, (0, 0, 0))
