"""Images: every orientation and kind read right, every damage found, and the letterbox that all stages share."""

import contextlib
import csv
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from utils import images
from utils.boxes import scale_boxes
from utils.images import (
    ImageError,
    check_image,
    exif_size,
    exif_transpose,
    image_size,
    letterbox,
    read_image,
    resized_wh,
    to_8_bits,
)

ORIENTATION = 0x0112
LOSSLESS = {"png": {}, "webp": {"lossless": True}, "tiff": {}, "bmp": {}, "jpg": {"quality": 95}}


def scene_rgb(width=64, height=48):
    """An image without symmetry, smooth enough for JPEG: uint8 (h, w, 3)."""
    rows, columns = np.mgrid[0:height, 0:width]
    blue = 127 + 100 * np.sin(5 * columns / width) * np.cos(4 * rows / height)
    return np.stack([columns * 255 / width, rows * 255 / height, blue], axis=-1).astype(np.uint8)


SCENE = scene_rgb()
GREY = SCENE[:, :, 0]
GREY_BGR = np.repeat(GREY[:, :, None], 3, axis=2)
ALPHA = np.full_like(GREY, 100)


def encoded(image=None, kind="JPEG", several=False, **options):
    """The bytes of an image file; with `several`, the image's negative is a second frame or page."""
    if several:
        options |= {"save_all": True, "append_images": [Image.fromarray(255 - SCENE)]}
    buffer = io.BytesIO()
    (Image.fromarray(SCENE) if image is None else image).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path, data):
    path.write_bytes(data)
    return path


def exif_of(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def assert_reads_as(path, expected_bgr, tolerance=0):
    """The pixels, and that the header and the check know the size of what is decoded."""
    pixels = read_image(path)
    assert pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
    assert pixels.shape == expected_bgr.shape
    assert np.abs(pixels.astype(int) - expected_bgr.astype(int)).max() <= tolerance
    for info in (image_size(path), check_image(path)):
        assert (info.height, info.width) == pixels.shape[:2]


# Orientation


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_orientation_is_applied_once_as_pillow_applies_it(tmp_path, suffix, orientation):
    path = tmp_path / f"image.{suffix}"
    how = {"tiffinfo": {ORIENTATION: orientation}} if suffix == "tiff" else {"exif": exif_of(orientation)}
    Image.fromarray(SCENE).save(path, **how, **LOSSLESS[suffix])
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))[:, :, ::-1]
    assert upright.shape[:2] == ((64, 48) if orientation in (5, 6, 7, 8) else (48, 64))
    assert_reads_as(path, upright, tolerance=2 if suffix == "jpg" else 0)


def test_orientation_of_pillow_images():
    image = Image.new("RGB", (40, 20))
    image.getexif()[0x0112] = 6
    assert exif_size(image) == (20, 40) and exif_transpose(image).size == (20, 40)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_orientation_is_applied_to_a_reduced_decode_too(tmp_path, orientation):
    path = tmp_path / "image.jpg"
    Image.fromarray(scene_rgb(256, 192)).save(path, exif=exif_of(orientation), quality=95)
    full, reduced = read_image(path), read_image(path, min_side_hint=64)
    assert reduced.shape == tuple(-(-side // 4) for side in full.shape[:2]) + (3,)
    expected = cv2.resize(full, reduced.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(reduced.astype(int) - expected.astype(int)).mean() < 1


def test_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    block = exif_of(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    data = encoded(kind="PNG")
    path = write(tmp_path / "image.png", data[:-12] + chunk + data[-12:])
    assert_reads_as(path, cv2.rotate(SCENE[:, :, ::-1], cv2.ROTATE_90_CLOCKWISE))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
def test_a_damaged_exif_block_is_no_reason_to_refuse_an_image(tmp_path):
    for suffix, kind in (("jpg", "JPEG"), ("webp", "WEBP")):
        path = write(
            tmp_path / f"image.{suffix}", encoded(kind=kind, exif=b"Exif\0\0MM\0*\0\0\xff\xffrubbish", quality=95)
        )
        assert read_image(path).shape == (48, 64, 3) and check_image(path)[:2] == (64, 48)


# Kinds


def sixteen_bits(array):
    return array.astype(np.uint16) * 257


def twelve_bits(array):
    return array.astype(np.uint16) * 16 + 15


def cv_encoded(suffix, array):
    return cv2.imencode(suffix, array)[1].tobytes()


SCENE_BGR = np.ascontiguousarray(SCENE[:, :, ::-1])
GREY_PIC, RGBA_PIC = Image.fromarray(GREY), Image.fromarray(np.dstack([SCENE, ALPHA]))
PALETTE_PIC = Image.fromarray(SCENE).quantize(16)
PALETTE_BGR = np.asarray(PALETTE_PIC.convert("RGB"))[:, :, ::-1]
BIT_PIC = GREY_PIC.convert("1", dither=Image.Dither.NONE)
BIT_BGR = np.repeat(np.where(GREY > 127, 255, 0)[:, :, None], 3, axis=2)
FLOAT_PIC, LONG_PIC = Image.fromarray(GREY.astype(np.float32) / 255), Image.fromarray(GREY.astype(np.int32) * 257)

KINDS = {  # file name: (its bytes, the pixels expected, tolerance); the usual ones are in test_bad_data.py
    "grey.png": (encoded(GREY_PIC, "PNG"), GREY_BGR, 0),
    "grey_alpha.png": (encoded(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG"), GREY_BGR, 0),
    "bits.png": (encoded(BIT_PIC, "PNG"), BIT_BGR, 0),
    "animated.png": (encoded(kind="PNG", several=True), SCENE_BGR, 0),
    "progressive.jpg": (encoded(progressive=True, quality=95), SCENE_BGR, 8),
    "trailing.jpg": (encoded(quality=95) + b"left by a camera", SCENE_BGR, 8),
    "several.mpo": (encoded(kind="MPO", quality=95, several=True), SCENE_BGR, 8),
    "rgba.webp": (encoded(RGBA_PIC, "WEBP", lossless=True, exact=True), SCENE_BGR, 0),
    "palette.bmp": (encoded(PALETTE_PIC, "BMP"), PALETTE_BGR, 0),
    "bits.bmp": (encoded(BIT_PIC, "BMP"), BIT_BGR, 0),
    "rgba.tiff": (encoded(RGBA_PIC, "TIFF"), SCENE_BGR, 0),
    "grey16.tif": (encoded(Image.fromarray(sixteen_bits(GREY)), "TIFF"), GREY_BGR, 0),
    "grey32.tif": (encoded(LONG_PIC, "TIFF"), GREY_BGR, 0),
    "colour16.tif": (cv_encoded(".tiff", sixteen_bits(SCENE_BGR)), SCENE_BGR, 0),
    "float.tif": (encoded(FLOAT_PIC, "TIFF"), GREY_BGR, 1),
    "float255.tif": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), GREY_BGR, 0),
    "float16bits.tif": (encoded(Image.fromarray(GREY.astype(np.float32) * 257), "TIFF"), GREY_BGR, 0),
    "grey12.tif": (encoded(Image.fromarray(twelve_bits(GREY)), "TIFF"), GREY_BGR, 0),
    "grey8in16.tif": (encoded(Image.fromarray(GREY.astype(np.uint16)), "TIFF"), GREY_BGR, 0),
    "grey8in32.tif": (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), GREY_BGR, 0),
    "grey12.png": (encoded(Image.fromarray(twelve_bits(GREY)), "PNG"), GREY_BGR, 0),
    "colour12.png": (cv_encoded(".png", twelve_bits(SCENE_BGR)), SCENE_BGR, 0),
    "alpha12.png": (cv_encoded(".png", twelve_bits(np.dstack([SCENE_BGR, ALPHA]))), SCENE_BGR, 0),
    "bits.tif": (encoded(BIT_PIC, "TIFF"), BIT_BGR, 0),
    "cmyk.tif": (encoded(Image.fromarray(SCENE).convert("CMYK"), "TIFF"), SCENE_BGR, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_8_bit_colour_without_alpha_first_frame(tmp_path, name):
    data, expected, tolerance = KINDS[name]
    assert_reads_as(write(tmp_path / name, data), expected, tolerance)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 128, 255], np.uint8), [0, 128, 255]),
        (np.array([False, True]), [0, 255]),
        (np.array([0, 128, 255], np.uint16), [0, 128, 255]),
        (np.array([-3, 128, 260], np.int64), [0, 128, 255]),  # interpolation overshot
        (np.array([0, 2048, 4095], np.uint16), [0, 128, 255]),
        (np.array([0, 2048, 4095], np.int32), [0, 128, 255]),
        (np.array([0, 32768, 65535], np.uint16), [0, 128, 255]),
        (np.array([0, 0.5, 1]), [0, 128, 255]),
        (np.array([-0.04, 0.5, 1.3], np.float32), [0, 128, 255]),
        (np.array([0, 127.6, 255], np.float32), [0, 128, 255]),
        (np.array([-9, 127.6, 262], np.float16), [0, 128, 255]),
        (np.array([0, 2056, 4095.0]), [0, 128, 255]),
        (np.array([0, 32896, 65535.0]), [0, 128, 255]),
        (np.zeros(2), [0, 0]),
        (np.zeros((0, 3)), np.zeros((0, 3))),
    ],
)
def test_values_become_8_bits_by_type_and_range(values, expected):
    found = to_8_bits(values)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "values",
    [
        [-2.1, 0.3, 2.6],  # normalised by mean and deviation
        [-1.0, 1.0],
        [-0.5, 0.5],
        [0.0, np.nan],
        [0.0, np.inf],
        [0.0, 1e6],
        [-300, 70],
        [0, 2**31 - 1],
    ],
)
def test_values_of_no_known_range_are_refused(values):
    with pytest.raises(ImageError, match=r"has values from \S+ to \S+; 0 to 1 \(floats\), 0 to 255"):
        to_8_bits(np.array(values))


def test_files_of_no_known_range_are_found_when_checked_and_when_read(tmp_path):
    for data, words in (
        (encoded(Image.fromarray(GREY.astype(np.float32) * 1000), "TIFF"), "has values from"),
        (encoded(Image.fromarray(GREY.astype(np.float32) / 60 - 2), "TIFF"), "has values from -2 to"),
        (cv_encoded(".tiff", twelve_bits(SCENE_BGR)), "16 bits a channel with values below 4096"),
    ):
        for look in (check_image, read_image):
            with pytest.raises(ImageError, match=words):
                look(write(tmp_path / "image.tif", data))


# Damage

WHOLE = {
    "baseline.jpg": encoded(),
    "progressive.jpg": encoded(progressive=True),
    "image.png": encoded(kind="PNG"),
    "lossy.webp": encoded(kind="WEBP"),
    "lossless.webp": encoded(kind="WEBP", lossless=True),
    "image.bmp": encoded(kind="BMP"),
    "plain.tiff": encoded(kind="TIFF"),
    "lzw.tiff": encoded(kind="TIFF", compression="tiff_lzw"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on TIFF files that end in their directory
@pytest.mark.parametrize("kept", [-1, 0.99, 0.9, 0.5, 0.1, 20, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_truncation_is_found_when_checked_and_when_read(tmp_path, name, kept):
    data = WHOLE[name]
    path = write(tmp_path / name, data)
    check_image(path)
    write(path, data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    for function in (check_image, read_image):
        with pytest.raises(ImageError):
            function(path)


@pytest.mark.parametrize("function", [check_image, read_image])
def test_a_jpeg_without_its_end_marker_is_truncated(tmp_path, function):
    path = write(tmp_path / "image.jpg", encoded()[:-2])
    assert cv2.imread(str(path)) is not None  # OpenCV lets it pass
    Image.open(path).verify()  # and Pillow too
    with pytest.raises(ImageError, match="truncated JPEG"):
        function(path)


@pytest.mark.parametrize("function", [check_image, read_image])
def test_the_end_marker_of_a_thumbnail_hides_no_truncation(tmp_path, function):
    thumbnail = encoded(Image.fromarray(SCENE).resize((16, 12)))
    data = encoded(exif=exif_of(6).tobytes() + thumbnail)
    path = write(tmp_path / "image.jpg", data)
    assert image_size(path)[:2] == (48, 64)
    function(path)
    write(path, data[: len(data) * 3 // 4])
    assert b"\xff\xd9" in path.read_bytes()
    with pytest.raises(ImageError, match="truncated JPEG"):
        function(path)


@pytest.mark.parametrize("function", [check_image, read_image])
def test_one_flipped_bit_in_a_png_is_found(tmp_path, function):
    data = bytearray(WHOLE["image.png"])
    data[data.index(b"IDAT") + 40] ^= 1
    with pytest.raises(ImageError, match="damaged PNG .*IDAT"):
        function(write(tmp_path / "image.png", bytes(data)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xd8\xff\xd9", "no frame header"),
        (b"\xff\xd8" + b"\xff\xe0\x00\x10" + bytes(40), "no marker where one must stand"),
        (
            b"\xff\xd8" + b"\xff\xc3\x00\x0b\x08\x00\x30\x00\x40\x01\x01\x11\x00" + b"\xff\xda" + bytes(9),
            "no frame header",
        ),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a readable image"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(40), "not a readable image|cannot be decoded"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(tmp_path, data, reason):
    path = write(tmp_path / "image.jpg", data)
    for function in (check_image, read_image):
        with pytest.raises(ImageError, match=reason):
            function(path)


def claiming_png(width: int, height: int) -> bytes:
    """Returns a PNG whose header, with the right checksum, claims a size that its few pixels do not fill."""
    data = bytearray(cv2.imencode(".png", np.zeros((12, 12), np.uint8))[1].tobytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def claiming_jpeg(width: int, height: int) -> bytes:
    """Returns a whole JPEG of 12x12 px whose frame header claims another size."""
    data = bytearray(cv2.imencode(".jpg", np.zeros((12, 12, 3), np.uint8))[1].tobytes())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def claiming_tiff(width: int, height: int) -> bytes:
    """Returns a TIFF whose header claims another size than its pixels fill."""
    target = io.BytesIO()
    Image.new("L", (12, 12)).save(target, "tiff")
    data = target.getvalue()
    for tag, side in ((0x0100, width), (0x0101, height)):
        entry = data.index(struct.pack("<H", tag) + b"\4\0\1\0\0\0")
        data = data[: entry + 8] + struct.pack("<I", side) + data[entry + 12 :]
    return data


@pytest.mark.parametrize(
    "data",
    [
        claiming_png(12, 8_388_620),  # took 2 s, twice decoded in vain
        claiming_tiff(12, 4_194_316),  # took 600 MB
        claiming_jpeg(32_767, 32_767),  # would have taken 3 GB
        claiming_jpeg(13_000, 13_000),
    ],
    ids=("png", "tiff", "jpeg", "smaller jpeg"),
)
def test_a_small_file_that_claims_many_pixels_is_refused_undecoded(tmp_path, monkeypatch, data):
    for decoder in ("_decode", "_decode_with_pillow"):
        monkeypatch.setattr(images, decoder, lambda *_: pytest.fail("was decoded"))
    path = write(tmp_path / "image", data)
    for function in (check_image, image_size, read_image):
        with pytest.raises(images.ImageTooLargeError, match="pixels"):
            function(path)


def test_a_large_blank_image_is_no_bomb():
    data = cv2.imencode(".png", np.zeros((4200, 4200, 3), np.uint8))[1].tobytes()
    assert images.decode_image(data).shape == (4200, 4200, 3)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    for path in (tmp_path / "missing.jpg", tmp_path):
        for function in (check_image, image_size, read_image):
            with pytest.raises(ImageError, match="cannot be read"):
                function(path)


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (1, 20000, "1x20000 px; sides under 10 px"),
        (20000, 1, "20000x1 px; sides under 10 px"),
        (9, 100, "9x100 px; sides under 10 px"),
        (4020, 20, "4020x20 px; sides beyond 200:1"),
        (10, 2000, None),
    ],
)
def test_strips_are_refused_for_training_but_can_be_read(tmp_path, width, height, reason):
    path = tmp_path / "strip.png"
    Image.new("RGB", (width, height)).save(path)
    if reason is None:
        assert check_image(path) == (width, height, "png")
    else:
        with pytest.raises(ImageError, match=reason):
            check_image(path)
    assert read_image(path).shape == (height, width, 3)


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged headers
@pytest.mark.parametrize("name", WHOLE)
def test_damage_anywhere_raises_nothing_but_image_error(tmp_path, name):
    rng = np.random.default_rng(0)
    sizes, reads = 0, 0
    for _ in range(80):
        damaged = bytearray(WHOLE[name])
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(min(len(damaged), 400))] = rng.integers(256)
        path = write(tmp_path / name, bytes(damaged))
        for function in (image_size, check_image):
            with contextlib.suppress(ImageError):
                function(path)
                sizes += 1
        with contextlib.suppress(ImageError):
            pixels = read_image(path)
            assert image_size(path)[:2] == pixels.shape[1::-1]
            reads += 1
    assert 0 < sizes < 160 and reads < 80  # some damage is harmless, some is found


# Cost


def test_checking_a_jpeg_or_png_decodes_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("decoded")

    paths = [write(tmp_path / name, WHOLE[name]) for name in ("baseline.jpg", "progressive.jpg", "image.png")]
    monkeypatch.setattr(images.cv2, "imdecode", refuse)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", refuse)
    for path in paths:
        assert check_image(path)[:2] == image_size(path)[:2] == (64, 48)


@pytest.mark.parametrize(
    ("hint", "factor"), [(None, 1), (641, 1), (501, 1), (500, 2), (251, 2), (250, 4), (125, 8), (10, 8)]
)
def test_a_reduced_decode_keeps_the_long_side_and_looks_the_same(tmp_path, hint, factor):
    path = tmp_path / "image.jpg"
    Image.fromarray(scene_rgb(667, 1001)).save(path, quality=95)
    full, reduced = read_image(path), read_image(path, hint)
    assert reduced.shape == (-(-1001 // factor), -(-667 // factor), 3)
    assert max(reduced.shape) >= (hint or 1001)
    expected = cv2.resize(full, reduced.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(reduced.astype(int) - expected.astype(int)).mean() < 1.5


def test_formats_without_reduced_decoding_are_read_whole(tmp_path):
    assert read_image(write(tmp_path / "image.png", WHOLE["image.png"]), min_side_hint=8).shape == (48, 64, 3)


# Sizes


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [(640, 480, 640, (640, 480)), (500, 333, 640, (640, 427)), (1280, 719, 640, (640, 360)), (1, 1000, 100, (1, 100))],
)
def test_resizing_rounds_the_short_side_up(width, height, size, expected):
    assert resized_wh((width, height), size) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000))
@settings(max_examples=200)
def test_resized_sides_fit_and_the_long_one_is_exact(width, height, size):
    resized = resized_wh((width, height), size)
    assert max(resized) == size and min(resized) >= 1
    for side, original in zip(resized, (width, height), strict=True):
        assert -1e-6 <= side - original * size / max(width, height) < 1


def test_letterbox_equals_the_published_program(golden_dir):
    with open(golden_dir / "letterbox.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        image = np.zeros((int(row["h"]), int(row["w"]), 3), np.uint8)
        boxed = letterbox(image, 640, auto=row["auto"] == "True", scaleup=row["scaleup"] == "True")
        assert boxed.image.shape == (int(row["out_h"]), int(row["out_w"]), 3)
        assert [round(ratio, 6) for ratio in boxed.ratio] == [float(row["ratio_w"]), float(row["ratio_h"])]
        assert boxed.pad == (float(row["pad_w_each_side"]), float(row["pad_h_each_side"]))


@pytest.mark.parametrize(
    ("shape", "padded", "pad"), [((720, 1280), (384, 640), (0, 12)), ((1080, 810), (640, 480), (0, 0))]
)
def test_letterbox_worked_by_hand(shape, padded, pad):
    boxed = letterbox(np.full((*shape, 3), 200, np.uint8), 640)
    assert boxed.image.shape == (*padded, 3) and boxed.pad == pad
    top = pad[1]
    assert (boxed.image[:top] == 114).all() and (boxed.image[padded[0] - top :] == 114).all()
    assert (boxed.image[top : padded[0] - top] == 200).all()


def test_odd_padding_puts_the_spare_pixel_below_and_to_the_right():
    image = np.full((61, 100, 3), 7, np.uint8)
    boxed = letterbox(image, (64, 103), color=(1, 2, 3), auto=False, scaleup=False)
    assert boxed.pad == (1.5, 1.5) and boxed.ratio == (1, 1)
    np.testing.assert_array_equal(boxed.image[1:62, 1:101], image)
    for border in (boxed.image[:1], boxed.image[62:], boxed.image[:, :1], boxed.image[:, 101:]):
        assert (border == (1, 2, 3)).all()


def test_stretching_uses_a_ratio_for_each_axis():
    boxed = letterbox(np.zeros((100, 200, 3), np.uint8), (320, 480), auto=False, scaleFill=True)
    assert boxed.image.shape == (320, 480, 3) and boxed.ratio == (2.4, 3.2) and boxed.pad == (0, 0)


image_sides = st.integers(1, 1000)


@given(image_sides, image_sides, st.sampled_from([160, 320, (192, 320)]), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_letterbox_is_filled_exactly_and_leads_back(height, width, new_shape, auto, scaleup):
    boxed = letterbox(np.zeros((height, width, 3), np.uint8), new_shape, auto=auto, scaleup=scaleup)
    padded_hw, target_hw = boxed.image.shape[:2], (new_shape,) * 2 if isinstance(new_shape, int) else new_shape
    if auto:
        assert padded_hw[0] % 32 == padded_hw[1] % 32 == 0 and all(np.less_equal(padded_hw, target_hw))
    else:
        assert padded_hw == target_hw
    content = np.flatnonzero((boxed.image[..., 0] == 0).any(1)), np.flatnonzero((boxed.image[..., 0] == 0).any(0))
    for lines, side, pad in zip(content, padded_hw, boxed.pad[::-1], strict=True):
        before, after = lines[0], side - 1 - lines[-1]
        assert 0 <= after - before <= 1 and before + after == 2 * pad
    corners = np.array([[0, 0, width, height], [width * 0.2, height * 0.3, width * 0.7, height * 0.9]])
    there = corners * np.tile(boxed.ratio, 2) + np.tile(boxed.pad, 2)
    recorded = (boxed.ratio[::-1], boxed.pad)
    np.testing.assert_allclose(scale_boxes(padded_hw, there, (height, width), recorded), corners, atol=1e-6)
    if scaleup and not auto:  # without the record, the half pixel that rounding moved the image is lost
        back = scale_boxes(padded_hw, there, (height, width))
        np.testing.assert_allclose(back, corners, atol=0.5 / boxed.ratio[0] + 1e-6)
