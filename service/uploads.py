"""From an HTTP request to an upright image, with limits at every step.

The body is read piece by piece and given up as soon as it is too long or too slow; an image's size is read from its
header before a pixel is decoded. Nothing is written to disk, and no name in a request is taken for a path.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import numpy as np
from fastapi import HTTPException
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from utils.images import ImageError, ImageTooLargeError, decode_image, image_info

FIELD = "image"  # of a multipart form, as in YOLOv5's own service
FORMATS = frozenset({"bmp", "gif", "jpeg", "mpo", "png", "tiff", "webp"})
MULTIPART, PLAIN_TYPES = "multipart/form-data", ("", "application/octet-stream")
ENVELOPE_BYTES = 64 * 1024  # what a form may hold beside the image
MAX_FIELDS = 8
MANY_TIMES = 4  # how many times as long as one image may be what a request of several has in all
MAX_SCANS = 100  # of a progressive JPEG, which has about ten: each costs a pass over all pixels
BODY_TIMEOUT_S, DRAIN_TIMEOUT_S = 30.0, 2.0


class _MemoryParser(MultiPartParser):
    """Starlette's form parser; the limit on the body stands before it, so no upload need go to a temporary file."""

    spool_max_size = 2**40


class Upload:
    """One request's image or images: `read` once, and `drain` the rest where the request is refused."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        """Takes a request whose body was not read yet, and how long an image file may be."""
        self._request, self._max_bytes = request, max_bytes
        self._begun = self._finished = False

    async def read(self) -> bytes:
        """Returns the image file's content.

        Raises:
            HTTPException: 400 a broken form or an empty image, 408 too slow, 413 too long, 415 no image's media type,
                422 no image in the form.
            ClientDisconnect: the client went away.
        """
        kind = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != MULTIPART and kind not in PLAIN_TYPES and not kind.startswith("image/"):
            expected = f"multipart/form-data with a field '{FIELD}', or the image itself as image/jpeg, image/png ..."
            raise HTTPException(415, f"Content-Type {kind} is not taken: send {expected}")
        try:
            if kind == MULTIPART:
                ((_, data),) = await asyncio.wait_for(self._read_form(1, self._max_bytes), BODY_TIMEOUT_S)
            else:
                data = await asyncio.wait_for(self._read_plain(), BODY_TIMEOUT_S)
        except asyncio.TimeoutError as error:  # its own class before Python 3.11
            raise HTTPException(408, f"the image did not arrive within {BODY_TIMEOUT_S:.0f} s") from error
        if len(data) > self._max_bytes:
            raise self._too_long()
        if not data:
            raise HTTPException(400, "the image is empty (0 bytes)")
        return data

    async def read_many(self, most: int) -> list[tuple[str, bytes]]:
        """Returns name and content of the image files of a form, in its order.

        Args:
            most: how many are taken.

        Raises:
            HTTPException: as `read`; 413 for too many, or too much in all.
            ClientDisconnect: the client went away.
        """
        kind = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != MULTIPART:
            raise HTTPException(415, f"send multipart/form-data with a field '{FIELD}' for each image")
        try:
            return await asyncio.wait_for(self._read_form(most, MANY_TIMES * self._max_bytes), BODY_TIMEOUT_S)
        except asyncio.TimeoutError as error:  # its own class before Python 3.11
            raise HTTPException(408, f"the images did not arrive within {BODY_TIMEOUT_S:.0f} s") from error

    async def drain(self) -> None:
        """Reads and forgets what a refused client still sends, for a short while, so that it gets to see the answer.

        A connection that is closed with unread data is reset, and many clients then drop the answer. A client that
        asked first (`Expect: 100-continue`) was not asked to send, and sends nothing.
        """
        if not self._begun and "expect" in self._request.headers:
            return

        async def forget() -> None:
            left = 4 * self._max_bytes
            while not self._finished and left > 0:
                left -= len(await self._receive())

        try:
            await asyncio.wait_for(forget(), DRAIN_TIMEOUT_S)
        except (asyncio.TimeoutError, ClientDisconnect):
            self._finished = True  # the server closes the connection

    async def wait_until_gone(self) -> None:
        """Returns when the client has closed the connection; for use after `read`."""
        while (await self._request.receive())["type"] != "http.disconnect":
            continue

    async def _receive(self) -> bytes:
        self._begun = True
        message = await self._request.receive()
        if message["type"] == "http.disconnect":
            self._finished = True
            raise ClientDisconnect
        self._finished = not message.get("more_body", False)
        return message.get("body", b"")

    async def _pieces(self, limit: int) -> AsyncGenerator[bytes, None]:
        """Yields the body; raises 413 once it is longer than `limit` bytes, before reading where it says so itself."""
        declared = self._request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise self._too_long()
        length = 0
        while not self._finished:
            piece = await self._receive()
            length += len(piece)
            if length > limit:
                raise self._too_long()
            yield piece

    async def _read_plain(self) -> bytes:
        data = bytearray()
        async for piece in self._pieces(self._max_bytes):
            data += piece
        return bytes(data)

    async def _read_form(self, most: int, max_bytes: int) -> list[tuple[str, bytes]]:
        pieces = self._pieces(max_bytes + ENVELOPE_BYTES)
        parser = _MemoryParser(
            self._request.headers, pieces, max_files=most, max_fields=MAX_FIELDS, max_part_size=ENVELOPE_BYTES
        )
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError) as error:  # KeyError: no boundary, in some versions
            reason = getattr(error, "message", error)
            raise HTTPException(400, f"the form cannot be read, of at most {most} files ({reason})") from error
        try:
            images = [one for one in form.getlist(FIELD) if isinstance(one, UploadFile)]
            if not images:
                names = ", ".join(f"'{name}'" for name in form) or "none"
                raise HTTPException(422, f"the form has no file in a field '{FIELD}'; its fields: {names}")
            return [(image.filename or "", await image.read()) for image in images]
        finally:
            await form.close()

    def _too_long(self) -> HTTPException:
        return HTTPException(413, f"the image is larger than {self._max_bytes / 2**20:g} MB")


def check_upload(data: bytes, max_pixels: int) -> int:
    """Looks at an image file's header and returns its number of pixels.

    Raises:
        HTTPException: 400 no image, 413 too many pixels, 415 a format that is not taken.
    """
    with _image_errors():
        info = image_info(data)
    if info.format not in FORMATS:
        raise HTTPException(415, f"the image is of format {info.format}: send one of {', '.join(sorted(FORMATS))}")
    if info.width * info.height > max_pixels:
        size = f"{info.width}x{info.height} px"
        raise HTTPException(413, f"the image is {size}; at most {max_pixels / 1e6:g} million pixels are taken")
    scans = data.count(b"\xff\xda") if info.format in ("jpeg", "mpo") else 0
    if scans > MAX_SCANS:
        raise HTTPException(400, f"the image is a JPEG of {scans} scans; at most {MAX_SCANS} are taken")
    return info.width * info.height


def decode_upload(data: bytes) -> np.ndarray:
    """Decodes an image file's content to uint8 (h, w, 3) BGR, upright.

    Raises:
        HTTPException: 400 a damaged image.
    """
    with _image_errors():
        return decode_image(data)


@contextmanager
def _image_errors() -> Iterator[None]:
    """Makes refusals of what is wrong with an image."""
    try:
        yield
    except ImageTooLargeError as error:
        raise HTTPException(413, f"the image {error}") from error
    except ImageError as error:
        raise HTTPException(400, f"the image {error}") from error
