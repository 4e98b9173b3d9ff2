"""Sizes of `--multi-scale`."""

import torch

from utils.train.prepare import largest_side, rescaled


def test_sizes_span_half_to_one_and_a_half_in_strides_and_follow_seed_and_batch():
    images = torch.rand(1, 3, 64, 96)
    shapes = [tuple(rescaled(images, 96, 32, 0, iteration).shape[2:]) for iteration in range(60)]
    assert {width for _, width in shapes} == {64, 96, 128, 160}  # 48 to 175 px, rounded down, but at least two strides
    assert largest_side(96, 32) == 160
    assert all(height % 32 == 0 and height <= width for height, width in shapes)
    assert shapes == [tuple(rescaled(images, 96, 32, 0, iteration).shape[2:]) for iteration in range(60)]
    assert shapes != [tuple(rescaled(images, 96, 32, 1, iteration).shape[2:]) for iteration in range(60)]


def test_a_batch_of_one_image_keeps_two_cells_at_the_smallest_size():
    """As of the last batch of 17 images: batch norm has no variance of a single value."""
    for height in (32, 64):
        for iteration in range(20):
            cells = torch.nn.Conv2d(3, 1, 32, 32)(rescaled(torch.rand(1, 3, height, 64), 64, 32, 0, iteration))
            assert torch.nn.BatchNorm2d(1)(cells).isfinite().all()
