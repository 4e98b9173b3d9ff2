"""Files of data sets made to run something, to reach other files or to fill the memory: archives, caches, images, ...

Each is refused in one line, or said to be damaged; a canary file shows that nothing ran. More of archives is in
utils/test_archives.py.
"""

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from utils.archives import list_members, unpack
from utils.dataloaders.labels import read_cache
from utils.errors import UserError
from utils.images import ImageError, read_image
from utils.tools.convert import convert_coco, convert_voc


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(path: Path, *members: tuple[str, bytes, dict]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content, attributes in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return path


TARS = {
    "link, then a file through it": (("a", b"", {"type": tarfile.SYMTYPE, "linkname": "/tmp"}), ("a/x.txt", b"x", {})),
    "hard link": (("a", b"x", {}), ("b", b"", {"type": tarfile.LNKTYPE, "linkname": "../canary"})),
    "hard link to itself": (("a", b"", {"type": tarfile.LNKTYPE, "linkname": "a"}),),
    "device": (("a", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 1}),),
    "block device": (("a", b"", {"type": tarfile.BLKTYPE}),),
    "pipe": (("a", b"", {"type": tarfile.FIFOTYPE}),),
    "unknown kind": (("a", b"", {"type": b"Z", "linkname": "/etc/passwd"}),),
    "a file that is a folder": (("a", b"x", {}), ("a/b", b"x", {})),
    "a folder that is a file": (("a/b", b"x", {}), ("a", b"x", {})),
    "above": (("../canary", b"x", {}),),
    "absolute": (("/canary", b"x", {}),),
    "windows": (("..\\canary", b"x", {}),),
    "drive": (("C:canary", b"x", {}),),
    "no name": ((" ", b"x", {}),),
    "after good ones": (("a.txt", b"x", {}), ("b/../../canary", b"x", {})),
}


@pytest.mark.parametrize("name", TARS)
def test_tars_are_refused_whole(tmp_path, canary, name):
    path = tar_of(tmp_path / "evil.tar", *TARS[name])
    with pytest.raises(UserError, match="evil.tar: "):
        unpack(path, tmp_path / "to")
    assert not canary.exists() and not list((tmp_path / "to").rglob("*"))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_that_would_fill_the_memory_are_refused(tmp_path, kind):
    """Such a header is read into memory as a whole, whatever its length."""
    header = tarfile.TarInfo("a")
    header.type, header.size = kind, 1 << 30
    path = tmp_path / "bomb.tar"
    packer = zlib.compressobj(9, wbits=31)
    path.write_bytes(
        packer.compress(header.tobuf(tarfile.GNU_FORMAT)) + packer.compress(bytes(64 << 20)) + packer.flush()
    )
    with pytest.raises(UserError, match=r"bomb.tar: the archive is damaged \(a header of 1073741824 bytes\)"):
        list_members(path)


def test_sparse_files_count_with_their_size(tmp_path):
    header = tarfile.TarInfo("a.txt")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"77777777777\0"  # its real size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "bomb.tar").write_bytes(bytes(block) + bytes(1024))
    with pytest.raises(UserError, match=r"bomb.tar: 1536 bytes unpack to 8589934591 bytes"):
        list_members(tmp_path / "bomb.tar")


def test_members_of_one_name_give_one_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for content in (b"first", b"second"):
            archive.writestr("a.txt", content)
    unpack(tmp_path / "a.zip", tmp_path / "to")
    assert [path.read_bytes() for path in (tmp_path / "to").rglob("*.txt")] == [b"second"]


class Touch:
    """Unpickled freely, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_objects(path: Path, canary: Path) -> None:
    np.savez(path.open("wb"), key=np.asarray("k"), rows=np.array([Touch(canary)], object))


def write_object_key(path: Path, canary: Path) -> None:
    np.savez(path.open("wb"), key=np.array(Touch(canary), object))


def write_header(path: Path, canary: Path, header: str) -> None:
    text = header.ljust(117).encode() + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)


CACHES = {
    "pickle": lambda path, canary: path.write_bytes(pickle.dumps(Touch(canary))),
    "pickle of protocol 0": lambda path, canary: path.write_bytes(pickle.dumps(Touch(canary), 0)),
    "npy of objects": lambda path, canary: np.save(
        path.open("wb"), np.array([Touch(canary)], object), allow_pickle=True
    ),
    "objects": write_objects,
    "objects as the key": write_object_key,
    "huge": lambda path, canary: write_header(
        path, canary, "{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}"
    ),
    "code": lambda path, canary: write_header(path, canary, f"__import__('os').system('touch {canary}')"),
    "nested": lambda path, canary: write_header(path, canary, "(" * 5000),
    "pickle in a zip": lambda path, canary: path.write_bytes(zipped({"key": pickle.dumps(Touch(canary))})),
}


@pytest.mark.parametrize("name", CACHES)
def test_label_caches_are_never_unpickled(tmp_path, canary, name, caplog):
    path = tmp_path / "train.cache.npz"
    CACHES[name](path, canary)
    with caplog.at_level("WARNING", "yolov5"):
        assert read_cache(path, "k") is None
    assert f"{path} is damaged" in caplog.text
    assert not canary.exists()


def png(width: int, height: int) -> bytes:
    """A picture whose pixels are all black and take next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


PICTURES = {
    "script": b"#!/bin/sh\ntouch canary\n",
    "program": b"\x7fELF" + bytes(100),
    "pickle": pickle.dumps({"a": 1}),
    "archive": zipped({"a.jpg": b"x"}),
    "page": b"<html><script>open('canary')</script></html>",
    "vector": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile\nshowpage\n",
    "ImageMagick": b"push graphic-context\nfill 'url(https://a.invalid/\"|touch canary\")'\n",
    "empty": b"",
    "bomb": png(100_000, 100_000),
    "wide": png(2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_images_that_are_something_else_are_told(tmp_path, canary, name, suffix):
    path = tmp_path / f"evil.{suffix}"
    path.write_bytes(PICTURES[name])
    with pytest.raises(ImageError):
        read_image(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def voc(folder: Path, annotation: bytes) -> Path:
    base = folder / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (base / name).mkdir(parents=True)
    (base / "JPEGImages" / "a.jpg").write_bytes(b"x")
    (base / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (base / "Annotations" / "a.xml").write_bytes(annotation)
    return folder


ENTITIES = '<?xml version="1.0" encoding="{}"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_in_annotations_are_refused_in_any_encoding(tmp_path, encoding):
    with pytest.raises(UserError, match="a.xml: XML with a DTD .* is not accepted"):
        convert_voc(voc(tmp_path, ENTITIES.format(encoding).encode(encoding)), {0: "a"})


@pytest.mark.parametrize("name", ["instances_...json", "instances_..json", "...json"])
def test_the_name_of_a_coco_file_leads_nowhere(tmp_path, name):
    """Its name becomes that of a folder, which is replaced."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    image = {"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "annotations" / name).write_text(json.dumps(content))
    convert_coco(tmp_path, {0: "a"})
    assert (tmp_path / "images" / "a.jpg").read_bytes() == b"x" and (tmp_path / "annotations" / name).is_file()


@pytest.mark.parametrize("picture", ["../../canary", "/etc/passwd", "..\\x", "a/../../x", "C:x"])
def test_pictures_of_a_coco_file_lie_in_its_folder(tmp_path, picture):
    (tmp_path / "annotations").mkdir()
    image = {"id": 1, "file_name": picture, "width": 8, "height": 8}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="lies outside the data set"):
        convert_coco(tmp_path, {0: "a"})
