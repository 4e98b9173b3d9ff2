"""Following objects through videos and streams: every object gets a number that it keeps from frame to frame.

The work is done by ByteTrack (Zhang et al., "ByteTrack: Multi-Object Tracking by Associating Every Detection Box",
2022) as the library `trackers` has it; here are its settings, the numbers, what class an object is of, and what keeps
inputs apart. Not here: counting (`utils.media.counting`) and drawing (`utils.plots.boxes`).
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from utils.boxes import Detections
from utils.errors import UserError
from utils.images import VID_FORMATS

if TYPE_CHECKING:
    from utils.media.capture import Frame


LOGGER = logging.getLogger("yolov5")
NO_TRACK = -1
MEMORY_S = 1.0  # how long an object may be out of sight and keep its number
WEAKEST = 0.1  # confidence of the weakest detections that prolong a track
CONFIRMED_AFTER = 2  # frames in a row: one alone is more often a mistake of the detector
SELDOM = 3  # frames in a row that come after MEMORY_S: no outage, but a model too slow, or too large a stride
LEAST_IOU = 0.1  # of a detection and where its track was expected
_LIBRARY_FPS = 30  # the library tells its memory in frames at this rate


def require_video(inputs: Sequence[str], live: bool = False) -> None:
    """Refuses images: nothing can be followed from one to the next.

    Args:
        inputs: paths of files, or names of live inputs.
        live: whether they are live inputs.

    Raises:
        UserError: some of the files are no videos; the first is named.
    """
    images = [path for path in inputs if not live and Path(path).suffix.lower().lstrip(".") not in VID_FORMATS]
    if images:
        others = f" and {len(images) - 1} more inputs are images" if len(images) > 1 else " is an image"
        raise UserError(
            f"--track follows objects through videos and streams, but {images[0]}{others}: leave --track out, or give "
            "videos alone."
        )


class Trackers:
    """Gives the objects of every video and live input their numbers: 1, 2, ... for each input.

    An object has its number from the second frame on in which it is seen, and keeps it through gaps of up to MEMORY_S
    by the frames' own time, whatever classes the model takes it for meanwhile. Its class is that of most of its
    detections so far, each as heavy as it is confident. The same frames give the same numbers in every run.
    """

    def __init__(self, conf_thres: float = 0.25, vid_stride: int = 1) -> None:
        """Loads the library.

        Args:
            conf_thres: a weaker detection prolongs a track but begins none.
            vid_stride: every so many frames of an input are handed over.

        Raises:
            UserError: it is not installed, or does not work here.
        """
        self._library = _load_library()
        self._conf_thres, self._vid_stride = conf_thres, vid_stride
        self._tracks: dict[str, _InputTracks] = {}
        self._file = ""  # the video file that is being read

    def update(self, frame: Frame, detections: Detections) -> Detections:
        """Takes what was found in the next frame of an input.

        Args:
            frame: the frames of an input come in order; those of live inputs may alternate.
            detections: those down to WEAKEST among them.

        Returns:
            The same in the same order with `track_ids`, without the weak ones that prolong no track. The class of one
            that has a track is the track's.
        """
        if not frame.live and frame.path != self._file:
            self._tracks.pop(self._file, None)
            self._file = frame.path
        if frame.path not in self._tracks:
            rate = frame.fps / self._vid_stride
            self._tracks[frame.path] = _InputTracks(frame.path, self._library, self._conf_thres, rate)
        tracked = self._tracks[frame.path].update(frame.time, detections)
        return tracked[(tracked.confidences > self._conf_thres) | (tracked.track_ids != NO_TRACK)]


class _InputTracks:
    """The tracks of one input, and what each of them was taken for."""

    def __init__(self, name: str, library: tuple[ModuleType, ModuleType], conf_thres: float, rate: float) -> None:
        """Starts without tracks; `rate` frames a second of the input `name` are to come, more or less."""
        trackers, self._supervision = library
        self._tracker = trackers.ByteTrackTracker(
            lost_track_buffer=round(MEMORY_S * _LIBRARY_FPS),
            frame_rate=rate,  # the unit of its model of motion; the time is given with every frame
            track_activation_threshold=conf_thres,
            high_conf_det_threshold=conf_thres,
            minimum_consecutive_frames=CONFIRMED_AFTER,
            minimum_iou_threshold=LEAST_IOU,
        )
        self._votes: dict[int, dict[int, float]] = {}  # {the library's number: {class: sum of confidences}}
        self._name, self._last_s, self._seldom = name, math.inf, 0  # how many frames in a row came too late

    def update(self, time_s: float, detections: Detections) -> Detections:
        """Returns the detections of the frame of that time with class and number of their tracks."""
        self._seldom = self._seldom + 1 if time_s - self._last_s > MEMORY_S else 0
        self._last_s = time_s
        if self._seldom == SELDOM:
            LOGGER.warning(
                f"WARNING: --track: the frames of {self._name} come more than {MEMORY_S:g} s apart, so that no object "
                "can be followed: take a smaller model or --imgsz, or a smaller --vid-stride."
            )
        found = self._supervision.Detections(
            xyxy=detections.boxes_xyxy, confidence=detections.confidences, data={"row": np.arange(len(detections))}
        )
        found = self._tracker.update(found, timestamp=time_s)
        classes, tracks = detections.classes.copy(), np.full(len(detections), NO_TRACK)
        for row, number in zip(found.data.get("row", ()), found.tracker_id.tolist(), strict=True):
            if number != NO_TRACK:
                votes = self._votes.setdefault(number, {})
                taken_for = int(classes[row])
                votes[taken_for] = votes.get(taken_for, 0.0) + float(detections.confidences[row])
                classes[row] = max(votes, key=votes.__getitem__)  # of equal ones the first
                tracks[row] = number + 1
        alive = set(self._tracker.tracked_objects.tracker_id.tolist())  # a stream that runs for months has many dead
        self._votes = {number: votes for number, votes in self._votes.items() if number in alive}
        return replace(detections, classes=classes, track_ids=tracks)


def _load_library() -> tuple[ModuleType, ModuleType]:
    """Returns the modules `trackers` and `supervision`, which comes with it and has the type that it takes."""
    advice = "pip install -r requirements-track.txt"
    try:
        return importlib.import_module("trackers"), importlib.import_module("supervision")
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        lacking = name if name == "trackers" else f"trackers, which lacks {error.name}"
        raise UserError(f"--track needs the library {lacking}: {advice}") from error
    except ImportError as error:
        raise UserError(f"--track: the library trackers cannot be loaded here ({error}): {advice}") from error
