"""Where detect.py's options go when a pipeline is opened, and what it does with results that need no model."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

import detect
from models.inference import pipeline
from models.inference.predictor import Window
from utils import process as background
from utils.boxes import Detections
from utils.cli import options_from
from utils.media.counting import Counts, Tally
from utils.media.sources import Frame


def test_stride_and_patience_reach_the_source_and_the_stride_the_tracks(monkeypatch):
    """Without the stride, tracking would expect an object to move several times as far as it does."""
    given = []

    def open_source(*arguments):
        given.append(arguments)
        return SimpleNamespace(inputs=["0"], live=True, close=lambda: None)

    def trackers(*arguments, **keywords):
        given.append((*arguments, *keywords.values()))

    monkeypatch.setattr(pipeline, "open_source", open_source)
    monkeypatch.setattr(pipeline, "Trackers", trackers)
    monkeypatch.setattr(pipeline, "find_weights", list)
    monkeypatch.setattr(pipeline, "_open_predictor", lambda _options: (None, {}))
    options = {"weights": "x.pt", "source": "0", "vid_stride": 3, "stream_timeout": 7, "track": True}
    pipeline.open_pipeline(options_from(detect.build_parser(), options))
    assert given[0] == ("0", 3, 7.0)
    assert 3 in given[1]


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
    counts = Counts(((0.0, 20.0), (64.0, 20.0)), (Tally(0, 2, 1),))
    found = Detections.from_rows(np.array([[5, 5, 30, 30, 0.9, 0]]))
    result = pipeline.Result(frame, found, {0: "cat"}, counts, (64, 64), 0.0)
    stub = SimpleNamespace(names={0: "cat"}, results=lambda _sink: [result], summary=list)
    stub.source = SimpleNamespace(inputs=["/in/a.png"])
    shown = []
    window = SimpleNamespace(show=lambda _title, image: shown.append(image) is None, close=lambda: None)
    detect.write_all(stub, tmp_path, options_from(detect.build_parser(), {}), window)
    np.testing.assert_array_equal(shown[0], cv2.imread(str(tmp_path / "a.png")))
