"""Where a data set's images come from: files, or copies kept in memory or on disk (`--cache ram|disk`).

Each class has `read(index)`, which returns image `index` as uint8 (h, w, 3) RGB with its long side at the training
size, read-only; all of them return the same pixels. They wrap one another: memory in front of disk in front of files.
"""

from __future__ import annotations

import hashlib
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import cv2
import numpy as np
import torch

from utils.dataloaders.labels import LabelTable
from utils.errors import UserError, memory_left
from utils.files import remove_temporaries, temporary_beside
from utils.images import ImageError, read_image, resize, resized_wh
from utils.log import progress

FILL_THREADS = 8
REDUCTIONS = (1, 2, 4, 8)  # by how much a JPEG may have been shrunk while it was decoded
RAM_SHARE = 0.9  # of what is left that images may take
_GB = 1e9
Result = TypeVar("Result")


class ImageSource(Protocol):
    """Anything that images can be read from."""

    def read(self, index: int) -> np.ndarray:
        """Returns image `index`, uint8 (h, w, 3) RGB, read-only."""
        ...


class Machine(Protocol):
    """The processes of a run that are on this machine; see `utils.train.distributed.World`."""

    local_rank: int
    local_size: int

    def broadcast_str_local(self, text: str = "") -> str:
        """Returns the text that the first of them hands in."""
        ...


class ImageFiles:
    """The image files themselves: decoded and resized at each call.

    In training a JPEG of at least twice the size is decoded at a half, a quarter or an eighth; evaluation decodes all
    pixels, as detection does.
    """

    def __init__(self, table: LabelTable, imgsz: int | tuple[int, int] | None, augment: bool) -> None:
        """Reads the images of `table` with their long sides at `imgsz` px, the training way if `augment`.

        For evaluation `imgsz` may be (height, width) that the images are scaled to fit, or None for full size.
        """
        self.table = table
        self.imgsz = imgsz
        self.augment = augment

    def size_wh(self, index: int) -> tuple[int, int]:
        """Returns the (width, height) that `read` gives image `index`."""
        size_wh = tuple(self.table.sizes_wh[index].tolist())
        return size_wh if self.imgsz is None else resized_wh(size_wh, self.imgsz)

    def sizes_wh(self) -> np.ndarray:
        """Returns the (N, 2) int64 sizes that `read` gives all images."""
        return np.array([self.size_wh(index) for index in range(len(self.table))], dtype=np.int64).reshape(-1, 2)

    def read(self, index: int) -> np.ndarray:
        """Returns image `index`, uint8 (h, w, 3) RGB, read-only.

        Raises:
            UserError: the file vanished, was damaged or replaced after the data set was scanned.
        """
        path = self.table.image_paths[index]
        try:
            image = read_image(path, min_side_hint=self.imgsz if self.augment else None)
        except ImageError as error:
            raise UserError(
                f"{path}: {error}. It was in order when the data set was scanned: put it back, or start again."
            ) from error
        height, width = image.shape[:2]
        full_width, full_height = self.table.sizes_wh[index].tolist()
        if (width, height) not in {(math.ceil(full_width / k), math.ceil(full_height / k)) for k in REDUCTIONS}:
            raise UserError(
                f"{path}: is {width}x{height} px, but was {full_width}x{full_height} px when the data set was "
                "scanned. Start again, so that it is scanned anew."
            )
        image = resize(image, self.size_wh(index), by_area=not self.augment)
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
        image.flags.writeable = False
        return image


class DiskImages:
    """Copies of the resized images as `.npy` files in a folder `<image folder>_npy` beside each image folder.

    A copy's name is a hash of its image's path, size and times (as in `utils.dataloaders.labels`), of the training
    size, and of whether it is for training; so stale copies are never read. They are not deleted either: remove the
    folder to get rid of them.
    """

    def __init__(self, files: ImageFiles) -> None:
        """Stands in front of `files`."""
        self.files = files

    def read(self, index: int) -> np.ndarray:
        """Returns image `index`, uint8 (h, w, 3) RGB, read-only; makes its copy where there is none."""
        image = self._load(index)
        if image is None:
            image = self.files.read(index)
            self._write(self.copy_path(index), image)
        image.flags.writeable = False
        return image

    def fill(self, prefix: str = "") -> None:
        """Makes the copies that are missing or cut short; clears what a killed process left of one."""
        for folder in {os.path.dirname(os.path.abspath(path)) for path in self.files.table.image_paths}:
            remove_temporaries(_beside(folder), abandoned=True)
        total = 0
        bar = progress(_in_order(self._make_whole, len(self.files.table)), total=len(self.files.table), unit="img")
        for size in bar:
            total += size
            bar.set_description_str(f"{prefix}Caching images ({total / _GB:.1f}GB disk)", refresh=False)

    def _make_whole(self, index: int) -> int:
        """Makes the copy of image `index` unless one is there, by its header and its length; returns its bytes."""
        if self._load(index, mmap_mode="r") is None:
            self.read(index)
        return 3 * math.prod(self.files.size_wh(index))

    def _load(self, index: int, mmap_mode: str | None = None) -> np.ndarray | None:
        """Returns the copy of image `index`; None where there is none, or a damaged one."""
        width, height = self.files.size_wh(index)
        try:
            image = np.load(self.copy_path(index), mmap_mode=mmap_mode, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # none yet, cut short, not readable
            return None
        return image if (image.shape, image.dtype) == ((height, width, 3), np.uint8) else None

    def copy_path(self, index: int) -> Path:
        """Returns where the copy of image `index` is, or will be.

        Raises:
            UserError: the image is gone.
        """
        path = os.path.abspath(self.files.table.image_paths[index])
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}). It was in order when the data set was scanned: "
                "put it back, or start again."
            ) from error
        key = (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, self.files.imgsz, self.files.augment)
        name = hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return _beside(os.path.dirname(path)) / f"{name}.npy"

    @staticmethod
    def _write(copy: Path, image: np.ndarray) -> None:
        """Writes a copy so that other processes see all of it or nothing; not flushed, since `read` checks it."""
        temporary = temporary_beside(copy)
        try:
            copy.parent.mkdir(exist_ok=True)
            try:
                with open(temporary, "wb") as handle:
                    np.save(handle, image, allow_pickle=False)
                os.replace(temporary, copy)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{copy}: --cache disk cannot write here ({error.strerror}). Free the disk or make the folder "
                "writable, or use --cache ram or no --cache."
            ) from error


def _beside(folder: str) -> Path:
    return Path(folder).with_name(f"{os.path.basename(folder)}_npy")


class RamImages:
    """All images in one flat buffer, which worker processes share, and on Linux other processes of the machine too.

    There it is a file without a name (memfd): not bound to the size of /dev/shm, which containers keep small, and gone
    with the last process that uses it.

    Attributes:
        address: by which other processes find the buffer while this one lives; empty where the system has no such file.
    """

    def __init__(self, files: ImageFiles, address: str = "") -> None:
        """Sets aside memory for the images of `files`, which `fill` reads; or takes what another process has filled.

        Args:
            files: the images.
            address: of the other process's `RamImages`, made for the same files.

        Raises:
            UserError: they are more than there is memory for.
        """
        count = len(files.table)
        sizes = files.sizes_wh()
        offsets = np.concatenate([[0], np.cumsum(3 * sizes.prod(axis=1))])
        needed, left = int(offsets[-1]), memory_left()
        if not address and left is not None and needed > RAM_SHARE * left:
            raise UserError(
                f"--cache ram: {count} images at {files.imgsz} px take {needed / _GB:.1f} GB, and {left / _GB:.1f} GB "
                "of memory are left. Use --cache disk, or no --cache."
            )
        self.files = files
        self.sizes_wh = sizes
        self.offsets = offsets
        self.address = address or self._make_file(needed)
        self.buffer = self._mapped() if self.address else torch.empty(needed, dtype=torch.uint8)

    def _make_file(self, size: int) -> str:
        """Makes the file without a name; returns its address."""
        if not hasattr(os, "memfd_create"):
            return ""
        file = os.memfd_create("images")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, size)
        return f"/proc/{os.getpid()}/fd/{file}"

    def _mapped(self) -> torch.Tensor:
        """Returns the file of `address` as a uint8 tensor."""
        return torch.from_file(self.address, shared=True, size=int(self.offsets[-1]), dtype=torch.uint8)

    def fill(self, prefix: str = "") -> None:
        """Reads all images."""
        count = len(self.files.table)
        bar = progress(_in_order(self.files.read, count), total=count, unit="img")
        for index, image in enumerate(bar):
            self._slot(index)[:] = image
            filled = self.offsets[index + 1] / _GB
            bar.set_description_str(f"{prefix}Caching images ({filled:.1f}GB ram)", refresh=False)

    def read(self, index: int) -> np.ndarray:
        """Returns image `index`, uint8 (h, w, 3) RGB, read-only."""
        image = self._slot(index)
        image.flags.writeable = False
        return image

    def _slot(self, index: int) -> np.ndarray:
        """View of the buffer where image `index` is."""
        width, height = self.sizes_wh[index]
        return self.buffer[self.offsets[index] : self.offsets[index + 1]].numpy().reshape(height, width, 3)

    def __getstate__(self) -> dict:
        """Lets a spawned worker have the same buffer: by its address, or moved to shared memory."""
        if not self.address:
            self.buffer.share_memory_()
        return {**self.__dict__, "buffer": None if self.address else self.buffer}

    def __setstate__(self, state: dict) -> None:
        """Finds the buffer of `address`."""
        self.__dict__.update(state)
        if self.address:
            self.buffer = self._mapped()


class RecentImages:
    """The images that one process read last, up to a number of bytes; each process starts with none."""

    def __init__(self, source: ImageSource, max_bytes: int) -> None:
        """Stands in front of `source`."""
        self.source = source
        self.max_bytes = max_bytes
        self.misses = 0
        self._images: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def read(self, index: int) -> np.ndarray:
        """Returns image `index`, uint8 (h, w, 3) RGB, read-only."""
        image = self._images.get(index)
        if image is not None:
            self._images.move_to_end(index)
            return image
        self.misses += 1
        image = self._images[index] = self.source.read(index)
        self._bytes += image.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image


def make_source(
    table: LabelTable,
    imgsz: int | tuple[int, int] | None,
    augment: bool,
    cache: str | ImageSource | None,
    prefix: str,
    machine: Machine | None = None,
) -> ImageSource:
    """Returns where images are read from; a cache is filled before, of several processes by the machine's first.

    `cache` may be what an earlier call returned for the same arguments, and is returned then.

    Raises:
        UserError: the cache cannot be filled, or not be shared.
    """
    if not isinstance(cache, (str, type(None))):
        return cache
    files = ImageFiles(table, imgsz, augment)
    if cache is None:
        return files
    if machine and machine.local_rank > 0:
        return DiskImages(files) if cache == "disk" else RamImages(files, machine.broadcast_str_local())
    cached = {"ram": RamImages, "disk": DiskImages}[cache](files)
    if isinstance(cached, RamImages) and machine and machine.local_size > 1:
        if not cached.address:
            raise UserError("--cache ram: only on Linux do several processes share one. Use --cache disk, or none.")
        machine.broadcast_str_local(cached.address)
    cached.fill(prefix)
    return cached


def _in_order(work: Callable[[int], Result], count: int) -> Iterator[Result]:
    """Yields what `work` makes of 0 to count - 1 in order, done by a few threads that never run far ahead."""
    with ThreadPoolExecutor(min(FILL_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, count, 8 * FILL_THREADS):
            yield from pool.map(work, range(start, min(start + 8 * FILL_THREADS, count)))
