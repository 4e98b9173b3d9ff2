"""Archives (zip, tar and its compressed kinds), unpacked all or nothing.

Every member is checked before anything is written: no absolute paths, no `..`, no links or devices, no sizes that
only a bomb has. Members are unpacked beside their destination first and then moved, so a damaged archive leaves
nothing behind.
"""

from __future__ import annotations

import bz2
import contextlib
import filecmp
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.errors import UserError
from utils.log import LOGGER

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAX_TOTAL_BYTES = 1 << 40
MAX_MEMBERS = 5_000_000
MAX_RATIO = 200  # unpacked to packed; images come to 1, label text to 10
RATIO_FROM_BYTES = 64 << 20  # below this no ratio is a bomb
MAX_READ_BYTES = 8 << 20
DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by what a file begins with
MAGIC_BYTES = 6
SHOWN = 5  # names in a message
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, RuntimeError, ValueError),
)


class Member(NamedTuple):
    """A file or folder in an archive."""

    name: str
    size: int
    is_folder: bool
    handle: zipfile.ZipInfo | tarfile.TarInfo


def is_archive_name(name: str) -> bool:
    """Says whether a file name ends like an archive."""
    return name.lower().endswith(SUFFIXES)


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool] = bool, overwrite: bool = True) -> list[str]:
    """Unpacks an archive into `folder`.

    Args:
        archive: the file.
        folder: made if need be.
        wanted: told each file's name, says whether to unpack it; those left out are counted and named.
        overwrite: take the place of files of the same names; else those must have the same content.

    Returns:
        The names of the files, with forward slashes.

    Raises:
        UserError: not an archive or damaged; a member that may not be unpacked; the disk is full; a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _open(archive) as opened:
            members = _checked_members(archive, opened)
            left_out = [member.name for member in members if not member.is_folder and not wanted(member.name)]
            if left_out:
                shown = ", ".join(repr(name[:100]) for name in left_out[:SHOWN])
                LOGGER.warning(f"WARNING: {archive.name}: left out {len(left_out)} files that are no data: {shown}")
            unwanted = set(left_out)
            members = [member for member in members if member.name not in unwanted]
            needed, free = sum(member.size for member in members), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"{archive.name}: {needed / 1e9:.1f} GB are needed in {folder} and {free / 1e9:.1f} GB are free."
                )
            with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as temporary:
                for member in members:
                    _extract(opened, member, Path(temporary))
                if not overwrite:
                    _check_free(archive, Path(temporary), folder, members)
                for member in members:
                    source, target = Path(temporary) / member.name, folder / member.name
                    (target if member.is_folder else target.parent).mkdir(parents=True, exist_ok=True)
                    if not member.is_folder and source.exists():  # a name that stands twice was moved already
                        os.replace(source, target)
    except _DAMAGE as error:
        raise UserError(f"{archive.name}: the archive is damaged ({error}); nothing was unpacked.") from error
    except OSError as error:
        raise UserError(f"{archive.name}: cannot be unpacked into {folder} ({error.strerror or error}).") from error
    return [member.name for member in members if not member.is_folder]


def list_members(archive: Path) -> list[Member]:
    """Returns the checked members of an archive without unpacking it.

    Raises:
        UserError: as `unpack`.
    """
    try:
        with _open(archive) as opened:
            return _checked_members(archive, opened)
    except _DAMAGE as error:
        raise UserError(f"{archive.name}: the archive is damaged ({error}).") from error
    except OSError as error:
        raise UserError(f"{archive.name}: cannot be read ({error.strerror or error}).") from error


def _checked_members(archive: Path, opened: zipfile.ZipFile | tarfile.TarFile) -> list[Member]:
    """Returns all members if every one of them may be unpacked, else names the first that may not."""
    packed, total, members = os.path.getsize(archive), 0, []
    for entry in opened if isinstance(opened, tarfile.TarFile) else opened.infolist():  # tar files are read bit by bit
        if isinstance(entry, tarfile.TarInfo):
            member = Member(entry.name, entry.size, entry.isdir(), entry)
            refusal = "" if entry.isfile() or entry.isdir() else "is a link, device or pipe"
        else:
            member = Member(entry.filename, entry.file_size, entry.filename.endswith("/"), entry)
            kind = stat.S_IFMT(entry.external_attr >> 16)
            refusal = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "is a link, device or pipe"
            refusal = "is encrypted" if entry.flag_bits & 1 else refusal
        refusal = refusal or _name_refusal(member.name) or ("has a negative size" if member.size < 0 else "")
        if refusal:
            raise UserError(f"{archive.name}: member '{member.name[:100]}' {refusal}; nothing was unpacked.")
        total += member.size
        members.append(member)
        if len(members) > MAX_MEMBERS or total > MAX_TOTAL_BYTES or total > max(RATIO_FROM_BYTES, packed * MAX_RATIO):
            raise UserError(
                f"{archive.name}: {packed} bytes unpack to {total} bytes in {len(members)} files or more, as only a "
                "decompression bomb does; nothing was unpacked."
            )
    return members


def _name_refusal(name: str) -> str:
    """Says why a member's name may not be used, or returns an empty string."""
    parts = re.split(r"[/\\]", name)
    if not name.strip() or "\0" in name:
        return "has no usable name"
    if not parts[0] or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in parts:
        return "leaves the folder ('..')"
    return "has backslashes in its name" if "\\" in name else ""


@contextlib.contextmanager
def _open(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """Opens a zip or tar file by its content."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield opened
        return
    with open(archive, "rb") as file:
        head = file.read(MAGIC_BYTES)
    opener = next((opener for magic, opener in DECOMPRESSORS.items() if head.startswith(magic)), open)
    with opener(archive, "rb") as stream:
        try:
            opened = tarfile.TarFile(fileobj=_Bounded(stream))
        except (tarfile.ReadError, EOFError) as error:
            message = f"{archive.name}: is neither a zip nor a tar archive (a web page instead of the file?)."
            raise UserError(message) from error
        yield opened


class _Bounded:
    """A tar file's bytes, in pieces of bounded size: tarfile reads a header as a whole, whatever length it claims."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.tell, self.seek = stream, stream.tell, stream.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return self._stream.read(size)


def _check_free(archive: Path, source: Path, folder: Path, members: list[Member]) -> None:
    """Refuses to put unpacked members over files of other content."""
    for member in members:
        target = folder / member.name
        if not member.is_folder and target.exists() and not filecmp.cmp(source / member.name, target, shallow=False):
            raise UserError(f"{archive.name}: {target} is there and differs; nothing was unpacked. Move it away.")


def _extract(opened: zipfile.ZipFile | tarfile.TarFile, member: Member, folder: Path) -> None:
    """Writes one checked member below `folder`, with none of its permissions or owners."""
    target = folder / member.name
    if member.is_folder:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = opened.extractfile(member.handle) if isinstance(opened, tarfile.TarFile) else opened.open(member.handle)
    with source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    if target.stat().st_size != member.size:
        raise ValueError(f"'{member.name}' is cut short")
