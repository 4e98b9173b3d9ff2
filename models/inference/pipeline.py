"""Detection as one stream: frames of a source in, results out, with tracking and counting on the way.

detect.py writes these results to files, `detect.run(..., stream=True)` hands them to its caller. Files are read and
letterboxed ahead in a thread of their own; of live inputs always the newest frame is taken. Not here: options, writing.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import NamedTuple

import numpy as np

from models.backends import load_backend, runtime_of
from models.inference.predictor import Detector, WindowBatch, class_summary, shape_for
from utils.cli import find_weights
from utils.dataloaders.config import load_spec
from utils.errors import UserError
from utils.log import LOGGER
from utils.media.counting import Counter, Counts
from utils.media.sources import Frame, Source, open_source
from utils.media.tracking import WEAKEST, Trackers, require_video
from utils.process import ReadAhead
from utils.tiles import Tiling

DEFAULT_PX = 640
AHEAD = 4  # frames that are read before their turn
AHEAD_IN_TILES = 1  # a large picture's windows are many

FeatureSink = Callable[[Frame, int, str, np.ndarray], None]  # frame, layer's row, its block, maps (1, c, h, w)


class Result(NamedTuple):
    """What was found in one picture.

    Attributes:
        frame: the picture and where it comes from.
        detections: (k, 6) [x1, y1, x2, y2 in whole px, confidence, class], most confident first; with tracking (k, 7),
            the last column the track's number, -1 for none, and the class the track's.
        names: class names {number: name}.
        counts: how often the line was crossed or the zone entered so far; None without counting.
        input_hw: height and width that the model saw of this picture, of its first tile where it was cut.
        inference_s: seconds of the model's run, which all pictures of a batch share.
    """

    frame: Frame
    detections: np.ndarray
    names: dict[int, str]
    counts: Counts | None
    input_hw: tuple[int, int]
    inference_s: float

    @property
    def path(self) -> str:
        """The file, or the live input's name."""
        return self.frame.path

    @property
    def image(self) -> np.ndarray:
        """The picture, uint8 (h, w, 3) BGR."""
        return self.frame.image

    @property
    def boxes_xyxy(self) -> np.ndarray:
        """Corners (k, 4) in px of the picture."""
        return self.detections[:, :4]

    @property
    def confidences(self) -> np.ndarray:
        """Confidences (k,)."""
        return self.detections[:, 4]

    @property
    def classes(self) -> np.ndarray:
        """Class numbers (k,), int."""
        return self.detections[:, 5].astype(int)

    @property
    def track_ids(self) -> np.ndarray | None:
        """Numbers of the tracks (k,), int, -1 for none; None without tracking."""
        return self.detections[:, 6].astype(int) if self.detections.shape[1] > 6 else None

    def summary(self) -> str:
        """Returns `2 persons, 1 tie` in the order of the classes; empty for none."""
        return class_summary(self.classes.tolist(), self.names)


class Pipeline:
    """A source and a detector; iterate once.

    Attributes:
        source: what is read.
        names: class names {number: name}.
        damaged: what could not be read so far, one line each.
        ended: live inputs that ended before their time, one line each.
        counter: counts what passes, where asked for.
    """

    def __init__(
        self,
        source: Source,
        detector: Detector,
        names: dict[int, str],
        trackers: Trackers | None = None,
        counter: Counter | None = None,
        ahead: int = AHEAD,
    ) -> None:
        """Takes the parts, of which tracking and counting may be left out.

        Args:
            source: what to read; closed at the end.
            detector: the model with its thresholds.
            names: class names {number: name}.
            trackers: give objects their numbers.
            counter: needs them.
            ahead: how many frames of files to read before their turn.
        """
        self.source, self.names, self.counter = source, names, counter
        self.damaged: list[str] = []
        self.ended: list[str] = []
        self._detector, self._trackers, self._ahead = detector, trackers, ahead

    def __iter__(self) -> Iterator[Result]:
        """Yields the results; see `results`."""
        return self.results()

    def results(self, feature_sink: FeatureSink | None = None) -> Iterator[Result]:
        """Yields a result for every picture, in the order of the source; damaged ones are told and collected.

        Args:
            feature_sink: called with each layer's maps.
        """
        with closing(self.source), self._prepared() as prepared:
            for frames, batches in prepared:
                yield from self._detect(frames, batches, feature_sink)

    def summary(self) -> list[str]:
        """Returns lines about the whole run: mean times, what was counted, what live inputs lost."""
        counted = self.counter.summary(self.names) if self.counter else []
        return [line for line in (self._detector.speed().rstrip(), *counted, *self.source.report()) if line]

    def _prepared(self) -> AbstractContextManager[Iterator[tuple[list[Frame], list[WindowBatch]]]]:
        """Returns the frames with what the model is to see of them; those of files are prepared ahead."""
        return nullcontext(self._prepare()) if self.source.live else ReadAhead(self._prepare(), self._ahead)

    def _prepare(self) -> Iterator[tuple[list[Frame], list[WindowBatch]]]:
        """Yields the source's frames as they come, and batches of those that have a picture."""
        for frames in self.source.read():
            yield frames, self._detector.prepare([frame.image for frame in frames if frame.image is not None])

    def _detect(
        self, frames: list[Frame], batches: list[WindowBatch], feature_sink: FeatureSink | None
    ) -> Iterator[Result]:
        """Detects in the frames that have a picture."""
        for frame in frames:
            if frame.image is None and frame.live:  # its source has said so
                self.ended.append(f"{frame.path}: {frame.error}")
            elif frame.image is None:
                self.damaged.append(f"{frame.label}: {frame.error}")
                LOGGER.warning(f"WARNING: {self.damaged[-1]}; skipped")
        good = [frame for frame in frames if frame.image is not None]
        if not good:
            return

        def show(number: int, row: int, block: str, maps: np.ndarray) -> None:
            feature_sink(good[number], row, block, maps)

        found = self._detector(batches, len(good), show if feature_sink else None)
        seen_hw: dict[int, tuple[int, int]] = {}  # by number of the picture; of its first window
        for batch in batches:
            for number in batch.pictures:
                seen_hw.setdefault(number, batch.images.shape[2:])
        for number, (frame, detections) in enumerate(zip(good, found, strict=True)):
            tracked = self._trackers.update(frame, detections) if self._trackers else detections
            counts = self.counter.update(frame, tracked) if self.counter else None
            yield Result(frame, tracked, self.names, counts, seen_hw[number], self._detector.last_s["inference"])


def open_pipeline(options: Namespace) -> Pipeline:
    """Opens what detect.py's options name: first the source, whose mistakes are told before a model is loaded.

    Sets `options.weights` to the list of files used.

    Raises:
        UserError: a source or weights that cannot be opened, or options that do not go together.
    """
    _check(options)
    source = open_source(options.source, options.vid_stride, options.stream_timeout)
    try:
        counter = Counter.parse(options.count) if options.count else None
        if options.track:
            require_video(source.inputs, source.live)
        trackers = Trackers(options.conf_thres, options.vid_stride) if options.track else None
        options.weights = find_weights(options.weights)
        detector, names = _open_detector(options)
    except BaseException:
        source.close()
        raise
    return Pipeline(source, detector, names, trackers, counter, AHEAD_IN_TILES if options.tile else AHEAD)


def _check(options: Namespace) -> None:
    """Refuses options that no run can satisfy."""
    if options.imgsz is not None and len(options.imgsz) not in (1, 2):
        sides = " ".join(map(str, options.imgsz))
        raise UserError(f"--img-size {sides}: one side, or height and width, are expected.")
    if options.count and not options.track:
        raise UserError("--count counts tracks: add --track.")
    if options.visualize and options.tile:
        raise UserError("--visualize shows the maps of whole pictures: leave --tile out.")
    if options.visualize and options.augment:
        raise UserError("--visualize shows the maps of one look at a picture: leave --augment out.")


def _open_detector(options: Namespace) -> tuple[Detector, dict[int, str]]:
    """Loads the model; returns it with the class names."""
    weights = options.weights
    for option in ("update", "visualize", "augment"):
        export = next((path for path in weights if runtime_of(path) != "pytorch"), None)
        if getattr(options, option) and export:
            raise UserError(f"--{option} is for checkpoints (.pt); {export} is an export. Leave it out.")
    backend = load_backend(weights, options.device, options.half, options.dnn)
    names = _names_of(options.data, backend.names)
    unknown = sorted(set(options.classes or ()) - set(names))
    if unknown:
        raise UserError(f"--classes {unknown[0]}: the model has the classes 0 to {max(names)}.")
    limits = {name: getattr(options, name) for name in ("conf_thres", "iou_thres", "max_det", "classes", "augment")}
    if options.track:  # weak detections prolong tracks, as far as the model itself lets them through
        weakest = max(WEAKEST, backend.metadata.nms.conf_thres) if backend.has_nms else WEAKEST
        limits["conf_thres"] = min(options.conf_thres, weakest)
    tiling = Tiling(options.tile, options.tile_overlap) if options.tile else None
    shape_hw = shape_for(backend, options.imgsz, DEFAULT_PX)
    return Detector(backend, shape_hw, agnostic=options.agnostic_nms, tiling=tiling, **limits), names


def _names_of(data: str, model_names: dict[int, str]) -> dict[int, str]:
    """Returns the class names of a data set YAML where they fit the model's classes, else the model's own."""
    if not data:
        return model_names
    names = load_spec(data, need=()).names
    if len(names) != len(model_names):
        counts = f"names {len(names)} classes, the model has {len(model_names)}"
        LOGGER.warning(f"WARNING: --data {data} {counts}: the model's own names are used")
        return model_names
    return names
