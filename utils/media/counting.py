"""Counting what passes: tracked objects that cross a line, in either direction, or stay in a zone, and how long.

Where an object is means a point of its box: the centre, or what `--count-anchor` names. A line counts it as soon as it
has left the line behind by a quarter of its box's shorter side: so one that trembles or waits on the line is not
counted again and again, and one that turns back before that is not counted at all. It counts for the class that its
track has then. Not here: tracking (`utils.media.tracking`) and drawing (`utils.plots.boxes`).
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
STAY_HEADINGS = ("mean stay s", "longest stay s")  # of a zone
ANCHORS = {  # of a box, as shares of its width and height
    "center": (0.5, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
}

Point = tuple[float, float]  # x, y


class Tally(NamedTuple):
    """What was counted of one class."""

    class_id: int
    first: int  # tracks that crossed the line inwards, or were inside the zone so far
    second: int  # tracks that crossed it outwards, or are inside now
    stay_s: float = 0.0  # of all tracks together inside the zone, seconds
    longest_s: float = 0.0  # of one track


class Counts(NamedTuple):
    """What one line or zone has counted in one input up to one of its frames."""

    points_xy: tuple[Point, ...]  # px of the image: two are a line's ends, more a zone's corners
    tallies: tuple[Tally, ...]  # of every class that was tracked, in the order of the classes
    name: str = ""  # of the line or zone; empty for one alone that was given none

    @property
    def is_zone(self) -> bool:
        """Whether a zone is counted, not a line."""
        return len(self.points_xy) > 2

    @property
    def headings(self) -> tuple[str, str]:
        """What a tally's two numbers mean."""
        return ZONE_HEADINGS if self.is_zone else LINE_HEADINGS

    def describe(self, names: Mapping[int, str] | Sequence[str]) -> list[str]:
        """Returns two texts such as `in 3 (2 person, 1 car)`, and how long objects stayed in a zone.

        Args:
            names: of the classes; the number stands for one that is not in there.
        """
        texts = []
        for column, heading in enumerate(self.headings, start=1):
            shares = [f"{tally[column]} {class_name(names, tally[0])}" for tally in self.tallies if tally[column]]
            total = f"{heading} {sum(tally[column] for tally in self.tallies)}"
            texts.append(f"{total} ({', '.join(shares)})" if shares else total)
        been = sum(tally.first for tally in self.tallies)
        if self.is_zone and been:
            mean_s = sum(tally.stay_s for tally in self.tallies) / been
            longest_s = max(tally.longest_s for tally in self.tallies)
            texts.append(f"stayed {mean_s:.1f} s on average, {longest_s:.1f} s at most")
        return texts

    def rows(self) -> list[tuple[int, dict[str, int | float]]]:
        """Returns for each class its number and its figures by their headings."""
        rows = []
        for tally in self.tallies:
            figures: dict[str, int | float] = dict(zip(self.headings, tally[1:3], strict=True))
            if self.is_zone:
                stays = (tally.stay_s / max(tally.first, 1), tally.longest_s)
                figures |= {name: round(value, 2) for name, value in zip(STAY_HEADINGS, stays, strict=True)}
            rows.append((tally.class_id, figures))
        return rows


class Shape(NamedTuple):
    """A line or zone as it was given."""

    name: str
    points_xy: tuple[Point, ...]  # two ends of a line, or three or more corners of a zone
    in_fractions: bool  # whether they are fractions of the image's width and height, else px

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads one value of `--count`: `x1,y1,x2,y2` is a line, three or more points are a zone; `NAME=` may precede.

        The numbers are px, or fractions of the image where none is above 1. Whoever walks along the line from the
        first point to the second and is crossed from left to right, as seen on the image, sees objects go in: a line
        drawn from left to right counts what moves down as in.

        Raises:
            UserError: no such list of numbers, or points that make neither a line nor an area.
        """
        name, _, numbers = text.rpartition("=")
        values = [_number(part, text) for part in numbers.split(",")]
        if len(values) < 4 or len(values) % 2:
            raise _refusal(text, f"{len(values)} numbers are no list of two or more points")
        points = list(zip(values[::2], values[1::2], strict=True))
        if len(set(points)) < min(len(points), 3):
            raise _refusal(text, "some of its points are the same")
        if len(points) > 2 and _area(points) == 0:
            raise _refusal(text, "its points, joined in this order, enclose no area")
        return cls(name.strip(), tuple(points), max(values) <= 1)

    def pixels(self, shape_hw: tuple[int, int]) -> tuple[Point, ...]:
        """Returns the points in px of an image of that height and width."""
        height, width = shape_hw
        scale_x, scale_y = (width, height) if self.in_fractions else (1, 1)
        return tuple((x * scale_x, y * scale_y) for x, y in self.points_xy)


class Counter:
    """Counts in every input on its own."""

    def __init__(self, shapes: Sequence[Shape], anchor: str = "center") -> None:
        """Takes lines and zones, of different names, and which of ANCHORS says where an object is."""
        self._shapes, self._anchor = tuple(shapes), ANCHORS[anchor]
        self._states: dict[str, list[_State]] = {}  # of each input: one of each shape

    @classmethod
    def parse(cls, texts: Sequence[str], anchor: str = "center") -> Counter:
        """Reads the values of `--count` (`Shape.parse`) and `--count-anchor`; several that have no name are numbered.

        Raises:
            UserError: a value that is no line or zone, or two of one name.
        """
        shapes = [Shape.parse(text) for text in texts]
        if len(shapes) > 1:
            shapes = [
                shape
                if shape.name
                else shape._replace(name=f"{'zone' if len(shape.points_xy) > 2 else 'line'} {number}")
                for number, shape in enumerate(shapes, start=1)
            ]
        names = [shape.name for shape in shapes]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"--count: two of the lines and zones have the name '{twice}'.")
        return cls(shapes, anchor)

    def update(self, frame: Frame, tracked: Detections) -> tuple[Counts, ...]:
        """Counts on with the next frame of an input.

        Args:
            frame: with its image; the frames of an input come in order.
            tracked: what was found in it, with `track_ids`.

        Returns:
            What each line and zone has counted in this input so far.
        """
        shape_hw = frame.image.shape[:2]
        states = self._states.setdefault(frame.path, [_State(shape.name, self._anchor) for shape in self._shapes])
        tracked = tracked[tracked.track_ids >= 0]
        for shape, state in zip(self._shapes, states, strict=True):
            if state.shape_hw != shape_hw:
                height, width = shape_hw
                points_px = shape.pixels(shape_hw)
                if min(x for x, _ in points_px) > width or min(y for _, y in points_px) > height:
                    whose = f"of {shape.name} " if shape.name else ""
                    LOGGER.warning(
                        f"WARNING: --count: the points {whose}lie outside {frame.path}, which has {width}x{height} px"
                    )
                state.resize(points_px, shape_hw)
            state.update(frame.time, tracked)
        return tuple(state.counts() for state in states)

    def summary(self, names: Mapping[int, str] | Sequence[str] = ()) -> list[str]:
        """Returns a line about each input and shape: `Counted in PATH, gate: in 3 (2 person, 1 car), out 0`.

        Args:
            names: of the classes; the number stands for one that is not in there.
        """
        return [
            f"Counted in {path}{f', {counts.name}' if counts.name else ''}: {', '.join(counts.describe(names))}"
            for path, states in self._states.items()
            for counts in (state.counts() for state in states)
        ]


class _Path(NamedTuple):
    """What is remembered of one track."""

    anchor_xy: Point  # where it was seen last
    crossings: int  # of the line since it was last clear of it: +1 inwards, -1 outwards
    inside: bool  # whether it was in the zone then
    been_inside: bool  # whether it was at any time
    stay_s: float  # how long, in all
    seen_s: float  # when that was, by the frames' time


class _State:
    """One input's line or zone, the tracks and the numbers."""

    def __init__(self, name: str, anchor: tuple[float, float]) -> None:
        self.shape_hw: tuple[int, int] = (1, 1)
        self._name, self._anchor = name, anchor
        self._points_xy: tuple[Point, ...] = ()
        self._paths: dict[int, _Path] = {}  # by track
        self._classes: set[int] = set()
        self._first: collections.Counter[int] = collections.Counter()  # by class, as in a `Tally`
        self._second: collections.Counter[int] = collections.Counter()
        self._stay_s: collections.defaultdict[int, float] = collections.defaultdict(float)
        self._longest_s: collections.defaultdict[int, float] = collections.defaultdict(float)

    def resize(self, points_xy: tuple[Point, ...], shape_hw: tuple[int, int]) -> None:
        """Goes over to images of (height, width), in whose px the points are; the paths are stretched."""
        scale_y, scale_x = shape_hw[0] / self.shape_hw[0], shape_hw[1] / self.shape_hw[1]
        for track, path in self._paths.items():
            x, y = path.anchor_xy
            self._paths[track] = path._replace(anchor_xy=(x * scale_x, y * scale_y))
        self._points_xy, self.shape_hw = points_xy, shape_hw

    def counts(self) -> Counts:
        """Returns the numbers so far."""
        columns = (self._first, self._second, self._stay_s, self._longest_s)
        tallies = [Tally(class_id, *(column[class_id] for column in columns)) for class_id in sorted(self._classes)]
        return Counts(self._points_xy, tuple(tallies), self._name)

    def update(self, now_s: float, tracked: Detections) -> None:
        """Counts on with the tracked objects of the next frame, which is of that time."""
        zone = len(self._points_xy) > 2
        if zone:
            self._second.clear()
        columns = (tracked.boxes_xyxy.tolist(), tracked.classes.tolist(), tracked.track_ids.tolist())
        for (x1, y1, x2, y2), class_id, track in zip(*columns, strict=True):
            anchor_xy = (x1 + (x2 - x1) * self._anchor[0], y1 + (y2 - y1) * self._anchor[1])
            self._classes.add(class_id)
            former = self._paths.get(track) or _Path(anchor_xy, 0, False, False, 0.0, now_s)
            if zone:
                path = self._stay(former, anchor_xy, class_id, now_s)
            else:
                crossings = former.crossings + _crossing(former.anchor_xy, anchor_xy, self._points_xy)
                if abs(_distance(anchor_xy, self._points_xy)) >= CLEARANCE * min(x2 - x1, y2 - y1):
                    self._first[class_id] += crossings > 0
                    self._second[class_id] += crossings < 0
                    crossings = 0
                path = former._replace(anchor_xy=anchor_xy, crossings=crossings, seen_s=now_s)
            self._paths[track] = path
        self._paths = {track: path for track, path in self._paths.items() if now_s - path.seen_s < FORGET_AFTER_S}

    def _stay(self, former: _Path, anchor_xy: Point, class_id: int, now_s: float) -> _Path:
        """Counts an object's stay in the zone on: the time between two sights of it inside; returns its path."""
        inside = _is_inside(anchor_xy, self._points_xy)
        stayed_s = now_s - former.seen_s if inside and former.inside else 0.0
        self._second[class_id] += inside
        self._first[class_id] += inside and not former.been_inside
        self._stay_s[class_id] += stayed_s
        stay_s = former.stay_s + stayed_s
        self._longest_s[class_id] = max(self._longest_s[class_id], stay_s)
        return _Path(anchor_xy, 0, inside, inside or former.been_inside, stay_s, now_s)


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
