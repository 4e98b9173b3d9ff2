"""Metrics by YOLOv5's signatures: golden average precision, hand-worked scenes."""

import json

import numpy as np
import pytest
import torch

from utils import metrics
from utils.compat import metrics as compat_metrics
from utils.errors import UserError


@pytest.mark.parametrize("case", range(3))
def test_ap_per_class_agrees_with_the_golden_values(golden_dir, case):
    golden = json.loads((golden_dir / "ap.json").read_text())[case]
    arrays = [np.array(golden[key]) for key in ("tp", "conf", "pred_cls", "target_cls")]
    tp, fp, precision, recall, f1, ap, classes = metrics.ap_per_class(*arrays)
    assert np.allclose(ap, golden["ap"], atol=1e-6)
    assert np.allclose(precision, golden["precision"], atol=1e-6) and np.allclose(recall, golden["recall"], atol=1e-6)
    assert np.allclose(f1, golden["f1"], atol=1e-6)
    assert classes.dtype == np.int32 and np.array_equal(classes, np.unique(arrays[3]))
    counts = np.array([(arrays[3] == number).sum() for number in classes])
    assert np.array_equal(tp, np.round(recall * counts)) and (fp >= 0).all()


def test_curves_are_drawn_on_demand(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compat_metrics, "plot_curves", lambda *arguments: asked.append(arguments))
    arrays = np.ones((4, 10), bool), np.linspace(0.9, 0.6, 4), np.zeros(4), np.zeros(4)
    metrics.ap_per_class(*arrays)
    metrics.ap_per_class(*arrays, plot=True, save_dir=str(tmp_path), names=["cat"])
    ((result, lettering, folder),) = asked
    assert (result.map50, lettering.names, folder) == (pytest.approx(0.995), {0: "cat"}, tmp_path)


def test_compute_ap_of_perfect_detections_is_0_995():
    ap, mpre, mrec = metrics.compute_ap([0.5, 1.0], [1.0, 1.0])
    assert ap == pytest.approx(0.995)
    assert mrec.tolist() == [0, 0.5, 1, 1] and mpre.tolist() == [1, 1, 1, 0]


def test_fitness_weighs_rows():
    rows = np.array([[0.5, 0.5, 0.8, 0.6, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0]])
    assert np.allclose(metrics.fitness(rows), [0.1 * 0.8 + 0.9 * 0.6, 0.1])


def test_confusion_matrix(tmp_path, caplog):
    """One hit of class 1, one label of class 0 missed, one detection beside everything, one in an empty image."""
    confusion = metrics.ConfusionMatrix(nc=2)
    labels = torch.tensor([[1.0, 0, 0, 10, 10], [0, 50, 50, 60, 60]])
    found = torch.tensor([[0.0, 0, 10, 9, 0.9, 1], [80, 80, 90, 90, 0.8, 0], [50, 50, 60, 60, 0.2, 0]])
    confusion.process_batch(found, labels)
    confusion.process_batch(found[1:2], labels[:0])
    confusion.process_batch(None, labels[:1])
    assert confusion.matrix.tolist() == [[0, 0, 2], [0, 1, 0], [1, 1, 0]]
    true_positives, false_positives = confusion.tp_fp()
    assert true_positives.tolist() == [0, 1] and false_positives.tolist() == [2, 0]
    confusion.plot(save_dir=tmp_path, names={0: "a", 1: "b"})
    assert (tmp_path / "confusion_matrix.png").stat().st_size > 1000
    with pytest.raises(UserError, match="matrix"):
        confusion.plot(normalize=False)
    with caplog.at_level("INFO", "yolov5"):
        confusion.print()
    assert caplog.messages == ["0 0 2", "0 1 0", "1 1 0"]
