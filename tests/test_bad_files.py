"""Bad files of a data set, generated: labels, lists of images, label caches.

Each is read rightly, or what it names is left out, counted and named, or it is refused in one message with file and
line. Images are in test_bad_images.py, weights in test_bad_weights.py; what people commonly do wrong with the commands
is in test_mistakes.py, files made to attack are in test_hostile*.py.
"""

import os
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from utils.dataloaders import labels as cache_module
from utils.dataloaders.labels import LabelTable, cache_location, load_labels, scan_images
from utils.dataloaders.paths import list_images
from utils.errors import UserError
from utils.media.sources import open_source

PNG = cv2.imencode(".png", np.full((32, 40, 3), 99, np.uint8))[1].tobytes()


class Names(NamedTuple):
    """Stands in for a data set's YAML of two classes."""

    source: Path | None = None
    nc: int = 2
    kpt_shape: tuple[int, int] | None = None


def refusal(act) -> str:
    """Returns the message, of at most three lines that a person can read, with which `act()` is refused."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and len(message) < 1500
    return message


# Labels: a line that breaks the rules stops the run before it begins, so that nothing is learnt from half of them

GOOD = "0 0.5 0.5 0.25 0.25"
FIELDS = ("class", "x", "y", "w", "h")
NO_NUMBERS = ("abc", "0,5", "0x1", "None", "1.0.0", "--1", "½", "0.5\0")
NO_CLASSES = ("nan", "inf", "-inf", "-1", "-1e-9", "0.5", "1e7", "1e30", "99999999")
NEGATIVE, BEYOND = ("-0.5", "-1e30", "-inf"), ("1.5", "320", "1e30", "1e400", "inf")


def field_cases():
    """Yields a field's place, what stands there, and the reason expected."""
    for place, field in enumerate(FIELDS):
        yield from ((place, value, f"{value!r} is not a number") for value in NO_NUMBERS)
        if field == "class":
            yield from ((place, value, f"class {value!r} is not a whole number from 0") for value in NO_CLASSES)
            continue
        yield place, "nan", "coordinate 'nan' is not a number"
        yield from ((place, value, f"coordinate {value!r} is negative") for value in NEGATIVE)
        yield from ((place, value, f"coordinate {value!r} is beyond 1") for value in BEYOND)


def make_set(folder: Path, odd_label: bytes | None = None) -> tuple[Path, Path]:
    """Makes four pictures with a label each, one of them odd; returns the folder of images and the odd label's path."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(4):
        cv2.imwrite(str(folder / "images" / f"{number}.png"), np.full((32, 40, 3), 50 * number, np.uint8))
        (folder / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.25 0.{number + 1}\n")
    odd = folder / "labels" / "2.txt"
    if odd_label is not None:
        odd.write_bytes(odd_label)
    return folder / "images", odd


@pytest.mark.parametrize(("place", "value", "reason"), list(field_cases()))
def test_a_wrong_field_is_named_with_file_and_line(tmp_path, place, value, reason):
    tokens = GOOD.split()
    tokens[place] = value
    images, odd = make_set(tmp_path, f"{GOOD}\n\n{' '.join(tokens)}\n".encode())
    message = refusal(lambda: load_labels([images], Names()))
    assert message.startswith(f"Label file {odd}, line 3: {reason}")
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 10, 100, 1_000_000])
def test_a_wrong_number_of_columns_is_named_and_other_ones_are_polygons(tmp_path, count):
    tokens = ["1", "0.25", "0.25", "0.75", "0.25", "0.75", *["0.75"] * count][:count]
    images, odd = make_set(tmp_path, " ".join(tokens).encode())
    message = refusal(lambda: load_labels([images]))
    assert message.startswith(f"Label file {odd}, line 1: {count} numbers; a box has 5 and a polygon 7, 9, 11, ...")
    if count >= 6:
        odd.write_text(" ".join([*tokens, "0.75"]))
        table = load_labels([images])
        assert table.labels(2).tolist() == [[1, 0.5, 0.5, 0.5, 0.5]]
        assert len(table.segments(2)[0]) == count // 2


@pytest.mark.parametrize("place", range(1, 7))
@pytest.mark.parametrize(("value", "reason"), [("nan", "not a number"), ("-1", "negative"), ("9", "beyond 1")])
def test_a_wrong_point_of_a_polygon_is_named(tmp_path, place, value, reason):
    tokens = "1 0.2 0.2 0.8 0.2 0.8 0.8".split()
    tokens[place] = value
    images, odd = make_set(tmp_path, " ".join(tokens).encode())
    message = refusal(lambda: load_labels([images]))
    assert message.startswith(f"Label file {odd}, line 1: coordinate '{value}' is {reason}")


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
    "a picture": (PNG, 1, "numbers; a box has 5"),
    "line ends of old": (b"0 0.5 0.5 0.2 0.2\r0 0.5 0.5 0.2 2\r", 2, "'2' is beyond 1"),
}


@pytest.mark.parametrize(("content", "line", "reason"), LABEL_FILES.values(), ids=LABEL_FILES)
def test_a_file_that_is_no_label_file_is_named_with_its_line(tmp_path, content, line, reason):
    images, odd = make_set(tmp_path, content)
    message = refusal(lambda: load_labels([images]))
    where = f"{odd}, line {line}" if line else odd
    assert message.startswith(f"Label file {where}: ") and reason in message
    assert message.endswith("Fix the label(s) and rerun.")


def make_link(target: str):
    return lambda path: path.symlink_to(target)


NO_FILES = {
    "a folder": (Path.mkdir, "Is a directory"),
    "a link to nothing": (make_link("gone.txt"), "is a link to nothing"),
    "a link to itself": (make_link("2.txt"), "Too many levels of symbolic links"),
}


@pytest.mark.skipif(os.name == "nt", reason="links and their errors are POSIX")
@pytest.mark.parametrize(("make", "reason"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_in_place_of_a_label_file_is_named(tmp_path, make, reason):
    images, odd = make_set(tmp_path)
    odd.unlink()
    make(odd)
    assert refusal(lambda: load_labels([images])).startswith(f"Label file {odd}: cannot be read ({reason}")


@pytest.mark.parametrize("label", [2, 3, 80, 9_999_999])
def test_a_class_that_the_data_set_has_not_is_named_with_its_line(tmp_path, label):
    images, odd = make_set(tmp_path, f"{GOOD}\n{label} 0.1 0.1 0.1 0.1\n".encode())
    message = refusal(lambda: load_labels([images], Names()))
    assert message.startswith(f"Label class {label} exceeds nc=2: allowed are 0 to 1. Found in {odd}, line 2.")


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
    "comments": (b"# my pictures\n./0.png\n", (["0.png"], []), (["0.png"], [])),
    "blank lines": (b"\n\n\t\n  ./0.png  \n\n./sub/1.png", (["0.png", "1.png"], []), (["0.png", "1.png"], [])),
    "a mark and old line ends": (b"\xef\xbb\xbf./0.png\r\n\r\n", (["0.png"], []), (["0.png"], [])),
    "a folder like an image": (b"./0.png\n./x.jpg\n", (["0.png"], ["x.jpg"]), (["0.png"], ["x.jpg"])),
    "itself": (b"./0.png\n./list.txt\n", (["0.png"], []), (["0.png"], ["list.txt"])),
    "an unknown address": (b"./0.png\nftp://a.invalid/b.png\n", (["0.png"], ["b.png"]), (["0.png"], ["b.png"])),
    "an address": (b"./0.png\nhttp://a.invalid/b.png\n", (["0.png"], ["b.png"]), "http://a.invalid/b.png"),
    "relative upwards": (b"./sub/../0.png\nsub/1.png\n", (["0.png", "1.png"], []), (["0.png", "1.png"], [])),
    "Latin-1": (b"./0.png\n./\xe9.png\n", (["0.png", os.fsdecode(b"\xe9.png")], []), "utf-8"),
    "UTF-16": ("./0.png\n".encode("utf-16"), "it is text in UTF-16. Save it", "list of paths"),
    "NUL bytes": (b"./0.png\n./\0.png\n", (["0.png"], ["\0.png"]), "NUL bytes"),
    "a picture": (PNG, "No images found in ", "list of paths"),
    "nothing": (b"\n# nothing\n", "No images found in ", "no images or videos found there"),
    "a long name": (b"./0.png\n./" + b"9" * 5000 + b".png", (["0.png"], ["9.png"]), (["0.png"], ["9.png"])),
}


def listed(folder: Path, content: bytes) -> Path:
    """Makes pictures, a folder named like one, and a list of them."""
    for name in (b"0.png", b"\xe9.png", b"sub/1.png"):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(PNG)
    (folder / "x.jpg").mkdir()
    (folder / "list.txt").write_bytes(content)
    return folder / "list.txt"


@pytest.mark.skipif(os.name != "posix", reason="names of any bytes are POSIX")
@pytest.mark.parametrize(("content", "training", "detection"), LISTS.values(), ids=LISTS)
def test_lists_are_read_and_what_they_name_in_vain_is_said(tmp_path, content, training, detection):
    path = listed(tmp_path, content)
    if isinstance(training, str):
        message = refusal(lambda: list_images([path]))
        assert training in message and str(path) in message
    else:
        table = scan_images(list_images([path]))
        assert [os.path.basename(image) for image in table.image_paths] == training[0]
        assert table.counts.corrupt == len(table.messages) == len(training[1])
        assert all(f"{name}: image left out" in said for said, name in zip(table.messages, training[1], strict=True))
    if isinstance(detection, str):
        message = refusal(lambda: open_source(path))
        assert detection in message
        return
    frames = [frame for (frame,) in open_source(path).read()]
    assert [os.path.basename(frame.path) for frame in frames if not frame.error] == detection[0]
    failed = [frame for frame in frames if frame.error]
    assert len(failed) == len(detection[1]) and all(frame.path.endswith(detection[1][0]) for frame in failed)


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


@pytest.mark.parametrize("twentieths", range(20))
def test_a_cache_that_is_cut_anywhere_is_made_anew(cached, caplog, twentieths):
    content = cached[1].read_bytes()
    cached[1].write_bytes(content[: len(content) * twentieths // 20])
    assert_made_anew(cached, caplog, "is damaged")


@pytest.mark.parametrize("fortieths", range(40))
def test_a_changed_byte_of_a_cache_is_found_or_harmless(cached, fortieths):
    images, path, table = cached
    changed = bytearray(path.read_bytes())
    changed[len(changed) * fortieths // 40 + 1] ^= 0x55
    path.write_bytes(changed)
    assert_same(load_labels([images], Names()), table)


def test_every_changed_number_of_a_cache_is_found(cached, caplog):
    """The labels' own bytes, one after the other: none is believed."""
    images, path, table = cached
    content = path.read_bytes()
    start = content.index(table.rows.tobytes())
    for place in range(start, start + table.rows.nbytes, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert_made_anew(cached, caplog, "is damaged")


def test_a_cache_of_another_version_is_made_anew(cached, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "FORMAT_VERSION", cache_module.FORMAT_VERSION + 1)
        load_labels([cached[0]], Names())
    assert_made_anew(cached, caplog, "is stale")


def test_a_cache_of_another_set_or_of_other_labels_is_made_anew(cached, caplog, tmp_path):
    images, odd = make_set(tmp_path / "other", b"1 0.1 0.1 0.1 0.1")
    load_labels([images], Names())
    cached[1].write_bytes(cache_location([images]).read_bytes())
    assert_made_anew(cached, caplog, "is stale")
    before = load_labels([images], Names())
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
