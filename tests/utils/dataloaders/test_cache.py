"""The label cache: reused for the same files only, rebuilt when stale or damaged, never a reason to stop."""

import errno
import logging
import os
import pickle
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.dataloaders import labels as labels_module
from utils.dataloaders.labels import cache_key, cache_location, load_labels, read_cache, scan_images, write_cache
from utils.dataloaders.paths import image_to_label_path, list_images
from utils.files import atomic_write


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "labels" / "train").mkdir(parents=True)
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((20, 30, 3), 40 * index, np.uint8))
        (tmp_path / "labels" / "train" / f"{index}.txt").write_text(f"{index} 0.5 0.5 0.1 0.1\n{index} 0 0 1 0 1 1\n")
    return folder


@pytest.fixture
def scans(monkeypatch):
    """Counts how often images are looked at."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return scan_images(*arguments)

    monkeypatch.setattr(labels_module, "scan_images", counted)
    return calls


def key_of(images):
    paths = list_images([images])
    return cache_key(paths, [image_to_label_path(path) for path in paths])


def assert_same(one, other):
    assert list(one.image_paths) == list(other.image_paths)
    assert one.counts == other.counts and one.messages == other.messages
    for name in ("sizes_wh", "rows", "offsets", "seg_points", "seg_offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_second_start_reads_the_cache_and_finds_the_same(images, scans, tmp_path):
    first, second = load_labels([images]), load_labels([images])
    assert len(scans) == 1 and (tmp_path / "labels" / "train.cache.npz").is_file()
    assert_same(first, second)


@pytest.mark.parametrize("later_ns", [0, 1])
def test_an_edit_of_the_same_size_is_noticed(images, scans, tmp_path, later_ns):
    """Also one whose time is set back, as rsync -t, cp -p and unpacking an archive of fixed times do."""
    load_labels([images])
    label = tmp_path / "labels" / "train" / "0.txt"
    status = label.stat()
    label.write_text(label.read_text().replace("0.5", "0.6"))
    os.utime(label, ns=(status.st_atime_ns, status.st_mtime_ns + later_ns))
    assert load_labels([images]).labels(0)[0, 1] == np.float32(0.6) and len(scans) == 2


@pytest.mark.parametrize("change", ["image added", "image removed", "label removed", "image touched"])
def test_every_other_change_is_noticed(images, tmp_path, change):
    before = key_of(images)
    if change == "image added":
        (images / "9.png").write_bytes((images / "0.png").read_bytes())
    elif change == "image removed":
        (images / "0.png").unlink()
    elif change == "label removed":
        (tmp_path / "labels" / "train" / "0.txt").unlink()
    else:
        os.utime(images / "0.png", ns=(0, 1))
    assert key_of(images) != before


@pytest.mark.parametrize("how", ["text", "single array", "empty zip"])
def test_what_is_no_archive_of_arrays_is_named_and_made_anew(images, scans, tmp_path, caplog, how):
    expected, path = load_labels([images]), tmp_path / "labels" / "train.cache.npz"
    with open(path, "wb") as file:
        file.write(b"not a cache") if how == "text" else None
        np.save(file, np.zeros(3)) if how == "single array" else None
        zipfile.ZipFile(file, "w").close() if how == "empty zip" else None
    with caplog.at_level(logging.WARNING, logger="yolov5"):
        table = load_labels([images])
    assert_same(expected, table)
    assert len(scans) == 2 and any("damaged" in record.message for record in caplog.records)
    assert_same(table, read_cache(path, key_of(images)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offsets", np.array([0, 2, 99, 6])),
        ("offsets", np.array([0, 4, 2, 6])),
        ("offsets", np.zeros(0, np.int64)),
        ("seg_offsets", np.array([0, 0, 3, 3, 6, 6, 10**9])),
        ("path_offsets", np.array([0, 5, 5, 10**9])),
        ("rows", np.zeros((6, 4), np.float32)),
        ("rows", np.full((6, 5), np.nan, np.float32)),
        ("rows", np.full((6, 5), 2, np.float32)),
        ("rows", np.full((6, 5), 0.5, np.float32)),  # half a class
        ("rows", np.full((6, 5), -1, np.float32)),
        ("seg_points", np.full((6, 2), np.inf, np.float32)),
        ("counts", np.array([-1, 0, 0, 0, 0])),
        ("rows", np.zeros((6, 5), np.float64)),
        ("sizes_wh", np.zeros((3, 2), np.int32)),
        ("sizes_wh", np.array([object()] * 3)),
        ("counts", np.zeros(7, np.int64)),
        ("messages", np.frombuffer(b'{"a": 1}', np.uint8)),
    ],
)
def test_arrays_that_do_not_fit_together_are_damage(images, tmp_path, name, value):
    path, key = tmp_path / "labels.cache.npz", key_of(images)
    assert write_cache(path, key, scan_images(list_images([images])))
    with np.load(path) as archive:
        arrays = dict(archive) | {name: value}
    np.savez(path, **arrays)
    assert read_cache(path, key) is None


@pytest.mark.parametrize("header", ["{'descr': '<U16', 'shape': (", "{'descr': '<f4', 'shape': ), }", "\0", "(" * 9000])
def test_an_array_header_that_is_no_python_literal_is_damage(tmp_path, header):
    path = tmp_path / "labels.cache.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode())
    assert read_cache(path, "any") is None


def test_a_disk_that_fills_up_leaves_the_former_cache_and_no_other_file(images, tmp_path, monkeypatch):
    """Whoever reads meanwhile sees the former cache or the new one, never a part."""
    table = load_labels([images])
    path, before = cache_location([images]), cache_location([images]).read_bytes()

    def half(file, **_):
        file.write(before[: len(before) // 2])
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.dataloaders.labels.np.savez", half)
    assert write_cache(path, "another key", table) is False
    assert path.read_bytes() == before
    assert [file.name for file in (tmp_path / "labels").iterdir() if file.is_file()] == [path.name]


def test_a_folder_that_cannot_be_written_is_a_warning(images, caplog, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with caplog.at_level(logging.WARNING, logger="yolov5"):
        table = load_labels([images])
    assert len(table) == 3 and any("no label cache" in record.message for record in caplog.records)


def test_caches_of_other_programs_are_left_alone(images, tmp_path):
    other = tmp_path / "labels" / "train.cache"
    other.write_bytes(pickle.dumps({"version": 0.6}))
    before = other.read_bytes()
    load_labels([images])
    assert other.read_bytes() == before


def test_each_combination_of_sources_has_a_place_of_its_own(tmp_path):
    for name in ("images/a", "images/b", "images/v1.0", "plain"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "list.v2.txt").write_text("")
    a, b, dotted, plain = (tmp_path / name for name in ("images/a", "images/b", "images/v1.0", "plain"))
    assert cache_location([a]) == tmp_path / "labels" / "a.cache.npz"
    assert cache_location([dotted]) == tmp_path / "labels" / "v1.0.cache.npz"
    assert cache_location([plain]) == tmp_path / "plain.cache.npz"
    assert cache_location([tmp_path / "list.v2.txt"]) == tmp_path / "list.v2.cache.npz"
    places = {cache_location(sources) for sources in ([a], [b], [a, b], [b, a], [plain, b], [a, plain])}
    assert len(places) == 6


def test_what_a_killed_process_left_is_removed_once_it_is_a_day_old(images, tmp_path):
    """Until then another process may be writing it."""
    labels, day = tmp_path / "labels", 24 * 3600
    others = [".val.cache.npz.0123abcd.tmp", ".train.cache.npz.notes.tmp", "train.cache.npz.0123abcd.tmp"]
    for name in others:
        (labels / name).touch()
        os.utime(labels / name, (0, 0))
    with atomic_write(labels / "train.cache.npz") as half:
        for age, stays in ((day - 600, True), (day + 600, False)):
            os.utime(half, (time.time() - age,) * 2)
            load_labels([images])
            assert sorted(path.name for path in labels.iterdir()) == sorted(
                [*others, *[half.name] * stays, "train", "train.cache.npz"]
            )
        half.touch()


def test_a_temporary_that_cannot_be_removed_is_left(images, tmp_path, monkeypatch):
    left = tmp_path / "labels" / ".train.cache.npz.0123abcd.tmp"
    left.touch()
    os.utime(left, (0, 0))

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert len(load_labels([images])) == 3 and left.exists()
