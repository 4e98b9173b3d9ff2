"""Following objects through videos and streams: every object gets a number that it keeps from frame to frame.

The work is done by ByteTrack (Zhang et al., "ByteTrack: Multi-Object Tracking by Associating Every Detection Box",
2022) as the library `trackers` has it; here are its settings, the numbers, and what keeps inputs and classes apart.
Not here: counting (`utils.counting`) and drawing (`utils.draw`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.checks import UserError
from utils.images import VID_FORMATS

if TYPE_CHECKING:
    from utils.data.sources import Frame

NO_TRACK = -1
MEMORY_S = 1.0  # how long an object may be out of sight and keep its number
CONFIDENT = 0.25  # the usual --conf-thres: a weaker detection prolongs a track but begins none
CONFIRMED_AFTER = 2  # frames in a row: one alone is more often a mistake of the detector
LEAST_IOU = 0.1  # of a detection and where its track was expected
_LIBRARY_FPS = 30  # the library tells its memory in frames at this rate


def require_video(inputs: Sequence[str], live: bool = False) -> None:
    """Refuses pictures: nothing can be followed from one to the next.

    Args:
        inputs: paths of files, or names of live inputs.
        live: whether they are live inputs.

    Raises:
        UserError: some of the files are no videos; the first is named.
    """
    pictures = [path for path in inputs if not live and Path(path).suffix.lower().lstrip(".") not in VID_FORMATS]
    if pictures:
        others = f" and {len(pictures) - 1} more inputs are pictures" if len(pictures) > 1 else " is a picture"
        raise UserError(
            f"--track follows objects through videos and streams, but {pictures[0]}{others}: leave --track out, "
            "or give videos alone."
        )


class Trackers:
    """Gives the objects of every video and live input their numbers: 1, 2, ... for each input.

    An object has its number from the second frame on in which it is seen, and keeps it through gaps of up to a second
    of the video. A number never passes to an object of another class: one whose class flickers between two has a
    number for each. The same frames give the same numbers in every run.
    """

    def __init__(self, vid_stride: int = 1) -> None:
        """Loads the library.

        Args:
            vid_stride: every so many frames of an input are handed over.

        Raises:
            UserError: it is not installed, or does not work here.
        """
        self._library = _load_library()
        self._vid_stride = vid_stride
        self._tracks: dict[str, _InputTracks] = {}
        self._file = ""  # the video file that is being read

    def update(self, frame: Frame, detections: np.ndarray) -> np.ndarray:
        """Takes what was found in the next frame of an input.

        Args:
            frame: the frames of an input come in order; those of live inputs may alternate.
            detections: (k, 6) [x1, y1, x2, y2 in px, confidence, class].

        Returns:
            The same detections in the same order, (k, 7): the last column is the object's number, -1 for none (yet).
        """
        if not frame.live and frame.path != self._file:
            self._tracks.pop(self._file, None)
            self._file = frame.path
        if frame.path not in self._tracks:
            self._tracks[frame.path] = _InputTracks(self._library, self._vid_stride, frame.fps)
        numbers = self._tracks[frame.path].update(frame, detections)
        return np.concatenate([detections, numbers[:, None].astype(detections.dtype)], axis=1)


class _InputTracks:
    """The tracks of one input: a tracker for each class, and numbers that the classes share."""

    def __init__(self, library: tuple[ModuleType, ModuleType], vid_stride: int, fps: float) -> None:
        """Starts without tracks; every `vid_stride`-th of an input's `fps` frames a second is to come."""
        self._trackers_library, self._supervision = library
        self._vid_stride, self._frame_rate = vid_stride, fps / vid_stride
        self._trackers: dict[int, Any] = {}  # by class
        self._numbers: dict[tuple[int, int], int] = {}  # (class, the library's number) -> ours
        self._last_number = 0  # the largest of ours
        self._last_frame, self._seconds = 0, 0.0

    def update(self, frame: Frame, detections: np.ndarray) -> np.ndarray:
        """Returns the number (k,) of each detection (k, 6), -1 for none.

        All trackers see every frame, so that tracks whose class is not found grow old. Time is a video's own: frames
        that are missing count. Of live inputs only the frames that were handed over are numbered and count; their
        time is summed up, as one that comes back may have another rate.
        """
        stride = self._vid_stride if frame.live else 1  # a video's numbers have the stride in them
        self._seconds += (frame.number - self._last_frame) * stride / frame.fps
        self._last_frame = frame.number
        classes = detections[:, 5].astype(int)
        for class_id in sorted(set(classes.tolist()) - set(self._trackers)):
            self._trackers[class_id] = self._new_tracker()
        keys: dict[int, tuple[int, int]] = {}  # by row of the detections
        for class_id, tracker in self._trackers.items():
            rows = np.flatnonzero(classes == class_id)
            keys.update(self._associate(class_id, tracker, detections, rows))
        for row in sorted(keys):
            if keys[row] not in self._numbers:
                self._last_number += 1
                self._numbers[keys[row]] = self._last_number
        numbers = np.full(len(detections), NO_TRACK)
        for row, key in keys.items():
            numbers[row] = self._numbers[key]
        self._forget()
        return numbers

    def _new_tracker(self) -> Any:
        """Makes a tracker for one class."""
        return self._trackers_library.ByteTrackTracker(
            lost_track_buffer=round(MEMORY_S * _LIBRARY_FPS),
            frame_rate=self._frame_rate,
            track_activation_threshold=CONFIDENT,
            high_conf_det_threshold=CONFIDENT,
            minimum_consecutive_frames=CONFIRMED_AFTER,
            minimum_iou_threshold=LEAST_IOU,
        )

    def _associate(
        self, class_id: int, tracker: Any, detections: np.ndarray, rows: np.ndarray
    ) -> dict[int, tuple[int, int]]:
        """Hands a class's rows of detections (k, 6) to its tracker; returns {row: (class, library's number)}.

        Rows without a track are left out.
        """
        found = self._supervision.Detections(
            xyxy=detections[rows, :4], confidence=detections[rows, 4], data={"row": rows}
        )
        tracked = tracker.update(found, timestamp=self._seconds)
        if not len(tracked):
            return {}
        pairs = zip(tracked.data["row"].tolist(), tracked.tracker_id.tolist(), strict=True)
        return {row: (class_id, number) for row, number in pairs if number != NO_TRACK}

    def _forget(self) -> None:
        """Drops what belongs to tracks that ended: a stream that runs for months would fill the memory."""
        self._trackers = {class_id: tracker for class_id, tracker in self._trackers.items() if tracker.tracks}
        alive = {
            (class_id, number)
            for class_id, tracker in self._trackers.items()
            for number in tracker.tracked_objects.tracker_id.tolist()
        }
        self._numbers = {key: number for key, number in self._numbers.items() if key in alive}


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
