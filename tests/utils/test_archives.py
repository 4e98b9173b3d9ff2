"""Archives: unpacked whole into their folder, or refused with nothing written; see also tests/test_hostile_files.py."""

import io
import stat
import tarfile
import zipfile

import pytest

from utils import archives
from utils.archives import is_archive_name, unpack
from utils.errors import UserError


def zip_bytes(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_archives_of_every_kind_are_merged_into_a_folder(tmp_path, suffix):
    out, files = tmp_path / "out", {"d/": b"", "d/new.txt": b"new", "b.txt": b"b"}
    (out / "d").mkdir(parents=True)
    (out / "d" / "old.txt").write_text("old")
    (out / "d" / "new.txt").write_text("replaced")
    path = tmp_path / f"x{suffix}"
    if suffix == ".zip":
        path.write_bytes(zip_bytes(files))
    else:
        write_tar(path, files, "w:" + {".tgz": "gz", ".tar": ""}.get(suffix, suffix.rpartition(".")[2]))
    assert is_archive_name(path.name) and unpack(path, out) == ["d/new.txt", "b.txt"]
    assert everything_in(out) == ["b.txt", "d", "d/new.txt", "d/old.txt"]
    assert (out / "d" / "new.txt").read_text() == "new"


BAD_NAMES = ["../evil.txt", "a/../../evil.txt", "/evil.txt", "C:/evil.txt", "a\\..\\evil.txt", "\\\\host\\x"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder_stop_everything(tmp_path, name):
    (tmp_path / "x.zip").write_bytes(zip_bytes({"good.txt": b"x", name: b"x"}))
    with pytest.raises(UserError, match="member .* nothing was unpacked"):
        unpack(tmp_path / "x.zip", tmp_path / "in" / "out")
    assert not [entry for entry in everything_in(tmp_path) if entry.endswith(".txt")]


def test_a_tar_member_of_negative_size_is_refused(tmp_path):
    """Its size would make up for that of a bomb behind it."""
    member = tarfile.TarInfo("a.txt")
    member.size = -5
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="negative size|damaged|neither a zip nor a tar"):
        unpack(path, tmp_path / "out")
    member.name = "folder/"
    member.type = tarfile.DIRTYPE
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="negative size"):
        unpack(path, tmp_path / "out")


def test_a_zip_member_without_a_name_is_refused(tmp_path):
    directory = bytearray(zip_bytes({"a": b"x"}))
    start = directory.index(b"PK\x01\x02")
    directory[start + 28] = 0  # the name's length, in the directory
    directory[start + 32] = 1  # and the comment's, so that the entry stays as long
    directory[26] = 0
    directory[28] = 1
    path = tmp_path / "x.zip"
    path.write_bytes(directory)
    with pytest.raises(UserError, match="has no usable name"):
        unpack(path, tmp_path / "out")


def test_links_and_encryption_in_zip_files_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        unpack(tmp_path / "link.zip", tmp_path / "out")
    content = bytearray(zip_bytes({"a.txt": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(UserError, match="member 'a.txt' is encrypted"):
        unpack(tmp_path / "locked.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_bombs_are_refused_before_anything_is_written(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives, "RATIO_FROM_BYTES", 1 << 16)
    path, zeros = tmp_path / f"bomb.{kind}", bytes(1 << 20)
    if kind == "zip":
        path.write_bytes(zip_bytes({"good.txt": b"x", "zeros": zeros}))
    else:
        write_tar(path, {"good.txt": b"x", "zeros": zeros})
    with pytest.raises(UserError, match="decompression bomb"):
        unpack(path, tmp_path / "out")
    assert everything_in(tmp_path / "out") == []


@pytest.mark.parametrize(("limit", "value"), [("MAX_MEMBERS", 2), ("MAX_TOTAL_BYTES", 2)])
def test_limits_on_members_and_bytes(tmp_path, monkeypatch, limit, value):
    (tmp_path / "x.zip").write_bytes(zip_bytes({"a": b"1", "b": b"2", "c": b"3"}))
    monkeypatch.setattr(archives, limit, value)
    with pytest.raises(UserError, match="bomb"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["flipped", "cut zip", "cut tar", "text"])
def test_damaged_archives_leave_nothing(tmp_path, kind):
    content = bytearray(zip_bytes({"a.txt": b"a" * 100, "b.txt": bytes(range(250)) * 4}))
    if kind == "flipped":
        content[content.rindex(b"PK\x01\x02") - 20] ^= 0xFF
    elif kind == "cut zip":
        content = content[: len(content) // 2]
    elif kind == "cut tar":
        whole = write_tar(tmp_path / "w.tar.gz", {"a": b"a", "b": bytes(range(256)) * 4000}).read_bytes()
        content = whole[: len(whole) // 2]
    else:
        content = b"<html>not found</html>"
    (tmp_path / "x.zip").write_bytes(content)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="x.zip"):
        unpack(tmp_path / "x.zip", tmp_path / "out")
    assert everything_in(tmp_path / "out") == ["mine.txt"]


def test_a_full_disk_is_told_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    (tmp_path / "x.zip").write_bytes(zip_bytes({"a.txt": b"a" * 100}))
    with pytest.raises(UserError, match="GB are needed"):
        unpack(tmp_path / "x.zip", tmp_path / "out")
