"""Counting what passes: tracked objects that cross a line, in either direction, or come into a zone.

Where an object is means the centre of its box. A line counts it as soon as it has left the line behind by a quarter of
its box's shorter side: so one that trembles or waits on the line is not counted again and again, and one that turns
back before that is not counted at all. It counts for the class that its track has then. Not here: tracking
(`utils.media.tracking`) and drawing (`utils.plots.boxes`).
"""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from utils.boxes import Detections
from utils.errors import UserError
from utils.plots.boxes import class_name

if TYPE_CHECKING:
    from utils.media.capture import Frame


LOGGER = logging.getLogger("yolov5")
CLEARANCE = 0.25  # of the box's shorter side, beyond the line
FORGET_AFTER_S = 2.0  # no tracker remembers an object out of sight for so long, so its number never comes back
FARTHEST_PX = 1e6  # no image is larger
LINE_HEADINGS, ZONE_HEADINGS = ("in", "out"), ("inside so far", "inside now")

Point = tuple[float, float]  # x, y


class Tally(NamedTuple):
    """What was counted of one class."""

    class_id: int
    first: int  # tracks that crossed the line inwards, or were inside the zone so far
    second: int  # tracks that crossed it outwards, or are inside now


class Counts(NamedTuple):
    """What was counted in one input up to one of its frames."""

    points_xy: tuple[Point, ...]  # px of the image: two are a line's ends, more a zone's corners
    tallies: tuple[Tally, ...]  # of every class that was tracked, in the order of the classes

    @property
    def is_zone(self) -> bool:
        """Whether a zone is counted, not a line."""
        return len(self.points_xy) > 2

    @property
    def headings(self) -> tuple[str, str]:
        """What a tally's two numbers mean."""
        return ZONE_HEADINGS if self.is_zone else LINE_HEADINGS

    def describe(self, names: Mapping[int, str] | Sequence[str]) -> list[str]:
        """Returns two texts such as `in 3 (2 person, 1 car)`.

        Args:
            names: of the classes; the number stands for one that is not in there.
        """
        texts = []
        for column, heading in enumerate(self.headings, start=1):
            shares = [f"{tally[column]} {class_name(names, tally[0])}" for tally in self.tallies if tally[column]]
            total = f"{heading} {sum(tally[column] for tally in self.tallies)}"
            texts.append(f"{total} ({', '.join(shares)})" if shares else total)
        return texts


class Counter:
    """Counts in every input on its own."""

    def __init__(self, points_xy: Sequence[Point], in_fractions: bool) -> None:
        """Takes what `parse` read.

        Args:
            points_xy: two ends of a line, or three or more corners of a zone.
            in_fractions: whether they are fractions of the image's width and height, else px.
        """
        self._points_xy, self._in_fractions = tuple(points_xy), in_fractions
        self._states: dict[str, _State] = {}

    @classmethod
    def parse(cls, text: str) -> Counter:
        """Reads `--count`: `x1,y1,x2,y2` is a line, three or more points are a zone.

        The numbers are px, or fractions of the image where none is above 1. Whoever walks along the line from the
        first point to the second and is crossed from left to right, as seen on the image, sees objects go in: a line
        drawn from left to right counts what moves down as in.

        Raises:
            UserError: no such list of numbers, or points that make neither a line nor an area.
        """
        values = [_number(part, text) for part in text.split(",")]
        if len(values) < 4 or len(values) % 2:
            raise _refusal(text, f"{len(values)} numbers are no list of two or more points")
        points = list(zip(values[::2], values[1::2], strict=True))
        if len(set(points)) < min(len(points), 3):
            raise _refusal(text, "some of its points are the same")
        if len(points) > 2 and _area(points) == 0:
            raise _refusal(text, "its points, joined in this order, enclose no area")
        return cls(points, max(values) <= 1)

    def update(self, frame: Frame, tracked: Detections) -> Counts:
        """Counts on with the next frame of an input.

        Args:
            frame: with its image; the frames of an input come in order.
            tracked: what was found in it, with `track_ids`.

        Returns:
            The counts of this input so far.
        """
        shape_hw = frame.image.shape[:2]
        state = self._states.setdefault(frame.path, _State())
        if state.shape_hw != shape_hw:
            height, width = shape_hw
            scale_x, scale_y = (width, height) if self._in_fractions else (1, 1)
            points_px = tuple((x * scale_x, y * scale_y) for x, y in self._points_xy)
            if min(x for x, _ in points_px) > width or min(y for _, y in points_px) > height:
                LOGGER.warning(f"WARNING: --count: the points lie outside {frame.path}, which has {width}x{height} px")
            state.resize(points_px, shape_hw)
        state.update(frame.time, tracked[tracked.track_ids >= 0])
        return state.counts()

    def summary(self, names: Mapping[int, str] | Sequence[str] = ()) -> list[str]:
        """Returns a line about each input: `Counted in PATH: in 3 (2 person, 1 car), out 0`.

        Args:
            names: of the classes; the number stands for one that is not in there.
        """
        return [
            f"Counted in {path}: {', '.join(state.counts().describe(names))}" for path, state in self._states.items()
        ]


class _Path(NamedTuple):
    """What is remembered of one track."""

    center_xy: Point  # where it was seen last
    crossings: int  # of the line since it was last clear of it: +1 inwards, -1 outwards
    inside: bool  # whether it was in the zone at any time
    seen_s: float  # when that was, by the frames' time


class _State:
    """One input's line or zone, the tracks and the numbers."""

    def __init__(self) -> None:
        self.shape_hw: tuple[int, int] = (1, 1)
        self._points_xy: tuple[Point, ...] = ()
        self._paths: dict[int, _Path] = {}  # by track
        self._classes: set[int] = set()
        self._first: collections.Counter[int] = collections.Counter()  # by class, as in a `Tally`
        self._second: collections.Counter[int] = collections.Counter()

    def resize(self, points_xy: tuple[Point, ...], shape_hw: tuple[int, int]) -> None:
        """Goes over to images of (height, width), in whose px the points are; the paths are stretched."""
        scale_y, scale_x = shape_hw[0] / self.shape_hw[0], shape_hw[1] / self.shape_hw[1]
        for track, path in self._paths.items():
            x, y = path.center_xy
            self._paths[track] = path._replace(center_xy=(x * scale_x, y * scale_y))
        self._points_xy, self.shape_hw = points_xy, shape_hw

    def counts(self) -> Counts:
        """Returns the numbers so far."""
        tallies = [Tally(class_id, self._first[class_id], self._second[class_id]) for class_id in sorted(self._classes)]
        return Counts(self._points_xy, tuple(tallies))

    def update(self, now_s: float, tracked: Detections) -> None:
        """Counts on with the tracked objects of the next frame, which is of that time."""
        zone = len(self._points_xy) > 2
        if zone:
            self._second.clear()
        columns = (tracked.boxes_xyxy.tolist(), tracked.classes.tolist(), tracked.track_ids.tolist())
        for (x1, y1, x2, y2), class_id, track in zip(*columns, strict=True):
            center_xy = ((x1 + x2) / 2, (y1 + y2) / 2)
            self._classes.add(class_id)
            crossings, been_inside = 0, False
            former = self._paths.get(track)
            if zone:
                inside, been_inside = _is_inside(center_xy, self._points_xy), former is not None and former.inside
                self._second[class_id] += inside
                self._first[class_id] += inside and not been_inside
                been_inside |= inside
            else:
                if former is not None:
                    crossings = former.crossings + _crossing(former.center_xy, center_xy, self._points_xy)
                if abs(_distance(center_xy, self._points_xy)) >= CLEARANCE * min(x2 - x1, y2 - y1):
                    self._first[class_id] += crossings > 0
                    self._second[class_id] += crossings < 0
                    crossings = 0
            self._paths[track] = _Path(center_xy, crossings, been_inside, now_s)
        self._paths = {track: path for track, path in self._paths.items() if now_s - path.seen_s < FORGET_AFTER_S}


def _distance(point_xy: Point, line_xy: Sequence[Point]) -> float:
    """Returns a point's distance from the line through two points: positive on its right as seen on the image."""
    (x1, y1), (x2, y2) = line_xy
    return ((x2 - x1) * (point_xy[1] - y1) - (y2 - y1) * (point_xy[0] - x1)) / math.hypot(x2 - x1, y2 - y1)


def _crossing(before_xy: Point, after_xy: Point, line_xy: Sequence[Point]) -> int:
    """Returns 1 if a step crosses the line between its two ends from left to right, -1 from right to left, else 0.

    A point on the line belongs to its right side, so that a path that touches the line crosses it once or not at all.
    """
    before, after = _distance(before_xy, line_xy), _distance(after_xy, line_xy)
    if (before >= 0) == (after >= 0):
        return 0
    share = before / (before - after)
    x, y = (a + share * (b - a) for a, b in zip(before_xy, after_xy, strict=True))
    (x1, y1), (x2, y2) = line_xy
    along = ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / ((x2 - x1) ** 2 + (y2 - y1) ** 2)
    return (1 if after >= 0 else -1) if 0 <= along <= 1 else 0


def _is_inside(point_xy: Point, corners_xy: Sequence[Point]) -> bool:
    """Tells whether a ray from the point to the right leaves the polygon an odd number of times."""
    x, y = point_xy
    inside = False
    for (x1, y1), (x2, y2) in _edges(corners_xy):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            inside = not inside
    return inside


def _edges(corners_xy: Sequence[Point]) -> Iterator[tuple[Point, Point]]:
    return zip(corners_xy, [*corners_xy[1:], corners_xy[0]], strict=True)


def _area(corners_xy: Sequence[Point]) -> float:
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in _edges(corners_xy))


def _number(part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        raise _refusal(text, f"'{part.strip()}' is no number") from None
    if not 0 <= value <= FARTHEST_PX:
        raise _refusal(text, f"{part.strip()} lies outside every image")
    return value


def _refusal(text: str, why: str) -> UserError:
    expected = "x1,y1,x2,y2 for a line, or three or more points for a zone, in pixels or all from 0 to 1"
    return UserError(f"--count '{text}': {why}. Expected: {expected}.")
