"""Bad files of a data set, generated: labels, images, lists of images, label caches.

Each is read rightly, or what it names is left out, counted and named, or it is refused in one message with file and
line. Weights are in test_bad_weights.py, YAMLs in test_bad_yaml.py; files made to attack are in test_hostile*.py.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from PIL import Image

import detect
import train
import val
from utils.dataloaders import labels as cache_module
from utils.dataloaders.labels import LabelTable, cache_location, load_labels, scan_images
from utils.dataloaders.paths import list_images
from utils.media.sources import open_source

POSIX = pytest.mark.skipif(os.name == "nt", reason="links, their errors and names of any bytes are POSIX")
IMAGE = cv2.resize(np.random.default_rng(5).integers(0, 256, (4, 5, 3)).astype(np.uint8), (60, 45))  # BGR
PILLOW = Image.fromarray(IMAGE[:, :, ::-1])


class Names(NamedTuple):
    """Stands in for a data set's YAML of two classes."""

    source: Path | None = None
    nc: int = 2
    kpt_shape: tuple[int, int] | None = None


def encoded(kind: str, image: Image.Image = PILLOW, **options) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


PNG = encoded("PNG")


def make_set(folder: Path, odd_label: bytes | None = None) -> tuple[Path, Path]:
    """Makes four images with a label each, one of them odd; returns the folder of images and the odd label's path."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(4):
        (folder / "images" / f"{number}.png").write_bytes(PNG)
        (folder / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.25 0.{number + 1}\n")
    odd = folder / "labels" / "2.txt"
    if odd_label is not None:
        odd.write_bytes(odd_label)
    return folder / "images", odd


# Labels: a line that breaks the rules stops the run before it begins, so that nothing is learnt from half of them

GOOD = "0 0.5 0.5 0.25 0.25"
NO_NUMBERS = ("abc", "0,5", "0x1", "None", "1.0.0", "--1", "½", "0.5\0")
NO_CLASSES = ("nan", "inf", "-inf", "-1", "-1e-9", "0.5", "1e7", "1e30", "99999999")
NEGATIVE, BEYOND = ("-0.5", "-1e30", "-inf"), ("1.5", "320", "1e30", "1e400", "inf")
LABEL_FILES = {  # content -> the line and the reason
    "NUL bytes": (bytes(64), 0, "64 of its 64 bytes are NUL: it is damaged, or in UTF-16"),
    "NUL for blanks": (GOOD.replace(" ", "\0").encode(), 1, "1 numbers"),
    "UTF-16": (f"{GOOD}\n{GOOD}\n".encode("utf-16"), 0, "is text in UTF-16 or UTF-32: save it in UTF-8"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-be"), 0, "in UTF-16 (save it in UTF-8)"),
    "UTF-32": (GOOD.encode("utf-32"), 0, "is text in UTF-16 or UTF-32: save it in UTF-8"),
    "Latin-1": (f"{GOOD}\nKäfer 0.5 0.5 0.2 0.2\n".encode("latin-1"), 2, "'K\N{REPLACEMENT CHARACTER}fer' is not"),
    "one huge word": (b"7" * 10_000_000, 1, "1 numbers"),
    "huge words": (b" ".join([b"7" * 1_000_000] * 5), 1, "class '7777777"),
    "commas": (GOOD.replace(" ", ",").encode(), 1, "numbers are separated by commas: put spaces between"),
    "commas and spaces": (GOOD.replace(" ", ", ").encode(), 1, "numbers are separated by commas: put spaces between"),
    "semicolons": (GOOD.replace(" ", "; ").encode(), 1, "numbers are separated by semicolons: put spaces between"),
    "semicolons and decimal commas": (b"0;0,5;0,5;0,2;0,2", 1, "by semicolons: put spaces between them, and points"),
    "decimal commas": (b"0 0,5 0,5 0,2 0,2", 1, "'0,5' is not a number: it has a decimal comma; write '0.5'"),
    "a no-break space": (GOOD.replace(" ", "\xa0", 1).encode(), 1, "has a no-break space (U+00A0): put plain spaces"),
    "a no-break space in Latin-1": (GOOD.replace(" ", "\xa0", 1).encode("latin-1"), 1, "has a no-break space (U+00A0)"),
    "two files in one": (f"{GOOD}\n\ufeff{GOOD}\n".encode(), 2, "has a zero width no-break space (U+FEFF): put plain"),
    "a comment": (f"# by hand\n{GOOD}\n".encode(), 1, "has a comment (#), which label files do not have: delete it"),
    "a comment behind": (f"{GOOD} # a dog\n".encode(), 1, "has a comment (#), which label files do not have: delete"),
    "DOS's end of a file": (f"{GOOD}\r\n\x1a".encode(), 2, "is the end-of-file mark of DOS (Ctrl-Z, byte 1A): delete"),
    "a confidence": (f"{GOOD} 0.9".encode(), 1, "6 numbers; a box has 5 and a polygon 7, 9, 11, ...; a sixth is a"),
    "a class by its name": (b"dog 0.5 0.5 0.2 0.2", 1, "'dog' is not a number (a class is written as its number, 0"),
    "JSON": (b'{"class": 0,\n "box": [1, 2, 3, 4]}', 1, "2 numbers"),
    "XML": (b"<annotation>\n<object/></annotation>", 1, "1 numbers"),
    "a heading": (f"class x y w h\n{GOOD}\n".encode(), 1, "'class' is not a number"),
    "corners in pixels": (b"0 10 20 110 220", 1, "fractions of the image, not pixels"),
    "an image": (PNG, 1, "numbers; a box has 5"),
    "line ends of old": (b"0 0.5 0.5 0.2 0.2\r0 0.5 0.5 0.2 2\r", 2, "'2' is beyond 1"),
}


def wrong_labels() -> Iterator[tuple[str, bytes, int, str]]:
    """Yields a kind of mistake, a label file with it, the line that must be named (0: none) and the reason."""
    yield from ((f"file: {name}", *case) for name, case in LABEL_FILES.items())
    for row, kind in ((GOOD, "box"), ("1 0.2 0.2 0.8 0.2 0.8 0.8", "polygon")):
        for place in range(len(row.split())):
            wrong = [(value, f"{value!r} is not a number") for value in NO_NUMBERS]
            if place == 0:
                wrong += [(value, f"class {value!r} is not a whole number from 0") for value in NO_CLASSES]
            else:
                wrong += [("nan", "coordinate 'nan' is not a number")]
                wrong += [(value, f"coordinate {value!r} is negative") for value in NEGATIVE]
                wrong += [(value, f"coordinate {value!r} is beyond 1") for value in BEYOND]
            for value, reason in wrong:
                tokens = row.split()
                tokens[place] = value
                yield f"{kind}: {place}", f"{GOOD}\n\n{' '.join(tokens)}\n".encode(), 3, reason
    for count in (1, 2, 3, 4, 6, 8, 10, 100, 1_000_000):
        tokens = ["1", "0.25", "0.25", "0.75", "0.25", "0.75", *["0.75"] * count][:count]
        yield "columns", " ".join(tokens).encode(), 1, f"{count} numbers; a box has 5 and a polygon 7, 9, 11, ..."
    for label in (2, 3, 80, 9_999_999):
        yield "class", f"{GOOD}\n{label} 0.1 0.1 0.1 0.1\n".encode(), 2, f"class {label} exceeds nc=2: allowed are 0 to"


WRONG_LABELS = list(wrong_labels())


@pytest.mark.parametrize("kind", dict.fromkeys(name for name, *_ in WRONG_LABELS))
def test_a_wrong_label_file_is_named_with_its_line_and_no_cache_is_made(tmp_path, kind, refusal):
    images, odd = make_set(tmp_path)
    for _, content, line, reason in (case for case in WRONG_LABELS if case[0] == kind):
        odd.write_bytes(content)
        message = refusal(load_labels, [images], Names())
        where = f"{odd}, line {line}" if line else str(odd)
        assert message.startswith("Label ") and reason in message and where in message, message
        assert message.endswith("Fix the label(s) and rerun.") or kind == "class"
    if kind != "class":  # which are allowed says the YAML, not the labels
        assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize("points", [3, 4, 5, 50])
def test_a_longer_row_is_a_polygon(tmp_path, points):
    corners = [("0.25", "0.25"), ("0.75", "0.25"), *[("0.75", "0.75")] * (points - 2)]
    images, _ = make_set(tmp_path, " ".join(["1", *(x for corner in corners for x in corner)]).encode())
    table = load_labels([images])
    assert table.labels(2).tolist() == [[1, 0.5, 0.5, 0.5, 0.5]] and len(table.segments(2)[0]) == points


def make_link(target: str):
    return lambda path: path.symlink_to(target)


NO_FILES = {
    "Is a directory": Path.mkdir,
    "is a link to nothing": make_link("gone.txt"),
    "Too many levels of symbolic links": make_link("2.txt"),
}


@POSIX
@pytest.mark.parametrize(("reason", "make"), NO_FILES.items(), ids=NO_FILES)
def test_what_is_no_file_in_place_of_a_label_file_is_named(tmp_path, make, reason, refusal):
    images, odd = make_set(tmp_path)
    odd.unlink()
    make(odd)
    assert refusal(load_labels, [images]).startswith(f"Label file {odd}: cannot be read ({reason}")


def test_repeated_lines_are_counted_and_the_rest_goes_on(tmp_path, caplog):
    other = "1 0.2 0.2 0.1 0.1"
    images, odd = make_set(tmp_path, "\n".join([GOOD, other, GOOD, "0 0.50 .5 0.25 25e-2", other]).encode())
    table = load_labels([images], Names())
    assert table.labels(2).tolist() == np.float32([[0, 0.5, 0.5, 0.25, 0.25], [1, 0.2, 0.2, 0.1, 0.1]]).tolist()
    assert table.counts == (4, 0, 0, 0, 4) and len(table.rows) == 5
    assert f"{odd}: 3 duplicate label(s) left out" in caplog.text


# Lists: what training uses and names as left out (a text: why the list is refused), and the same of detection

LISTS = {
    "missing files": (b"./0.png\n./gone.png\n", (["0.png"], ["gone.png"]), (["0.png"], ["gone.png"])),
    "comments": (b"# my images\n./0.png\n", (["0.png"], []), (["0.png"], [])),
    "blank lines": (b"\n\n\t\n  ./0.png  \n\n./sub/1.png", (["0.png", "1.png"], []), (["0.png", "1.png"], [])),
    "a mark and old line ends": (b"\xef\xbb\xbf./0.png\r\n\r\n", (["0.png"], []), (["0.png"], [])),
    "a folder like an image": (b"./0.png\n./x.jpg\n", (["0.png"], ["x.jpg"]), (["0.png"], ["x.jpg"])),
    "a link to nothing": (b"./0.png\n./link.png\n", (["0.png"], ["link.png"]), (["0.png"], ["link.png"])),
    "a link to itself": (b"./0.png\n./circle.png\n", (["0.png"], ["circle.png"]), (["0.png"], ["circle.png"])),
    "itself": (b"./0.png\n./list.txt\n", (["0.png"], []), (["0.png"], ["list.txt"])),
    "an unknown address": (b"./0.png\nftp://a.invalid/b.png\n", (["0.png"], ["b.png"]), (["0.png"], ["b.png"])),
    "an address": (b"./0.png\nhttp://a.invalid/b.png\n", (["0.png"], ["b.png"]), "http://a.invalid/b.png"),
    "relative upwards": (b"./sub/../0.png\nsub/1.png\n", (["0.png", "1.png"], []), (["0.png", "1.png"], [])),
    "Latin-1": (b"./0.png\n./\xe9.png\n", (["0.png", os.fsdecode(b"\xe9.png")], []), "utf-8"),
    "UTF-16": ("./0.png\n".encode("utf-16"), "it is text in UTF-16. Save it", "list of paths"),
    "NUL bytes": (b"./0.png\n./\0.png\n", (["0.png"], ["\0.png"]), "NUL bytes"),
    "an image": (PNG, "No images found in ", "list of paths"),
    "nothing": (b"\n# nothing\n", "No images found in ", "no images or videos found there"),
    "a long name": (b"./0.png\n./" + b"9" * 5000 + b".png", (["0.png"], ["9.png"]), (["0.png"], ["9.png"])),
}


def listed(folder: Path, content: bytes) -> Path:
    """Makes images, a folder named like one, links to none, and a list."""
    for name in (b"0.png", b"\xe9.png", b"sub/1.png"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PNG)
    (folder / "x.jpg").mkdir()
    (folder / "link.png").symlink_to("gone.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "list.txt").write_bytes(content)
    return folder / "list.txt"


@POSIX
@pytest.mark.parametrize(("content", "training", "detection"), LISTS.values(), ids=LISTS)
def test_lists_are_read_and_what_they_name_in_vain_is_said(tmp_path, content, training, detection, refusal):
    path = listed(tmp_path, content)
    if isinstance(training, str):
        message = refusal(list_images, [path])
        assert training in message and str(path) in message
    else:
        table = scan_images(list_images([path]))
        assert [os.path.basename(image) for image in table.image_paths] == training[0]
        assert table.counts.corrupt == len(table.messages) == len(training[1])
        assert all(f"{name}: image left out" in said for said, name in zip(table.messages, training[1], strict=True))
    if isinstance(detection, str):
        assert detection in refusal(open_source, path)
        return
    frames = [frame for (frame,) in open_source(path).read()]
    assert [os.path.basename(frame.path) for frame in frames if not frame.error] == detection[0]
    failed = [frame for frame in frames if frame.error]
    assert len(failed) == len(detection[1]) and all(frame.path.endswith(detection[1][0]) for frame in failed)


def test_folders_named_like_images_are_searched_not_read(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    for path in (tmp_path / "0.png", tmp_path / "x.jpg" / "1.png"):
        path.write_bytes(PNG)
    table = scan_images(list_images([tmp_path]))
    assert len(table) == 2 and table.counts.corrupt == 0
    assert [Path(frame.path).name for (frame,) in open_source(tmp_path).read()] == ["0.png"]


# Label caches


@pytest.fixture
def cached(tmp_path):
    """A small set's images, its cache and what the cache holds."""
    images, _ = make_set(tmp_path / "set", b"1 0 0 1 0 1 1\n0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n")
    table = load_labels([images], Names())
    return images, cache_location([images]), table


def assert_same(one: LabelTable, other: LabelTable) -> None:
    assert list(one.image_paths) == list(other.image_paths)
    assert (one.counts, one.messages) == (other.counts, other.messages)
    for name in ("sizes_wh", "rows", "offsets", "seg_points", "seg_offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def assert_made_anew(cached, caplog, word: str) -> None:
    """Loading says what is wrong with the cache, finds the same as before, and leaves a cache that holds."""
    images, path, table = cached
    with caplog.at_level("INFO", logger="yolov5"):
        caplog.clear()
        assert_same(load_labels([images], Names()), table)
        (said,) = (
            record.message for record in caplog.records if str(path) in record.message and word in record.message
        )
        assert "scanning again" in said and len(said.splitlines()) == 1
        assert f"New cache created: {path}" in caplog.text
        caplog.clear()
        assert_same(load_labels([images], Names()), table)
        assert "scanning again" not in caplog.text


def test_a_cache_that_is_cut_anywhere_is_made_anew(cached, caplog):
    content = cached[1].read_bytes()
    for twentieths in range(20):
        cached[1].write_bytes(content[: len(content) * twentieths // 20])
        assert_made_anew(cached, caplog, "is damaged")


def test_a_changed_byte_of_a_cache_is_found_or_harmless(cached):
    images, path, table = cached
    content = path.read_bytes()
    for place in range(1, len(content), len(content) // 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        assert_same(load_labels([images], Names()), table)


def test_every_changed_number_of_a_cache_is_found(cached, caplog):
    """The labels' own bytes, one after the other: none is believed."""
    images, path, table = cached
    content = path.read_bytes()
    start = content.index(table.rows.tobytes())
    for place in range(start, start + table.rows.nbytes, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert_made_anew(cached, caplog, "is damaged")


def test_a_cache_of_another_version_set_or_label_is_made_anew(cached, caplog, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "FORMAT_VERSION", cache_module.FORMAT_VERSION + 1)
        load_labels([cached[0]], Names())
    assert_made_anew(cached, caplog, "is stale")
    images, odd = make_set(tmp_path / "other", b"1 0.1 0.1 0.1 0.1")
    before = load_labels([images], Names())
    cached[1].write_bytes(cache_location([images]).read_bytes())
    assert_made_anew(cached, caplog, "is stale")
    odd.write_text("0 0.9 0.9 0.1 0.1 \n")
    assert_made_anew((images, cache_location([images]), scan_images(list_images([images]))), caplog, "is stale")
    assert before.labels(2).tolist() != load_labels([images], Names()).labels(2).tolist()


@pytest.mark.parametrize("name", ["key", "rows", "offsets", "messages"])
def test_a_cache_without_a_part_is_made_anew(cached, caplog, name):
    with np.load(cached[1]) as archive:
        arrays = {key: archive[key] for key in archive if key != name}
    with open(cached[1], "wb") as file:
        np.savez(file, **arrays)
    assert_made_anew(cached, caplog, "is damaged")


def test_a_folder_in_place_of_a_cache_is_said(cached, caplog):
    images, path, table = cached
    path.unlink()
    path.mkdir()
    assert_same(load_labels([images], Names()), table)
    assert f"no label cache, so the next start scans again: {path}" in caplog.text


# Images; the reader's finer points are in utils/test_images.py

GREY = IMAGE[:, :, 1]
INVERTED = Image.fromarray(255 - IMAGE[:, :, ::-1])


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
    """An image file; why it is left out, empty where it is read; what it shows."""

    data: bytes
    scan: str = ""  # in training and validation
    detect: str | None = None  # in detection; None: as in training
    shown: np.ndarray = IMAGE  # (h, w, 3) BGR
    tolerance: int = 0


def deep(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image.astype(np.uint16) * 257)[1].tobytes()


CUT = {kind: encoded(kind)[: len(encoded(kind)) * 2 // 3] for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")}
SIDES, UNREADABLE = "sides under 10 px", "is not a readable image"
PALETTE = PILLOW.quantize(16)
PALETTE_SHOWN = np.asarray(PALETTE.convert("RGB"))[:, :, ::-1]
GIF_SHOWN = np.asarray(Image.open(io.BytesIO(encoded("GIF"))).convert("RGB"))[:, :, ::-1]
GREY_SHOWN = np.dstack([GREY] * 3)
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
    "no_sides_gif.png": Kind(of_sides("GIF", 0, 0), "is of format gif", "", GIF_SHOWN),
    "dot.png": Kind(encoded("PNG", PILLOW.crop((7, 8, 8, 9))), SIDES, "", IMAGE[8:9, 7:8]),
    "small.png": Kind(encoded("PNG", PILLOW.crop((0, 0, 9, 40))), SIDES, "", IMAGE[:40, :9]),
    "line.png": Kind(encoded("PNG", PILLOW.resize((3000, 10))), "beyond 200:1"),
    "png.jpg": Kind(PNG),
    "jpeg.png": Kind(encoded("JPEG", quality=100, subsampling=0), tolerance=4),
    "bmp.webp": Kind(encoded("BMP")),
    "webp.tif": Kind(encoded("WEBP", lossless=True)),
    "gif.bmp": Kind(encoded("GIF", PALETTE), "is of format gif", "", PALETTE_SHOWN),
    "ink.jpg": Kind(encoded("JPEG", PILLOW.convert("CMYK"), quality=100, subsampling=0), tolerance=4),
    "grey.jpg": Kind(encoded("JPEG", Image.fromarray(GREY), quality=100), shown=GREY_SHOWN, tolerance=3),
    "deep.png": Kind(deep(IMAGE)),
    "deep_grey.png": Kind(deep(GREY), shown=GREY_SHOWN),
    "turned.png": Kind(turned(6), shown=np.rot90(IMAGE, -1)),
    "mirrored.png": Kind(turned(2), shown=IMAGE[:, ::-1]),
    "alpha.png": Kind(encoded("PNG", Image.fromarray(np.dstack([IMAGE[:, :, ::-1], GREY])))),
    "palette.png": Kind(encoded("PNG", PALETTE), shown=PALETTE_SHOWN),
    "palette_alpha.png": Kind(encoded("PNG", PALETTE, transparency=2), shown=PALETTE_SHOWN),
    "moving.webp": Kind(encoded("WEBP", lossless=True, save_all=True, append_images=[INVERTED])),
    "pages.tif": Kind(encoded("TIFF", save_all=True, append_images=[INVERTED])),
}
LEFT_OUT = [name for name, kind in KINDS.items() if kind.scan]
SKIPPED = {name: kind.scan if kind.detect is None else kind.detect for name, kind in KINDS.items()}
SKIPPED = {name: reason for name, reason in SKIPPED.items() if reason}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """A data set's YAML: four sound images with labels, and a file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    images, _ = make_set(folder)
    for name, kind in KINDS.items():
        (images / name).write_bytes(kind.data)
    (folder / "set.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [a, b]\n")
    return folder / "set.yaml"


def line_of(script, data: Path, weights: Path, project: Path) -> list:
    """A command over a data set."""
    shared = ["--weights", weights, "--project", project, "--img", 64, "--device", "cpu"]
    if script is detect:
        return [*shared, "--source", data.parent / "images", "--nosave", "--save-txt"]
    return [*shared, "--data", data, "--workers", 0, "--noplots"]


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged headers
def test_images_are_read_rightly_or_left_out_with_the_reason(kinds):
    images = kinds.parent / "images"
    table = scan_images(list_images([images]))
    assert table.counts == (4, len(KINDS) - len(LEFT_OUT), 0, len(LEFT_OUT), 4 + len(KINDS))
    reasons = {message.partition(": image left out: it ")[0]: message for message in table.messages}
    assert set(reasons) == {str(images / name) for name in LEFT_OUT}
    sizes_wh = dict(zip(table.image_paths, table.sizes_wh.tolist(), strict=True))
    frames = {Path(frame.path).name: frame for (frame,) in open_source(images).read()}
    for name, kind in {"0.png": Kind(PNG), **KINDS}.items():
        path, frame = str(images / name), frames[name]
        if kind.scan:
            assert kind.scan in reasons[path] and len(reasons[path]) < 500
        else:
            assert sizes_wh[path] == list(kind.shown.shape[1::-1])
        if name in SKIPPED:
            assert frame.image is None and SKIPPED[name] in frame.error
        else:
            assert not frame.error and frame.image.dtype == np.uint8 and frame.image.shape == kind.shown.shape, name
            assert np.abs(frame.image.astype(int) - kind.shown).max() <= kind.tolerance, name


@pytest.mark.filterwarnings("ignore")
def test_commands_skip_count_and_name_them_and_do_all_others(kinds, tmp_path, command, weights, one_thread):
    outcome = command(detect, *line_of(detect, kinds, weights, tmp_path))
    assert outcome.status == 1 and "Traceback" not in outcome.said
    summary = outcome.said.partition(f"{len(SKIPPED)} damaged inputs were skipped, all others are done:\n")[2]
    assert len(summary.strip().splitlines()) == len(SKIPPED)
    assert all(str(kinds.parent / "images" / name) in summary for name in SKIPPED)
    assert len(list((tmp_path / "exp" / "labels").iterdir())) == 4 + len(KINDS) - len(SKIPPED)
    outcome = command(val, *line_of(val, kinds, weights, tmp_path))
    assert outcome.status == 0, outcome.said
    assert f"4 found, {len(KINDS) - len(LEFT_OUT)} missing, 0 empty, {len(LEFT_OUT)} corrupt" in outcome.said
    words = "WARNING: {}: image left out: it "
    assert all(words.format(kinds.parent / "images" / name) in outcome.said for name in LEFT_OUT)
    assert f"all{4 + len(KINDS) - len(LEFT_OUT):11}" in outcome.said


@pytest.mark.parametrize("script", [train, val, detect], ids=lambda script: script.__name__)
def test_a_set_that_is_broken_entirely_is_an_error(tmp_path, script, command, weights, one_thread):
    images, _ = make_set(tmp_path)
    (tmp_path / "set.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [a, b]\n")
    for number, path in enumerate(sorted(images.iterdir())):
        path.write_bytes([b"", b"text", CUT["PNG"], CUT["JPEG"]][number])
    outcome = command(script, *line_of(script, tmp_path / "set.yaml", weights, tmp_path / "runs"))
    if script is detect:
        assert outcome.status == 1 and "Traceback" not in outcome.said and "4 damaged inputs were skip" in outcome.said
        assert all(outcome.said.count(str(path)) for path in images.iterdir())
    else:
        outcome.assert_refused("None of the 4 images can be used; the first: ", str(images / "0.png"))
