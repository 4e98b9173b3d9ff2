"""Which files belong to a data set: links that lead back, and list files with more than images."""

import logging

import pytest

from utils.dataloaders.paths import is_image, list_images
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
    assert list_images([top]) == [str(top / "a.jpg"), str(top / "deep" / "b.jpg")]
    assert said() == [f"{top}: 4 hidden files and folders are passed over, such as {top / '._a.jpg'}"]
    assert find_sources(top) == find_sources(top / "*") == [str(top / "a.jpg")]
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


def test_a_list_in_utf_16_is_named(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"list\.txt: it is text in UTF-16\. Save it in UTF-8"):
        list_images([tmp_path / "list.txt"])


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


@pytest.mark.parametrize(("text", "count"), [("a.jpg\nnotes.doc\n\nfolder\n", 2), ("a.jpg\n\n./b.png\n", 0)])
def test_lines_of_a_list_that_name_no_image_are_counted(tmp_path, said, text, count):
    (tmp_path / "list.txt").write_text(text)
    images = list_images([tmp_path / "list.txt"])
    assert len(images) == len(text.split()) - count
    words = f"{tmp_path / 'list.txt'}: {count} lines name no image and are left out, such as 'notes.doc'"
    assert said() == ([f"WARNING: {words}"] if count else [])
