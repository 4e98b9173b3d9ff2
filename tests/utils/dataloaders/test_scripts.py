"""The data set and loader of training by YOLOv5's signatures, on the embedded shapes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from utils import datasets
from utils.dataloaders.config import load_spec
from utils.errors import UserError
from utils.general import scale_coords, xywhn2xyxy
from utils.train.hyp import Hyp

HYP = "data/hyps/hyp.scratch-low.yaml"


@pytest.fixture(scope="module")
def spec(tiny_shapes):
    return load_spec(tiny_shapes)


@pytest.fixture(scope="module")
def hyp():
    from utils.files import ROOT

    return Hyp.from_yaml(ROOT / HYP).to_dict()


def test_validation_batches_lead_back_to_the_originals(spec):
    """Labels taken from a batch to the original's pixels are those of the label file."""
    loader, dataset = datasets.create_dataloader(spec.val[0], 64, 4, 32, rect=True, pad=0.5, workers=0)
    assert len(loader) == 2 and dataset.n == len(dataset) == 8
    labels = {path: rows for path, rows in zip(dataset.im_files, dataset.labels, strict=True)}
    seen = 0
    for imgs, targets, paths, shapes in loader:
        assert imgs.dtype == torch.uint8 and imgs.shape[1] == 3 and targets.shape[1] == 6
        for number, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
            mine = targets[targets[:, 0] == number]
            height, width = imgs.shape[2:]
            boxes = scale_coords((height, width), xywhn2xyxy(mine[:, 2:], width, height), shape[0], shape[1])
            original = xywhn2xyxy(torch.from_numpy(labels[path][:, 1:].copy()), shape[0][1], shape[0][0])
            assert torch.allclose(boxes, original, atol=0.02 * max(shape[0]))
            seen += len(mine)
    assert seen == sum(map(len, labels.values())) > 0


def test_training_epochs_differ_and_come_again(spec, hyp):
    def first_epoch(loader):
        return [(imgs, targets) for imgs, targets, _, _ in loader]

    loader, dataset = datasets.create_dataloader(
        str(spec.train[0]), 64, 8, 32, hyp=hyp, augment=True, workers=0, shuffle=True, cache=True
    )
    first, second = first_epoch(loader), first_epoch(loader)
    assert not torch.equal(first[0][0], second[0][0]) and dataset.mosaic
    loader.sampler.set_epoch(0)
    assert torch.equal(first_epoch(loader)[0][0], first[0][0])
    loader.set_image_weights(np.eye(len(dataset))[3])
    assert {path for _, _, paths, _ in loader for path in paths} == {dataset.img_files[3]}


def test_items_by_index_serve_a_loader_of_torch(spec, hyp):
    dataset = datasets.LoadImagesAndLabels(spec.val, 64, 4, stride=32, single_cls=True)
    image, targets, path, shapes = dataset[2]
    assert image.shape == (3, 64, 64) and path == dataset.im_files[2] and shapes[0] == tuple(dataset.shapes[2][::-1])
    assert all((rows[:, 0] == 0).all() for rows in dataset.labels) and len(dataset.segments[2]) == len(targets)
    assert dataset.label_files[2] == path.replace("/images/", "/labels/").replace(".jpg", ".txt")
    batches = list(DataLoader(dataset, 4, collate_fn=dataset.collate_fn))
    assert len(batches) == 2 and batches[0][0].shape == (4, 3, 64, 64)
    assert sorted(set(batches[0][1][:, 0].tolist())) == [0, 1, 2, 3]
    infinite = datasets.InfiniteDataLoader(dataset, batch_size=8, collate_fn=dataset.collate_fn)
    assert len(next(iter(infinite))[2]) == 8 and not infinite.persistent_workers


def test_mosaics_can_be_switched_off(spec, hyp):
    dataset = datasets.LoadImagesAndLabels(spec.train[0], 64, 4, augment=True, hyp=hyp)
    assert dataset[0][3] is None
    dataset.mosaic = False
    assert dataset[0][3] is not None and len(dataset.labels[:3]) == 3
    assert len(np.concatenate(dataset.labels)) == len(dataset.table.rows)


def test_quad_joins_four_images(spec, hyp):
    loader, _ = datasets.create_dataloader(spec.train[0], 64, 8, 32, hyp=hyp, augment=True, workers=0, quad=True)
    imgs, _, paths, shapes = next(iter(loader))
    assert imgs.shape == (2, 3, 128, 128) and len(paths) == 2 and shapes == (None, None)


def test_processes_share_every_batch(spec, monkeypatch):
    """The halves of two processes, in their order, are what one process alone gets."""
    alone, _ = datasets.create_dataloader(spec.train[0], 64, 8, 32, workers=0, shuffle=True)
    whole = [paths for _, _, paths, _ in alone]
    barriers, halves = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: barriers.append(len(halves)))
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        loader, _ = datasets.create_dataloader(spec.train[0], 64, 4, 32, workers=0, shuffle=True, rank=rank)
        halves.append([paths for _, _, paths, _ in loader])
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    assert barriers == [0, 1]  # the first opens it once it has read the labels, the second waits before


def test_augmentation_needs_hyperparameters_and_ranks_a_group(spec):
    with pytest.raises(UserError, match="augment=True needs hyp"):
        datasets.create_dataloader(spec.train[0], 64, 8, 32, augment=True)
    with pytest.raises(UserError, match="init_process_group"):
        datasets.create_dataloader(spec.train[0], 64, 8, 32, rank=0)


def test_orientation_of_pillow_images():
    image = Image.new("RGB", (40, 20))
    image.getexif()[0x0112] = 6
    assert datasets.exif_size(image) == (20, 40) and datasets.exif_transpose(image).size == (20, 40)
