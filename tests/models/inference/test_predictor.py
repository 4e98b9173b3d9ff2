"""From images to boxes on any runtime: letterbox to the model's size, thresholds, suppression inside the model."""

from dataclasses import replace

import numpy as np
import pytest

from models.backends.base import ArrayBackend
from models.backends.metadata import Metadata
from models.inference.predictor import MAX_BATCH, Predictor
from utils.nms import NMSConfig
from utils.tiles import Tiling


class Fixed(ArrayBackend):
    """A runtime that answers every image with the same array."""

    device = "nowhere"

    def __init__(self, answer, **said):
        self.answer, self.batch, self.seen = np.array([answer], np.float32), 1, []
        self.metadata = replace(Metadata({0: "a", 1: "b"}, 32, (64, 96)), **said)
        self.dynamic = self.metadata.dynamic

    def run(self, inputs):
        self.seen.append(inputs.shape)
        return np.repeat(self.answer, len(inputs), 0)


INSIDE = NMSConfig(conf_thres=0.25, iou_thres=0.45, max_det=4, agnostic=False)
CHOSEN = [[10, 10, 30, 30, 0.9, 1], [40, 10, 60, 30, 0.5, 0], [70, 10, 90, 30, 0.3, 1], [0, 0, 0, 0, 0, 0]]


def found(backend, image_hw=(64, 96), **limits):
    return Predictor(backend, NMSConfig(**limits), [64, 96]).detect(np.zeros((*image_hw, 3), np.uint8)).rounded().rows


def test_detections_chosen_inside_lose_the_filling_and_go_back_to_the_image():
    detections = found(Fixed(CHOSEN, nms=INSIDE), image_hw=(128, 192))
    np.testing.assert_array_equal(detections[:, :4], np.array([row[:4] for row in CHOSEN[:3]]) * 2)
    np.testing.assert_allclose(detections[:, 4:], np.array([row[4:] for row in CHOSEN[:3]]))


@pytest.mark.parametrize(
    ("limits", "kept"),
    [({"conf_thres": 0.4}, [0.9, 0.5]), ({"classes": [1]}, [0.9, 0.3]), ({"max_det": 1}, [0.9]), ({"classes": []}, [])],
)
def test_detections_chosen_inside_can_be_narrowed(limits, kept):
    np.testing.assert_allclose(found(Fixed(CHOSEN, nms=INSIDE), **limits)[:, 4], kept)


def test_normalised_boxes_become_pixels():
    row = [0.5, 0.5, 0.25, 0.5, 1, 0.2, 0.8]  # x, y, w, h of 96x64
    np.testing.assert_allclose(found(Fixed([row], boxes_normalised=True))[0], [36, 16, 60, 48, 0.8, 1])


def test_images_are_padded_to_the_one_size_of_a_fixed_model_and_to_rectangles_else():
    for dynamic, expected in ((False, (1, 3, 64, 96)), (True, (1, 3, 64, 64))):
        backend = Fixed([[0.0] * 7], dynamic=dynamic)
        found(backend, image_hw=(60, 60))
        assert backend.seen == [expected]


def test_boxes_of_a_strip_whose_height_was_rounded_down_come_back_to_their_place():
    """129 x 1280 at 640 px is resized to 64 x 640, without padding: x is halved all the same."""
    backend = Fixed([[96, 32, 64, 32, 1, 1, 0]], dynamic=True)
    (detection,) = Predictor(backend, shape=640).detect(np.zeros((129, 1280, 3), np.uint8)).rounded().rows
    assert backend.seen == [(1, 3, 64, 640)]
    assert detection[:4].tolist() == [128, 32, 256, 97]  # 129 / 64 * 16 = 32.25, 96.75


def test_images_of_one_shape_share_a_batch_and_each_gets_its_own_detections():
    backend = Fixed([[48, 32, 20, 20, 1, 0.9, 0.1]], dynamic=True)
    backend.batch = None
    predictor = Predictor(backend, shape=[64, 96])
    images = [np.zeros((height, width, 3), np.uint8) for height, width in ((64, 96), (60, 60), (128, 192))]
    all_found = predictor([predictor.prepare(image) for image in images])
    assert backend.seen == [(2, 3, 64, 96), (1, 3, 64, 64)]
    for image, found in zip(images, all_found, strict=True):
        np.testing.assert_array_equal(found.rows, predictor.detect(image).rows)
    assert predictor.speed().startswith("Speed: ") and predictor.speed().endswith(" per image at shape (1, 3, 64, 96)")


def test_each_image_of_a_batch_is_searched_with_settings_of_its_own():
    rows = [[48, 32, 20, 20, 1, 0.9, 0.1], [50, 32, 20, 20, 1, 0.5, 0.1], [20, 32, 20, 20, 1, 0.1, 0.2]]
    wanted = [NMSConfig(0.3), NMSConfig(0.15), NMSConfig(0.3, 0.9), NMSConfig(0.15, classes=[1]), NMSConfig(0.15)]
    kept = [[0.9], [0.9, 0.2], [0.9, 0.5], [0.2], [0.9, 0.2]]
    chosen = [[10, 10, 30, 30, 0.9, 0], [40, 10, 60, 30, 0.2, 1], [0] * 6]
    narrowed = [[0.9], [0.9, 0.2], [0.9], [0.2], [0.9, 0.2]]
    for backend, expected in ((Fixed(rows), kept), (Fixed(chosen, nms=INSIDE), narrowed)):
        predictor = Predictor(backend, NMSConfig(1.0), [64, 96])
        images = [predictor.prepare(np.zeros((64, 96, 3), np.uint8))] * len(wanted)
        confidences = [found.confidences.tolist() for found in predictor(images, wanted)]
        assert confidences == [pytest.approx(values) for values in expected]
        assert [len(found) for found in predictor(images)] == [0] * len(wanted)


def test_a_large_image_is_run_in_batches_of_bounded_size_and_its_tiles_are_joined():
    backend = Fixed([[48, 32, 20, 20, 1, 0.9, 0.1]])  # in the middle of every window
    backend.batch = None
    predictor = Predictor(backend, shape=[64, 96], tiling=Tiling(64, 0.0))
    found = predictor.detect(np.zeros((320, 448, 3), np.uint8))
    assert [shape[0] for shape in backend.seen] == [MAX_BATCH, MAX_BATCH, 5 * 7 + 1 - 2 * MAX_BATCH]
    corners = found.rounded().boxes_xyxy
    centres = {tuple(row) for row in ((corners[:, :2] + corners[:, 2:]) / 2).tolist()}
    assert {(32 + 64 * x, 32 + 64 * y) for x in range(7) for y in range(5)} <= centres


@pytest.mark.parametrize(("agnostic", "confidences"), [(False, {1: 0.9, 0: 0.8}), (True, {1: 0.9})])
def test_agnostic_suppression_holds_between_tiles_too(agnostic, confidences):
    """Of two tiles that overlap the left one takes an object for class 1, the right one for class 0."""
    rows = [[70, 32, 20, 20, 1, 0.1, 0.9], [22, 32, 20, 20, 1, 0.8, 0.1], [0] * 7]  # the last: the whole image

    class InTurn(Fixed):
        def run(self, inputs):
            return np.float32([[rows.pop(0)]])

    predictor = Predictor(InTurn([[0] * 7]), NMSConfig(agnostic=agnostic), [64, 96], tiling=Tiling(96, 0.5))
    found = predictor.detect(np.zeros((64, 144, 3), np.uint8))
    assert not rows and dict(zip(found.classes, found.confidences, strict=True)) == pytest.approx(confidences)
    np.testing.assert_array_equal(found.rounded().boxes_xyxy, [[60, 22, 80, 42]] * len(confidences))


def test_layers_are_shown_for_each_image_of_a_batch():
    class Showing(Fixed):
        def infer(self, inputs, visualize=None, augment=False):
            visualize(7, "Conv", np.arange(len(inputs) * 2.0).reshape(-1, 2, 1, 1))
            return super().infer(inputs)

    seen = []
    predictor = Predictor(Showing([[0.0] * 7]), shape=[64, 96])
    images = [predictor.prepare(np.zeros((64, 96, 3), np.uint8))] * 2
    predictor(images, visualize=lambda *told: seen.append((*told[:3], told[3].ravel().tolist())))
    assert seen == [(0, 7, "Conv", [0, 1]), (1, 7, "Conv", [2, 3])]
