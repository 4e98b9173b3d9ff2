"""Sizes far from the usual: very many boxes in an image, very large and very long images, very many classes.

Each works, with the boxes in their places, or is refused with the reason; none may take 3 GB of memory.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch

import detect
import train
import val
from models.yolo import Model
from utils.boxes import scale_boxes, xywh2xyxy, xywhn2xyxy, xyxy2xywh
from utils.dataloaders.dataset import LoadImagesAndLabels
from utils.dataloaders.labels import LabelTable, load_labels, read_label_file
from utils.dataloaders.loader import create_dataloader
from utils.eval.report import table_rows
from utils.files import ROOT
from utils.loss import ComputeLoss
from utils.metrics import ConfusionMatrix, ap_per_class, match_detections
from utils.train.hyp import Hyp

MAX_BYTES = 3 << 30
GRID = 100  # boxes along each side of the crowded image
PEAK_CONTROL = Path("/proc/self/clear_refs")


@pytest.fixture(autouse=True)
def _within_memory(one_thread):
    """Fails where the process grows by 3 GB or more meanwhile; only Linux can tell."""
    try:
        PEAK_CONTROL.write_text("5")  # forget the former peak
    except OSError:
        yield
        return
    before = kilobytes("VmRSS")
    yield
    assert (kilobytes("VmHWM") - before) * 1024 < MAX_BYTES


def kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def recipe() -> Hyp:
    return Hyp.from_yaml(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")


def step(nc: int, images: torch.Tensor, targets: torch.Tensor):
    """Takes one training step's forward and backward pass; returns the loss and the model."""
    torch.manual_seed(0)
    model = Model("yolov5n-slimneck.yaml", nc=nc).train()
    model.hyp = ComputeLoss.scaled(recipe(), model.head, images.shape[2]).to_dict()
    loss = ComputeLoss(model).compute(model(images.float() / 255), targets)
    loss.total.backward()
    return loss, model


# Very many boxes


def write_set(folder: Path, images: dict[str, np.ndarray], labels: dict[str, str], names: list[str]) -> Path:
    """Writes images with labels and a YAML that takes them for training and validation; returns the YAML."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for name, image in images.items():
        cv2.imwrite(str(folder / "images" / name), image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    for name, text in labels.items():
        (folder / "labels" / name).with_suffix(".txt").write_text(text)
    (folder / "set.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames: {names}\n")
    return folder / "set.yaml"


def crowd() -> np.ndarray:
    """Returns 10,000 labels [class, x, y, w, h] that fill the image."""
    centres = (np.arange(GRID) + 0.5) / GRID
    y, x = (axis.ravel() for axis in np.meshgrid(centres, centres, indexing="ij"))
    return np.column_stack([np.arange(GRID**2) % 2, x, y, np.full_like(x, 0.01), np.full_like(y, 0.01)])


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> Path:
    """A data set's YAML: one image of 640x640 px with 10,000 boxes, and a second with none."""
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3)).astype(np.uint8)
    text = "".join(f"{int(row[0])} {row[1]:.4f} {row[2]:.4f} {row[3]} {row[4]}\n" for row in crowd())
    images = {"crowd.png": noise, "empty.png": noise[::-1]}
    return write_set(tmp_path_factory.mktemp("crowd"), images, {"crowd": text, "empty": ""}, ["a", "b"])


@pytest.fixture
def crowd_table(crowded) -> LabelTable:
    return load_labels([crowded.parent / "images"])


def test_ten_thousand_boxes_are_read_and_none_is_lost(crowd_table):
    np.testing.assert_allclose(crowd_table.labels(0), crowd(), atol=1e-6)
    assert crowd_table.counts == (2, 0, 1, 0, 2) and not crowd_table.messages


@pytest.mark.parametrize("augment", [False, True], ids=["validation", "training"])
def test_ten_thousand_boxes_come_in_a_batch_where_they_belong(crowd_table, augment):
    (batch,), _ = create_dataloader(crowd_table, 640, 2, 32, hyp={}, augment=augment, workers=0)
    assert batch.images.shape == (2, 3, 640, 640) and batch.targets[:, 0].unique().tolist() == [0]
    np.testing.assert_allclose(batch.targets[:, 1:], crowd(), atol=1e-5)


def test_a_mosaic_of_crowded_images_trains(crowd_table):
    table = crowd_table.subset([0, 0, 0, 0])
    loader, _ = create_dataloader(table, 640, 1, 32, hyp=recipe(), augment=True, workers=0, shuffle=True)
    images, targets, _, _ = next(iter(loader))
    assert len(targets) > 5000 and (targets[:, 2:] >= 0).all() and (targets[:, 2:] <= 1).all()
    loss, model = step(2, images, targets)
    assert torch.isfinite(loss.items).all() and loss.labels == len(targets)
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)
    _, alone = step(2, images, targets[:0])
    assert not torch.equal(model.head.m[0].weight.grad, alone.head.m[0].weight.grad)  # the boxes were learnt from


def test_ten_thousand_boxes_are_scored():
    labels = crowd()
    labels[:, 1:] = xywh2xyxy(labels[:, 1:] * 640)
    found = labels[:600:2]  # as many as --max-det lets through, all of class 0
    detections = np.column_stack([found[:, 1:], np.linspace(0.9, 0.5, len(found)), found[:, 0]])
    right = match_detections(detections, labels)
    assert right.shape == (300, 10) and right.all()
    figures = ap_per_class(right, detections[:, 4], detections[:, 5], labels[:, 0])
    assert (figures.label_counts == [5000, 5000]).all()
    confusion = ConfusionMatrix(2)
    confusion.process_batch(detections, labels)
    assert confusion.matrix.tolist() == [[300, 0, 0], [0, 0, 0], [4700, 5000, 0]]


def test_val_counts_ten_thousand_boxes(crowded, command, more_weights, tmp_path):
    weights = more_weights(tmp_path / "two.pt", {0: "a", 1: "b"})
    line = ["--data", crowded, "--weights", weights, "--img", 64, "--workers", 0, "--device", "cpu", "--noplots"]
    outcome = command(val, *line, "--project", tmp_path / "runs")
    assert outcome.status == 0, outcome.said
    assert f"{'all':>20}{2:11}{10_000:11}" in outcome.said and f"{'b':>20}{2:11}{5000:11}" in outcome.said


# Very large and very long images


class Odd(NamedTuple):
    """An image of blocks: dark ones, and white ones that are the object."""

    width: int
    height: int
    scan: str = ""  # why training and validation leave it out
    detect: str = ""  # why detection does

    @property
    def object_xyxy_norm(self) -> np.ndarray:
        """Where the object is, (4,): all across a strip."""
        left, right = (3 / 12, 9 / 12) if self.width > 100 else (0, 1)
        top, bottom = (3 / 12, 6 / 12) if self.height > 100 else (0, 1)
        return np.array([left, top, right, bottom])

    def draw(self, scale: int = 1) -> np.ndarray:
        """Returns the image, uint8 (h, w), its sides divided by `scale`."""
        rows, columns = (12 if side > 100 else 1 for side in (self.height, self.width))
        blocks = np.random.default_rng(3).integers(0, 90, (rows, columns)).astype(np.uint8)
        blocks = np.broadcast_to(blocks, (12, 12)).copy()
        left, top, right, bottom = (12 * self.object_xyxy_norm).astype(int)
        blocks[top:bottom, left:right] = 255
        size = (self.width // scale, self.height // scale)
        return cv2.resize(blocks, size, interpolation=cv2.INTER_NEAREST)

    @property
    def label(self) -> str:
        """The object's label."""
        (row,) = xyxy2xywh(self.object_xyxy_norm[None])
        return " ".join(map(str, [0, *row])) + "\n"


BEYOND, THIN = "px; sides beyond 200:1 cannot be used", "px; sides under 10 px cannot be used"
ODD = {
    "high.png": Odd(1, 20_000, f"is 1x20000 {THIN}", f"is 1x20000 {BEYOND}"),
    "wide.png": Odd(20_000, 1, f"is 20000x1 {THIN}", f"is 20000x1 {BEYOND}"),
    "large.png": Odd(12_000, 12_000),
    "long.png": Odd(12_000, 60),
    "tower.png": Odd(60, 12_000),
    "longer.png": Odd(12_060, 60, f"is 12060x60 {BEYOND}", f"is 12060x60 {BEYOND}"),
}
USED = [name for name, odd in ODD.items() if not odd.scan]


@pytest.fixture(scope="module")
def odd_set(tmp_path_factory) -> Path:
    """A data set's YAML with one image of each odd size."""
    folder = tmp_path_factory.mktemp("odd")
    images = {name: odd.draw() for name, odd in ODD.items()}
    return write_set(folder, images, {name: odd.label for name, odd in ODD.items()}, ["a", "b"])


@pytest.fixture
def odd_table(odd_set) -> LabelTable:
    return load_labels([odd_set.parent / "images"])


def test_odd_sizes_are_taken_or_left_out_with_the_reason(odd_table, odd_set):
    assert sorted(Path(path).name for path in odd_table.image_paths) == sorted(USED)
    reasons = {Path(message.partition(": ")[0]).name: message for message in odd_table.messages}
    assert set(reasons) == set(ODD) - set(USED)
    assert all(message.endswith(f"image left out: it {ODD[name].scan}") for name, message in reasons.items())
    assert {tuple(size) for size in odd_table.sizes_wh.tolist()} == {ODD[name][:2] for name in USED}


@pytest.mark.parametrize("augment", [False, True], ids=["validation", "training"])
@pytest.mark.parametrize("name", USED)
def test_boxes_of_odd_sizes_frame_what_they_did(odd_table, name, augment):
    """The box lies around the white pixels of the small image, and leads back to the label's own pixels."""
    names = [Path(path).name for path in odd_table.image_paths]
    table = odd_table.subset([names.index(name)])
    item = LoadImagesAndLabels(table, 512, augment=augment, hyp={}, rect=not augment)[0]
    height, width = item.image.shape[1:]
    (box_xyxy,) = xywhn2xyxy(item.targets[:, 2:].numpy(), w=width, h=height)
    rows, columns = np.nonzero(item.image[0].numpy() > 128 + 60)
    seen_xyxy = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(box_xyxy - seen_xyxy).max() <= 1.5
    if not augment:
        odd, (image_hw, ratio_pad) = ODD[name], item.shapes
        assert image_hw == (odd.height, odd.width)
        expected = xywhn2xyxy(table.labels(0)[:, 1:], w=odd.width, h=odd.height)
        back = scale_boxes((height, width), box_xyxy[None].copy(), image_hw, ratio_pad)
        np.testing.assert_allclose(back, expected, atol=0.5)


def test_val_uses_them_and_names_the_others(odd_set, command, weights, tmp_path):
    line = ["--weights", weights, "--data", odd_set, "--img", 64, "--workers", 0, "--device", "cpu", "--noplots"]
    outcome = command(val, *line, "--project", tmp_path)
    assert outcome.status == 0, outcome.said
    assert f"{'all':>20}{len(USED):11}{len(USED):11}" in outcome.said and "3 corrupt" in outcome.said
    assert all(f"{odd_set.parent / 'images' / name}: image left out" in outcome.said for name in set(ODD) - set(USED))


@pytest.mark.slow
def test_detection_finds_the_same_in_large_images_as_in_small_ones(odd_set, command, weights, tmp_path):
    small = {name: ODD[name].draw(scale=10) for name in USED}
    write_set(tmp_path / "small", small, {}, [])
    outcomes = {}
    for name, folder in {"small": tmp_path / "small", "odd": odd_set.parent}.items():
        line = ["--source", folder / "images", "--project", tmp_path / "runs", "--name", name, "--img", 64]
        line += ["--weights", weights, "--device", "cpu", "--nosave", "--save-txt", "--max-det", 5]
        outcomes[name] = command(detect, *line)
    assert outcomes["small"].status == 0 and outcomes["odd"].status == 1
    assert "3 damaged inputs were skipped, all others are done" in outcomes["odd"].said
    assert all(f"images/{name}: {odd.detect}" in outcomes["odd"].said for name, odd in ODD.items() if odd.detect)
    for name, image in small.items():
        labels = [(tmp_path / "runs" / run / "labels" / name).with_suffix(".txt") for run in outcomes]
        expected, found = (read_label_file(path).rows for path in labels)
        assert 0 < len(expected) == len(found) and expected[:, 0].tolist() == found[:, 0].tolist()
        pixel = 1.01 / np.tile(image.shape[::-1], 2)  # boxes are in whole pixels
        assert (np.abs(expected - found)[:, 1:] <= pixel).all()


# Very many classes

CLASSES = 2000


def test_two_thousand_classes_take_a_training_step():
    torch.manual_seed(1)
    classes = torch.arange(0, CLASSES, 20)
    targets = torch.cat([torch.zeros(100, 1), classes[:, None], torch.rand(100, 2), torch.full((100, 2), 0.3)], 1)
    loss, model = step(CLASSES, torch.randint(0, 256, (2, 3, 64, 64)), targets)
    assert torch.isfinite(loss.items).all() and loss.items[2] > 0
    grads = model.head.m[0].bias.grad.view(3, -1)[:, 5:].sum(0)
    assert grads.shape == (CLASSES,) and set(torch.argsort(grads)[:50].tolist()) <= set(classes.tolist())


def test_two_thousand_classes_are_counted():
    labels = np.column_stack([np.arange(CLASSES), *[np.full(CLASSES, side) for side in (0, 0, 9, 9)]]).astype(float)
    confusion, parts = ConfusionMatrix(CLASSES), []
    for label in labels:
        detections = np.array([[*label[1:], 0.9, (label[0] + 1) % CLASSES if label[0] % 2 else label[0]]])
        confusion.process_batch(detections, label[None])
        parts.append((match_detections(detections, label[None]), detections[:, 4], detections[:, 5], label[:1]))
    assert confusion.matrix.shape == (CLASSES + 1, CLASSES + 1) and confusion.matrix.sum() == CLASSES
    assert np.trace(confusion.matrix) == CLASSES / 2 and confusion.matrix[2, 1] == 1
    figures = ap_per_class(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    rows = table_rows(figures, {number: f"class {number}" for number in range(CLASSES)}, CLASSES, per_class=True)
    assert len(rows) == CLASSES + 1 and rows[-1].split()[:4] == ["class", "1999", "2000", "1"]


@pytest.mark.slow
def test_two_thousand_classes_from_training_to_the_confusion_matrix(command, tiny_cfg, tmp_path):
    noise = np.random.default_rng(2).integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    labels = {f"{n}.png": f"{n * 250} 0.5 0.5 0.5 0.5\n{n * 250 + 7} 0.3 0.3 0.2 0.2\n" for n in range(8)}
    names = [f"class {number}" for number in range(CLASSES)]
    data = write_set(tmp_path / "many", dict(zip(labels, noise, strict=True)), labels, names)
    shared = ["--data", data, "--img", 64, "--workers", 0, "--device", "cpu", "--project", tmp_path / "runs"]
    training = ["--cfg", tiny_cfg, "--epochs", 1, "--batch-size", 4, "--amp", "off", "--noplots"]
    outcome = command(train, *shared, *training, "--name", "train")
    assert outcome.status == 0, outcome.said
    assert f"{'all':>20}{8:11}{16:11}" in outcome.said
    weights = tmp_path / "runs" / "train" / "weights" / "last.pt"
    outcome = command(val, *shared, "--weights", weights, "--verbose", "--name", "val")
    assert outcome.status == 0, outcome.said
    assert all(f"{f'class {n * 250 + 7}':>20}{8:11}{1:11}" in outcome.said for n in range(8))
    matrix = cv2.imread(str(tmp_path / "runs" / "val" / "confusion_matrix.png"))
    assert min(matrix.shape[:2]) > 1000 and (matrix[..., 0] > matrix[..., 2] + 60).any()  # shares are blue
