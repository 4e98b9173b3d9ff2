"""Detection as one stream: frames of a source in, results out, with tracking and counting on the way.

detect.py writes these results to files, `detect.run(..., stream=True)` hands them to its caller. Files are read and
letterboxed ahead in a thread of their own, several at a time on request; of live inputs always the newest frame is
taken. Not here: options, writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.backends import load_backend, runtime_of
from models.inference.predictor import MAX_BATCH, Predictor, Window, class_summary
from utils.boxes import Detections
from utils.cli import find_weights
from utils.dataloaders.config import load_spec
from utils.errors import UserError
from utils.images import inference_hw
from utils.log import LOGGER
from utils.media.counting import Counter, Counts
from utils.media.live_output import check_live_output
from utils.media.sources import Frame, Source, open_source
from utils.media.tracking import WEAKEST, Trackers, require_video
from utils.nms import NMSConfig
from utils.plots.boxes import class_name
from utils.process import ReadAhead
from utils.tiles import Tiling

AHEAD = 4  # frames that are read before their turn
AHEAD_BYTES = 256 << 20  # of frames and of what the model is to see of them; a large image's tiles are many

FeatureSink = Callable[[Frame, int, str, np.ndarray], None]  # frame, layer's row, its block, maps (1, c, h, w)


@dataclass
class DetectConfig:
    """detect.py's options, under their names and with their meanings; defaults are the command line's."""

    weights: str | Path | Sequence[str]
    source: str
    data: str
    imgsz: Sequence[int] | None
    conf_thres: float
    iou_thres: float
    max_det: int
    device: str
    view_img: bool
    save_txt: bool
    save_conf: bool
    save_crop: bool
    save_csv: bool
    save_json: bool
    stream_json: bool
    nosave: bool
    live_out: str
    segment: float | None
    classes: Sequence[int] | None
    agnostic_nms: bool
    augment: bool
    tile: int | None
    tile_overlap: float
    track: bool
    count: Sequence[str]
    count_anchor: str
    visualize: bool
    update: bool
    project: str
    name: str
    exist_ok: bool
    line_thickness: int
    hide_labels: bool
    hide_conf: bool
    half: bool
    dnn: bool
    stream_timeout: float
    vid_stride: int
    batch_size: int
    save_scale: bool


class Result(NamedTuple):
    """What was found in one image.

    Attributes:
        frame: the image and where it comes from.
        detections: most confident first, in whole px; with tracking their classes are their tracks'.
        names: class names {number: name}.
        counts: what each line and zone has counted so far; empty without counting.
        input_hw: height and width that the model saw of this image, of its first tile where it was cut.
        inference_s: seconds of the model's run, which all images of a batch share.
    """

    frame: Frame
    detections: Detections
    names: dict[int, str]
    counts: tuple[Counts, ...]
    input_hw: tuple[int, int]
    inference_s: float

    @property
    def path(self) -> str:
        """The file, or the live input's name."""
        return self.frame.path

    @property
    def image(self) -> np.ndarray:
        """The image, uint8 (h, w, 3) BGR."""
        return self.frame.image

    @property
    def boxes_xyxy(self) -> np.ndarray:
        """Corners (k, 4) in px of the image."""
        return self.detections.boxes_xyxy

    @property
    def confidences(self) -> np.ndarray:
        """Confidences (k,)."""
        return self.detections.confidences

    @property
    def classes(self) -> np.ndarray:
        """Class numbers (k,), int."""
        return self.detections.classes

    @property
    def track_ids(self) -> np.ndarray | None:
        """Numbers of the tracks (k,), int, -1 for none; None without tracking."""
        return self.detections.track_ids

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain data, as `detect.py --stream-json` prints it; see docs/guide.md."""
        frame, found, names = self.frame, self.detections, self.names
        height, width = frame.image.shape[:2]
        tracks = (
            [{}] * len(found) if found.track_ids is None else [{"track": track} for track in found.track_ids.tolist()]
        )
        columns = (found.boxes_xyxy.tolist(), found.confidences.tolist(), found.classes.tolist(), tracks)
        content = {
            "path": frame.path,
            "frame": frame.number if frame.is_video else None,
            "time_s": round(frame.time, 4) if frame.is_video else None,
            "width": width,
            "height": height,
            "inference_ms": round(1e3 * self.inference_s, 3),
            "detections": [
                {
                    "class": class_id,
                    "name": class_name(names, class_id),
                    "confidence": round(confidence, 5),
                    "box": box,
                    **track,
                }
                for box, confidence, class_id, track in zip(*columns, strict=True)
            ],
        }
        if self.counts:
            content["counts"] = [
                {
                    "name": one.name,
                    "class": class_id,
                    **{key.replace(" ", "_"): value for key, value in figures.items()},
                }
                for one in self.counts
                for class_id, figures in one.rows()
            ]
        return content

    def summary(self) -> str:
        """Returns `2 persons, 1 tie` in the order of the classes; empty for none."""
        return class_summary(self.classes.tolist(), self.names)


class Pipeline:
    """A source and a predictor; iterate once.

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
        predictor: Predictor,
        names: dict[int, str],
        trackers: Trackers | None = None,
        counter: Counter | None = None,
        batch_size: int = 1,
    ) -> None:
        """Takes the parts, of which tracking and counting may be left out.

        Args:
            source: what to read; closed at the end.
            predictor: the model and how it is used.
            names: class names {number: name}.
            trackers: give objects their numbers.
            counter: needs them.
            batch_size: how many frames of files to detect in at a time.
        """
        self.source, self.names, self.counter = source, names, counter
        self.damaged: list[str] = []
        self.ended: list[str] = []
        self._predictor, self._trackers, self._batch_size = predictor, trackers, batch_size

    @property
    def shape_hw(self) -> tuple[int, int]:
        """Height and width that images, or their tiles, are fitted into, px."""
        return tuple(self._predictor.shape)

    def __iter__(self) -> Iterator[Result]:
        """Yields the results; see `results`."""
        return self.results()

    def results(self, feature_sink: FeatureSink | None = None) -> Iterator[Result]:
        """Yields a result for every image, in the order of the source; damaged ones are told and collected.

        Args:
            feature_sink: called with each layer's maps.
        """
        ready = self._prepare()  # of live inputs when their turn has come, of files ahead
        if not self.source.live:
            ready = ReadAhead(ready, max(AHEAD // self._batch_size, 1), _size_of, AHEAD_BYTES)
        else:
            ready = nullcontext(ready)
        with closing(self.source), ready as prepared:
            for frames, images in prepared:
                yield from self._detect(frames, images, feature_sink)

    def summary(self) -> list[str]:
        """Returns lines about the whole run: mean times, what was counted, what live inputs lost."""
        counted = self.counter.summary(self.names) if self.counter else []
        return [line for line in (self._predictor.speed(), *counted, *self.source.report()) if line]

    def _prepare(self) -> Iterator[tuple[list[Frame], list[list[Window]]]]:
        """Yields the source's frames as they come, and what the model is to see of those that have an image."""
        batch: list[Frame] = []
        images: list[list[Window]] = []
        for frames in self.source.read():
            batch += frames
            images += [self._predictor.prepare(frame.image) for frame in frames if frame.image is not None]
            if self.source.live or len(batch) >= self._batch_size:
                yield batch, images
                batch, images = [], []
        if batch:
            yield batch, images

    def _detect(
        self, frames: list[Frame], images: list[list[Window]], feature_sink: FeatureSink | None
    ) -> Iterator[Result]:
        """Detects in the frames that have an image."""
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

        found = self._predictor(images, visualize=show if feature_sink else None)
        for frame, image, unrounded in zip(good, images, found, strict=True):
            detections, counts = unrounded.rounded(), ()
            if self._trackers:
                detections = self._trackers.update(frame, detections)
            if self.counter:
                counts = self.counter.update(frame, detections)
            input_hw = image[0].inputs.shape[1:]
            yield Result(frame, detections, self.names, counts, input_hw, self._predictor.last_s["inference"])


def _size_of(ready: tuple[list[Frame], list[list[Window]]]) -> int:
    """Returns how many bytes frames and what was prepared of them take."""
    frames, images = ready
    taken = [frame.image.nbytes for frame in frames if frame.image is not None]
    return sum(taken) + sum(window.inputs.nbytes for image in images for window in image)


def open_pipeline(config: DetectConfig) -> Pipeline:
    """Opens what detect.py's options name: first the source, whose mistakes are told before a model is loaded.

    Sets `config.weights` to the list of files used.

    Raises:
        UserError: a source or weights that cannot be opened, or options that do not go together.
    """
    inference_hw(config.imgsz, 1)  # refused, if at all, before a source is opened
    if config.count and not config.track:
        raise UserError("--count counts tracks: add --track.")
    if config.save_scale and config.tile:
        raise UserError("--save-scale draws at the size that the model sees of a whole image: leave --tile out.")
    if config.visualize and config.tile:
        raise UserError("--visualize shows the maps of whole images: leave --tile out.")
    if config.visualize and config.augment:
        raise UserError("--visualize shows the maps of one look at an image: leave --augment out.")
    source = open_source(config.source, config.vid_stride, config.stream_timeout)
    try:
        if config.batch_size > 1 and source.live:
            raise UserError(
                f"--batch-size {config.batch_size} is for files: a live input's frames are used as they come."
            )
        counter = Counter.parse(config.count, config.count_anchor) if config.count else None
        if config.track:
            require_video(source.inputs, source.live)
        if config.live_out:
            check_live_output(config.live_out, source.inputs, source.live)
        trackers = Trackers(config.conf_thres, config.vid_stride) if config.track else None
        config.weights = find_weights(config.weights)
        predictor, names = _open_predictor(config)
    except BaseException:
        source.close()
        raise
    return Pipeline(source, predictor, names, trackers, counter, config.batch_size)


def _open_predictor(config: DetectConfig) -> tuple[Predictor, dict[int, str]]:
    """Loads the model; returns it with the class names."""
    for option in ("update", "visualize", "augment"):
        export = next((path for path in config.weights if runtime_of(path) != "pytorch"), None)
        if getattr(config, option) and export:
            raise UserError(f"--{option} is for checkpoints (.pt); {export} is an export. Leave it out.")
    backend = load_backend(config.weights, config.device, config.half, config.dnn)
    names = _names_of(config.data, backend.names)
    unknown = sorted(set(config.classes or ()) - set(names))
    if unknown:
        raise UserError(f"--classes {unknown[0]}: the model has the classes 0 to {max(names)}.")
    inside, conf_thres = backend.metadata.nms, config.conf_thres
    if config.track:  # weak detections prolong tracks, as far as the model itself lets them through
        conf_thres = min(conf_thres, max(WEAKEST, inside.conf_thres) if inside else WEAKEST)
    nms = NMSConfig(conf_thres, config.iou_thres, config.max_det, config.agnostic_nms, config.classes)
    if inside:
        _tell_what_is_fixed(nms, inside)
    only_hw = None if backend.dynamic else backend.metadata.shape_hw
    shape_hw = inference_hw(config.imgsz, backend.stride, only_hw)
    backend.warm_up(*shape_hw)
    tiling = Tiling(config.tile, config.tile_overlap) if config.tile else None
    at_once = max(config.batch_size, MAX_BATCH)
    return Predictor(backend, nms, shape_hw, tiling=tiling, augment=config.augment, max_batch=at_once), names


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


def _tell_what_is_fixed(asked: NMSConfig, inside: NMSConfig) -> None:
    """Says where a model that chooses detections itself cannot do as asked."""
    fixed = []
    if asked.conf_thres < inside.conf_thres:
        fixed.append(f"--conf-thres at least {inside.conf_thres}")
    if asked.iou_thres != inside.iou_thres:
        fixed.append(f"--iou-thres {inside.iou_thres}")
    if asked.max_det > inside.max_det:
        fixed.append(f"--max-det at most {inside.max_det}")
    if asked.agnostic != inside.agnostic:
        fixed.append("--agnostic-nms" if inside.agnostic else "no --agnostic-nms")
    if fixed:
        LOGGER.info(f"The model chooses detections itself: {', '.join(fixed)} holds")
