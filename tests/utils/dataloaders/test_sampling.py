"""Generators from keys, epoch orders, where partners come from, and class and image weights by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.dataloaders.images_cache import RecentImages
from utils.dataloaders.sampling import (
    MAX_LANES,
    MosaicSampler,
    Shard,
    Stream,
    class_weights,
    epoch_order,
    image_weights,
    keyed_generator,
)


def test_generators_depend_on_every_part_of_their_key():
    keys = [(Stream.SAMPLE, 0, 0, 0), (Stream.SAMPLE, 0, 0, 1), (Stream.SAMPLE, 0, 1, 0), (Stream.SAMPLE, 1, 0, 0)]
    keys += [(Stream.QUAD, 0, 0, 0), (Stream.ORDER, 0, 0)]
    draws = [keyed_generator(*key).integers(2**62) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [keyed_generator(*key).integers(2**62) for key in keys]


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    first, second, other_seed = epoch_order(500, 0, 0), epoch_order(500, 0, 1), epoch_order(500, 1, 0)
    assert sorted(first) == list(range(500)) == sorted(second)
    assert not np.array_equal(first, second) and not np.array_equal(first, other_seed)
    assert np.array_equal(first, epoch_order(500, 0, 0))


def test_weights_set_how_often_an_image_comes():
    weights = np.array([0.0, 1.0, 3.0] * 1000)
    drawn = np.bincount(epoch_order(3000, 0, 4, weights), minlength=3000).reshape(-1, 3).sum(axis=0)
    assert drawn[0] == 0
    assert abs(drawn[2] / drawn[1] - 3) < 0.4
    assert len(np.unique(epoch_order(3000, 0, 4, np.zeros(3000)))) > 1500  # all alike: about 63 % of the images


def test_small_sets_draw_partners_from_the_whole_epoch():
    plan = MosaicSampler.for_images(205, 16, 320)
    assert (plan.lanes, plan.window) == (1, 205)
    drawn = plan.draw(100, 20_000, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=205)
    assert counts.min() > 50 and counts.max() < 160  # 97.6 expected


@pytest.mark.parametrize(("count", "lanes"), [(325, 1), (326, 2), (651, 2), (652, 4), (1304, 8), (118_287, 8)])
def test_lanes_begin_where_two_windows_fit(count, lanes):
    plan = MosaicSampler.for_images(count, 16, 640)
    assert plan.lanes == lanes and plan.window == (count if lanes == 1 else 163)


@pytest.mark.parametrize("count", [2000, 2003, 2017])
def test_partners_stay_in_the_lane_and_near(count):
    plan = MosaicSampler(count, batch_size=16, lanes=8, window=64)
    lanes_rows = {}  # positions of each lane, in order
    for position in range(count):
        lanes_rows.setdefault(position // 16 % 8, []).append(position)
    generator = np.random.default_rng(0)
    seen = set()
    for position in range(count):
        lane = lanes_rows[position // 16 % 8]
        here = lane.index(position)
        start = min(max(here - 32, 0), len(lane) - 64)
        drawn = plan.draw(position, 8, generator)
        assert set(drawn.tolist()) <= set(lane[start : start + 64])
        seen |= set(drawn.tolist())
    assert len(seen) > 0.98 * count


class Decoder:
    def __init__(self):
        self.decoded, self.image = 0, np.zeros((480, 640, 3), np.uint8)

    def read(self, index):
        self.decoded += 1
        return self.image


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_each_image_is_decoded_about_once_an_epoch(workers):
    count, batch_size, imgsz = 2000, 16, 640
    plan = MosaicSampler.for_images(count, batch_size, imgsz)
    assert plan.lanes == MAX_LANES
    decoder = Decoder()
    for worker in range(workers):
        recent, generator = RecentImages(decoder, plan.recent_bytes(workers, imgsz)), np.random.default_rng(worker)
        for batch in range(worker, -(-count // batch_size), workers):
            for position in range(batch * batch_size, min((batch + 1) * batch_size, count)):
                for each in [position, *plan.draw(position, 3, generator).tolist()]:
                    recent.read(each)
    assert decoder.decoded / count < 1.15


def test_memory_for_decoded_images_is_bounded():
    plan = MosaicSampler.for_images(118_287, 16, 1280)
    totals = [workers * plan.recent_bytes(workers, 1280) for workers in (1, 2, 3, 5, 8, 12)]
    assert max(totals) <= 1536 * 2**20


@given(count=st.integers(1, 70), size=st.integers(1, 9), unit=st.sampled_from([1, 4]))
def test_shares_of_a_batch_cover_it_once_evenly_and_in_whole_groups(count, size, unit):
    parts = [Shard(rank, size).of(count, unit) for rank in range(size)]
    own = [part for part in parts if part.own]
    assert [place for part in own for place in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % unit == 0 for part in parts)
    groups = [-(-(part.stop - part.start) // unit) for part in own]
    assert max(groups) - min(groups) <= 1 and groups == sorted(groups, reverse=True)
    assert parts[0].own and len(own) == min(size, -(-count // unit))
    stand_ins = [part for part in parts if not part.own]
    assert all(0 <= part.start < part.stop <= min(part.start + unit, count) for part in stand_ins)


def test_shares_by_hand():
    assert [tuple(Shard(rank, 2).of(16)) for rank in range(2)] == [(0, 8, True), (8, 16, True)]
    assert [tuple(Shard(rank, 2).of(5)) for rank in range(2)] == [(0, 3, True), (3, 5, True)]
    assert [tuple(Shard(rank, 3).of(2)) for rank in range(3)] == [(0, 1, True), (1, 2, True), (0, 1, False)]
    assert [tuple(Shard(rank, 2).of(6, unit=4)) for rank in range(2)] == [(0, 4, True), (4, 6, True)]
    assert tuple(Shard().of(7)) == (0, 7, True)


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
