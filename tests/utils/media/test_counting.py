"""Lines and zones: crossings counted by hand, the rule about trembling, what a number does not depend on, mistakes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import Detections
from utils.errors import UserError
from utils.media.counting import CLEARANCE, Counter, Counts
from utils.media.sources import Frame

HEIGHT, WIDTH, SIDE, FPS = 300, 400, 20, 30.0
MIDDLE = "0,150,400,150"  # from left to right: in means down
NAMES = ["person", "car"]
FORTH = [(100, y) for y in range(50, 260, 10)]  # over the middle, downwards
BACK = FORTH[::-1]


def frame(number: int, path: str = "/in/a.mp4", height: int = HEIGHT, width: int = WIDTH) -> Frame:
    return Frame(path, 1, 1, np.zeros((height, width, 3), np.uint8), number=number, fps=FPS, time=(number - 1) / FPS)


def rows(objects: dict[int, tuple[float, float]], classes: dict[int, int] | None = None, side=SIDE) -> Detections:
    """Squares round the centres {track: (x, y)}."""
    half, classes = side / 2, classes or {}
    boxes = [(x - half, y - half, x + half, y + half, 0.9, classes.get(of, 0), of) for of, (x, y) in objects.items()]
    return Detections.from_rows(np.array(boxes, np.float64).reshape(-1, 7))


def walk(
    text: str, paths: dict[int, list], classes: dict[int, int] | None = None, side=SIDE, anchor="center"
) -> Counts:
    """Counts tracks along their paths, a point for each frame, None where it is out of sight."""
    counter = Counter.parse([text], anchor)
    for index in range(max(map(len, paths.values()))):
        seen = {track: path[index] for track, path in paths.items() if index < len(path) and path[index] is not None}
        (counts,) = counter.update(frame(index + 1), rows(seen, classes, side))
    return counts


def tallies(counts: Counts) -> list[tuple]:
    return [tuple(tally[:3]) for tally in counts.tallies]


def test_crossings_are_counted_in_both_directions_and_by_class():
    paths = {1: FORTH, 2: FORTH, 3: BACK, 4: FORTH, 5: [(300, 20)] * 9}
    counts = walk(MIDDLE, paths, {4: 1, 5: 1})
    assert tallies(counts) == [(0, 2, 1), (1, 1, 0)]
    assert counts.headings == ("in", "out")
    assert counts.describe(NAMES) == ["in 3 (2 person, 1 car)", "out 1 (1 person)"]
    assert counts.describe({}) == ["in 3 (2 0, 1 1)", "out 1 (1 0)"]


def test_the_order_of_the_points_says_which_way_is_in():
    assert tallies(walk("400,150,0,150", {1: FORTH})) == [(0, 0, 1)]
    leftwards = [(x, 100) for x in range(300, 100, -10)]
    assert tallies(walk("200,0,200,300", {1: leftwards})) == [(0, 1, 0)]  # downwards, so in is to the left


def test_only_what_passes_between_the_ends_counts():
    line = "120,150,280,150"
    outside, across = [(x, y) for (_, y), x in zip(FORTH, [100] * 99, strict=False)], [(200, y) for _, y in FORTH]
    slanted_past = [(90 + 2 * step, 100 + 10 * step) for step in range(12)]  # at y 150 it is at x 100
    assert tallies(walk(line, {1: outside, 2: across, 3: slanted_past})) == [(0, 1, 0)]


def test_there_and_back_again_is_counted_each_time():
    assert tallies(walk(MIDDLE, {1: FORTH + BACK + FORTH})) == [(0, 2, 1)]


def test_trembling_on_the_line_counts_once_when_it_is_left_behind():
    clear = CLEARANCE * SIDE
    tremble = [(100, 150 + offset) for offset in (-clear + 0.5, clear - 0.5) * 20]
    assert tallies(walk(MIDDLE, {1: [(100, 100), *tremble]})) == [(0, 0, 0)]
    assert tallies(walk(MIDDLE, {1: [(100, 100), *tremble, (100, 200)]})) == [(0, 1, 0)]
    assert tallies(walk(MIDDLE, {1: [(100, 100), *tremble, (100, 100)]})) == [(0, 0, 0)]


def test_one_that_stops_on_the_line_and_goes_on_counts_once():
    assert tallies(walk(MIDDLE, {1: [(100, 140), *[(100, 150)] * 10, (100, 160)]})) == [(0, 1, 0)]
    assert tallies(walk(MIDDLE, {1: [(100, 140), *[(100, 150)] * 10, (100, 140)]})) == [(0, 0, 0)]


def test_crossing_out_of_sight_counts_when_it_is_seen_again():
    for frames in (3, 29):  # as long as a tracker remembers it
        assert tallies(walk(MIDDLE, {1: [(100, 100), *[None] * frames, (100, 200)]})) == [(0, 1, 0)]


def test_objects_without_a_track_do_not_count():
    counts = walk(MIDDLE, {-1: FORTH})
    assert tallies(counts) == []
    assert counts.describe(NAMES) == ["in 0", "out 0"]


def test_zone_tells_how_many_were_inside_and_how_many_are():
    square = "100,100,200,100,200,200,100,200"
    through = [(x, 150) for x in range(20, 300, 20)]  # 14 frames, in the zone from 100 to 180
    paths = {1: through, 2: through + through[::-1], 3: [(150, 110)] * 28, 4: [(50, 50)] * 28}
    counts = walk(square, paths, {3: 1})
    assert counts.headings == ("inside so far", "inside now")
    assert tallies(counts) == [(0, 2, 0), (1, 1, 1)]
    until_then = {track: path[:22] for track, path in paths.items()}  # number 2 is on its way back, at x 140
    assert tallies(walk(square, until_then, {3: 1})) == [(0, 2, 1), (1, 1, 1)]


def test_stays_are_timed_by_track_and_class():
    square = "100,100,200,100,200,200,100,200"
    away = [(50, 150)] * 15
    paths = {
        1: [(150, 150)] * 31 + away,  # a second, to the frame
        2: [(150, 150)] * 16 + away + [(120, 150)] * 16,  # half a second, twice
        3: [(150, 150)] * 7 + away + [None] * 15 + [(150, 150)] * 4,  # 0.2 s, then 0.1 s; not the gap between them
        4: [(150, 150)] * 10 + [None] * 5 + [(150, 150)],  # 0.5 s, out of sight for a moment
        5: away,
    }
    counts = walk(square, paths, {4: 1, 5: 1})
    person, car = counts.tallies
    assert (person.stay_s, person.longest_s) == pytest.approx((2.3, 1.0))
    assert (car.first, car.stay_s, car.longest_s) == pytest.approx((1, 0.5, 0.5))
    assert counts.describe(NAMES)[2] == "stayed 0.7 s on average, 1.0 s at most"
    assert counts.rows()[1] == (
        1, {"inside so far": 1, "inside now": 0, "mean stay s": 0.5, "longest stay s": 0.5}
    )  # fmt: skip
    assert len(walk(MIDDLE, {1: FORTH}).describe(NAMES)) == 2  # a line has no stays


@pytest.mark.parametrize(
    ("anchor", "crosses_at"), [("center", 150), ("bottom", 140), ("top", 160), ("left", 150), ("right", 150)]
)
def test_the_anchor_is_what_crosses(anchor, crosses_at):
    for y, expected in ((crosses_at + 4, 0), (crosses_at + 6, 1)):  # a quarter of the side past it
        assert (
            sum(tally.first for tally in walk(MIDDLE, {1: [(100, 100), (100, y)]}, anchor=anchor).tallies) == expected
        )
    upright = {"left": 110, "right": 90}.get(anchor, 100)
    for x, expected in ((upright - 6, 1), (upright - 4, 0)):
        counts = walk("100,0,100,300", {1: [(300, 100), (x, 100)]}, anchor=anchor)
        assert sum(tally.first for tally in counts.tallies) == expected


def test_several_lines_and_zones_count_side_by_side():
    counter = Counter.parse(["gate = " + MIDDLE, "100,100,200,100,200,200,100,200", "0,60,400,60"])
    for number, point in enumerate(FORTH, start=1):
        gate, zone, line = counter.update(frame(number), rows({1: point}))
    assert [counts.name for counts in (gate, zone, line)] == ["gate", "zone 2", "line 3"]
    assert tallies(gate) == tallies(line) == [(0, 1, 0)] and tallies(zone) == [(0, 1, 0)]
    assert counter.summary(NAMES) == [
        "Counted in /in/a.mp4, gate: in 1 (1 person), out 0",
        "Counted in /in/a.mp4, zone 2: inside so far 1 (1 person), inside now 0, "
        "stayed 0.3 s on average, 0.3 s at most",
        "Counted in /in/a.mp4, line 3: in 1 (1 person), out 0",
    ]
    with pytest.raises(UserError, match="two of the lines and zones have the name 'a'"):
        Counter.parse(["a=" + MIDDLE, "a=0,60,400,60"])


def test_concave_zone_leaves_its_notch_out():
    notch = "0,0,300,0,300,300,150,50,0,300"  # a W without the middle
    counts = walk(notch, {1: [(150, 30)], 2: [(150, 200)], 3: [(20, 200)], 4: [(280, 200)]})
    assert tallies(counts) == [(0, 3, 3)]


def test_fractions_are_of_the_picture():
    assert walk("0,0.5,1,0.5", {1: FORTH}).points_xy == ((0, 150), (400, 150))
    assert tallies(walk("0,0.5,1,0.5", {1: FORTH})) == [(0, 1, 0)]
    assert walk("0,0,2,2", {1: FORTH}).points_xy == ((0, 0), (2, 2))


def test_numbers_survive_a_stream_whose_images_change_their_size():
    counter = Counter.parse(["0,0.5,1,0.5", "0,0.5,1,0.5,1,1,0,1"])
    sizes = [(HEIGHT, WIDTH)] * 3 + [(2 * HEIGHT, 2 * WIDTH)] * 3
    for number, ((height, width), y) in enumerate(zip(sizes, (0.3, 0.6, 0.7, 0.7, 0.6, 0.2), strict=True), 1):
        one = frame(number, height=height, width=width)
        tracked = rows({1: (0.5 * width, y * height)})
        crossed, inside = counter.update(one, tracked)
    assert tallies(crossed) == [(0, 1, 1)]
    assert tallies(inside) == [(0, 1, 0)]
    assert crossed.points_xy == ((0, HEIGHT), (2 * WIDTH, HEIGHT))


def test_inputs_are_counted_apart():
    counter = Counter.parse([MIDDLE])
    for number, (there, back) in enumerate(zip(FORTH, BACK, strict=True), start=1):
        counter.update(frame(number, "/in/a.mp4"), rows({1: there}))
        counter.update(frame(number, "/in/b.mp4"), rows({1: back}, {1: 1}))
    assert counter.summary(NAMES) == [
        "Counted in /in/a.mp4: in 1 (1 person), out 0",
        "Counted in /in/b.mp4: in 0, out 1 (1 car)",
    ]


def test_memory_of_tracks_is_bounded():
    counter = Counter.parse([MIDDLE])
    for track in range(3000):
        (counts,) = counter.update(frame(track + 1), rows({track: (100, 200)}))
    assert len(counter._states["/in/a.mp4"][0]._paths) <= 2 * FPS
    assert tallies(counts) == [(0, 0, 0)]


points = st.tuples(st.integers(0, WIDTH), st.integers(0, HEIGHT))
walks = st.lists(st.lists(points, min_size=2, max_size=12), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(walks, st.randoms(use_true_random=False), st.sampled_from([MIDDLE, "50,20,350,280", "50,50,300,80,200,250"]))
def test_numbers_of_tracks_and_order_of_detections_do_not_matter(paths, random, text):
    names = random.sample(range(1, 1000), len(paths))
    renamed = list(zip(names, paths, strict=True))
    random.shuffle(renamed)
    assert tallies(walk(text, dict(renamed))) == tallies(walk(text, dict(enumerate(paths, start=1))))


@settings(max_examples=60, deadline=None)
@given(walks)
def test_turning_the_line_round_exchanges_in_and_out(paths):
    """The line is at half a pixel, since a point on it belongs to one side."""
    numbered = dict(enumerate(paths, start=1))
    (forth,), (back,) = (walk(text, numbered).tallies for text in ("0,150.25,400,150.25", "400,150.25,0,150.25"))
    assert (forth.first, forth.second) == (back.second, back.first)


@settings(max_examples=60, deadline=None)
@given(walks)
def test_in_less_out_is_how_many_changed_sides(paths):
    """Of a line right across the image; ends near to it are left out, as they may count or not."""
    paths = [path for path in paths if min(abs(path[0][1] - 150), abs(path[-1][1] - 150)) >= CLEARANCE * SIDE]
    if paths:
        (tally,) = walk(MIDDLE, dict(enumerate(paths, start=1))).tallies
        changed = sum((path[-1][1] > 150) - (path[0][1] > 150) for path in paths)
        assert tally.first - tally.second == changed


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "'' is no number"),
        ("10,20,30", "3 numbers are no list"),
        ("10,20", "2 numbers are no list"),
        ("1,2,3,4,5", "5 numbers are no list"),
        ("10,20,thirty,40", "'thirty' is no number"),
        ("10;20;30;40", "'10;20;30;40' is no number"),
        ("10,20,-30,40", "-30 lies outside every image"),
        ("10,20,nan,40", "nan lies outside every image"),
        ("10,20,inf,40", "inf lies outside every image"),
        ("10,20,10,20", "some of its points are the same"),
        ("10,20,50,60,10,20", "some of its points are the same"),
        ("10,10,20,20,30,30", "enclose no area"),
    ],
)
def test_mistakes_are_told_with_the_option(text, why):
    with pytest.raises(UserError, match=r"^--count '.*': ") as error:
        Counter.parse([text])
    assert why in str(error.value)
    assert "x1,y1,x2,y2 for a line" in str(error.value)


def test_spaces_between_the_numbers_are_allowed():
    assert walk(" 0, 150 ,400 , 150", {1: FORTH}).points_xy == ((0, 150), (400, 150))


def test_line_outside_the_image_is_told_once(caplog):
    counter = Counter.parse(["0,500,400,500"])
    for number in range(1, 4):
        counter.update(frame(number), rows({1: (100, 100)}))
    assert [record.message for record in caplog.records] == [
        "WARNING: --count: the points lie outside /in/a.mp4, which has 400x300 px"
    ]
