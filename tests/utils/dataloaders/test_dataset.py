"""Items: letterboxed labels by hand, rectangular shapes, one item whatever is cached."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from utils.boxes import xywh2xyxy
from utils.dataloaders.dataset import LoadImagesAndLabels, rectangular_batches
from utils.dataloaders.loader import InfiniteDataLoader
from utils.dataloaders.sampling import MosaicSampler, SampleKey

FULL = dict(
    hsv_h=0.015,
    hsv_s=0.7,
    hsv_v=0.4,
    degrees=10.0,
    translate=0.1,
    scale=0.5,
    shear=2.0,
    perspective=0.0002,
    flipud=0.3,
    fliplr=0.5,
    mosaic=0.8,
    mixup=0.3,
    copy_paste=0.5,
    mosaic9=0.3,
)


def training(table, img_size=64, hyp=FULL, **options):
    return LoadImagesAndLabels(table, img_size, augment=True, hyp=hyp, **options)


def keys_of(dataset, epoch=0):
    return [SampleKey(epoch, position, int(index)) for position, index in enumerate(dataset.order(epoch))]


def items_of(dataset, epoch=0):
    return [dataset[key] for key in keys_of(dataset, epoch)]


def same_items(first, second):
    return all(
        torch.equal(a.image, b.image) and torch.equal(a.targets, b.targets) and a[2:] == b[2:]
        for a, b in zip(first, second, strict=True)
    )


def test_the_contracts_rectangular_shape():
    _, shapes = rectangular_batches(np.array([[500, 500]] * 3), 16, 640, 32, 0.5)
    assert shapes.tolist() == [[672, 672]]


def test_rectangular_batches_by_hand():
    sizes_wh = np.array([[640, 480], [480, 640], [640, 320], [640, 480], [320, 640], [100, 100]])
    order, shapes = rectangular_batches(sizes_wh, 2, 640, 32, 0.0)
    assert order.tolist() == [2, 0, 3, 5, 1, 4]  # h/w 0.5, 0.75, 0.75 (in their order), 1, 1.33, 2
    # widest of the first pair 0.75: 480 px high; the second holds a square; 1 / 1.33: 480 px wide
    assert shapes.tolist() == [[480, 640], [640, 640], [640, 480]]
    _, padded = rectangular_batches(sizes_wh, 2, 640, 32, 0.5)
    assert padded.tolist() == [[512, 672], [672, 672], [672, 512]]


def test_rect_orders_images_labels_and_shapes_alike(label_table):
    dataset = LoadImagesAndLabels(label_table, 64, rect=True, batch_size=4, pad=0.5)
    ratios = dataset.table.sizes_wh[:, 1] / dataset.table.sizes_wh[:, 0]
    assert (np.diff(ratios) >= 0).all()
    for index in range(len(dataset)):
        item = dataset[index]
        assert tuple(item.image.shape[1:]) == tuple(dataset.batch_shapes_hw[index // 4])
        source = list(label_table.image_paths).index(item.path)
        assert len(item.targets) == len(label_table.labels(source))
        assert item.shapes.original_hw == tuple(label_table.sizes_wh[source][::-1])


def test_an_evaluation_item_by_hand(label_table):
    item = LoadImagesAndLabels(label_table, 64)[0]  # 128 x 96 becomes 64 x 48, 8 px above it
    assert item.image.shape == (3, 64, 64) and item.image.dtype == torch.uint8 and item.image.is_contiguous()
    assert (item.image[:, :8] == 114).all() and (item.image[:, 56:] == 114).all()
    assert item.shapes == ((96, 128), ((0.5, 0.5), (0.0, 8.0)))
    assert item.targets.dtype == torch.float32
    box = item.targets[0].tolist()
    assert box[:2] == [0, 0]
    assert np.allclose(box[2:], [0.5, 0.5, 0.4, 0.6 * 48 / 64], atol=1e-6)


def test_small_images_are_enlarged_and_boxes_stay_inside(label_table):
    table = label_table.subset([7])  # 40 x 30
    table.rows[0] = [1, 0.5, 0.5, 1, 1]
    item = LoadImagesAndLabels(table, 64)[0]
    assert item.shapes == ((30, 40), ((1.6, 1.6), (0.0, 8.0)))
    x, y, w, h = item.targets[0, 2:].tolist()
    assert x + w / 2 <= 1 and w == pytest.approx((64 - 1e-3) / 64) and h == pytest.approx(48 / 64)


def test_training_without_ranges_is_the_letterboxed_image(label_table):
    trained = training(label_table, hyp={})
    trained.albumentations = False
    assert torch.equal(trained[2].image, LoadImagesAndLabels(label_table, 64)[2].image)  # 64 x 64: nothing to resize


@pytest.mark.parametrize("rect", [False, True])
def test_items_are_the_same_with_every_cache_and_in_every_order(label_table, rect):
    def dataset(**kwargs):
        return training(label_table, batch_size=4, rect=rect, seed=3, **kwargs)

    plan = MosaicSampler(21, 4, lanes=2, window=5)
    expected = items_of(dataset(plan=plan))
    assert same_items(items_of(dataset(plan=plan, cache_images="ram")), expected)
    assert same_items(items_of(dataset(plan=plan, cache_images="disk")), expected)
    backwards = dataset(plan=plan)
    keys = keys_of(backwards)
    assert same_items([backwards[key] for key in reversed(keys)][::-1], expected)
    other_epoch = [dataset()[key._replace(epoch=1)] for key in keys]
    assert not any(torch.equal(a.image, b.image) for a, b in zip(expected, other_epoch, strict=True))


def test_the_seed_decides_order_and_augmentation(label_table):
    first, again, other = (training(label_table, batch_size=4, seed=seed) for seed in (3, 3, 4))
    assert first.order(0).tolist() == again.order(0).tolist() != other.order(0).tolist()
    items = items_of(first)
    assert same_items(items_of(again), items)
    other._order = (0, first.order(0))  # the same images at the same places
    assert not any(torch.equal(a.image, b.image) for a, b in zip(items_of(other), items, strict=True))


def test_mosaics_come_as_often_as_asked_and_can_be_switched_off(label_table):
    dataset = training(label_table, batch_size=4)
    mosaics = [item.shapes is None for epoch in range(6) for item in items_of(dataset, epoch)]
    assert 0.7 < np.mean(mosaics) < 0.9
    dataset.mosaic = False
    assert all(item.shapes is not None for item in items_of(dataset))


def test_rect_takes_no_mosaics(label_table):
    dataset = training(label_table, rect=True, batch_size=4)
    assert all(item.shapes is not None for item in items_of(dataset))


def test_global_generators_are_neither_read_nor_moved(label_table):
    dataset = training(label_table)
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    first = items_of(dataset)
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.random.get_rng_state())
    np.random.seed(1)
    torch.manual_seed(1)
    assert same_items(items_of(dataset), first)


def test_image_weights_must_fit(label_table):
    dataset = training(label_table)
    for weights in (np.ones(3), -np.ones(21), np.full(21, np.nan)):
        with pytest.raises(ValueError, match="21 finite numbers"):
            dataset.set_image_weights(weights)


def test_every_image_is_padded_to_a_given_height_and_width(label_table):
    items = list(map(LoadImagesAndLabels(label_table, (64, 128), batch_size=4).__getitem__, range(len(label_table))))
    assert {tuple(item.image.shape) for item in items} == {(3, 64, 128)}
    assert [item.path for item in items] == list(label_table.image_paths)  # not sorted by shape
    wide, high, strip = items[0], items[1], items[3]  # 128 x 96, 96 x 128 and 200 x 50 px
    ratio_hw, pad_wh = wide.shapes.ratio_pad
    assert ratio_hw == pytest.approx((64 / 96, 86 / 128)) and pad_wh == (21.0, 0.0)  # 85.3 px rounds up to 86
    assert high.shapes == ((128, 96), ((0.5, 0.5), (40.0, 0.0)))
    assert strip.shapes == ((50, 200), ((0.64, 0.64), (0.0, 16.0)))
    x, y, w, h = high.targets[0, 2:].tolist()
    assert (x, y, w, h) == pytest.approx((0.5, 0.5, 0.4 * 48 / 128, 0.6), abs=1e-6)


@pytest.mark.parametrize("options", [{"rect": True}, {"augment": True, "hyp": FULL}])
def test_height_and_width_are_for_plain_evaluation_alone(label_table, options):
    with pytest.raises(ValueError, match="evaluation"):
        LoadImagesAndLabels(label_table, (64, 128), **options)


def test_items_by_index_serve_a_loader_of_torch(label_table):
    dataset = LoadImagesAndLabels(str(Path(label_table.image_paths[0]).parent), 64, 4, single_cls=True)
    image, targets, path, shapes = dataset[2]
    assert image.shape == (3, 64, 64) and path == dataset.im_files[2] and shapes[0] == tuple(dataset.shapes[2][::-1])
    assert all((rows[:, 0] == 0).all() for rows in dataset.labels) and len(dataset.segments[2]) == len(targets)
    assert dataset.label_files[2] == path.replace("/images/", "/labels/").replace(".jpg", ".txt")
    assert len(dataset.labels[:3]) == 3 and len(np.concatenate(dataset.labels)) == len(label_table.rows)
    batches = list(DataLoader(dataset, 4, collate_fn=dataset.collate_fn))
    assert len(batches) == 6 and batches[0][0].shape == (4, 3, 64, 64)
    assert sorted(set(batches[0][1][:, 0].tolist())) == [0, 1, 2, 3]
    infinite = InfiniteDataLoader(dataset, batch_size=8, collate_fn=dataset.collate_fn)
    assert len(next(iter(infinite))[2]) == 8 and not infinite.persistent_workers


shares = st.floats(0, 1)
extreme_params = st.builds(
    dict,
    hsv_h=shares,
    hsv_s=shares,
    hsv_v=shares,
    degrees=st.floats(0, 180),
    translate=shares,
    scale=st.floats(0, 0.99),
    shear=st.floats(0, 89),
    perspective=st.floats(0, 0.01),
    **dict.fromkeys(("flipud", "fliplr", "mosaic", "mixup", "copy_paste", "mosaic9"), shares),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(params=extreme_params, seed=st.integers(0, 2**31), index=st.integers(0, 20), rect=st.booleans())
def test_augmented_boxes_stay_inside_the_picture_with_their_corners_in_order(label_table, params, seed, index, rect):
    item = training(label_table, hyp=params, rect=rect, batch_size=4, seed=seed)[index]
    boxes = item.targets[:, 2:]
    corners = xywh2xyxy(boxes)
    assert torch.isfinite(item.targets).all() and (boxes[:, 2:] > 0).all()
    assert (corners > -1e-6).all() and (corners < 1 + 1e-6).all()  # float32: centre and half a side are rounded apart
    assert set(item.targets[:, 1].tolist()) <= {0, 1, 2}
