"""What detection writes: annotated images and videos, label files, crops and CSV tables.

A result is written once for each frame, replacing what a former run left in the same folder. Two inputs of one stem
never share a file: the later one is numbered (`bus.jpg` and `bus.png` give `bus` and `bus-2`). Live inputs are written
side by side, each to a video of its own. A run that is killed leaves its tables as they were a second before,
and all pieces of its videos but those that were being written.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import itertools
import json
import math
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from utils.boxes import Detections, xyxy2xywhn
from utils.errors import UserError, printable
from utils.eval.coco import detection_rows, image_id
from utils.files import atomic_write, native_path
from utils.images import IMG_FORMATS, VID_FORMATS
from utils.log import LOGGER
from utils.media.counting import STAY_HEADINGS, Counts
from utils.media.live_output import LiveOutput, open_live_output
from utils.media.mp4 import Mp4Error, set_times
from utils.media.sources import Frame, suffix_of
from utils.plots.boxes import class_name, draw_detections, feature_visualization, save_image, save_one_box

CSV_COLUMNS = ("Image Name", "Prediction", "Confidence")
TRACK_COLUMN = "Track"  # with tracking
FRAME_COLUMN = "Frame"  # where an input is a video or live; from 1, empty for an image
MAX_STEM_BYTES = 220  # file systems take names of 255; those made from a stem are longer by numbers and a suffix
LIVE_PIECE_S = 300.0  # of a live input's recording, which a loss of power may cost
KEEP_S = 1.0  # how old what was counted may be on the disk
VIDEO_CODEC = "mp4v"
# Why one file's results cannot be written while others' can: names that are too long or taken by folders, files that
# are write-protected or, on Windows, open in another program
_OF_ONE_FILE = frozenset({errno.EACCES, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.EPERM})
_PORT_NAMES = {f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)}
_RESERVED_NAMES = frozenset({"con", "prn", "aux", "nul"} | _PORT_NAMES)  # by Windows


@dataclass(frozen=True)
class OutputOptions:
    """Which results are written, and how images look; the fields are detect.py's options."""

    nosave: bool = False  # no annotated images and videos
    save_scale: bool = False  # they are shrunk to the model's scale before anything is drawn
    save_txt: bool = False
    save_conf: bool = False  # confidences in the label files
    save_crop: bool = False
    save_csv: bool = False
    save_json: bool = False
    track: bool = False  # detections have tracks
    line_thickness: int | None = None  # px; None suits the image
    hide_labels: bool = False
    hide_conf: bool = False
    vid_stride: int = 1
    live_out: str = ""  # where drawn frames are shown live
    segment: float | None = None  # minutes of a piece of video; None: LIVE_PIECE_S of what is live, files whole

    @classmethod
    def from_options(cls, options: Any) -> OutputOptions:
        """Takes what concerns writing from detect.py's options."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})


def _stem_of(path: str) -> str:
    """Returns an input's stem, cut where names made from it would not fit."""
    stem = Path(path).stem
    while len(os.fsencode(stem)) > MAX_STEM_BYTES:
        stem = stem[:-1]
    return stem


class OutputStems(dict[str, str]):
    """Gives each input a stem of its own for the files made from it, distinct without regard to case.

    The first input of a stem keeps it, later ones become `stem-2`, `stem-3`, ... Of the inputs that are known at the
    beginning, none loses its own stem to such a number, and a video gives way to images that are named like its
    frames' label files (`clip_12`). An input that was not known gets its stem when it is asked for.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        super().__init__()
        paths = list(paths)
        self._natural = {_stem_of(path).casefold() for path in paths}
        self._like_frames = {stem.rpartition("_")[0] for stem in self._natural if re.fullmatch(r".+_\d+", stem)}
        self._taken: set[str] = set()
        self._next: Counter[str] = Counter()
        for path in paths:
            self[path]  # noqa: B018 - this makes it

    def __missing__(self, path: str) -> str:
        stem = unique = _stem_of(path)
        folded = stem.casefold()
        number, clash = 1, suffix_of(path) in VID_FORMATS and folded in self._like_frames
        while clash or unique.casefold() in self._taken or (number > 1 and unique.casefold() in self._natural):
            number, clash = max(number, self._next[folded]) + 1, False
            unique = f"{stem}-{number}"
        self._next[folded] = number
        self._taken.add(unique.casefold())
        self[path] = unique
        return unique


def label_lines(detections: Detections, shape_hw: Sequence[int], save_conf: bool = False) -> list[str]:
    """Returns lines `class x y w h[ confidence][ track]`, box normalised, of one image's detections, in their order.

    Args:
        detections: in px of the image.
        shape_hw: the image's (height, width).
        save_conf: whether lines have the confidence.
    """
    numbers = xyxy2xywhn(detections.boxes_xyxy, w=shape_hw[1], h=shape_hw[0])
    numbers = np.column_stack((numbers, detections.confidences)) if save_conf else numbers
    tracks = [""] * len(detections) if detections.track_ids is None else [f" {track}" for track in detections.track_ids]
    return [
        f"{class_id} {' '.join(f'{number:g}' for number in row)}{track}"
        for class_id, row, track in zip(detections.classes, numbers.tolist(), tracks, strict=True)
    ]


class LabelWriter:
    """Writes detections as YOLO label files, one for each image that has any; a former run's file of an image goes.

    Attributes:
        folder: where.
        written: number of files.
    """

    def __init__(self, folder: Path, save_conf: bool = False) -> None:
        """Makes `folder`; with `save_conf` the lines have the confidence.

        Raises:
            UserError: the folder cannot be made.
        """
        self.folder, self.written = folder, 0
        self._save_conf = save_conf
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, stem: str, detections: Detections, shape_hw: Sequence[int]) -> None:
        """Writes one image's file, a line for each detection; see `label_lines`.

        Raises:
            UserError: the file cannot be written.
        """
        file = self.folder / f"{stem}.txt"
        with _explained(file):
            if not len(detections):
                file.unlink(missing_ok=True)
                return
            lines = label_lines(detections, shape_hw, self._save_conf)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.written += 1


def folder_names(names: Mapping[int, str]) -> dict[int, str]:
    """Turns class names into names that every file system takes, a different one for each class.

    Separators and characters that Windows refuses become `_`; a name that a former class has gets its number added.
    """
    folders: dict[int, str] = {}
    taken: set[str] = set()
    for class_id, name in names.items():
        safe = printable(re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", str(name))).strip(" .")[:100] or "_"
        if safe.casefold().split(".")[0] in _RESERVED_NAMES:
            safe = f"_{safe}"
        while safe.casefold() in taken:
            safe = f"{safe}-{class_id}"
        taken.add(safe.casefold())
        folders[class_id] = safe
    return folders


class ResultWriter:
    """Writes the results of a run of detection into one folder; use in a `with` block, which ends videos properly.

    What cannot be written of one file, for its name or because another program has it open, is logged and stands in
    `failed`; the others go on.

    Calls of `write` come from one thread at a time, the frames of a video in order; those of live inputs may alternate.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[str],
        names: Mapping[int, str],
        options: OutputOptions,
        model_hw: Sequence[int] = (math.inf, math.inf),
    ) -> None:
        """Prepares writing.

        Args:
            folder: exists.
            paths: the inputs.
            names: class names {number: name}.
            options: what to write.
            model_hw: height and width that the model has images fitted into, for `save_scale`.
        """
        self.failed: dict[str, str] = {}  # inputs of which not everything could be written, and why
        self._folder, self._names, self._options, self._model_hw = folder, names, options, model_hw
        self._stems = OutputStems(paths)
        self._taken = {stem.casefold() for stem in self._stems.values()}
        self._crop_folders = folder_names(names)
        self._crop_numbers: Counter[tuple[str, Path]] = Counter()  # by stem and folder; a file's until the next file
        self._recordings: dict[str, Recording] = {}  # those that go on, by stem
        self._counts: dict[str, Sequence[Counts]] = {}  # the latest, by name
        self._labels: LabelWriter | None = None
        self._kept_counts: dict[str, Sequence[Counts]] = {}  # those on the disk
        self._kept_s = -math.inf  # when the tables were brought to the disk
        self._with_frames = any(suffix_of(path) not in IMG_FORMATS for path in paths)
        self._table_file: IO[str] | None = None
        self._table: Any = None
        self._json_file: IO[str] | None = None
        self._json_rows_end = 1  # position in it
        self._live: dict[str, LiveOutput] = {}  # by input

    @property
    def labels_written(self) -> int:
        """Number of label files."""
        return self._labels.written if self._labels else 0

    def __enter__(self) -> ResultWriter:
        if self._options.save_txt:
            self._labels = LabelWriter(self._folder / "labels", self._options.save_conf)
        if self._options.save_csv:
            path = self._folder / "predictions.csv"
            with _explained(path):
                self._table_file = open(path, "w", newline="", encoding="utf-8")
            self._table = csv.writer(self._table_file)
            track, number = [TRACK_COLUMN] * self._options.track, [FRAME_COLUMN] * self._with_frames
            self._table.writerow((*CSV_COLUMNS, *track, *number))
        if self._options.save_json:
            path = self._folder / "predictions.json"
            with _explained(path):
                self._json_file = open(path, "w", encoding="utf-8")
                self._json_file.write("[\n]\n")
        return self

    def __exit__(self, *_exception: object) -> None:
        """Ends all that is open, one after the other even if an end fails, and writes what was counted."""
        with ExitStack() as ends:
            for stem in list(self._recordings):
                ends.callback(self._recordings.pop(stem).close)
            for path in list(self._live):
                ends.callback(self._end_live, path)
            if self._table_file is not None:
                ends.enter_context(_explained(self._folder / "predictions.csv"))
                ends.callback(self._table_file.close)
            if self._json_file is not None:
                ends.enter_context(_explained(self._folder / "predictions.json"))
                ends.callback(self._json_file.close)
            ends.callback(self._keep_counts)

    def write(self, frame: Frame, detections: Detections, counts: Sequence[Counts] = ()) -> None:
        """Writes everything asked for about one frame.

        Args:
            frame: with its image, which is drawn into.
            detections: in whole px of the image, most confident first.
            counts: what each line and zone has counted in this input up to this frame.

        Raises:
            UserError: a file cannot be written, for a reason that others share, or a live input's.
        """
        if frame.path in self.failed:
            return
        if not frame.live:
            for former in self._recordings.keys() - {self._stems[frame.path]}:
                self._recordings.pop(former).close()
        try:
            with _explained(self._folder):
                self._write(frame, detections, counts)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                others_go_on = error.__cause__.errno in _OF_ONE_FILE  # not where the disk is full or gone
            else:
                others_go_on = not isinstance(error.__cause__, Mp4Error)
            if frame.live or not others_go_on:
                raise
            self.failed[frame.path] = f"{frame.label}: {error}"
            LOGGER.warning(f"WARNING: {self.failed[frame.path]} The others go on.")
        if time.monotonic() - self._kept_s >= KEEP_S:
            with _explained(self._folder / "predictions.csv"):
                self._keep_tables()

    def _write(self, frame: Frame, detections: Detections, counts: Sequence[Counts]) -> None:
        stem = self._stems[frame.path]
        name = stem + Path(frame.path).suffix
        if counts:
            self._counts[name] = counts
        if self._labels:  # the least confident detection comes first, as in YOLOv5
            name_of_frame = f"{stem}_{frame.number}" if frame.is_video else stem
            self._labels.write(name_of_frame, detections[::-1], frame.image.shape)
        if self._options.save_csv:
            self._write_rows(name, detections, frame)
        if self._json_file is not None:
            self._write_json(f"{stem}_{frame.number}" if frame.is_video else stem, detections)
        if self._options.save_crop:
            self._write_crops(frame, detections, stem)
        if not self._options.nosave or self._options.live_out:
            image = self._draw(np.ascontiguousarray(frame.image), detections, counts)
            if self._options.live_out:
                self._show_live(frame, image, stem)
            if not self._options.nosave:
                self._write_image(frame, image, stem)

    def _show_live(self, frame: Frame, image: np.ndarray, stem: str) -> None:
        if frame.path not in self._live:
            for former in [] if frame.live else list(self._live):  # of the file before
                self._end_live(former)
            fps = frame.fps / self._options.vid_stride
            self._live[frame.path] = open_live_output(self._options.live_out, stem, fps)
        self._live[frame.path].show(image)

    def _end_live(self, path: str) -> None:
        output = self._live.pop(path)
        output.close()
        if output.problem:
            self.failed[path] = f"{path}: --live-out: {output.problem}"

    def drawn(self, frame: Frame, detections: Detections, counts: Sequence[Counts] = ()) -> np.ndarray:
        """Returns the image (h, w, 3) as `write` saves it, drawn into a copy; from any thread."""
        return self._draw(frame.image.copy(), detections, counts)

    def _draw(self, image: np.ndarray, detections: Detections, counts: Sequence[Counts]) -> np.ndarray:
        height, width = image.shape[:2]
        scale = min(self._model_hw[0] / height, self._model_hw[1] / width)
        if self._options.save_scale and scale < 1:
            wh = max(round(width * scale), 1), max(round(height * scale), 1)
            image = cv2.resize(image, wh, interpolation=cv2.INTER_LINEAR)  # as the model sees it
            ratio = np.divide(wh, (width, height), dtype=np.float32)
            detections = replace(detections, boxes_xyxy=detections.boxes_xyxy * np.tile(ratio, 2))
            counts = [one._replace(points_xy=tuple(map(tuple, one.points_xy * ratio))) for one in counts]
        look = (self._options.line_thickness, self._options.hide_labels, self._options.hide_conf)
        return draw_detections(image, detections, self._names, *look, counts)

    def write_features(self, frame: Frame, row: int, block: str, maps: np.ndarray) -> None:
        """Writes what a layer makes of a frame into the folder `STEM`, of a video's frames `STEM_<number>`.

        Args:
            frame: the frame.
            row: the layer's row in the model.
            block: its block's name.
            maps: (1, c, h, w) its output.

        Raises:
            UserError: a file cannot be written.
        """
        stem = self._stems[frame.path]
        folder = self._folder / (f"{stem}_{frame.number}" if frame.is_video else stem)
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        feature_visualization(maps, block, row, save_dir=folder)

    def _write_rows(self, name: str, detections: Detections, frame: Frame) -> None:
        """Adds the detections to the table, the least confident first, as in the label files."""
        number = [frame.number or ""] * self._with_frames
        least_first = detections[::-1]
        tracks = [[]] * len(least_first) if least_first.track_ids is None else least_first.track_ids[:, None].tolist()
        for class_id, confidence, track in zip(least_first.classes, least_first.confidences, tracks, strict=True):
            found = (class_name(self._names, class_id), f"{confidence:.4f}")
            self._table.writerow((printable(name), *found, *track, *number))
        self._table_file.flush()  # a run that is killed leaves them

    def _write_json(self, name: str, detections: Detections) -> None:
        """Adds the detections in the image or frame of that name to the COCO results, a line each."""
        rows = detection_rows(image_id(name), detections.rows, range(int(detections.classes.max(initial=0)) + 1))
        if detections.track_ids is not None:
            rows = [row | {"track_id": track} for row, track in zip(rows, detections.track_ids.tolist(), strict=True)]
        self._json_file.seek(self._json_rows_end)
        for row in rows:
            self._json_file.write(f"{',' if self._json_file.tell() > 1 else ''}\n{json.dumps(row)}")
        self._json_rows_end = self._json_file.tell()
        self._json_file.write("\n]\n")  # so that a run that is killed leaves a whole list
        self._json_file.flush()

    def _keep_tables(self) -> None:
        """Brings the tables to the disk, so that they outlast a loss of power."""
        self._kept_s = time.monotonic()
        if self._table_file is not None:
            os.fsync(self._table_file.fileno())
        self._keep_counts()

    def _keep_counts(self) -> None:
        """Replaces the table of what was counted, if that has changed: a row for each class tracked in an input.

        With names of lines and zones there is a column for them, and what one of them does not count is empty.
        """
        if self._counts == self._kept_counts:
            return
        counted = [(name, one) for name, counts in self._counts.items() for one in counts]
        headings = list(dict.fromkeys(heading for _, one in counted for heading in one.headings))
        headings += STAY_HEADINGS * any(one.is_zone for _, one in counted)
        named = any(one.name for _, one in counted)
        rows = [("Input", *["Counted"] * named, "Class", *(heading.capitalize() for heading in headings))]
        for name, one in counted:
            for class_id, figures in one.rows():
                cells = (figures.get(heading, "") for heading in headings)
                rows.append((printable(name), *[one.name] * named, class_name(self._names, class_id), *cells))
        path = self._folder / "counts.csv"
        with _explained(path), atomic_write(path) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
        self._kept_counts = dict(self._counts)

    def _write_crops(self, frame: Frame, detections: Detections, stem: str) -> None:
        """Cuts the detections out of the image: `crops/CLASS/STEM.jpg`, then `STEM2.jpg` and so on."""
        if not frame.live and not any(stem == former for former, _ in self._crop_numbers):
            self._crop_numbers.clear()
        least_first = detections[::-1]
        for box_xyxy, class_id in zip(least_first.boxes_xyxy, least_first.classes.tolist(), strict=True):
            folder = self._folder / "crops" / self._crop_folders.get(class_id, str(class_id))
            folder.mkdir(parents=True, exist_ok=True)
            taken = True
            while taken:  # by another input's crops
                self._crop_numbers[stem, folder] += 1
                number = self._crop_numbers[stem, folder]
                digits = "" if number == 1 else str(number)
                taken = any((stem + digits[:end]).casefold() in self._taken for end in range(1, len(digits) + 1))
            save_image(folder / f"{stem}{digits}.jpg", save_one_box(box_xyxy, frame.image, BGR=True, save=False))

    def _write_image(self, frame: Frame, image: np.ndarray, stem: str) -> None:
        """Saves the drawn image (h, w, 3), or adds it to its video."""
        if not frame.is_video:
            suffix = Path(frame.path).suffix
            suffix = suffix if cv2.haveImageWriter(printable(f"x{suffix}")) else ".jpg"
            save_image(self._folder / f"{stem}{suffix}", image)
            return
        if stem not in self._recordings:
            piece_s = 60 * self._options.segment if self._options.segment else LIVE_PIECE_S if frame.live else math.inf
            self._recordings[stem] = Recording(self._pieces(stem), frame.fps / self._options.vid_stride, piece_s)
        self._recordings[stem].write(image, frame.time)

    def _pieces(self, stem: str) -> Iterator[Path]:
        """Yields `STEM.mp4`, `STEM_part2.mp4`, `STEM_part3.mp4`, ..., without what another input's video is called."""
        yield self._folder / f"{stem}.mp4"
        names = (f"{stem}_part{number}" for number in itertools.count(2))
        yield from (self._folder / f"{name}.mp4" for name in names if name.casefold() not in self._taken)


class Recording:
    """The annotated frames of a video or live input, in one mp4 file or in pieces that play once ended.

    A frame is shown from its own time to the next one's, so that a recording lasts as long as what it shows, whatever
    became of frames in between.
    """

    def __init__(self, paths: Iterator[Path], fps: float, piece_s: float = math.inf) -> None:
        """Takes names for the pieces, the rate that the input declares, and how long a piece is."""
        self._paths, self._fps, self._piece_s = paths, fps, piece_s
        self._video: cv2.VideoWriter | None = None
        self._path, self._size_wh, self._odd = Path(), (0, 0), (0, 0)  # of the piece
        self._times_s, self._ends_s = array("d"), math.inf  # of its frames; when it ends

    def write(self, image: np.ndarray, time_s: float) -> None:
        """Adds an image (h, w, 3) BGR that is shown from a time on, into the next piece where it is time for that.

        One of another size than the first is resized, or it would be left out; odd sides get a row or column more.

        Raises:
            UserError: a piece cannot be written.
        """
        if time_s >= self._ends_s:
            self.close(self._ends_s)
        if self._video is None:
            self._open(image.shape[1], image.shape[0])
            self._ends_s = time_s + self._piece_s
        if (image.shape[1], image.shape[0]) != self._size_wh:
            image = cv2.resize(image, self._size_wh)
        if any(self._odd):
            image = cv2.copyMakeBorder(image, 0, self._odd[0], 0, self._odd[1], cv2.BORDER_REPLICATE)
        self._video.write(image)
        self._times_s.append(time_s)

    def _open(self, width: int, height: int) -> None:
        path, self._odd = next(self._paths), (height % 2, width % 2)  # the encoder leaves out what is one too many
        even_wh = (width + self._odd[1], height + self._odd[0])
        video = cv2.VideoWriter(native_path(path), cv2.VideoWriter_fourcc(*VIDEO_CODEC), self._fps, even_wh)
        if not video.isOpened():
            raise UserError(f"{path}: OpenCV cannot write an mp4 video of {width}x{height} px there.")
        self._path, self._size_wh, self._video, self._times_s = path, (width, height), video, array("d")

    def close(self, end_s: float | None = None) -> None:
        """Ends the last piece, which is shown until a time, or for a usual while after its last frame.

        Raises:
            UserError: it is not whole; OpenCV reports no error of its own.
        """
        if self._video is None:  # the next piece could not be opened
            return
        self._video.release()
        self._video = None
        try:
            set_times(self._path, self._times_s, self._times_s[-1] + 1 / self._fps if end_s is None else end_s)
        except Mp4Error as error:
            raise UserError(f"{self._path}: the video could not be written: {error}. Is the disk full?") from error
        except OSError as error:
            raise UserError(f"{self._path}: the video could not be written ({error.strerror}).") from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Says what cannot be written, `path` where the system names no file, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be written ({error.strerror}).") from error
