"""Batches of pictures: each gets what the predictor finds in it alone; models that choose boxes themselves; sizes."""

import numpy as np
import pytest

from models.backends.base import ArrayBackend
from models.backends.metadata import Metadata
from service.predictor import Predictor
from utils.errors import UserError
from utils.nms import NMSConfig

DEFAULTS = NMSConfig(0.25, 0.45, 1000)


class ChoosingBackend(ArrayBackend):
    """Stands in for a fixed export with suppression inside: three boxes, then zeros."""

    def __init__(self):
        inside = NMSConfig(conf_thres=0.2, iou_thres=0.5, max_det=4)
        self.metadata = Metadata({0: "cat"}, 32, (64, 96), nms=inside)
        self.dynamic, self.device, self.batch = False, "here", None

    def run(self, inputs):
        rows = [[0, 16, 48, 48, 0.9, 0], [10, 20, 30, 40, 0.5, 0], [1, 17, 9, 25, 0.3, 0], [0, 0, 0, 0, 0, 0]]
        return np.array([rows] * len(inputs), np.float32)


@pytest.mark.parametrize("fixed", [False, True])
def test_batch_gives_what_the_detector_finds_in_each_picture(exported, picture, fixed):
    from models.backends import load_backend
    from models.inference.predictor import Predictor as Reference

    backend = load_backend(exported, "cpu")
    backend.dynamic = not fixed
    backend.metadata = Metadata(backend.names, 32, (64, 96), batch=4, dynamic=not fixed)
    predictor = Predictor(backend, None, DEFAULTS)
    sizes = [(64, 96), (40, 96), (64, 20), (100, 100)] if fixed else [(64, 96), (128, 192), (33, 48), (64, 95)]
    pictures = [picture(seed, *size) for seed, size in enumerate(sizes)]
    thresholds = [NMSConfig(conf, iou, 1000) for conf, iou in ((0.1, 0.45), (0.25, 0.9), (0.3, 0.2), (0.2, 0.45))]
    batch = [predictor.prepare(image, wanted) for image, wanted in zip(pictures, thresholds, strict=True)]
    for image, wanted, found in zip(pictures, thresholds, predictor.detect(batch), strict=True):
        expected = Reference(backend, wanted, (64, 96)).detect(image).rounded().rows
        assert len(found) == len(expected) > 0
        assert np.allclose(found, expected, atol=(1, 1, 1, 1, 1e-4, 0))


def test_boxes_chosen_inside_the_model_are_scaled_and_thinned_out():
    predictor = Predictor(ChoosingBackend(), None, DEFAULTS)
    image = np.zeros((32, 96, 3), np.uint8)  # padded by 16 px above and below
    found = predictor.detect([predictor.prepare(image, predictor.thresholds(0.4, None))])[0]
    assert found.tolist() == [[0, 0, 48, 32, pytest.approx(0.9), 0], [10, 4, 30, 24, 0.5, 0]]
    record = {"xmin": 10.0, "ymin": 4.0, "xmax": 30.0, "ymax": 24.0, "confidence": 0.5, "class": 0, "name": "cat"}
    assert predictor.records(found)[1] == record


def test_thresholds_that_a_choosing_model_cannot_honour_are_refused():
    predictor = Predictor(ChoosingBackend(), None, DEFAULTS)
    assert predictor.lowest_conf == 0.2
    with pytest.raises(UserError, match="drops boxes below 0.2"):
        predictor.thresholds(0.1, None)
    with pytest.raises(UserError, match="inside this model, with IoU 0.5"):
        predictor.thresholds(None, 0.6)


def test_size_is_the_files_own_and_another_is_refused_where_it_is_fixed(exported):
    assert Predictor(ChoosingBackend(), None, DEFAULTS).shape_hw == [64, 96]
    with pytest.raises(UserError, match="--imgsz 64 96 alone"):
        Predictor(ChoosingBackend(), [64], DEFAULTS)
