"""Bad and unusual images, generated: each is read rightly, or left out, counted and named with the reason.

In the scan of training and validation, and in what detection reads. The reader's finer points are in
utils/test_images.py.
"""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from PIL import Image

import detect
import train
import val
from utils.dataloaders.labels import scan_images
from utils.dataloaders.paths import list_images
from utils.media.sources import open_source

QUICK = ["--img", "64", "--workers", "0", "--device", "cpu"]

PICTURE = cv2.resize(np.random.default_rng(5).integers(0, 256, (4, 5, 3)).astype(np.uint8), (60, 45))  # BGR
PILLOW = Image.fromarray(PICTURE[:, :, ::-1])
GREY = PICTURE[:, :, 1]
INVERTED = Image.fromarray(255 - PICTURE[:, :, ::-1])


def encoded(kind: str, picture: Image.Image = PILLOW, **options) -> bytes:
    target = io.BytesIO()
    picture.save(target, kind, **options)
    return target.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("PNG", exif=exif)


def of_sides(kind: str, width: int, height: int) -> bytes:
    """Returns a file whose header states other sides than its pixels have."""
    start, pattern = {"PNG": (16, ">II"), "BMP": (18, "<II"), "GIF": (6, "<HH"), "JPEG": (-1, ">HH")}[kind]
    data = bytearray(encoded(kind))
    if kind == "JPEG":
        start, width, height = data.index(b"\xff\xc0") + 5, height, width
    struct.pack_into(pattern, data, start, width, height)
    if kind == "PNG":
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


class Kind(NamedTuple):
    """An image file; why it is left out, empty where it is read; the picture that it holds."""

    data: bytes
    scan: str = ""  # in training and validation
    detect: str | None = None  # in detection; None: as in training
    picture: np.ndarray | None = PICTURE  # (h, w, 3) BGR; None: damaged, whatever can be seen in it
    tolerance: int = 0


def deep(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", picture.astype(np.uint16) * 257)[1].tobytes()


def grey(data: bytes) -> Kind:
    return Kind(data, picture=np.dstack([GREY] * 3))


CUT = {kind: encoded(kind)[: len(encoded(kind)) * 2 // 3] for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")}
SIDES, UNREADABLE = "sides under 10 px", "is not a readable image"
PALETTE = PILLOW.quantize(16)
PALETTE_PICTURE = np.asarray(PALETTE.convert("RGB"))[:, :, ::-1]
GIF_PICTURE = np.asarray(Image.open(io.BytesIO(encoded("GIF"))).convert("RGB"))[:, :, ::-1]
KINDS = {
    "empty.jpg": Kind(b"", "is empty (0 bytes)"),
    "one_byte.jpg": Kind(b"\xff", UNREADABLE),
    "zeros.png": Kind(bytes(5000), UNREADABLE),
    "text.jpg": Kind(b"a photograph of a dog", UNREADABLE),
    "page.png": Kind(b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNREADABLE),
    "pointer.jpg": Kind(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", UNREADABLE),
    "drawing.png": Kind(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', UNREADABLE),
    "archive.jpg": Kind(b"PK\x03\x04" + bytes(200), UNREADABLE),
    "cut.jpg": Kind(CUT["JPEG"], "is a truncated JPEG"),
    "cut.png": Kind(CUT["PNG"], "is a truncated PNG"),
    "cut.tif": Kind(CUT["TIFF"], "image"),
    "cut.webp": Kind(CUT["WEBP"], UNREADABLE),
    "cut.bmp": Kind(CUT["BMP"], "cannot be decoded (image file is truncated"),
    "cut_gif.jpg": Kind(CUT["GIF"], "is of format gif", "cannot be decoded (image file is truncated"),
    "huge.png": Kind(of_sides("PNG", 2**31 - 1, 2**31 - 1), "too many pixels"),
    "beyond.png": Kind(of_sides("PNG", 2**31, 2**31), "too many pixels"),
    "long.png": Kind(of_sides("PNG", 60, 2**31 - 1), "too many pixels"),
    "large.jpg": Kind(of_sides("JPEG", 65535, 65535), "too many pixels"),
    "no_width.png": Kind(of_sides("PNG", 0, 45), UNREADABLE),
    "no_height.jpg": Kind(of_sides("JPEG", 60, 0), "no frame header"),
    "no_width.bmp": Kind(of_sides("BMP", 0, 45), UNREADABLE),
    "no_sides_gif.png": Kind(of_sides("GIF", 0, 0), "is of format gif", "", GIF_PICTURE),
    "dot.png": Kind(encoded("PNG", PILLOW.crop((7, 8, 8, 9))), SIDES, "", PICTURE[8:9, 7:8]),
    "small.png": Kind(encoded("PNG", PILLOW.crop((0, 0, 9, 40))), SIDES, "", PICTURE[:40, :9]),
    "line.png": Kind(encoded("PNG", PILLOW.resize((3000, 10))), "beyond 200:1"),
    "png.jpg": Kind(encoded("PNG")),
    "jpeg.png": Kind(encoded("JPEG", quality=100, subsampling=0), tolerance=4),
    "bmp.webp": Kind(encoded("BMP")),
    "webp.tif": Kind(encoded("WEBP", lossless=True)),
    "gif.bmp": Kind(encoded("GIF", PALETTE), "is of format gif", "", PALETTE_PICTURE),
    "ink.jpg": Kind(encoded("JPEG", PILLOW.convert("CMYK"), quality=100, subsampling=0), tolerance=4),
    "grey.jpg": Kind(encoded("JPEG", Image.fromarray(GREY), quality=100), picture=np.dstack([GREY] * 3), tolerance=3),
    "deep.png": Kind(deep(PICTURE)),
    "deep_grey.png": grey(deep(GREY)),
    "turned.png": Kind(turned(6), picture=np.rot90(PICTURE, -1)),
    "mirrored.png": Kind(turned(2), picture=PICTURE[:, ::-1]),
    "alpha.png": Kind(encoded("PNG", Image.fromarray(np.dstack([PICTURE[:, :, ::-1], GREY])))),
    "palette.png": Kind(encoded("PNG", PALETTE), picture=PALETTE_PICTURE),
    "palette_alpha.png": Kind(encoded("PNG", PALETTE, transparency=2), picture=PALETTE_PICTURE),
    "moving.webp": Kind(encoded("WEBP", lossless=True, save_all=True, append_images=[INVERTED])),
    "pages.tif": Kind(encoded("TIFF", save_all=True, append_images=[INVERTED])),
}
LEFT_OUT = {name: kind.scan for name, kind in KINDS.items() if kind.scan}
SKIPPED = {name: kind.scan if kind.detect is None else kind.detect for name, kind in KINDS.items()}
SKIPPED = {name: reason for name, reason in SKIPPED.items() if reason}


def assert_shows(picture: np.ndarray, kind: Kind) -> None:
    assert picture.dtype == np.uint8 and picture.shape == kind.picture.shape
    assert np.abs(picture.astype(int) - kind.picture).max() <= kind.tolerance


def make_set(folder: Path) -> Path:
    """Makes four whole pictures with a label each; returns the folder of images."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for number in range(4):
        (folder / "images" / f"{number}.png").write_bytes(encoded("PNG"))
        (folder / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.25 0.25\n")
    return folder / "images"


def write_kinds(folder: Path) -> None:
    """Puts a file of each kind into a folder."""
    for name, kind in KINDS.items():
        (folder / name).write_bytes(kind.data)


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged headers
@pytest.mark.parametrize("name", KINDS)
def test_an_image_is_read_rightly_or_left_out_with_the_reason(tmp_path, name):
    kind, path, good = KINDS[name], tmp_path / name, tmp_path / "0.png"
    path.write_bytes(kind.data)
    good.write_bytes(encoded("PNG"))
    table = scan_images(list_images([tmp_path]))
    frames = {Path(frame.path).name: frame for (frame,) in open_source(tmp_path).read()}
    assert str(good) in list(table.image_paths) and set(frames) == {"0.png", name}
    assert_shows(frames["0.png"].image, Kind(b""))
    assert table.counts == (0, 2 - bool(kind.scan), 0, bool(kind.scan), 2)
    if kind.scan:
        (message,) = table.messages
        assert message.startswith(f"{path}: image left out: it ") and kind.scan in message and len(message) < 500
    else:
        height, width = kind.picture.shape[:2]
        assert table.sizes_wh[list(table.image_paths).index(str(path))].tolist() == [width, height]
    if name in SKIPPED:
        assert frames[name].image is None and SKIPPED[name] in frames[name].error
    else:
        assert not frames[name].error
        assert_shows(frames[name].image, kind)


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged headers
def test_detection_skips_counts_and_names_them_and_does_all_others(tmp_path, command, weights, one_thread):
    write_kinds(make_set(tmp_path))
    outcome = command(detect, *detecting(tmp_path, weights), "--nosave", "--save-txt", "--device", "cpu")
    assert outcome.status == 1 and "Traceback" not in outcome.said
    summary = outcome.said.partition(f"{len(SKIPPED)} damaged inputs were skipped, all others are done:\n")[2]
    assert len(summary.strip().splitlines()) == len(SKIPPED)
    assert all(str(tmp_path / "images" / name) in summary for name in SKIPPED)
    assert len(list((tmp_path / "runs" / "exp" / "labels").iterdir())) == 4 + len(KINDS) - len(SKIPPED)


def detecting(folder: Path, weights: Path) -> list:
    return ["--weights", weights, "--source", folder / "images", "--project", folder / "runs", "--img", 64]


@pytest.mark.filterwarnings("ignore")
def test_validation_skips_counts_and_names_them_and_does_all_others(tmp_path, command, weights, one_thread):
    write_kinds(make_set(tmp_path))
    outcome = command(val, *validating(tmp_path, weights))
    assert outcome.status == 0, outcome.said
    assert f"4 found, {len(KINDS) - len(LEFT_OUT)} missing, 0 empty, {len(LEFT_OUT)} corrupt" in outcome.said
    named = [name for name in LEFT_OUT if f"WARNING: {tmp_path / 'images' / name}: image left out: it " in outcome.said]
    assert named == list(LEFT_OUT)
    assert f"all{4 + len(KINDS) - len(LEFT_OUT):11}" in outcome.said


def validating(folder: Path, weights: Path) -> list:
    (folder / "set.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [a, b]\n")
    shared = [*QUICK, "--data", folder / "set.yaml", "--project", folder / "runs"]
    return [*shared, "--weights", weights, "--noplots"]


@pytest.mark.parametrize("script", [train, val, detect], ids=lambda script: script.__name__)
def test_a_set_that_is_broken_entirely_is_an_error(tmp_path, script, command, weights, one_thread):
    images = make_set(tmp_path)
    for number, path in enumerate(sorted(images.iterdir())):
        path.write_bytes([b"", b"text", CUT["PNG"], CUT["JPEG"]][number])
    line = detecting(tmp_path, weights) if script is detect else validating(tmp_path, weights)
    outcome = command(script, *line)
    assert outcome.status == 1 and "Traceback" not in outcome.said
    if script is detect:
        assert "4 damaged inputs were skipped" in outcome.said
        assert all(outcome.said.count(str(path)) for path in images.iterdir())
    else:
        outcome.assert_refused("None of the 4 images can be used; the first: ", str(images / "0.png"))


@pytest.mark.skipif(os.name == "nt", reason="links are POSIX")
@pytest.mark.parametrize("target", ["gone.png", "x.png"])
def test_links_that_lead_nowhere_are_named(tmp_path, target):
    (tmp_path / "x.png").symlink_to(target)
    (tmp_path / "0.png").write_bytes(encoded("PNG"))
    table = scan_images(list_images([tmp_path]))
    assert table.counts.corrupt == 1 and table.messages[0].startswith(
        f"{tmp_path / 'x.png'}: image left out: it cannot"
    )
    (tmp_path / "list.txt").write_text("./0.png\n./x.png\n")
    frames = [frame for (frame,) in open_source(tmp_path / "list.txt").read()]
    assert [bool(frame.error) for frame in frames] == [False, True]


def test_folders_named_like_images_are_searched_not_read(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    for path in (tmp_path / "0.png", tmp_path / "x.jpg" / "1.png"):
        path.write_bytes(encoded("PNG"))
    table = scan_images(list_images([tmp_path]))
    assert len(table) == 2 and table.counts.corrupt == 0
    assert [Path(frame.path).name for (frame,) in open_source(tmp_path).read()] == ["0.png"]
