"""Images: reading them right (orientation, bit depth, damage), sizes from headers, resizing, and THE letterbox.

One reader and one letterbox serve training, validation, detection and calibration alike, so that a model meets the
same pixels everywhere. Arrays are uint8 (height, width, 3) in OpenCV's BGR order. Torch is never needed here.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError, check_img_size
from utils.log import LOGGER

# Those of YOLOv5, and what else is read: AVIF (by Pillow from 11.3 on), web video, transport streams, phones' videos
IMG_FORMATS = frozenset("avif bmp dng jpeg jpg mpo png tif tiff webp".split())
VID_FORMATS = frozenset("3gp asf avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ts webm wmv".split())
PAD_COLOUR = (114, 114, 114)
DEFAULT_IMGSZ = 640  # px, of `--imgsz`
MIN_SIDE = 10  # px; smaller images are refused, as in YOLOv5
MAX_ASPECT = 200  # longer strips than this shrink to nothing at training size
MAX_PIXELS = 178_956_970  # where Pillow refuses; 13,377 x 13,377
MAX_PIXELS_PER_BYTE = 4096  # of a file; a blank PNG in colour has 344
DENSITY_FROM_PIXELS = 1 << 24  # below this decoding is quick whatever the file claims
DEPTHS = {255: 0, 4095: 4, 65535: 8}  # largest values of integers of 8, 12 and 16 bits, and the bits to drop
DARKEST_DEEP = 15  # the upper 8 of 16 bits of 4095
SLACK = 0.05  # of the largest value, by which values may leave their range: interpolation overshoots

# OpenCV decodes these fastest. It fails on turned and float TIFF, and darkens a TIFF's colours by their alpha.
_OPENCV_FORMATS = frozenset({"jpeg", "png", "webp"})
_REDUCED_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # markers of the frames that decoders know; the others are lossless
_JPEG_SCAN, _JPEG_APP1 = 0xDA, 0xE1
_EXIF_START = b"Exif\x00\x00"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_ORIENTATION_TAG, _TIFF_WIDTH_TAG, _TIFF_HEIGHT_TAG, _TIFF_DEPTHS_TAG = 0x0112, 0x0100, 0x0101, 0x0102
# EXIF orientation -> (rows and columns change places, then this flip: 1 left-right, 0 upside down, -1 both)
_TURNS = {2: (False, 1), 3: (False, -1), 4: (False, 0), 5: (True, None), 6: (True, 1), 7: (True, -1), 8: (True, 0)}
# What Pillow raises on damaged files; its decoders and EXIF reader promise nothing narrower.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class ImageError(Exception):
    """One image that cannot be used; the text says why, without its path."""


class ImageTooLargeError(ImageError):
    """An image whose header states more pixels than Pillow would decode: a decompression bomb, or nearly."""


class ImageInfo(NamedTuple):
    """What a header says: the size in pixels after EXIF orientation, and the format."""

    width: int
    height: int
    format: str


class _Header(NamedTuple):
    info: ImageInfo
    orientation: int  # EXIF, 1 to 8
    pixels_at: int  # byte where the pixel data begin, as far as known


class Letterboxed(NamedTuple):
    """A letterboxed image with what leads back to the original: `x_padded = x * ratio[0] + pad[0]`."""

    image: np.ndarray  # uint8 (h, w, 3)
    ratio: tuple[float, float]  # (width, height)
    pad: tuple[float, float]  # px at the left and at the top; halves where the padding is odd

    def ratio_pad(self, image_hw: Sequence[int]) -> tuple[tuple[float, float], tuple[float, float]]:
        """Returns ((ratio_h, ratio_w), (pad_w, pad_h)), as `scale_boxes` takes it, of an image (h, w) made into this.

        Unlike `ratio` these are exact: the sides were resized to whole pixels.
        """
        resized_h, resized_w = (side - 2 * pad for side, pad in zip(self.image.shape, self.pad[::-1], strict=False))
        return (resized_h / image_hw[0], resized_w / image_hw[1]), self.pad


def read_image(path: str | Path, min_side_hint: int | None = None) -> np.ndarray:
    """Decodes an image to uint8 (h, w, 3) BGR: upright, 8 bits deep (`to_8_bits`), no alpha, the first of several.

    Args:
        path: the file.
        min_side_hint: where the caller shrinks the image anyway, the long side that it needs in pixels: a JPEG at
            least twice as large is decoded at 1/2, 1/4 or 1/8, which costs a fraction of a whole decode.

    Raises:
        ImageError: unreadable, damaged or truncated.
    """
    return decode_image(_read_bytes(path), min_side_hint)


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Returns an image's values as uint8, whatever type holds them, by a rule of type and range.

    Integers, and floats of 2 or more, are taken for the smallest of 8, 12 and 16 bits that holds the largest of them;
    floats that all are below 2 for values from 0 to 1. What leaves its range by less than SLACK is clipped.

    Args:
        values: of any shape; bool, integers or floats.

    Raises:
        ImageError: not finite, negative, or beyond 16 bits.
    """
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8, copy=False)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    low, high, floats = float(values.min()), float(values.max()), values.dtype.kind == "f"
    if floats and high < 2:
        full = 1
    else:
        full = next((full for full in DEPTHS if high <= (1 + SLACK) * full), 0)
    if not full or not np.isfinite((low, high)).all() or low < -SLACK * abs(high):
        raise ImageError(
            f"has values from {low:g} to {high:g}; 0 to 1 (floats), 0 to 255, or 0 to 4095 or 65535 are expected"
        )
    values = np.clip(values, 0, full)
    return np.rint(values * (255 / full)).astype(np.uint8) if floats else (values >> DEPTHS[full]).astype(np.uint8)


def decode_image(data: bytes, min_side_hint: int | None = None) -> np.ndarray:
    """Decodes an image file's content as `read_image` does."""
    header = _read_header(data)
    _check_end(data, header)
    return _decode(data, header, min_side_hint)


def check_jpeg_end(data: bytes) -> None:
    """Looks for truncation of a JPEG's content without decoding it, which costs a thousandth.

    Raises:
        ImageError: not a JPEG, damaged or truncated, as far as that shows before its pixels are decoded.
    """
    header = _read_header(data)
    if header.info.format != "jpeg":
        raise ImageError("is not a JPEG")
    _check_end(data, header)


def image_size(path: str | Path) -> ImageInfo:
    """Reads an image's size and format from its header.

    Raises:
        ImageError: not an image, or its header is damaged.
    """
    return image_info(_read_bytes(path))


def image_info(data: bytes) -> ImageInfo:
    """Reads size and format from the header of an image file's content, as `image_size` does.

    Raises:
        ImageError: not an image, or its header is damaged; `ImageTooLargeError` where Pillow refuses its size.
    """
    return _read_header(data).info


def exif_orientation(data: bytes) -> int:
    """Returns the EXIF orientation that an image file's content states, by which readers turn it; 1 for none.

    Raises:
        ImageError: as `image_info`.
    """
    orientation = _read_header(data).orientation
    return orientation if orientation in _TURNS else 1


def check_image(path: str | Path) -> ImageInfo:
    """Looks at an image closely enough to find truncation and damage, and reads its size.

    JPEG and PNG are followed from part to part to their end, which finds what OpenCV's decoder and Pillow's `verify`
    let pass, at a fraction of the cost of decoding; the other formats are decoded.

    Raises:
        ImageError: unreadable, damaged, truncated, or of a size that cannot be trained on.
    """
    data = _read_bytes(path)
    header = _read_header(data)
    info = header.info
    if info.format not in IMG_FORMATS:
        raise ImageError(f"is of format {info.format}, which is not one of {', '.join(sorted(IMG_FORMATS))}")
    short, long = sorted((info.width, info.height))
    if short < MIN_SIDE:
        raise ImageError(f"is {info.width}x{info.height} px; sides under {MIN_SIDE} px cannot be used")
    if long > MAX_ASPECT * short:
        raise ImageError(f"is {info.width}x{info.height} px; sides beyond {MAX_ASPECT}:1 cannot be used")
    if not _check_end(data, header):
        _decode(data, header)
    return info


def _read_bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ImageError(f"cannot be read ({getattr(error, 'strerror', error)})") from error
    if not data:
        raise ImageError("is empty (0 bytes)")
    return data


def _read_header(data: bytes) -> _Header:
    """Reads size, format and orientation without decoding pixels, and refuses what is not safe to decode."""
    read = _read_jpeg_header if data.startswith(_JPEG_START) else _read_header_with_pillow
    width, height, kind, orientation, pixels_at = read(data)
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise ImageTooLargeError("has too many pixels to be decoded safely")
    if pixels > max(DENSITY_FROM_PIXELS, MAX_PIXELS_PER_BYTE * len(data)):
        raise ImageTooLargeError(f"claims {pixels} pixels in {len(data)} bytes, as only a decompression bomb does")
    if _TURNS.get(orientation, (False, None))[0]:
        width, height = height, width
    return _Header(ImageInfo(width, height, kind), orientation, pixels_at)


def _read_header_with_pillow(data: bytes) -> tuple[int, int, str, int, int]:
    try:
        with Image.open(BytesIO(data)) as image:
            width, height = image.size
            kind = (image.format or "unknown").lower()
            if kind == "tiff":  # some versions of Pillow swap the sides by themselves, some do not
                width, height = image.tag_v2[_TIFF_WIDTH_TAG], image.tag_v2[_TIFF_HEIGHT_TAG]
            return width, height, kind, _orientation(image, data), 0
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError("has too many pixels to be decoded safely") from error
    except _DAMAGE as error:
        raise ImageError(f"is not a readable image ({_reason(error)})") from error


def _read_jpeg_header(data: bytes) -> tuple[int, int, str, int, int]:
    """Follows a JPEG's markers to its first scan."""
    position, size, orientation = 2, None, 1
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise ImageError("is a damaged JPEG (no marker where one must stand)")
        marker = data[position + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # fill bytes and markers without a segment
            position += 1 if marker == 0xFF else 2
            continue
        start, end = position + 4, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _JPEG_SCAN:
            break
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 1) if start + 5 <= len(data) else (0, 0)
            size = (width, height)
        elif marker == _JPEG_APP1 and orientation == 1 and data.startswith(_EXIF_START, start):
            orientation = _exif_orientation(data[start:end])
        position = end
    if size is None or 0 in size:
        raise ImageError("is a damaged JPEG (no frame header)")
    return *size, "jpeg", orientation, position


def _exif_orientation(block: bytes) -> int:
    """Returns the orientation that an EXIF block states; a damaged block states none, and the pixels may be well."""
    exif = Image.Exif()
    try:
        exif.load(block)
        return exif.get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1


def _orientation(image: Image.Image, data: bytes) -> int:
    """Returns the EXIF orientation of an opened image that is no JPEG; 1 where its EXIF block is damaged."""
    try:
        if image.format == "PNG" and b"eXIf" not in data:  # in search of one, Pillow would decode the whole image
            return Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:
        return 1


def _reason(error: Exception) -> str:
    """Returns a library's message without the addresses of its objects."""
    return str(error).split(" <")[0] or type(error).__name__


def _check_end(data: bytes, header: _Header) -> bool:
    """Looks for truncation without decoding; returns False for formats where only decoding tells."""
    if header.info.format == "jpeg":
        if data.rfind(_JPEG_END, header.pixels_at) < 0:
            raise ImageError("is a truncated JPEG (its end is missing)")
    elif header.info.format == "png":
        _check_png(data)
    return header.info.format in ("jpeg", "png")


def _check_png(data: bytes) -> None:
    """Follows a PNG's chunks to its end and compares the checksums of those that the pixels need."""
    view, position, kind = memoryview(data), len(_PNG_START), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position) if position + 12 <= len(data) else (0, b"")
        end = position + 8 + length
        if not kind or end + 4 > len(data):
            raise ImageError("is a truncated PNG (its end is missing)")
        needed = kind[:1].isupper()
        if needed and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ImageError(f"is a damaged PNG (the checksum of its part {kind.decode('ascii', 'replace')} is wrong)")
        position = end + 4


def _decode(data: bytes, header: _Header, min_side_hint: int | None = None) -> np.ndarray:
    """Decodes bytes to uint8 (h, w, 3) BGR, upright."""
    width, height, kind = header.info
    if kind not in _OPENCV_FORMATS:
        return _decode_with_pillow(data)
    reduction = 1
    if kind == "jpeg" and min_side_hint:
        reduction = next((factor for factor in (8, 4, 2) if max(width, height) >= factor * min_side_hint), 1)
    flags = _REDUCED_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    if kind == "png":  # the others have 8 bits
        flags |= cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"cannot be decoded ({error.err})") from error
    if image is None:
        return _decode_with_pillow(data)
    swapped, flip = _TURNS.get(header.orientation, (False, None))
    image = cv2.transpose(to_8_bits(image)) if swapped else to_8_bits(image)
    return image if flip is None else cv2.flip(image, flip)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """Decodes what OpenCV is not asked for or gives up to uint8 (h, w, 3) BGR, upright."""
    try:
        with Image.open(BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("F", "I")):
                image = Image.fromarray(to_8_bits(np.asarray(image)))
            rgb = np.asarray(image.convert("RGB"))
            several = (
                opened.format == "TIFF" and opened.mode[:1] != "I"
            )  # channels, of which Pillow reads the upper 8 bits
            if several and 16 in opened.tag_v2.get(_TIFF_DEPTHS_TAG, ()) and rgb.max() <= DARKEST_DEEP:
                raise ImageError(
                    "is a colour TIFF of 16 bits a channel with values below 4096 alone, which would be black: write "
                    "it with 8 bits a channel, or stretched to 16"
                )
    except _DAMAGE as error:
        raise ImageError(f"cannot be decoded ({_reason(error)})") from error
    return np.ascontiguousarray(rgb[:, :, ::-1])


def exif_size(img: Image.Image) -> tuple[int, int]:
    """Returns an image's width and height as it is seen, its EXIF orientation considered."""
    return ImageOps.exif_transpose(img).size


def exif_transpose(image: Image.Image) -> Image.Image:
    """Returns an image turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(image)


def inference_hw(
    imgsz: int | Sequence[int] | None,
    stride: int,
    only_hw: Sequence[int] | None = None,
    default: int | Sequence[int] = DEFAULT_IMGSZ,
) -> list[int]:
    """Returns the height and width that `--imgsz` asks for, px.

    Args:
        imgsz: one side for both, or height and width; None where it was not given.
        stride: the model's largest; sides are rounded up to multiples of it.
        only_hw: the only height and width that the model takes; None for any.
        default: what a model that takes any gets where nothing was asked for.

    Raises:
        UserError: more than two sides, one out of range, or the model takes one size only, and it is another.
    """
    asked = [] if imgsz is None else [imgsz] if isinstance(imgsz, Integral) else list(imgsz)
    if len(asked) > 2:
        raise UserError(f"--imgsz {' '.join(map(str, asked))}: one side, or height and width, are expected.")
    if only_hw is None:
        checked = check_img_size(asked[0] if len(asked) == 1 else asked or default, stride)
        return [checked, checked] if isinstance(checked, int) else checked
    if not asked:
        LOGGER.info(f"Image size {only_hw[0]}x{only_hw[1]}, the one that the model was exported for")
    elif (asked * 2)[:2] != list(only_hw):
        sides, fixed = (" ".join(map(str, shape)) for shape in (asked, only_hw))
        raise UserError(
            f"--imgsz {sides}: the model was exported for {fixed} (height, width) and takes no other: leave the option "
            "out, or export the checkpoint with --dynamic or for that size."
        )
    return list(only_hw)


def resized_wh(size_wh: Sequence[int], new_shape: int | Sequence[int]) -> tuple[int, int]:
    """Returns (width, height) of an image scaled to fit a square of side `new_shape`, or (height, width); rounds up."""
    target_h, target_w = (new_shape, new_shape) if isinstance(new_shape, int) else new_shape
    ratio = min(target_w / size_wh[0], target_h / size_wh[1])
    return (min(math.ceil(size_wh[0] * ratio), target_w), min(math.ceil(size_wh[1] * ratio), target_h))


def resize(image: np.ndarray, size_wh: tuple[int, int], by_area: bool) -> np.ndarray:
    """Brings an image (h, w, 3) to a width and height, bilinear; `by_area` shrinks by averaging, as validation does."""
    if image.shape[1::-1] == size_wh:
        return image
    shrinks = by_area and max(size_wh) < max(image.shape[:2])
    return cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def letterbox(
    im: np.ndarray,
    new_shape: int | Sequence[int] = (640, 640),
    color: tuple[int, int, int] = PAD_COLOUR,
    auto: bool = True,
    scaleFill: bool = False,
    scaleup: bool = True,
    stride: int = 32,
) -> Letterboxed:
    """Resizes an image to fit `new_shape`, and pads it evenly to it, or just to a multiple of `stride`.

    Args:
        im: (h, w, 3).
        new_shape: side of a square, or (height, width), in pixels.
        color: of the padding.
        auto: pad to the smallest rectangle of stride multiples instead of to `new_shape`.
        scaleFill: stretch to `new_shape` without padding (when not `auto`).
        scaleup: whether small images may be enlarged.
        stride: the model's largest stride.
    """
    target_h, target_w = (new_shape, new_shape) if isinstance(new_shape, int) else new_shape
    height, width = im.shape[:2]
    scale = min(target_h / height, target_w / width)
    scale = scale if scaleup else min(scale, 1.0)
    ratio = (scale, scale)
    resized_wh = (max(round(width * scale), 1), max(round(height * scale), 1))  # 1: a strip must not vanish
    pad_w, pad_h = target_w - resized_wh[0], target_h - resized_wh[1]
    if auto:
        pad_w, pad_h = pad_w % int(stride), pad_h % int(stride)
    elif scaleFill:
        resized_wh, ratio = (target_w, target_h), (target_w / width, target_h / height)
        pad_w, pad_h = 0, 0
    half_w, half_h = pad_w / 2, pad_h / 2
    if resized_wh != (width, height):
        im = cv2.resize(im, resized_wh, interpolation=cv2.INTER_LINEAR)
    if pad_w or pad_h:
        top, bottom, left, right = (round(half + less) for half in (half_h, half_w) for less in (-0.1, 0.1))
        im = cv2.copyMakeBorder(im, top, bottom, left, right, cv2.BORDER_CONSTANT, value=color)
    return Letterboxed(im, ratio, (half_w, half_h))
