"""Tracks against scenes whose truth is known: crossing paths, gaps, classes in doubt; and what keeps inputs apart."""

import importlib
import sys
import warnings

import numpy as np
import pytest

from utils.boxes import Detections
from utils.errors import UserError
from utils.media.counting import Counter
from utils.media.sources import Frame
from utils.media.tracking import NO_TRACK, require_video
from utils.media.tracking import Trackers as TrackersOfDetections

pytest.importorskip("trackers")

FPS = 25.0


class Trackers(TrackersOfDetections):
    """The same for rows (k, 6), and with rows (m, 7)."""

    def update(self, frame: Frame, rows: np.ndarray) -> np.ndarray:
        return super().update(frame, Detections.from_rows(rows)).rows


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library warns of times that run backwards
        yield


def frame(number: int, path: str = "/in/a.mp4", fps: float = FPS, time: float | None = None, live=False) -> Frame:
    time = (number - 1) / fps if time is None else time
    return Frame(path, 1, 1, np.zeros((480, 640, 3), np.uint8), number=number, fps=fps, live=live, time=time)


def box(x: float, y: float, class_id: int = 0, confidence: float = 0.8, width: int = 40, height: int = 60) -> list:
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2, confidence, class_id]


def detections(*boxes: list) -> np.ndarray:
    rounded = np.rint(np.array(boxes, np.float32).reshape(-1, 6) * [1, 1, 1, 1, 100, 1]) / [1, 1, 1, 1, 100, 1]
    return rounded.astype(np.float32)


class Scene:
    """Objects that move evenly, each with its class, start, step for each frame and frames in which it is hidden."""

    def __init__(self, *objects: tuple):
        self.objects = objects

    def at(self, number: int, shuffle: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        """Returns the detections of a frame in any order, and which object each of them is."""
        seen = [index for index, (*_, hidden) in enumerate(self.objects) if number not in hidden]
        shuffle.shuffle(seen)
        boxes = []
        for index in seen:
            class_id, (x, y), (step_x, step_y), _ = self.objects[index]
            boxes.append(box(x + step_x * number, y + step_y * number, class_id))
        return detections(*boxes), seen

    def numbers(self, frames: range, trackers: Trackers | None = None, **fields) -> dict[int, list[int]]:
        """Returns the number that each object has in every frame in which it is seen."""
        trackers, shuffle = trackers or Trackers(), np.random.default_rng(0)
        found: dict[int, list[int]] = {index: [] for index in range(len(self.objects))}
        for number in frames:
            given, seen = self.at(number, shuffle)
            tracked = trackers.update(frame(number, **fields), given)
            np.testing.assert_array_equal(tracked[:, :6], given)  # the classes too: they are in no doubt here
            for index, track in zip(seen, tracked[:, 6], strict=True):
                found[index].append(int(track))
        return found


NEVER = range(0)
CROSSING = Scene(
    (0, (40, 200), (6, 0), NEVER),
    (0, (600, 215), (-6, 0), NEVER),  # meets the first halfway, nearly in its place
    (0, (100, 60), (3, 4), NEVER),
    (1, (40, 205), (6, 0), NEVER),  # goes along in the first one's place, of another class
    (1, (320, 400), (0, 0), NEVER),
)


def test_every_object_keeps_its_own_number_while_paths_cross():
    found = CROSSING.numbers(range(1, 91))
    assert all(len(numbers) == 90 and numbers[0] == NO_TRACK for numbers in found.values())
    assert all(len(set(numbers[1:])) == 1 for numbers in found.values())
    assert sorted(numbers[1] for numbers in found.values()) == [1, 2, 3, 4, 5]


def test_number_outlives_a_gap_in_sight_of_up_to_a_second():
    scene = Scene((0, (40, 200), (6, 1), range(30, 50)), (0, (500, 100), (-2, 3), NEVER))
    found = scene.numbers(range(1, 81))
    assert len(found[0]) == 60
    assert [set(numbers[1:]) for numbers in found.values()] == [{found[0][1]}, {found[1][1]}]


@pytest.mark.parametrize("fps, hidden, kept", [(10.0, 8, True), (10.0, 12, False), (50.0, 45, True), (50.0, 55, False)])
def test_memory_is_a_second_of_the_video_whatever_its_rate(fps, hidden, kept):
    scene = Scene((0, (300, 200), (0, 0), range(10, 10 + hidden)))
    (numbers,) = scene.numbers(range(1, 20 + hidden), fps=fps).values()
    assert (numbers[-1] == numbers[1]) is kept


def test_motion_is_expected_alike_with_a_stride_and_in_a_video_of_that_rate():
    expected = []
    for trackers, fps, stride in ((Trackers(vid_stride=5), 50.0, 5), (Trackers(), 10.0, 1)):
        for index in range(12):
            given = detections(box(100 + 5 * index, 200 + 9 * (index % 3)))
            trackers.update(frame(1 + stride * index, fps=fps), given if index < 8 else detections())
        (state,) = trackers._tracks.values()
        expected.append(state._tracker.tracked_objects.xyxy)
    np.testing.assert_allclose(*expected, rtol=1e-6)
    assert expected[0][0, 0] > 80 + 5 * 7  # its left side went on while it was out of sight


def test_frames_that_could_not_be_read_count_as_time():
    trackers, still = Trackers(), detections(box(300, 200))
    first = [trackers.update(frame(number), still)[0, 6] for number in range(1, 6)]
    after_half_a_second = [trackers.update(frame(number), still)[0, 6] for number in range(18, 22)]
    after_two_more = [trackers.update(frame(number), still)[0, 6] for number in range(72, 76)]
    assert first[1:] + after_half_a_second == [1] * 8
    assert after_two_more == [NO_TRACK, 2, 2, 2]


@pytest.mark.parametrize("outage_s, kept", [(0.8, True), (1.2, False), (240.0, False)])
def test_number_of_a_camera_s_object_outlives_a_second_without_frames_and_no_more(outage_s, kept):
    """Live frames are numbered as they are handed out, whatever time passes between them."""
    trackers, still, started_s = Trackers(), detections(box(300, 200)), 1e6
    times = [started_s + 0.04 * index for index in range(10)]
    times += [times[-1] + outage_s + 0.04 * index for index in range(3)]
    tracks = [
        trackers.update(frame(number, "cam", time=time, live=True), still)[0, 6]
        for number, time in enumerate(times, start=1)
    ]
    assert tracks == [NO_TRACK, *[1] * 9, *([1, 1, 1] if kept else [NO_TRACK, 2, 2])]


@pytest.mark.parametrize("rate, away, kept", [(25, 20, True), (25, 30, False), (5, 3, True), (5, 6, False)])
def test_a_second_is_a_second_however_few_of_a_camera_s_frames_are_handed_out(rate, away, kept):
    trackers, tracks = Trackers(), []
    for number in range(1, 21 + away):
        given = detections() if 10 < number <= 10 + away else detections(box(300, 200))
        one = frame(number, "cam", fps=25.0, time=number / rate, live=True)
        tracks += trackers.update(one, given)[:, 6].tolist()
    assert tracks[1:] == [1] * 19 if kept else tracks[1:] == [*[1] * 9, NO_TRACK, *[2] * 9]


def test_frames_that_come_too_seldom_to_follow_anything_are_warned_of(caplog):
    trackers = Trackers()
    for number, time in enumerate([0, 0.5, 240, 241.5, 242, 300, 301.2], start=1):  # outages
        trackers.update(frame(number, "cam", time=time, live=True), detections(box(300, 200)))
    assert not caplog.records
    for number in range(8, 20):
        trackers.update(frame(number, "cam", time=300 + 1.2 * number, live=True), detections(box(300, 200)))
    (record,) = caplog.records
    assert record.message.startswith("WARNING: --track: the frames of cam come more than 1 s apart")


@pytest.mark.parametrize("jump_px, kept", [(25, True), (36, False)])
def test_object_that_jumps_keeps_its_number_as_long_as_a_tenth_overlaps(jump_px, kept):
    """Boxes 40 px wide: 25 px aside they overlap by 15 / 65, 36 px aside by 4 / 76."""
    trackers = Trackers()
    tracks = [
        trackers.update(frame(number), detections(box(300 + jump_px * (number > 6), 200)))[0, 6]
        for number in range(1, 9)
    ]
    assert tracks[1:6] + tracks[7:] == [1] * 5 + [1 if kept else 2]


DOUBTS = np.random.default_rng(0).random(61)


@pytest.mark.parametrize(
    "class_in, counted_as",
    [
        (lambda n: n % 2, 0),  # by turns; a 0 is the first that has a number
        (lambda n: int(n % 3 == 0), 0),
        (lambda n: int(n >= 30), 0),  # from where it reaches the line
        (lambda n: int(n >= 5), 1),
        (lambda n: int(DOUBTS[n] < 0.2), 0),
        (lambda n: int(DOUBTS[n] < 0.4), 0),
    ],
)
def test_object_whose_class_is_in_doubt_has_one_number_and_counts_once(class_in, counted_as):
    trackers, counter, numbers = Trackers(), Counter.parse(["0,240,640,240"]), []
    for number in range(1, 61):
        one = frame(number)
        tracked = trackers.update(one, detections(box(320, 60 + 6 * number, class_in(number))))
        numbers.append(tracked[0, 6])
        (counts,) = counter.update(one, Detections.from_rows(tracked))
    assert numbers == [NO_TRACK, *[1] * 59]
    assert {tally.class_id: tally[1:3] for tally in counts.tallies if any(tally[1:3])} == {counted_as: (1, 0)}


def test_class_of_a_track_is_what_its_detections_say_by_confidence():
    trackers = Trackers()
    given = [(2, 0.5), (2, 0.5), (7, 0.5), (7, 0.5), (7, 0.25), (2, 0.3)]  # the first has no number yet
    tracked = [trackers.update(frame(n), detections(box(300, 200, *one)))[0] for n, one in enumerate(given, start=1)]
    assert [int(row[5]) for row in tracked] == [2, 2, 2, 7, 7, 7]  # 2: .5, .8; 7: .5, 1, 1.25
    assert [row[4] for row in tracked] == pytest.approx([confidence for _, confidence in given])


@pytest.mark.parametrize("conf_thres", [0.25, 0.5])
def test_weak_detections_prolong_a_track_and_are_else_left_out(conf_thres):
    trackers, sure, weak = Trackers(conf_thres), conf_thres + 0.01, conf_thres - 0.01
    for number in range(1, 5):
        trackers.update(frame(number), detections(box(300, 200, confidence=sure)))
    for number in range(5, 60):  # far beyond the memory
        given = detections(box(100, 100, confidence=sure), box(500, 300, confidence=weak), box(300, 200, 0, 0.11))
        tracked = trackers.update(frame(number), given)
        np.testing.assert_array_equal(tracked[:, :6], given[[0, 2]])
        assert tracked[:, 6].tolist() == [NO_TRACK if number == 5 else 2, 1]


def test_frames_without_detections_give_none():
    trackers = Trackers()
    assert [trackers.update(frame(number), detections()).shape for number in range(1, 4)] == [(0, 7)] * 3


def test_numbers_are_the_same_in_every_run_and_start_at_1_in_every_input():
    trackers = Trackers()
    first = CROSSING.numbers(range(1, 31), trackers, path="/in/a.mp4")
    second = CROSSING.numbers(range(1, 31), trackers, path="/in/b.mp4")
    assert first == second == CROSSING.numbers(range(1, 31))


def test_a_video_that_is_done_is_forgotten_and_live_inputs_are_kept():
    trackers, still = Trackers(), detections(box(300, 200))
    for path in ("/in/a.mp4", "/in/b.mp4", "/in/c.mp4"):
        trackers.update(frame(1, path), still)
    assert list(trackers._tracks) == ["/in/c.mp4"]
    cameras = Trackers()
    for number in range(1, 5):
        tracks = [cameras.update(frame(number, name, live=True), still)[0, 6] for name in ("0", "1")]
    assert tracks == [1, 1]


def test_tracks_that_ended_take_no_memory():
    trackers = Trackers()
    for number in range(1, 400):  # somebody new, of another class, every third frame
        place, class_id = (number // 3) % 15, (number // 3) % 4
        trackers.update(frame(number), detections(box(20 + 42 * place, 200, class_id)))
    (state,) = trackers._tracks.values()
    assert trackers.update(frame(400), detections(box(300, 400)))[0, 6] == NO_TRACK
    assert trackers.update(frame(401), detections(box(300, 400)))[0, 6] > 50
    assert len(state._votes) < 15


def test_counting_what_is_tracked_equals_the_count_by_hand():
    """A line at x 320: the first of CROSSING passes it rightwards, the second and fourth leave it to each side."""
    trackers, counter, shuffle = Trackers(), Counter.parse(["320,480,320,0"]), np.random.default_rng(0)
    for number in range(1, 91):
        one = frame(number)
        (counts,) = counter.update(one, Detections.from_rows(trackers.update(one, CROSSING.at(number, shuffle)[0])))
    # upwards line, so in is to the right: objects 0 and 2 of class 0, object 3 of class 1; object 1 goes out
    assert [tuple(tally[:3]) for tally in counts.tallies] == [(0, 2, 1), (1, 1, 0)]


def test_images_are_refused_before_the_work():
    require_video(["/in/a.mp4", "/in/B.MOV"])
    require_video(["rtsp_camera", "0"], live=True)
    with pytest.raises(UserError, match=r"--track follows objects through videos .* but /in/a\.jpg is an image"):
        require_video(["/in/a.jpg"])
    with pytest.raises(UserError, match=r"but /in/a\.jpg and 1 more inputs are images"):
        require_video(["/in/v.mp4", "/in/a.jpg", "/in/b.png"])


@pytest.mark.parametrize("lacking", ["trackers", "scipy"])
def test_missing_library_is_told_with_what_to_install(monkeypatch, lacking):
    def import_module(name):
        raise ModuleNotFoundError(f"No module named '{lacking}'", name=f"{lacking}.sub")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(UserError, match=r"--track needs .*trackers.*pip install -r requirements-track\.txt"):
        Trackers()


def test_broken_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(UserError, match="requirements-track"):
        Trackers()
