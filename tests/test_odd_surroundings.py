"""The commands in surroundings that most people never meet: no standard streams, names in another encoding."""

import pytest

import detect
import train
import val

SMALL = {"imgsz": 64, "device": "cpu"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run_all(tiny_shapes, weights, tmp_path):
    """Runs train, val and detect on a data set and a source."""

    def run(data=tiny_shapes, source=None, **options):
        source = source or tiny_shapes.parent / "images" / "val"
        options = {"project": str(tmp_path / "runs"), **SMALL, **options}
        training = {"cfg": "yolov5n-slimneck.yaml", "weights": "", "epochs": 1, "batch_size": 8, "workers": 0}
        train.run(data=str(data), name="train", noplots=True, **training, **options)
        best = str(tmp_path / "runs" / "train" / "weights" / "best.pt")
        val.run(data=str(data), weights=best, name="val", workers=0, **options)
        detect.run(source=str(source), weights=str(weights), name="detect", **options)
        return tmp_path / "runs"

    return run


def test_the_programs_run_without_standard_streams(run_all, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    runs = run_all()
    assert (runs / "train" / "results.csv").is_file() and (runs / "val").is_dir()
    assert len(list((runs / "detect").glob("*.jpg"))) == 8
