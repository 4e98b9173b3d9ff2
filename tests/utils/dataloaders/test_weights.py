"""Class and image weights by hand."""

import numpy as np
import pytest

from utils.dataloaders.sampling import class_weights, image_weights


def test_class_weights_are_inverse_counts_that_sum_to_nc():
    """Counts 4, 1 and none (taken as 1): inverses 1/4, 1, 1, times 3 / 2.25."""
    weights = class_weights(np.array([0, 0, 1, 0, 0], np.float32), nc=3)
    assert weights == pytest.approx([1 / 3, 4 / 3, 4 / 3])


def test_image_weights_add_up_their_labels():
    """Class weights 1 and 2, mAP 0.5 and 0: labels weigh 1 * 0.25 / 2 and 2 * 1 / 2."""
    classes, offsets = np.array([0, 1, 1, 0], np.float32), np.array([0, 2, 2, 4])
    weights = image_weights(classes, offsets, np.array([1.0, 2.0]), np.array([0.5, 0.0]))
    assert weights == pytest.approx([1.125, 0.0, 1.125])


def test_trailing_images_without_labels_weigh_nothing():
    weights = image_weights(np.array([0.0]), np.array([0, 1, 1, 1]), np.array([1.0]), np.zeros(1))
    assert weights.tolist() == [1.0, 0.0, 0.0]


def test_where_nothing_has_weight_all_are_alike():
    assert image_weights(np.zeros(0), np.array([0, 0, 0]), np.array([1.0]), np.zeros(1)).tolist() == [1.0, 1.0]
    assert image_weights(np.zeros(1), np.array([0, 1, 1]), np.array([1.0]), np.ones(1)).tolist() == [1.0, 1.0]
