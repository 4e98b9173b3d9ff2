"""What detection writes: annotated images and videos, label files, crops and CSV tables.

A result is written once for each frame, replacing what a former run left in the same folder. Two inputs of one stem
never share a file: the later one is numbered (`bus.jpg` and `bus.png` give `bus` and `bus-2`). Live inputs are written
side by side, each to a video of its own.
"""

from __future__ import annotations

import csv
import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from utils.boxes import xyxy2xywhn
from utils.checks import UserError
from utils.counting import Counts
from utils.data.sources import Frame, suffix_of
from utils.draw import class_name, crop_box, draw_detections, feature_grid, save_image
from utils.images import VID_FORMATS

CSV_COLUMNS = ("Image Name", "Prediction", "Confidence")
TRACK_COLUMN = "Track"  # with tracking
VIDEO_CODEC = "mp4v"
_PORT_NAMES = {f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)}
_RESERVED_NAMES = frozenset({"con", "prn", "aux", "nul"} | _PORT_NAMES)  # by Windows


@dataclass(frozen=True)
class OutputOptions:
    """Which results are written, and how pictures look."""

    save_images: bool = True  # annotated images and videos
    save_txt: bool = False
    save_conf: bool = False  # confidences in the label files
    save_crop: bool = False
    save_csv: bool = False
    track: bool = False  # detections have the number of their track in a seventh column
    line_width: int | None = None  # px; None suits the picture
    hide_labels: bool = False
    hide_conf: bool = False
    vid_stride: int = 1

    @classmethod
    def from_options(cls, options: Namespace) -> OutputOptions:
        """Takes what concerns writing from detect.py's options."""
        same = ("save_txt", "save_conf", "save_crop", "save_csv", "track", "hide_labels", "hide_conf", "vid_stride")
        chosen = {name: getattr(options, name) for name in same}
        return cls(save_images=not options.nosave, line_width=options.line_thickness, **chosen)


class OutputStems(dict[str, str]):
    """Gives each input a stem of its own for the files made from it, told apart without regard to case.

    The first input of a stem keeps it, later ones become `stem-2`, `stem-3`, ... Of the inputs that are known at the
    beginning, none loses its own stem to such a number, and a video gives way to images that are named like its
    frames' label files (`clip_12`). An input that was not known gets its stem when it is asked for.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        super().__init__()
        paths = list(paths)
        self._natural = {Path(path).stem.casefold() for path in paths}
        self._like_frames = {stem.rpartition("_")[0] for stem in self._natural if re.fullmatch(r".+_\d+", stem)}
        self._taken: set[str] = set()
        self._next: Counter[str] = Counter()
        for path in paths:
            self[path]  # noqa: B018 - this makes it

    def __missing__(self, path: str) -> str:
        stem = unique = Path(path).stem
        folded = stem.casefold()
        number, clash = 1, suffix_of(path) in VID_FORMATS and folded in self._like_frames
        while clash or unique.casefold() in self._taken or (number > 1 and unique.casefold() in self._natural):
            number, clash = max(number, self._next[folded]) + 1, False
            unique = f"{stem}-{number}"
        self._next[folded] = number
        self._taken.add(unique.casefold())
        self[path] = unique
        return unique


def label_lines(detections: np.ndarray, shape_hw: Sequence[int], save_conf: bool = False) -> list[str]:
    """Returns lines `class x y w h[ confidence][ track]`, box normalised, of one image's detections, in their order.

    Args:
        detections: (n, 6) [x1, y1, x2, y2 in the image's pixels, confidence, class], or (n, 7) with tracks.
        shape_hw: the image's (height, width).
        save_conf: whether lines have the confidence.
    """
    boxes_norm = xyxy2xywhn(detections[:, :4], w=shape_hw[1], h=shape_hw[0])
    columns = [detections[:, 5:6], boxes_norm] + ([detections[:, 4:5]] if save_conf else [])
    lines = [" ".join(f"{value:g}" for value in row) for row in np.concatenate(columns, 1).tolist()]
    if detections.shape[1] > 6:
        lines = [f"{line} {int(track)}" for line, track in zip(lines, detections[:, 6], strict=True)]
    return lines


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
        _make_folder(folder)

    def write(self, stem: str, detections: np.ndarray, shape_hw: Sequence[int]) -> None:
        """Writes one image's file, a line for each detection; see `label_lines`.

        Raises:
            UserError: the file cannot be written.
        """
        file = self.folder / f"{stem}.txt"
        try:
            if not len(detections):
                file.unlink(missing_ok=True)
                return
            lines = label_lines(detections, shape_hw, self._save_conf)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}).") from error
        self.written += 1


def folder_names(names: Mapping[int, str]) -> dict[int, str]:
    """Turns class names into names that every file system takes, a different one for each class.

    Separators and characters that Windows refuses become `_`; a name that a former class has gets its number added.
    """
    folders: dict[int, str] = {}
    taken: set[str] = set()
    for class_id, name in names.items():
        safe = re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", str(name)).strip(" .")[:100] or "_"
        if safe.casefold().split(".")[0] in _RESERVED_NAMES:
            safe = f"_{safe}"
        while safe.casefold() in taken:
            safe = f"{safe}-{class_id}"
        taken.add(safe.casefold())
        folders[class_id] = safe
    return folders


class ResultWriter:
    """Writes the results of a run of detection into one folder; use in a `with` block, which ends videos properly.

    Calls of `write` come from one thread at a time, the frames of a video in order; those of live inputs may alternate.
    """

    def __init__(self, folder: Path, paths: Sequence[str], names: Mapping[int, str], options: OutputOptions) -> None:
        """Prepares writing below `folder`, which exists, the results for the inputs `paths`."""
        self._folder, self._names, self._options = folder, names, options
        self._stems = OutputStems(paths)
        self._crop_folders = folder_names(names)
        self._crops: set[Path] = set()
        self._crop_numbers: Counter[Path] = Counter()
        self._videos: dict[str, VideoFile] = {}  # open ones, by stem
        self._counts: dict[str, Counts] = {}  # the latest, by name
        self._labels: LabelWriter | None = None
        self._table_file: IO[str] | None = None
        self._table: Any = None

    @property
    def labels_written(self) -> int:
        """Number of label files."""
        return self._labels.written if self._labels else 0

    def __enter__(self) -> ResultWriter:
        """Makes the subfolders and opens the table."""
        if self._options.save_txt:
            self._labels = LabelWriter(self._folder / "labels", self._options.save_conf)
        if self._options.save_csv:
            self._table_file = _open_table(self._folder / "predictions.csv")
            self._table = csv.writer(self._table_file)
            self._table.writerow((*CSV_COLUMNS, *([TRACK_COLUMN] if self._options.track else [])))
        return self

    def __exit__(self, *_exception: object) -> None:
        """Ends all that is open, one after the other even if an end fails, and writes what was counted."""
        with ExitStack() as ends:
            for stem in list(self._videos):
                ends.callback(self._end_video, stem)
            if self._table_file is not None:
                ends.callback(self._table_file.close)
            if self._counts:
                ends.callback(self._write_counts)

    def write(self, frame: Frame, detections: np.ndarray, counts: Counts | None = None) -> None:
        """Writes everything asked for about one frame.

        Args:
            frame: with its picture, which is drawn into.
            detections: (k, 6) [x1, y1, x2, y2 in whole px of the picture, confidence, class], most confident first, or
                with tracking (k, 7): the last column is the number of the track, -1 for none.
            counts: what was counted in this input up to this frame.

        Raises:
            UserError: a file cannot be written.
        """
        stem = self._stems[frame.path]
        name = stem + Path(frame.path).suffix
        if counts is not None:
            self._counts[name] = counts
        try:
            if self._labels:  # the least confident detection comes first, as in YOLOv5
                name_of_frame = f"{stem}_{frame.number}" if frame.is_video else stem
                self._labels.write(name_of_frame, detections[::-1], frame.image.shape)
            if self._options.save_csv:
                self._write_rows(name, detections)
            if self._options.save_crop:
                self._write_crops(frame, detections, stem)
        except OSError as error:
            raise UserError(f"{error.filename or self._folder}: cannot be written ({error.strerror}).") from error
        if self._options.save_images:
            self._write_picture(frame, self._draw(np.ascontiguousarray(frame.image), detections, counts), stem)

    def drawn(self, frame: Frame, detections: np.ndarray, counts: Counts | None = None) -> np.ndarray:
        """Returns the picture (h, w, 3) as `write` saves it, drawn into a copy; from any thread."""
        return self._draw(frame.image.copy(), detections, counts)

    def write_features(self, frame: Frame, row: int, block: str, maps: np.ndarray) -> None:
        """Writes what a layer makes of a frame: `STEM/stage<row>_<block>_features.png` and all its channels as `.npy`.

        Args:
            frame: the frame; a video's frames have folders of their own (`STEM_<number>`).
            row: the layer's row in the model.
            block: its block's name.
            maps: (1, c, h, w) its output.

        Raises:
            UserError: a file cannot be written.
        """
        stem = self._stems[frame.path]
        folder = self._folder / (f"{stem}_{frame.number}" if frame.is_video else stem)
        _make_folder(folder)
        path = folder / f"stage{row}_{block}_features.png"
        save_image(path, feature_grid(maps[0]))
        try:
            np.save(path.with_suffix(".npy"), maps)
        except OSError as error:
            raise UserError(f"{path.with_suffix('.npy')}: cannot be written ({error.strerror}).") from error

    def _write_rows(self, name: str, detections: np.ndarray) -> None:
        """Adds the detections to the table, the least confident first, as in the label files."""
        for row in detections[::-1]:
            track = [int(row[6])] if self._options.track else []
            self._table.writerow((name, class_name(self._names, int(row[5])), f"{row[4]:.4f}", *track))

    def _write_counts(self) -> None:
        """Writes the table of what was counted: a row for each class that was tracked in an input."""
        with _open_table(self._folder / "counts.csv") as file:
            table = csv.writer(file)
            headings = next(iter(self._counts.values())).headings
            table.writerow(("Input", "Class", *(heading.capitalize() for heading in headings)))
            for name, counts in self._counts.items():
                for class_id, *numbers in counts.tallies:
                    table.writerow((name, class_name(self._names, class_id), *numbers))

    def _write_crops(self, frame: Frame, detections: np.ndarray, stem: str) -> None:
        """Cuts the detections out of the picture: `crops/CLASS/STEM.jpg`, then `STEM2.jpg` and so on."""
        for row in detections[::-1]:
            folder = self._folder / "crops" / self._crop_folders.get(int(row[5]), str(int(row[5])))
            folder.mkdir(parents=True, exist_ok=True)
            path = self._next_crop(folder / f"{stem}.jpg")
            save_image(path, crop_box(frame.image, row[:4]))

    def _next_crop(self, first: Path) -> Path:
        """Returns `STEM.jpg`, `STEM2.jpg`, ...: the first that this run has not written."""
        while True:
            self._crop_numbers[first] += 1
            number = self._crop_numbers[first]
            path = first if number == 1 else first.with_name(f"{first.stem}{number}.jpg")
            if path not in self._crops:
                self._crops.add(path)
                return path

    def _draw(self, image: np.ndarray, detections: np.ndarray, counts: Counts | None) -> np.ndarray:
        """Draws the detections and what was counted into the picture (h, w, 3), contiguous; returns it."""
        options = self._options
        look = (options.line_width, options.hide_labels, options.hide_conf)
        return draw_detections(image, detections, self._names, *look, counts)

    def _write_picture(self, frame: Frame, image: np.ndarray, stem: str) -> None:
        """Saves the drawn picture (h, w, 3), or adds it to its video."""
        if frame.is_video:
            self._video_of(frame, image, stem).write(image)
            return
        suffix = Path(frame.path).suffix
        save_image(self._folder / (stem + (suffix if cv2.haveImageWriter(f"x{suffix}") else ".jpg")), image)

    def _video_of(self, frame: Frame, image: np.ndarray, stem: str) -> VideoFile:
        """Returns the video that a frame goes into; the first frame of a file ends the video of the file before it."""
        if stem not in self._videos:
            for former in list(self._videos) if not frame.live else []:
                self._end_video(former)
            path, size_wh = self._folder / f"{stem}.mp4", (image.shape[1], image.shape[0])
            self._videos[stem] = VideoFile(path, frame.fps / self._options.vid_stride, size_wh)
        return self._videos[stem]

    def _end_video(self, stem: str) -> None:
        """Finishes a video, so that it plays."""
        self._videos.pop(stem).close()


class VideoFile:
    """An mp4 file being written frame by frame."""

    def __init__(self, path: Path, fps: float, size_wh: tuple[int, int]) -> None:
        """Opens the file.

        Raises:
            UserError: OpenCV cannot write a video there.
        """
        self.path = path
        self._size_wh = size_wh
        self._writer = cv2.VideoWriter(os.fspath(path), cv2.VideoWriter_fourcc(*VIDEO_CODEC), fps, size_wh)
        if not self._writer.isOpened():
            raise UserError(f"{path}: OpenCV cannot write an mp4 video of {size_wh[0]}x{size_wh[1]} px there.")

    def write(self, image: np.ndarray) -> None:
        """Adds a picture (h, w, 3) BGR; one of another size than the first is resized, or it would be left out."""
        if (image.shape[1], image.shape[0]) != self._size_wh:
            image = cv2.resize(image, self._size_wh)
        self._writer.write(image)

    def close(self) -> None:
        """Finishes the file.

        Raises:
            UserError: nothing arrived on the disk; OpenCV reports no error of its own.
        """
        self._writer.release()
        if not self.path.is_file() or not self.path.stat().st_size:
            raise UserError(f"{self.path}: the video could not be written. Is the disk full?")


def _make_folder(path: Path) -> None:
    """Makes a folder, with the reason in words if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be made ({error.strerror}).") from error


def _open_table(path: Path) -> IO[str]:
    """Opens a table for writing, with the reason in words if that fails."""
    try:
        return open(path, "w", newline="", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error
