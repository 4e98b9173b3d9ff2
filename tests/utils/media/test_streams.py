"""Live inputs: newest frames, silence and return, what is counted, what ends them; a real MJPEG server at the end."""

import _thread
import functools
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from utils.errors import UserError
from utils.images import ImageError
from utils.media import streams
from utils.media.capture import open_address, stream_fps
from utils.media.streams import LiveInput, LiveSource, Patience

IMPATIENT = Patience(first_wait_s=0.01, longest_wait_s=0.05, give_up_s=0.5)
SERVED = replace(IMPATIENT, give_up_s=1.5)
DAMAGED, SILENT, PAUSE = "damaged", "silent", "pause"


class Script:
    """An input that plays given frames in every session, and then is silent, as at SILENT: a read fails.

    Frames are numbers, DAMAGED for one that cannot be decoded, and PAUSE: nothing comes until `more` is set.
    """

    def __init__(self, *sessions: list, frame_count: int = 0, fps: float = 12.5) -> None:
        self.sessions, self.frame_count, self.is_recording = list(sessions), frame_count, frame_count > 0
        self.fps, self.more = fps, threading.Event()
        self.opened = self.released = 0
        self.frames: Iterator = iter(())
        self.current = None

    def open(self) -> "Script":
        if not self.sessions:
            raise UserError("Failed to open: nobody is there")
        self.opened += 1
        self.frames = iter(self.sessions.pop(0))
        return self

    def grab(self) -> bool:
        self.current = next(self.frames, SILENT)
        if self.current == PAUSE:
            self.more.wait()
            self.current = next(self.frames, SILENT)
        return self.current != SILENT

    def retrieve(self) -> np.ndarray | None:
        return None if self.current == DAMAGED else np.full((4, 4, 3), self.current, np.uint8)

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def opened():
    """Opens scripts as one source and closes it after the test, whatever happens."""
    sources = []

    def open_scripts(*scripts: Script, vid_stride: int = 1, patience: Patience = IMPATIENT, reconnects: bool = True):
        inputs = [LiveInput(f"in{number}", script.open, reconnects) for number, script in enumerate(scripts)]
        sources.append(LiveSource(inputs, vid_stride, patience))
        return sources[-1]

    yield open_scripts
    for source in sources:
        source.close()
    assert not stream_threads()


def stream_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stream ")]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def values(source) -> list[int]:
    return [int(frame.image[0, 0, 0]) for frames in source.read() for frame in frames if frame.image is not None]


@pytest.mark.parametrize(
    ("declared", "fps"),
    [(25, 25), (29.97, 29.97), (0, 30), (-1, 30), (float("nan"), 30), (float("inf"), 30), (9000, 30), (120, 20)],
)
def test_rate_is_taken_modulo_100_and_30_where_there_is_none(declared, fps):
    assert stream_fps(declared) == fps


def test_frames_say_that_they_are_live_and_count_from_1(opened):
    script = Script([7, 8, 9], frame_count=3)
    frames = [frame for (frame,) in opened(script).read()]
    assert [frame.number for frame in frames] == [1, 2, 3]
    assert {(frame.path, frame.label, frame.fps, frame.live, frame.is_video) for frame in frames} == {
        ("in0", "0", 12.5, True, True)
    }


def test_frames_say_when_they_arrived_or_where_in_their_recording_they_stand(opened):
    camera = Script([1, PAUSE, 2])
    before = time.monotonic()
    source = opened(camera)
    frames = source.read()
    (first,) = next(frames)
    between = time.monotonic()
    camera.more.set()
    (second,) = next(frames)
    assert before <= first.time <= between <= second.time <= time.monotonic()
    recording = opened(Script([*range(6)], frame_count=6, fps=12.5), vid_stride=2)
    assert [frame.time for (frame,) in recording.read()] == pytest.approx([0, 0.16, 0.32])


def test_only_the_newest_frame_is_kept_and_the_others_are_counted(opened):
    script = Script([*range(10), PAUSE, *range(10, 15)])
    source = opened(script)
    frames = source.read()
    next(frames)
    script.more.set()
    wait_until(lambda: script.released)
    (newest,) = next(frames)
    assert newest.image[0, 0, 0] == 14
    assert newest.number == 2
    source.close()
    tally = source.tallies[0]
    assert tally.received == tally.used + tally.dropped
    assert tally.used == 2
    assert tally.dropped >= 4
    assert list(frames) == []


def test_jpegs_are_decoded_when_they_are_taken_and_one_that_is_damaged_within_is_left_out(opened, monkeypatch):
    class Camera(Script):
        def retrieve(self):
            return bytes([self.current])

    def decode(data):
        decoded.append(data[0])
        if data[0] == 9:
            raise ImageError("damaged")
        return np.full((4, 4, 3), data[0], np.uint8)

    decoded = []
    monkeypatch.setattr(streams, "decode_image", decode)
    camera = Camera([*range(5), PAUSE, 9, PAUSE, *range(20, 25), PAUSE])
    source = opened(camera, Script([200], [], []))
    wait_until(lambda: source.tallies[0].received == 5)
    frames = source.read()
    assert sorted(int(frame.image[0, 0, 0]) for frame in next(frames)) == [4, 200]
    camera.more.set()
    camera.more = threading.Event()
    wait_until(lambda: source.tallies[0].received == 2)
    camera.more.set()
    camera.more = threading.Event()
    assert [int(frame.image[0, 0, 0]) for frame in next(frames) if frame.path == "in0"] == [24]
    tally = source.tallies[0]
    assert decoded == [4, 9, 24] and (tally.used, tally.undecodable) == (2, 1)
    assert tally.received == tally.used + tally.dropped
    camera.more.set()


def test_frames_that_pass_before_detection_begins_are_not_counted(opened):
    source = opened(Script([*range(5)]))
    wait_until(lambda: source.tallies[0].received == 5)
    frames = source.read()
    assert next(frames)[0].image[0, 0, 0] == 4
    tally = source.tallies[0]
    assert (tally.received, tally.used, tally.dropped) == (1, 1, 0)


def test_no_frame_is_handed_out_twice(opened):
    scripts = Script([1], [], [2], []), Script([*range(100, 160)], frame_count=60)
    given = values(opened(*scripts))
    assert sorted(given) == [1, 2, *range(100, 160)]


@pytest.mark.parametrize(("late_s", "late"), [(0.0, 1), (60.0, 0)])
def test_frames_that_waited_too_long_are_counted(opened, late_s, late):
    source = opened(Script([1]), patience=Patience(late_s=late_s), reconnects=False)
    time.sleep(0.002)
    assert values(source) == [1]
    assert source.tallies[0].late == late


def test_recording_waits_so_that_no_frame_is_lost(opened):
    source = opened(Script([*range(50)], frame_count=50))
    assert values(source) == [*range(50)]
    assert source.report() == [
        "in0: 50 frames received, 50 used, 0 dropped for newer ones, 0 late, 0 undecodable, 0 reconnections"
    ]


FIFTY = [*range(50)]
RECORDINGS = {  # sessions, declared frames, vid_stride; frames given, reconnections, undecodable ones
    "more than it declares": ([FIFTY[:10]], 8, 1, FIFTY[:10], 0, 0),
    "every third": ([FIFTY[:10]], 10, 3, [0, 3, 6, 9], 0, 0),
    "broken off twice": ([FIFTY[:20], FIFTY[:35], FIFTY], 50, 2, FIFTY[::2], 2, 0),
    "broken off within a frame": ([[*FIFTY[:20], DAMAGED], FIFTY], 50, 1, FIFTY, 1, 1),
}


@pytest.mark.parametrize("case", RECORDINGS)
def test_recording_goes_on_behind_its_last_whole_frame_to_its_end(opened, case):
    sessions, frame_count, vid_stride, given, reconnections, undecodable = RECORDINGS[case]
    script = Script(*sessions, frame_count=frame_count)
    source = opened(script, vid_stride=vid_stride)
    assert values(source) == given
    assert (source.tallies[0].reconnections, source.tallies[0].undecodable) == (reconnections, undecodable)
    assert script.opened == len(sessions)


def test_recording_that_comes_no_further_says_what_is_missing(opened):
    source = opened(Script([*range(20)], [*range(12)], [*range(50)], frame_count=50))
    assert values(source) == [*range(20)]
    assert source.report()[0].endswith("; ended: only 20 of its 50 frames come")


def test_damaged_frames_are_counted_and_left_out(opened):
    source = opened(Script([1, DAMAGED, 3, SILENT, 4, SILENT, SILENT, 5], frame_count=5))
    assert values(source) == [1, 3, 4, 5]
    assert source.tallies[0].undecodable == 4  # one that could not be decoded, three that could not even be grabbed


def test_input_that_comes_back_goes_on_and_one_that_does_not_has_ended(opened, caplog):
    script = Script([1, 2], [3, 4], [], [5])
    with caplog.at_level(logging.INFO, "yolov5"):
        source = opened(script)
        given = values(source)
    assert given[-1] == 5
    assert given == sorted(set(given))
    assert source.tallies[0].reconnections == 2
    assert source.report()[0].endswith("2 reconnections; ended: it could not be opened again for 0.5 s")
    assert (script.opened, script.released) == (4, 4)
    assert "in0 is back after " in caplog.text


def test_last_frame_of_an_input_that_is_given_up_says_why_and_comes_once(opened):
    source = opened(Script([1]), Script([*range(100, 130)], frame_count=30), patience=replace(IMPATIENT, give_up_s=0.1))
    frames = [frame for batch in source.read() for frame in batch]
    (last,) = [frame for frame in frames if frame.image is None]
    assert (last.path, last.label, last.live) == ("in0", "0", True)
    assert last.error == "ended: it could not be opened again for 0.1 s"
    assert frames[-1] is last
    assert len(frames) == 1 + 30 + 1


def test_waits_between_attempts_double_up_to_the_longest(opened, monkeypatch):
    waits = []
    wait = threading.Event.wait

    def noted(event: threading.Event, seconds: float | None = None) -> bool:
        if threading.current_thread().name == "stream in0":
            waits.append(seconds)
        return wait(event, seconds)

    monkeypatch.setattr(threading.Event, "wait", noted)
    source = opened(Script([1]), patience=Patience(first_wait_s=0.01, longest_wait_s=0.08, give_up_s=0.2))
    values(source)
    assert waits[:5] == [0.01, 0.02, 0.04, 0.08, 0.08]


def test_one_input_that_ends_does_not_end_the_others(opened):
    source = opened(Script([1, 2], frame_count=2), Script([*range(100, 130)], frame_count=30))
    batches = list(source.read())
    assert [frame.label for frame in batches[0]] in (["0", "1"], ["0"], ["1"])
    assert [len({frame.path for frame in batch}) for batch in batches] == [len(batch) for batch in batches]
    assert [frame.number for batch in batches for frame in batch if frame.path == "in1"] == [*range(1, 31)]
    assert {frame.file_count for batch in batches for frame in batch} == {2}


def test_input_that_cannot_be_opened_again_by_nature_ends_at_its_first_silence(opened):
    script = Script([1], [2])
    source = opened(script, reconnects=False)
    assert values(source) == [1]
    assert script.opened == 1
    assert source.report()[0].endswith("; ended: it gives no frames any more")


def test_all_inputs_that_cannot_be_opened_are_told_and_the_rest_is_released(opened):
    good, absent, mute = Script([1, 2, 3]), Script(), Script([])
    with pytest.raises(UserError, match="nobody is there\nFailed to open in2: it answers, but sends no frame"):
        opened(good, absent, mute)
    assert (good.released, mute.released) == (1, 1)
    assert not stream_threads()


def test_what_goes_wrong_in_a_thread_is_raised_where_frames_are_read(opened):
    script = Script([1], [2])
    source = opened(script)
    script.fps = property()  # no number
    script.sessions = [["no number"]]
    with pytest.raises(ValueError, match="no number"):
        values(source)


def test_closing_does_not_wait_for_the_next_attempt(opened):
    source = opened(Script([1]), patience=Patience(first_wait_s=3600))
    frames = source.read()
    next(frames)
    source.close()
    assert not stream_threads()
    assert list(frames) == []
    source.close()


def test_interrupt_reaches_whoever_waits_for_a_frame(opened):
    script = Script([1, PAUSE, 2])
    source = opened(script)
    frames = source.read()
    next(frames)
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
        next(frames)
    script.more.set()


@pytest.fixture
def served(mjpeg_server):
    """Starts MJPEG servers and opens them as one source."""
    sources = []

    def serve(*plans: list[str], patience: Patience = SERVED):
        servers = [mjpeg_server(plan) for plan in plans]
        inputs = [
            LiveInput(f"camera{number}", functools.partial(open_address, *[server.address] * 2, open_s=2, read_s=0.5))
            for number, server in enumerate(servers)
        ]
        sources.append(LiveSource(inputs, 1, patience))
        return sources[-1], servers

    yield serve
    for source in sources:
        source.close()
    assert not stream_threads()


def test_mjpeg_server_that_breaks_off_stalls_and_comes_back_gives_whole_new_frames_alone(served, numbered):
    source, (server,) = served(["cut", "refuse", "stall", "refuse", "refuse", "corrupt"])
    *frames, last = [frame for (frame,) in source.read()]
    numbers = [numbered.read(frame.image) for frame in frames]
    assert last.error.startswith("ended: it could not be opened again")
    assert numbers == sorted(set(numbers))
    assert [len(session) for session in server.sent] == [12, 12, 13]
    assert set(numbers) <= {number for session in server.sent for number in session}
    for session in server.sent:
        assert len(set(session) & set(numbers)) >= 3
        assert session[-1] in numbers
    tally = source.tallies[0]
    assert tally.used == len(numbers)
    assert tally.received == tally.used + tally.dropped
    assert (tally.reconnections, tally.undecodable) == (2, 2)
    assert "ended: it could not be opened again" in source.report()[0]


def test_two_servers_of_which_one_dies_are_read_side_by_side(served, numbered):
    source, servers = served(["end"], ["end", "end", "end"])
    numbers = {"camera0": [], "camera1": []}
    for frames in source.read():
        assert len({frame.path for frame in frames}) == len(frames) > 0
        for frame in frames:
            if not frame.error:
                numbers[frame.path].append(numbered.read(frame.image))
    for given, server in zip(numbers.values(), servers, strict=True):
        assert given == sorted(set(given))
        assert given[-1] == server.number
    assert [tally.reconnections for tally in source.tallies] == [0, 2]


def test_closing_a_stalled_stream_ends_its_thread(served):
    source, (server,) = served(["stall"], patience=Patience())
    frames = source.read()
    wait_until(lambda: len(server.sent[0]) == server.frames)
    next(frames)
    source.close()
    assert not stream_threads()
    assert list(frames) == []
