"""Which files belong to a data set: links that lead back, and list files with more than images."""

import logging

import pytest

from utils.data.paths import list_images


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
def test_lines_of_a_list_that_name_no_image_are_counted(tmp_path, caplog, monkeypatch, text, count):
    monkeypatch.setattr(logging.getLogger("yolov5"), "propagate", True)
    (tmp_path / "list.txt").write_text(text)
    images = list_images([tmp_path / "list.txt"])
    assert len(images) == len(text.split()) - count
    said = [record.getMessage() for record in caplog.records]
    words = f"{tmp_path / 'list.txt'}: {count} lines name no image and are left out, such as 'notes.doc'"
    assert said == ([f"WARNING: {words}"] if count else [])
