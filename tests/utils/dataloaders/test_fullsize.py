"""Pictures in full size: the usual loader's pixels and labels, before anything is shrunk."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.dataloaders.config import load_spec
from utils.dataloaders.dataset import DetectionDataset
from utils.dataloaders.labels import load_labels
from utils.dataloaders.loader import create_loader, full_size_loader
from utils.errors import UserError
from utils.files import write_yaml
from utils.images import read_image

LABELS = ("1 0.25 0.5 0.5 0.25\n0 0.75 0.75 0.125 0.25\n", "", "0 0.5 0.5 1 1\n")


@pytest.fixture
def table(tmp_path):
    """Three pictures of different sizes, the first one turned by its EXIF orientation, the second without objects."""
    generator = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for index, (size_hw, lines) in enumerate(zip(((48, 64), (50, 31), (40, 120)), LABELS, strict=True)):
        exif = Image.Exif()
        exif[0x0112] = 1 if index else 6
        picture = Image.fromarray(generator.integers(0, 256, (*size_hw, 3), dtype=np.uint8))
        picture.save(tmp_path / "images" / f"{index}.jpg", exif=exif)
        (tmp_path / "labels" / f"{index}.txt").write_text(lines)
    file = tmp_path / "data.yaml"
    write_yaml(file, {"path": str(tmp_path), "train": "images", "val": "images", "names": ["a", "b"]})
    spec = load_spec(file)
    return load_labels(spec.val, spec, False, 1, "")


def test_every_picture_comes_alone_upright_in_its_own_size_with_its_labels(table):
    batches = list(full_size_loader(table, workers=0))
    assert [tuple(batch.images.shape) for batch in batches] == [(1, 3, 64, 48), (1, 3, 50, 31), (1, 3, 40, 120)]
    for index, batch in enumerate(batches):
        rgb = read_image(batch.paths[0])[:, :, ::-1]
        np.testing.assert_array_equal(batch.images[0].numpy(), rgb.transpose(2, 0, 1))
        assert batch.shapes == [(tuple(rgb.shape[:2]), (1.0, 1.0), (0.0, 0.0))]
        rows = [[0.0, *map(float, line.split())] for line in LABELS[index].splitlines()]
        np.testing.assert_array_equal(batch.targets, np.array(rows).reshape(-1, 6))


def test_labels_are_those_of_the_usual_loader(table):
    usual = create_loader(DetectionDataset(table, 128, augment=None, batch_size=1), 1, workers=0, shuffle=False)
    for full, boxed in zip(full_size_loader(table, workers=0), usual, strict=True):
        (height, width), (ratio_h, ratio_w), (pad_w, pad_h) = boxed.shapes[0]
        targets = boxed.targets.clone()
        targets[:, 2::2] = (targets[:, 2::2] * 128 - torch.tensor([pad_w, 0])) / ratio_w / width
        targets[:, 3::2] = (targets[:, 3::2] * 128 - torch.tensor([pad_h, 0])) / ratio_h / height
        torch.testing.assert_close(full.targets, targets, rtol=0, atol=2e-5)


def test_worker_processes_give_the_same(table):
    alone = list(full_size_loader(table, workers=0))
    loader = full_size_loader(table, workers=2).start()
    try:
        for ours, theirs in zip(alone, loader, strict=True):
            assert ours.paths == theirs.paths and ours.shapes == theirs.shapes
            assert torch.equal(ours.images, theirs.images) and torch.equal(ours.targets, theirs.targets)
    finally:
        loader.close()


def test_a_picture_that_is_gone_is_named(table, tmp_path):
    (tmp_path / "images" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"1\.jpg"):
        list(full_size_loader(table, workers=0))
