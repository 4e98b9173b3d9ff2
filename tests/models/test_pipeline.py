"""Where detect.py's options go when a pipeline is opened."""

from types import SimpleNamespace

import detect
from models import pipeline
from utils.cli import options_from


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
    monkeypatch.setattr(pipeline, "_open_detector", lambda _options: (None, {}))
    options = {"weights": "x.pt", "source": "0", "vid_stride": 3, "stream_timeout": 7, "track": True}
    pipeline.open_pipeline(options_from(detect.build_parser(), options))
    assert given[0] == ("0", 3, 7.0)
    assert 3 in given[1]
