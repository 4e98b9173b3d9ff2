"""Images from files, memory and disk: the same pixels from all, and clear words when something is wrong."""

import errno
import os
import pickle

import cv2
import numpy as np
import pytest

from utils.dataloaders import images_cache
from utils.dataloaders.images_cache import DiskImages, ImageFiles, RamImages, RecentImages, make_source
from utils.errors import UserError
from utils.files import temporary_beside


@pytest.mark.parametrize("augment", [True, False])
def test_memory_and_disk_hold_the_pixels_of_the_files(label_table, augment):
    files = ImageFiles(label_table, 96, augment)
    ram, disk = RamImages(files), DiskImages(files)
    ram.fill()
    disk.fill()
    again = DiskImages(files)
    spawned = pickle.loads(pickle.dumps(ram))
    for index in range(len(label_table)):
        image = files.read(index)
        assert max(image.shape) == 96 and not image.flags.writeable
        for source in (ram, disk, again, spawned, RecentImages(files, 10**6)):
            assert np.array_equal(source.read(index), image) and not source.read(index).flags.writeable


def test_sides_round_up_and_colours_are_rgb(tmp_path, label_table):
    path = label_table.image_paths[0]
    cv2.imwrite(path, np.full((96, 128, 3), (250, 5, 5), np.uint8))  # blue
    image = ImageFiles(label_table, 50, augment=True).read(0)
    assert image.shape == (38, 50, 3)  # 96 * 50 / 128 = 37.5
    assert image[..., 2].min() > 200 and image[..., 0].max() < 60


def test_large_jpegs_shrink_while_they_are_decoded_in_training_only(monkeypatch, label_table):
    decoded = []
    read_image = images_cache.read_image
    monkeypatch.setattr(images_cache, "read_image", lambda *a, **k: decoded.append(read_image(*a, **k)) or decoded[-1])
    sizes = [ImageFiles(label_table, 100, augment).read(5).shape for augment in (True, False)]
    assert [image.shape[:2] for image in decoded] == [(100, 150), (200, 300)]
    assert sizes == [(67, 100, 3)] * 2


@pytest.mark.parametrize(
    ("index", "augment", "method"),
    [
        (0, True, cv2.INTER_LINEAR),
        (0, False, cv2.INTER_AREA),
        (7, True, cv2.INTER_LINEAR),
        (7, False, cv2.INTER_LINEAR),
    ],
)
def test_evaluation_shrinks_images_by_averaging(label_table, index, augment, method):
    """The image of 128 x 96 px; that of 40 x 30 px is enlarged."""
    full = cv2.cvtColor(cv2.imread(label_table.image_paths[index]), cv2.COLOR_BGR2RGB)
    expected = cv2.resize(full, (96, 72), interpolation=method)
    assert np.array_equal(ImageFiles(label_table, 96, augment).read(index), expected)


def test_copies_on_disk_follow_their_image(label_table):
    disk = DiskImages(ImageFiles(label_table, 64, augment=True))
    path = label_table.image_paths[0]
    disk.read(0)
    first_copy = disk.copy_path(0)
    assert first_copy.is_file() and first_copy.parent.name == "images_npy"
    status, size = os.stat(path), os.path.getsize(path)
    cv2.imwrite(path, np.full((96, 128, 3), 50, np.uint8))
    with open(path, "ab") as file:  # of the same size, as images without compression are, and of the same time
        file.truncate(max(size, file.tell()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.path.getsize(path) == size and disk.copy_path(0) != first_copy
    assert np.abs(disk.read(0).astype(int) - 50).max() <= 1
    assert DiskImages(ImageFiles(label_table, 32, augment=True)).copy_path(0) != disk.copy_path(0)
    assert DiskImages(ImageFiles(label_table, 64, augment=False)).copy_path(0) != disk.copy_path(0)


@pytest.mark.parametrize("damage", [b"", b"text", None])
def test_a_damaged_copy_is_made_again(label_table, damage):
    disk = DiskImages(ImageFiles(label_table, 64, augment=True))
    image = disk.read(0)
    copy = disk.copy_path(0)
    copy.write_bytes(copy.read_bytes()[:500] if damage is None else damage)
    assert np.array_equal(disk.read(0), image)
    assert np.array_equal(np.load(copy, allow_pickle=False), image)


class Touch:
    """Unpickled freely, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "npy of objects"])
def test_a_copy_that_is_a_pickle_is_never_unpickled(tmp_path, label_table, wrapped):
    disk, canary = DiskImages(ImageFiles(label_table, 64, augment=True)), tmp_path / "canary"
    image, copy = disk.read(0), disk.copy_path(0)
    with open(copy, "wb") as file:
        if wrapped:
            np.save(file, np.array([Touch(canary)], object), allow_pickle=True)
        else:
            pickle.dump(Touch(canary), file)
    assert np.array_equal(disk.read(0), image) and not canary.exists()
    with open(copy, "rb") as file:
        assert np.load(file, allow_pickle=False).shape == image.shape  # made again


def test_a_write_that_fails_leaves_the_former_copy_or_none_and_no_other_file(label_table, monkeypatch):
    """Another process that reads meanwhile must see all of a copy or nothing."""
    disk = DiskImages(ImageFiles(label_table, 64, augment=True))
    whole = disk.read(0)
    disk.copy_path(1).write_bytes(former := b"a former copy, of which nothing may be lost before the new one is whole")

    def half(handle, array, **_):
        handle.write(array.tobytes()[:1000])
        handle.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images_cache.np, "save", half)
    for index in (1, 2):
        with pytest.raises(UserError, match=r"--cache disk cannot write here \(No space left on device\)"):
            disk.read(index)
    assert np.array_equal(disk.read(0), whole) and disk.copy_path(1).read_bytes() == former
    names = sorted(path.name for path in disk.copy_path(0).parent.iterdir())
    assert names == sorted(disk.copy_path(index).name for index in (0, 1))


def test_filling_clears_what_a_killed_process_left(label_table):
    disk = DiskImages(ImageFiles(label_table, 64, augment=True))
    disk.read(0)
    left = temporary_beside(disk.copy_path(0))
    left.touch()
    os.utime(left, (0, 0))
    disk.fill()
    assert not left.exists() and len(list(left.parent.iterdir())) == len(label_table)


def test_a_start_makes_again_only_copies_that_are_cut_or_of_another_kind(label_table, monkeypatch):
    DiskImages(ImageFiles(label_table, 64, augment=True)).fill()
    disk = DiskImages(ImageFiles(label_table, 64, augment=True))
    cut, other = disk.copy_path(1), disk.copy_path(3)
    cut.write_bytes(cut.read_bytes()[:-1])
    other.write_bytes(other.read_bytes().replace(b"|u1", b"|i1"))
    decoded, read_image = [], images_cache.read_image
    monkeypatch.setattr(images_cache, "read_image", lambda *a, **k: decoded.append(a[0]) or read_image(*a, **k))
    for _ in range(2):
        disk.fill()
        assert sorted(decoded) == [label_table.image_paths[1], label_table.image_paths[3]]


class Neighbour:
    """One of two processes of a machine; they share a dict."""

    local_size = 2

    def __init__(self, local_rank: int, word: dict):
        self.local_rank, self.word = local_rank, word

    def broadcast_str_local(self, text: str = "") -> str:
        if self.local_rank == 0:
            self.word["text"] = text
        return self.word["text"]


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_of_several_processes_the_first_fills_the_cache_and_all_use_it(label_table, monkeypatch, cache):
    word, decoded, read_image = {}, [], images_cache.read_image
    monkeypatch.setattr(images_cache, "read_image", lambda *a, **k: decoded.append(a[0]) or read_image(*a, **k))
    first = make_source(label_table, 64, True, cache, "", Neighbour(0, word))
    monkeypatch.setattr(images_cache, "memory_left", lambda: 0)  # a second copy would not fit
    second = make_source(label_table, 64, True, cache, "", Neighbour(1, word))
    assert len(decoded) == len(label_table)
    for index in range(len(label_table)):
        assert np.array_equal(first.read(index), second.read(index))
    assert len(decoded) == len(label_table)
    if cache == "ram":
        first.buffer[5] = 255 - first.buffer[5]
        assert second.buffer[5] == first.buffer[5]
        address = first.address
        del first, second
        assert not os.path.exists(address)


def test_memory_that_cannot_be_shared_is_not_taken_twice(label_table, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert RamImages(ImageFiles(label_table, 64, True)).address == ""
    with pytest.raises(UserError, match="--cache ram: only on Linux do several processes share one"):
        make_source(label_table, 64, True, "ram", "", Neighbour(0, {}))


def test_a_folder_that_takes_no_copies_is_named(tmp_path, label_table):
    (tmp_path / "images_npy").write_text("in the way")
    with pytest.raises(UserError, match="--cache disk cannot write here"):
        DiskImages(ImageFiles(label_table, 64, augment=True)).fill()


def test_more_images_than_memory_are_refused_with_numbers(monkeypatch, label_table):
    monkeypatch.setattr(images_cache, "memory_left", lambda: 100_000)
    with pytest.raises(UserError, match=r"--cache ram: 21 images at 96 px take 0\.0 GB.*--cache disk"):
        RamImages(ImageFiles(label_table, 96, augment=True))


def test_images_that_changed_since_the_scan_are_named(tmp_path, label_table):
    files = ImageFiles(label_table, 64, augment=True)
    cv2.imwrite(label_table.image_paths[1], np.zeros((70, 70, 3), np.uint8))
    with pytest.raises(UserError, match=r"01\.jpg: is 70x70 px, but was 96x128 px"):
        files.read(1)
    (tmp_path / "images" / "02.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"02\.jpg: .*when the data set was scanned"):
        files.read(2)
    (tmp_path / "images" / "03.jpg").unlink()
    for source in (files, DiskImages(files)):
        with pytest.raises(UserError, match=r"03\.jpg: .*No such file"):
            source.read(3)


def test_recent_images_keep_to_their_bytes_and_forget_the_oldest(label_table):
    files = ImageFiles(label_table, 64, augment=True)
    sizes = [files.read(index).nbytes for index in range(3)]
    recent = RecentImages(files, sum(sizes))
    for index in (0, 1, 2, 0, 1, 2):
        recent.read(index)
    assert recent.misses == 3
    recent.read(0)  # now 1 is the oldest
    recent.read(8)
    misses = recent.misses
    recent.read(1)
    assert recent.misses == misses + 1
