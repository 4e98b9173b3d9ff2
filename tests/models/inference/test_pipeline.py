"""detect.py's stream of results, with a model whose answers are written down: sources, sizes, tracks, the window."""

import contextlib
import importlib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

import detect
from models.backends.base import ArrayBackend
from models.backends.metadata import Metadata
from models.inference import pipeline
from models.inference.predictor import Window
from utils import process as background
from utils.boxes import Detections
from utils.cli import options_from
from utils.errors import UserError
from utils.media.counting import Counts, Tally
from utils.media.sources import Frame
from utils.nms import NMSConfig

SIDE, FPS = 64, 10.0
needs_trackers = pytest.mark.skipif(find_spec("trackers") is None, reason="trackers is not installed")


class Played(ArrayBackend):
    """A runtime that answers with one array after the other, whatever it sees."""

    device, batch, dynamic = "nowhere", 1, False

    def __init__(self, answers, nms=None):
        self.answers = [np.array([rows], np.float32) for rows in answers]
        self.metadata = Metadata({0: "a", 1: "b"}, 32, (SIDE, SIDE), nms=nms)

    def warm_up(self, height, width):
        pass

    def run(self, inputs):
        return self.answers.pop(0)


class Film(list):
    """A source of these frames."""

    inputs, live = ["/in/a.mp4"], False
    read, close, report = list.__iter__, list.clear, list.copy


def run_batches(source_frames, batch_size, shapes):
    """Detects in frames, so many at a time; notes the shapes that the model saw."""

    class Seen(Played):
        def run(self, inputs):
            shapes.append(inputs.shape)
            mean = inputs.mean((1, 2, 3))
            return np.array([[[20, 30, 12, 20, 0.9, 1 - level, level]] for level in mean], np.float32)

    backend = Seen([])
    backend.batch = None  # as many as come
    predictor = pipeline.Predictor(backend, NMSConfig(), (SIDE, SIDE))
    return list(
        pipeline.Pipeline(Film([frame] for frame in source_frames), predictor, {0: "a", 1: "b"}, None, None, batch_size)
    )


def test_batches_of_files_give_the_results_of_single_images_in_order():
    grey = [np.full((SIDE, SIDE, 3), level, np.uint8) for level in (0, 255, 60, 200, 10)]
    frames = [Frame(f"/in/{number}.png", number, 6, image) for number, image in enumerate(grey, start=1)]
    frames.insert(2, Frame("/in/damaged.png", 6, 6, error="is damaged"))
    one, four = [], []
    singles, batches = run_batches(frames, 1, one), run_batches(frames, 4, four)
    assert (
        [result.path for result in singles]
        == [result.path for result in batches]
        == [f"/in/{n}.png" for n in range(1, 6)]
    )
    assert (
        [int(result.classes[0]) for result in batches]
        == [int(result.classes[0]) for result in singles]
        == [0, 1, 0, 1, 0]
    )
    assert [shape[0] for shape in one] == [1] * 5 and [shape[0] for shape in four] == [3, 2]


def test_frames_wait_by_their_bytes():
    image = np.zeros((10, 20, 3), np.uint8)
    window = Window(np.zeros((3, 8, 8), np.uint8), (0, 0, 20, 10), ((1, 1), (0, 0)))
    ready = [Frame("a.png", 1, 2, image), Frame("b.png", 2, 2, error="damaged")], [[window, window]]
    assert pipeline._size_of(ready) == 600 + 2 * 192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_scale": True, "tile": 64}, "--save-scale draws at the size .* leave --tile out"),
        ({"batch_size": 2}, "--batch-size 2 is for files"),
    ],
)
def test_options_that_do_not_suit_a_source_are_refused(options, message, monkeypatch):
    film = Film()
    monkeypatch.setattr(film, "live", True, raising=False)
    monkeypatch.setattr(pipeline, "open_source", lambda *_: film)
    with pytest.raises(UserError, match=message):
        pipeline.open_pipeline(options_from(detect.build_parser(), {"weights": "a.onnx", "source": "0", **options}))


@pytest.fixture
def play(monkeypatch):
    """Returns the results of detect.py's options on a video for which a model gives these answers."""

    def results(answers, nms=None, **options):
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        frames = [
            Frame("/in/a.mp4", 1, 1, image, number=index + 1, fps=FPS, time=index / FPS)
            for index in range(len(answers))
        ]
        film = Film([frame] for frame in frames)
        monkeypatch.setattr(pipeline, "open_source", lambda *asked: results.asked.append(asked) or film)
        monkeypatch.setattr(pipeline, "find_weights", list)
        monkeypatch.setattr(pipeline, "load_backend", lambda *_: Played(answers, nms))
        options = options_from(detect.build_parser(), {"weights": "a.onnx", "source": "/in/a.mp4", **options})
        return list(pipeline.open_pipeline(options))

    results.asked = []
    return results


SURE, WEAK, NOISE = 0.8, 0.15, 0.05


def raw(x: float, confidence: float) -> list[float]:
    """A model's row of a box of 12 x 20 px of class 0."""
    return [x, 30, 12, 20, confidence, 1, 0]


@needs_trackers
def test_weak_boxes_prolong_tracks_and_are_else_left_out(play):
    """An object that is hardly seen for two seconds, then no more than noise; beside it what is never sure."""
    confidences = [SURE] * 10 + [WEAK] * 20 + [NOISE] * 3
    answers = [[raw(20 + n / 2, confidence), raw(52, 0.2)] for n, confidence in enumerate(confidences)]
    results = play(answers, track=True)
    assert [result.track_ids.tolist() for result in results] == [[-1], *[[1]] * 29, *[[]] * 3]
    assert results[29].confidences.tolist() == pytest.approx([WEAK])
    assert [len(result.detections) for result in play(answers)] == [1] * 10 + [0] * 23


@needs_trackers
def test_threshold_says_what_begins_a_track(play):
    answers = [[raw(20, 0.5)]] * 3
    assert [result.track_ids.tolist() for result in play(answers, track=True, conf_thres=0.4)] == [[-1], [1], [1]]
    assert [result.track_ids.tolist() for result in play(answers, track=True, conf_thres=0.6)] == [[], [], []]
    faint = [[raw(20, 0.07)]] * 3
    assert [result.track_ids.tolist() for result in play(faint, track=True, conf_thres=0.05)] == [[-1], [1], [1]]


@needs_trackers
@pytest.mark.parametrize("conf_thres, inside, said", [(0.25, 0.25, False), (0.05, 0.25, True), (0.25, 0.01, False)])
def test_threshold_inside_a_model_is_told_where_the_user_s_own_is_lower(play, caplog, conf_thres, inside, said):
    caplog.set_level("INFO", "yolov5")
    rows = [[14, 20, 26, 40, 0.8, 0], [40, 20, 52, 40, 0.02, 0]]
    nms = NMSConfig(inside, 0.45, 1000, agnostic=False)
    results = play([rows] * 3, nms, track=True, conf_thres=conf_thres)
    assert [result.confidences.tolist() for result in results] == [pytest.approx([0.8])] * 3
    assert ("--conf-thres at least 0.25" in caplog.text) is said


def test_what_is_fixed_inside_a_model_is_said(play, caplog):
    caplog.set_level("INFO", "yolov5")
    play([[[14, 20, 26, 40, 0.8, 0]]], NMSConfig(0.25, 0.45, 4), conf_thres=0.1, iou_thres=0.6, agnostic_nms=True)
    assert "--conf-thres at least 0.25, --iou-thres 0.45, --max-det at most 4, no --agnostic-nms holds" in caplog.text
    caplog.clear()
    play([[[14, 20, 26, 40, 0.8, 0]]], NMSConfig(0.25, 0.45, 4), max_det=2)
    assert "holds" not in caplog.text


@needs_trackers
def test_stride_and_patience_reach_the_source_and_the_stride_the_tracks(play, monkeypatch):
    """Without the stride, tracking would expect an object to move several times as far as it does."""
    library, given = importlib.import_module("trackers"), []
    make = library.ByteTrackTracker
    monkeypatch.setattr(library, "ByteTrackTracker", lambda **told: given.append(told["frame_rate"]) or make(**told))
    play([[raw(20, SURE)]], track=True, vid_stride=5, stream_timeout=7)
    assert play.asked == [("/in/a.mp4", 5, 7.0)] and given == [FPS / 5]


def test_every_image_has_the_size_that_the_model_saw_of_it():
    shapes_hw = [(32, 64), (64, 32), (32, 64)]  # cameras of two shapes side by side
    images = [[Window(np.zeros((3, *hw), np.uint8), (0, 0, 8, 8), ((1, 1), (0, 0)))] for hw in shapes_hw]
    frames = [Frame(f"cam{n}", n + 1, 3, np.zeros((8, 8, 3), np.uint8), number=1, live=True) for n in range(3)]

    def predictor(images, visualize):
        return [Detections.from_rows(np.zeros((0, 6)))] * len(images)

    predictor.last_s = {"inference": 0.0}
    running = pipeline.Pipeline(SimpleNamespace(live=True), predictor, {})
    assert [result.input_hw for result in running._detect(frames, images, None)] == shapes_hw


class AtOnce(contextlib.nullcontext):
    """A writer's thread that is always faster than the one that shows."""

    def __init__(self, consume):
        super().__init__()
        self.put = consume

    def __enter__(self):
        return self


def test_window_shows_the_image_that_is_saved_however_fast_it_is_drawn_into(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(background, "Background", AtOnce)
    frame = Frame("/in/a.png", 1, 1, np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    counts = (Counts(((0.0, 20.0), (64.0, 20.0)), (Tally(0, 2, 1),)),)
    found = Detections.from_rows(np.array([[5, 5, 30, 30, 0.9, 0]]))
    result = pipeline.Result(frame, found, {0: "cat"}, counts, (64, 64), 0.0)
    stub = SimpleNamespace(names={0: "cat"}, results=lambda _sink: [result], summary=list, shape_hw=(64, 64))
    stub.source = SimpleNamespace(inputs=["/in/a.png"])
    shown = []
    window = SimpleNamespace(show=lambda _title, image: shown.append(image) is None, close=lambda: None)
    detect.write_all(stub, tmp_path, options_from(detect.build_parser(), {}), window)
    np.testing.assert_array_equal(shown[0], cv2.imread(str(tmp_path / "a.png")))
