"""What to detect in, by YOLOv5 6.1's loaders: tuples of (path, image for the model, original, capture, message).

Over `utils.media.sources` for files and `utils.media.inputs` for cameras, streams and the screen. Images for the model
are letterboxed uint8 RGB, channels first; originals are uint8 (h, w, 3) BGR.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import native_path
from utils.images import IMG_FORMATS as IMAGE_SUFFIXES
from utils.images import VID_FORMATS as VIDEO_SUFFIXES
from utils.images import letterbox
from utils.log import LOGGER
from utils.media.inputs import open_source
from utils.media.sources import Frame, find_sources, read_frames, suffix_of

IMG_FORMATS = sorted(IMAGE_SUFFIXES)
VID_FORMATS = sorted(VIDEO_SUFFIXES)

ImageTuple = tuple[str, np.ndarray, np.ndarray, cv2.VideoCapture | None, str]
StreamsTuple = tuple[list[str], np.ndarray, list[np.ndarray], None, str]


def _for_model(image: np.ndarray, img_size: int | Sequence[int], stride: int, auto: bool) -> np.ndarray:
    """Letterboxes a picture (h, w, 3) BGR and returns it as (3, h, w) RGB, contiguous."""
    boxed = letterbox(image, img_size, auto=auto, stride=int(stride)).image
    return np.ascontiguousarray(boxed.transpose(2, 0, 1)[::-1])


class LoadImages:
    """Images and videos of a file, a folder, a glob or a list file, images first.

    Yields (path, image (3, h, w), original (h, w, 3), the video's `cv2.VideoCapture` or None, message prefix). The
    capture is there to be asked (`cap.get(cv2.CAP_PROP_FPS)`), frames come from the iteration.

    Attributes:
        files: absolute paths, `nf` of them; `video_flag` says which are videos.
        mode: "image" or "video", of what was yielded last.
        count: number of the file, from 1.
        frame, frames: number of the frame, from 1, and how many the video declares; 0 for images.
        cap: the capture.
    """

    def __init__(
        self,
        path: str | Path,
        img_size: int | Sequence[int] = 640,
        stride: int = 32,
        auto: bool = True,
        vid_stride: int = 1,
    ) -> None:
        """Finds the files.

        Args:
            path: see `utils.media.sources.find_sources`.
            img_size: side, or (height, width), that images are scaled to.
            stride: the model's.
            auto: pad to the smallest rectangle of stride multiples, not to `img_size`.
            vid_stride: of a video every so many frames are read.

        Raises:
            UserError: there are none.
        """
        self.files = find_sources(path)
        self.nf = len(self.files)
        self.video_flag = [suffix_of(file) in VIDEO_SUFFIXES for file in self.files]
        self.img_size, self.stride, self.auto, self.vid_stride = img_size, stride, auto, vid_stride
        self.mode = "image"
        self.count = self.frame = self.frames = 0
        self.cap: cv2.VideoCapture | None = None

    def __len__(self) -> int:
        """Returns the number of files."""
        return self.nf

    def __iter__(self) -> Iterator[ImageTuple]:
        """Yields all frames of all files.

        Raises:
            UserError: a file or a part of it cannot be read.
        """
        with contextlib.closing(read_frames(self.files, self.vid_stride)) as frames:
            for frame in frames:
                if frame.image is None:
                    raise UserError(f"{frame.label}: {frame.error}")
                self._follow(frame)
                image = _for_model(frame.image, self.img_size, self.stride, self.auto)
                yield frame.path, image, frame.image, self.cap, f"{frame.label}: "

    def _follow(self, frame: Frame) -> None:
        """Takes over what a frame says about itself and its file."""
        if self.count != frame.file_number:
            self.cap = cv2.VideoCapture(native_path(frame.path)) if frame.is_video else None
        self.mode = "video" if frame.is_video else "image"
        self.count, self.frame, self.frames = frame.file_number, frame.number, frame.count


class _LiveInputs:
    """Cameras, streams or the screen, looked at together.

    Attributes:
        sources: the inputs' names.
        count: how often all of them were looked at.
        mode: "stream".
    """

    mode = "stream"

    def __init__(
        self, source: str, img_size: int | Sequence[int], stride: int, auto: bool, vid_stride: int = 1
    ) -> None:
        """Opens the inputs; see `utils.media.inputs.open_source`."""
        self._source = open_source(source, vid_stride)
        if not self._source.live:
            self._source.close()
            raise UserError(f"'{source}' names files, not live inputs: read them with LoadImages.")
        self.img_size, self.stride, self.auto = img_size, stride, auto
        self.sources = list(self._source.inputs)
        self.count = 0

    def __len__(self) -> int:
        """Returns the number of inputs."""
        return len(self.sources)

    def close(self) -> None:
        """Ends the reading and gives devices back."""
        self._source.close()

    def _rounds(self) -> Iterator[list[np.ndarray]]:
        """Yields the newest picture (h, w, 3) of every input, once all have a new one; tells at the end what was lost.

        It ends when the inputs end; one that is silent keeps the others waiting, so that positions stay the same.
        """
        newest: dict[int, np.ndarray] = {}
        with contextlib.closing(self._source):
            for frames in self._source:
                newest.update({frame.file_number - 1: frame.image for frame in frames if frame.image is not None})
                if len(newest) == len(self.sources):
                    self.count += 1
                    yield [newest.pop(number) for number in range(len(self.sources))]
        for line in self._source.report():
            LOGGER.info(line)


class LoadStreams(_LiveInputs):
    """Cameras and network streams as one batch.

    Yields (names, images (b, 3, h, w), originals, None, ""): one of every input, in the order of `sources`.
    """

    def __init__(
        self,
        sources: str = "streams.txt",
        img_size: int | Sequence[int] = 640,
        stride: int = 32,
        auto: bool = True,
        vid_stride: int = 1,
    ) -> None:
        """Opens a stream, a camera by number, or all that a text file lists.

        Raises:
            UserError: one of them cannot be opened, or these are files.
        """
        super().__init__(str(sources), img_size, stride, auto, vid_stride)

    def __iter__(self) -> Iterator[StreamsTuple]:
        """Yields batches; pictures of different shapes are padded to squares."""
        for pictures in self._rounds():
            alike = len({picture.shape for picture in pictures}) == 1
            images = [_for_model(picture, self.img_size, self.stride, self.auto and alike) for picture in pictures]
            yield self.sources, np.stack(images), pictures, None, ""


class LoadScreenshots(_LiveInputs):
    """The screen: yields ("screen", image (3, h, w), original (h, w, 3), None, message prefix)."""

    def __init__(
        self, source: str = "screen", img_size: int | Sequence[int] = 640, stride: int = 32, auto: bool = True
    ) -> None:
        """Takes `screen [number] [left top width height]`.

        Raises:
            UserError: there is no screen, or the library that reads it is missing.
        """
        super().__init__(source, img_size, stride, auto)

    def __iter__(self) -> Iterator[ImageTuple]:
        """Yields pictures without end."""
        for (picture,) in self._rounds():
            image = _for_model(picture, self.img_size, self.stride, self.auto)
            yield self.sources[0], image, picture, None, f"{self.sources[0]} {self.count}: "


class LoadWebcam(_LiveInputs):
    """A camera seen as in a mirror: yields ("webcam.jpg", image (3, h, w), original (h, w, 3), None, prefix)."""

    def __init__(self, pipe: str = "0", img_size: int | Sequence[int] = 640, stride: int = 32) -> None:
        """Takes a camera's number or an address.

        Raises:
            UserError: it cannot be opened.
        """
        super().__init__(str(pipe), img_size, stride, auto=True)

    def __iter__(self) -> Iterator[ImageTuple]:
        """Yields pictures until the camera ends."""
        for (picture,) in self._rounds():
            mirrored = cv2.flip(picture, 1)
            image = _for_model(mirrored, self.img_size, self.stride, self.auto)
            yield "webcam.jpg", image, mirrored, None, f"webcam {self.count}: "
