"""Following objects through videos and streams: every object gets a number that it keeps from frame to frame.

The work is done by ByteTrack (Zhang et al., "ByteTrack: Multi-Object Tracking by Associating Every Detection Box",
2022) as the library `trackers` has it; here are its settings, the numbers, what class an object is of, and what keeps
inputs apart. Not here: counting (`utils.counting`) and drawing (`utils.draw`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

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
    of the video, whatever classes the model takes it for meanwhile. Its class is that of most of its detections so
    far, each as heavy as it is confident. The same frames give the same numbers in every run.
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
            The class of one that has a number is its object's.
        """
        if not frame.live and frame.path != self._file:
            self._tracks.pop(self._file, None)
            self._file = frame.path
        if frame.path not in self._tracks:
            self._tracks[frame.path] = _InputTracks(self._library, self._vid_stride, frame.fps)
        return self._tracks[frame.path].update(frame, detections)


class _InputTracks:
    """The tracks of one input, and what each of them was taken for."""

    def __init__(self, library: tuple[ModuleType, ModuleType], vid_stride: int, fps: float) -> None:
        """Starts without tracks; every `vid_stride`-th of an input's `fps` frames a second is to come."""
        trackers, self._supervision = library
        self._vid_stride = vid_stride
        self._tracker = trackers.ByteTrackTracker(
            lost_track_buffer=round(MEMORY_S * _LIBRARY_FPS),
            frame_rate=fps / vid_stride,
            track_activation_threshold=CONFIDENT,
            high_conf_det_threshold=CONFIDENT,
            minimum_consecutive_frames=CONFIRMED_AFTER,
            minimum_iou_threshold=LEAST_IOU,
        )
        self._votes: dict[int, dict[int, float]] = {}  # {the library's number: {class: sum of confidences}}
        self._last_frame, self._seconds = 0, 0.0

    def update(self, frame: Frame, detections: np.ndarray) -> np.ndarray:
        """Returns the detections (k, 6) as (k, 7); see `Trackers.update`.

        Time is a video's own: frames that are missing count. Of live inputs only the frames that were handed over are
        numbered and count; their time is summed up, as one that comes back may have another rate.
        """
        stride = self._vid_stride if frame.live else 1  # a video's numbers have the stride in them
        self._seconds += (frame.number - self._last_frame) * stride / frame.fps
        self._last_frame = frame.number
        found = self._supervision.Detections(
            xyxy=detections[:, :4], confidence=detections[:, 4], data={"row": np.arange(len(detections))}
        )
        found = self._tracker.update(found, timestamp=self._seconds)
        tracked = np.column_stack((detections, np.full(len(detections), NO_TRACK, detections.dtype)))
        for row, number in zip(found.data.get("row", ()), found.tracker_id.tolist(), strict=True):
            if number != NO_TRACK:
                tracked[row, 5:] = self._vote(number, *detections[row, 4:].tolist()), number + 1
        alive = set(self._tracker.tracked_objects.tracker_id.tolist())  # a stream that runs for months has many dead
        self._votes = {number: votes for number, votes in self._votes.items() if number in alive}
        return tracked

    def _vote(self, number: int, confidence: float, class_id: float) -> int:
        """Counts what a track was taken for; returns the class that leads, of equal ones the one it had first."""
        votes = self._votes.setdefault(number, {})
        votes[int(class_id)] = votes.get(int(class_id), 0.0) + confidence
        return max(votes, key=votes.__getitem__)


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
