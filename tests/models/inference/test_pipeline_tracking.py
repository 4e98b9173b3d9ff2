"""detect.py's stream of results, with a model whose answers are written down: what tracking is given, and gives."""

import importlib

import numpy as np
import pytest

import detect
import models.inference.pipeline
from models.backends.base import ArrayBackend
from models.backends.metadata import Metadata
from models.inference.pipeline import open_pipeline
from utils.cli import options_from
from utils.media.sources import Frame
from utils.nms import NMSConfig

pytest.importorskip("trackers")

SIDE, FPS = 64, 10.0


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


@pytest.fixture
def play(monkeypatch):
    """Returns the results of detect.py's options on a video for which a model gives these answers."""

    def results(answers, nms=None, **options):
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        frames = [
            Frame("/in/a.mp4", 1, 1, image, number=index + 1, fps=FPS, time=index / FPS)
            for index in range(len(answers))
        ]
        monkeypatch.setattr(models.inference.pipeline, "open_source", lambda *_: Film([frame] for frame in frames))
        monkeypatch.setattr(models.inference.pipeline, "find_weights", list)
        monkeypatch.setattr(models.inference.pipeline, "load_backend", lambda *_: Played(answers, nms))
        options = options_from(detect.build_parser(), {"weights": "a.onnx", "source": "/in/a.mp4", **options})
        return list(open_pipeline(options))

    return results


SURE, WEAK, NOISE = 0.8, 0.15, 0.05


def raw(x: float, confidence: float) -> list[float]:
    """A model's row of a box of 12 x 20 px of class 0."""
    return [x, 30, 12, 20, confidence, 1, 0]


def test_weak_boxes_prolong_tracks_and_are_else_left_out(play):
    """An object that is hardly seen for two seconds, then no more than noise; beside it what is never sure."""
    confidences = [SURE] * 10 + [WEAK] * 20 + [NOISE] * 3
    answers = [[raw(20 + n / 2, confidence), raw(52, 0.2)] for n, confidence in enumerate(confidences)]
    results = play(answers, track=True)
    assert [result.track_ids.tolist() for result in results] == [[-1], *[[1]] * 29, *[[]] * 3]
    assert results[29].confidences.tolist() == pytest.approx([WEAK])
    assert [len(result.detections) for result in play(answers)] == [1] * 10 + [0] * 23


def test_threshold_says_what_begins_a_track(play):
    answers = [[raw(20, 0.5)]] * 3
    assert [result.track_ids.tolist() for result in play(answers, track=True, conf_thres=0.4)] == [[-1], [1], [1]]
    assert [result.track_ids.tolist() for result in play(answers, track=True, conf_thres=0.6)] == [[], [], []]
    faint = [[raw(20, 0.07)]] * 3
    assert [result.track_ids.tolist() for result in play(faint, track=True, conf_thres=0.05)] == [[-1], [1], [1]]


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


@pytest.mark.parametrize("vid_stride", [1, 5])
def test_trackers_know_how_many_frames_a_second_come(play, monkeypatch, vid_stride):
    library, rates = importlib.import_module("trackers"), []
    make = library.ByteTrackTracker
    monkeypatch.setattr(library, "ByteTrackTracker", lambda **given: rates.append(given["frame_rate"]) or make(**given))
    play([[raw(20, SURE)]], track=True, vid_stride=vid_stride)
    assert rates == [FPS / vid_stride]
