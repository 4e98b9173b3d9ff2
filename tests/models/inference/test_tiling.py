"""Tiles in detection and validation: small objects are found, and where one tile is enough nothing changes."""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

import val
from models.backends import ArrayBackend, Metadata, load_backend
from models.inference.evaluation import make_loader
from models.inference.predictor import Predictor
from utils.boxes import xywhn2xyxy
from utils.dataloaders.config import load_spec
from utils.eval.evaluate import NMS, evaluate
from utils.files import read_yaml, write_yaml
from utils.images import read_image
from utils.metrics import match_detections
from utils.nms import NMSConfig
from utils.tiles import Tiling

CHECKPOINT = "yolov5n-v6-coco.pt"
GRID, CELL_PX, SEEN_PX = 4, 320, 320  # the mosaic's images, and the size that the model sees


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_backend(golden_dir / CHECKPOINT, "cpu")


@pytest.fixture(scope="module")
def coco(datasets_dir):
    """The first sixteen images of coco128 by their paths, their labels (n, 5) normalised, and the classes' names."""
    root, files = datasets_dir / "coco128", {}
    for file in sorted((root / "images" / "train2017").glob("*.jpg"))[: GRID * GRID]:
        rows = (root / "labels" / "train2017" / f"{file.stem}.txt").read_text().split()
        files[file] = np.array(rows, np.float64).reshape(-1, 5)
    return files, read_yaml(root / "coco128.yaml")["names"]


@pytest.fixture(scope="module")
def few(coco, tmp_path_factory):
    """A data set of six images as they are."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "val.txt").write_text("\n".join(map(str, list(coco[0])[:6])))
    write_yaml(folder / "set.yaml", {"path": str(folder), "train": "val.txt", "val": "val.txt", "names": coco[1]})
    return folder / "set.yaml"


class Mosaic(NamedTuple):
    """One large image made of sixteen, each at half its size."""

    data: Path
    image: np.ndarray  # uint8 (h, w, 3) BGR
    labels: np.ndarray  # (n, 5) class, x1, y1, x2, y2 in px

    def objects_found(self, detections) -> int:
        return match_detections(detections, self.labels)[:, 0].sum()


@pytest.fixture(scope="module")
def mosaic(coco, tmp_path_factory):
    side = GRID * CELL_PX
    canvas, rows = np.full((side, side, 3), 114, np.uint8), []
    for cell, (file, labels) in enumerate(coco[0].items()):
        image = read_image(file)
        scale = CELL_PX / max(image.shape)
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        height, width = small.shape[:2]
        top, left = (CELL_PX * place for place in divmod(cell, GRID))
        canvas[top : top + height, left : left + width] = small
        shift, size = np.array([left, top, 0, 0]), np.array([width, height, width, height])
        rows.append(np.concatenate((labels[:, :1], (labels[:, 1:] * size + shift) / side), 1))
    rows = np.concatenate(rows)
    folder = tmp_path_factory.mktemp("mosaic")
    cv2.imwrite(str(folder / "large.png"), canvas)
    np.savetxt(folder / "large.txt", rows, ["%d", *["%.7f"] * 4])
    write_yaml(folder / "set.yaml", {"path": str(folder), "train": ".", "val": ".", "names": coco[1]})
    return Mosaic(folder / "set.yaml", canvas, np.concatenate((rows[:, :1], xywhn2xyxy(rows[:, 1:], side, side)), 1))


def test_detection_in_tiles_finds_small_objects_that_the_plain_look_misses(golden, mosaic):
    plain = Predictor(golden, shape=SEEN_PX).detect(mosaic.image).rows
    tiled = Predictor(golden, shape=SEEN_PX, tiling=Tiling(SEEN_PX)).detect(mosaic.image).rows
    assert mosaic.objects_found(tiled) > 2 * mosaic.objects_found(plain) > 0


def test_validation_in_tiles_finds_them_too_and_writes_what_it_finds(mosaic, golden_dir, tmp_path):
    options = {"weights": str(golden_dir / CHECKPOINT), "data": str(mosaic.data), "imgsz": SEEN_PX, "workers": 0}
    options.update(device="cpu", project=str(tmp_path), exist_ok=True)
    plain, *_ = val.run(plots=False, **options)
    tiled, maps, speed = val.run(tile=SEEN_PX, save_txt=True, save_conf=True, save_json=True, **options)
    for index in range(1, 4):  # recall, mAP50, mAP50-95
        assert tiled[index] > 1.5 * plain[index]
    assert maps.shape == (80,) and all(value >= 0 for value in speed)
    lines = np.loadtxt(tmp_path / "exp" / "labels" / "large.txt")
    assert lines.shape[1] == 6 and ((lines[:, 1:] >= 0) & (lines[:, 1:] <= 1)).all()
    written = {file.name for file in (tmp_path / "exp").iterdir()}
    assert {"val_batch0_pred.jpg", "PR_curve.png", "yolov5n-v6-coco_predictions.json"} <= written
    detections = np.concatenate((xywhn2xyxy(lines[:, 1:5], *mosaic.image.shape[1::-1]), lines[:, [5, 0]]), 1)
    assert mosaic.objects_found(detections) > 0.4 * len(mosaic.labels)


@pytest.mark.parametrize("shape", [160, (128, 192)])
def test_a_tile_larger_than_every_image_gives_plain_validation_s_figures(golden, few, shape):
    spec = load_spec(few)
    plain_loader = make_loader(spec, shape, 32, batch_size=1, workers=0)
    plain = evaluate(Predictor(golden, NMS), plain_loader, names=spec.names, quiet=True)
    predictor = Predictor(golden, NMS, shape, tiling=Tiling(2000), val_pad=0.5)
    tiled = evaluate(predictor, make_loader(spec, None, 32, workers=0), names=spec.names, quiet=True)
    assert plain.map > 0.1
    np.testing.assert_allclose(tiled.as_tuple(), plain.as_tuple(), atol=1e-9)
    np.testing.assert_allclose(tiled.maps, plain.maps, atol=1e-9)


@pytest.mark.parametrize(("shape", "pad"), [(160, 0.5), (1280, 0.0), ((128, 192), 0.5)])
def test_the_model_sees_the_pixels_that_plain_validation_shows_it(golden, few, shape, pad):
    spec = load_spec(few)
    loader = make_loader(spec, shape, 32, batch_size=1, workers=0, pad=pad)
    usual = {batch.paths[0]: batch for batch in loader}
    for batch in make_loader(spec, None, 32, workers=0):
        (image,) = batch.images.numpy()
        predictor = Predictor(golden, NMS, shape, tiling=Tiling(2000), val_pad=pad)
        (window,) = predictor.prepare(image.transpose(1, 2, 0), rgb=True)
        np.testing.assert_array_equal(window.inputs, usual[batch.paths[0]].images[0])
        original_hw, ratio_pad = usual[batch.paths[0]].shapes[0]
        assert (window.xyxy[2:][::-1], window.ratio_pad) == (tuple(original_hw), tuple(ratio_pad))


class Scripted(ArrayBackend):
    """A model that has chosen its detections: the same ones in every window, then zeros."""

    device, batch, dynamic, stride = "nowhere", None, True, 32

    def __init__(self, *rows, nms=NMS):
        self.rows, self.seen = np.array([*rows, [0] * len(rows[0])], np.float32), []
        self.metadata = Metadata({}, 32, (64, 64), nms=nms)

    def run(self, inputs):
        self.seen.append(inputs.shape)
        found = np.repeat(self.rows[None], len(inputs), 0)
        found.flags.writeable = False  # as some runtimes give it
        return found


def test_windows_are_run_in_batches_of_one_shape_and_bounded_size_and_shifted_to_their_place():
    # Tiles of 64 px at 0, 50 and 100 px; the model sees them at twice their size.
    model = Scripted([40, 20, 80, 60, 0.9, 1], [100, 20, 110, 60, 0.05, 1])
    tiled = Predictor(model, NMSConfig(0.1), (128, 128), tiling=Tiling(64, 0.2), val_pad=0.5, max_batch=3)
    (found,) = tiled.predict(np.zeros((1, 3, 64, 164), np.uint8))
    assert model.seen == [(3, 3, 128, 128), (1, 3, 128, 128)]
    # The whole image is scaled to 128 x 50 px with 39 px of grey above: rows 20 to 60 are its upper 21 px.
    whole = [40 * 164 / 128, 0, 80 * 164 / 128, 21 * 64 / 50, 0.9, 1]
    expected = [[left + 20, 10, left + 40, 30, 0.9, 1] for left in (0, 50, 100)]
    np.testing.assert_allclose(sorted(found.tolist()), sorted([*expected, whole]), atol=0.01)


def test_windows_of_several_shapes_stay_with_their_places():
    """Tiles of 64 px between wholes of 64 x 160 px: the model sees rectangles of two shapes."""
    model = Scripted([10, 10, 50, 50, 0.9, 1])
    found = Predictor(model, NMSConfig(0.1), 64, tiling=Tiling(64, 0.2)).detect(np.zeros((64, 160, 3), np.uint8))
    assert model.seen == [(3, 3, 64, 64), (1, 3, 32, 64)]
    assert {10, 58, 106} <= set(found.boxes_xyxy[:, 0].round().tolist())


def test_one_class_is_suppressed_across_classes_and_the_number_of_detections_limited():
    model = Scripted([10, 10, 50, 50, 0.9, 1], [11, 10, 51, 50, 0.8, 0], [70, 10, 90, 50, 0.7, 0])
    for agnostic, max_det, classes in ((False, 300, {0, 1}), (True, 2, {1}), (False, 1, {1})):
        nms = NMSConfig(0.001, 0.6, max_det, agnostic)
        tiled = Predictor(model, nms, 64, tiling=Tiling(64, 0.2), val_pad=0.5)
        (found,) = tiled.predict(np.zeros((1, 3, 64, 160), np.uint8))
        assert set(found[:, 5].tolist()) == classes and len(found) <= max_det


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(64, 96), 64])
def test_raw_rows_are_suppressed_with_every_class_above_the_threshold(shape):
    model = Scripted([32, 32, 20, 20, 0.9, 0.8, 0.7], nms=None)
    tiled = Predictor(model, NMS, shape, tiling=Tiling(64), val_pad=0.5)
    (found,) = tiled.predict(np.zeros((1, 3, 64, 64), np.uint8))
    np.testing.assert_allclose(found[:, 4:], [[0.72, 0], [0.63, 1]], rtol=1e-6)
