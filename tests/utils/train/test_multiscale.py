"""Sizes of `--multi-scale`."""

import torch

from utils.train.multiscale import rescaled


def test_sizes_span_half_to_one_and_a_half_in_strides_and_follow_seed_and_batch():
    images = torch.rand(1, 3, 64, 96)
    shapes = [tuple(rescaled(images, 96, 32, 0, iteration).shape[2:]) for iteration in range(60)]
    assert {width for _, width in shapes} == {32, 64, 96, 128, 160}  # 48 to 175 px, rounded down
    assert all(height % 32 == 0 and height <= width for height, width in shapes)
    assert shapes == [tuple(rescaled(images, 96, 32, 0, iteration).shape[2:]) for iteration in range(60)]
    assert shapes != [tuple(rescaled(images, 96, 32, 1, iteration).shape[2:]) for iteration in range(60)]
