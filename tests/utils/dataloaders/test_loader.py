"""Batches: the same for any number of workers, quad by hand, image weights, mistakes that cross from workers."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.dataloaders.dataset import Item, LoadImagesAndLabels
from utils.dataloaders.loader import (
    DetectionLoader,
    create_dataloader,
    enlarge_item,
    full_size_loader,
    quad_items,
    tile_items,
)
from utils.dataloaders.sampling import SampleKey, Shard
from utils.errors import UserError
from utils.images import read_image

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
HYP = {"hsv_s": 0.7, "translate": 0.1, "scale": 0.5, "fliplr": 0.5, "mosaic": 0.9, "mixup": 0.3, "copy_paste": 0.5}


def loader_of(table, workers=0, cache=None, quad=False, seed=0):
    """A training loader, of more workers than the machine may have cores."""
    dataset = LoadImagesAndLabels(table, 64, 4, augment=True, hyp=HYP, cache_images=cache, seed=seed)
    return DetectionLoader(dataset, workers=workers, shuffle=True, quad=quad)


def plain_loader(table, batch_size=4, workers=0, **options):
    return create_dataloader(table, 64, batch_size, 32, workers=workers, **options)[0]


def epochs_of(loader, epochs):
    batches = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        batches.append(list(loader))
    return batches


def same(first, second):
    pairs = [(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)]
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a[2:] == b[2:] for a, b in pairs
    )


@pytest.mark.parametrize("quad", [False, True])
def test_batches_do_not_depend_on_workers_or_caches(label_table, quad):
    expected = epochs_of(loader_of(label_table, quad=quad), (0, 1))
    assert [len(batch.images) for batch in expected[0]] == ([1] * 6 if quad else [4, 4, 4, 4, 4, 1])
    for workers, cache in ((2, None), (3, "ram"), (8, "disk")):
        assert same(epochs_of(loader_of(label_table, workers, cache, quad), (0, 1)), expected)
    assert not same(expected[:1], expected[1:])
    assert not same(epochs_of(loader_of(label_table, quad=quad, seed=1), (0, 1)), expected)


def test_memory_is_pinned_where_the_process_computes_on_a_gpu(label_table, monkeypatch):
    """Not where the machine has one: `--device cpu` would open a context there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for computes in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda computes=computes: computes)
        assert loader_of(label_table)._make_loader().pin_memory is computes


def test_an_epoch_can_be_entered_at_once_and_left_early(label_table):
    loader = loader_of(label_table, workers=2)
    expected = epochs_of(loader, (0, 1, 2))
    uncounted = loader_of(label_table)
    assert same([list(uncounted), list(uncounted)], expected[:2])  # each iteration is of the next epoch
    started = loader_of(label_table).start()
    started.set_epoch(1)  # drops what was begun
    assert same([list(started)], expected[1:2])
    assert same(epochs_of(loader_of(label_table, workers=2), (2,)), expected[2:])
    loader.set_epoch(0)
    next(iter(loader))  # the rest of this epoch stays unread
    assert same(epochs_of(loader, (2,)), expected[2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_without_mosaics_is_that_of_a_data_set_without_them(label_table, workers, monkeypatch):
    loader = loader_of(label_table, workers)
    mosaics = epochs_of(loader, (0,))
    loader.set_epoch(1)
    loader.start()  # with mosaics, and that is dropped
    loader.set_epoch(1, mosaic=False)
    closed = list(loader)
    monkeypatch.setitem(HYP, "mosaic", 0.0)
    assert same([closed], epochs_of(loader_of(label_table), (1,)))
    assert all(shapes for batch in closed for shapes in batch.shapes)
    assert same(epochs_of(loader, (0,)), mosaics)  # as a test, or somebody's script, may go back


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches(label_table, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys
            from utils.dataloaders.labels import scan_images
            from utils.dataloaders.loader import create_dataloader

            def checksum(workers):
                hyp = {"mosaic": 1.0, "scale": 0.5, "hsv_s": 0.5}
                options = {"cache": "ram", "workers": workers, "shuffle": True}
                loader, _ = create_dataloader(table, 64, 4, 32, hyp=hyp, augment=True, **options)
                return [(int(b.images.long().sum()), float(b.targets.sum())) for b in loader]

            if __name__ == "__main__":
                table = scan_images(sys.argv[1:], workers=0)
                multiprocessing.set_start_method("spawn", force=True)
                assert checksum(1) == checksum(0)
                print("same")
            """
        )
    )
    command = [sys.executable, str(script), *label_table.image_paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.stdout.strip() == "same", done.stderr


def test_targets_name_their_image(label_table):
    for batch in loader_of(label_table):
        assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, 64, 64)
        assert batch.targets.dtype == torch.float32 and batch.targets.shape[1] == 6
        assert len(batch.paths) == len(batch.shapes) == len(batch.images)
        numbers = batch.targets[:, 0]
        assert torch.equal(numbers, numbers.sort().values) and (numbers < len(batch.images)).all()


def item(level, *boxes):
    targets = torch.tensor([[0, level, *box] for box in boxes]).float().reshape(-1, 6)
    return Item(torch.full((3, 2, 4), level, dtype=torch.uint8), targets, f"{level}.jpg", None)


def test_joined_targets_by_hand():
    first, second, third = item(10, (0.5, 0.5, 1, 1)), item(20), item(30, (0.1, 0.2, 0.1, 0.1), (0.3, 0.4, 0.1, 0.1))
    batch = LoadImagesAndLabels.collate_fn([first, second, third])
    assert batch.targets[:, 0].tolist() == [0, 2, 2]
    assert batch.targets[:, 1].tolist() == [10, 30, 30]
    assert batch.paths == ("10.jpg", "20.jpg", "30.jpg")
    assert LoadImagesAndLabels.collate_fn([second]).targets.shape == (0, 6)


def test_four_tiles_by_hand():
    box = (0.5, 0.5, 0.5, 0.25)
    tiled = tile_items([item(10, box), item(20, box), item(30, box), item(40)])
    assert tiled.image[0].tolist() == [[10] * 4 + [30] * 4] * 2 + [[20] * 4 + [40] * 4] * 2
    expected = [[0, 10, 0.25, 0.25, 0.25, 0.125], [0, 20, 0.25, 0.75, 0.25, 0.125], [0, 30, 0.75, 0.25, 0.25, 0.125]]
    assert torch.allclose(tiled.targets, torch.tensor(expected))


def test_enlarging_by_hand():
    small = item(0, (0.5, 0.5, 0.5, 0.25))
    small.image[0] = torch.tensor([[0, 100, 100, 100], [0, 100, 100, 100]])
    enlarged = enlarge_item(small)
    assert enlarged.image.shape == (3, 4, 8)
    assert enlarged.image[0, 0].tolist() == [0, 25, 75, 100, 100, 100, 100, 100]
    assert torch.equal(enlarged.targets, small.targets)


def quads(levels, seed=0, epoch=0, first=0):
    keys = [SampleKey(epoch, first + place, 0) for place in range(len(levels))]
    return [quad.image for quad in quad_items([item(level) for level in levels], keys, seed)]


def test_quads_enlarge_half_of_the_time_and_fill_up_the_last_group():
    kinds = [bool((image == 10).all()) for image in quads([10, 20, 30, 40] * 200)]
    assert abs(np.mean(kinds) - 0.5) < 0.12
    last = {tuple(quads([10, 20], first=place)[0][0, ::2, ::4].flatten().tolist()) for place in range(20)}
    assert last == {(10, 10, 10, 10), (10, 10, 20, 20)}  # enlarged, or 10 over 20 twice


def test_seed_epoch_and_place_decide_which_quads_are_enlarged():
    """Each of the three alone gives another choice of 32, and the same three the same one."""

    def enlarged(*keys):
        return tuple(bool((image == 10).all()) for image in quads([10, 20, 30, 40] * 32, *keys))

    choices = [enlarged(0, 0, 0), enlarged(1, 0, 0), enlarged(0, 1, 0), enlarged(0, 0, 1000)]
    assert len(set(choices)) == 4 and enlarged(0, 0, 0) == choices[0]


def test_image_weights_reach_the_workers(label_table):
    loader = loader_of(label_table, workers=2)
    list(loader)
    weights = np.zeros(21)
    weights[[3, 7]] = 1, 3
    loader.set_image_weights(weights)
    counts = {}
    for batches in epochs_of(loader, range(12)):
        for path in (path for batch in batches for path in batch.paths):
            counts[Path(path).stem] = counts.get(Path(path).stem, 0) + 1
    assert set(counts) == {"03", "07"} and sum(counts.values()) == 12 * 21
    assert 2 < counts["07"] / counts["03"] < 4.5
    (sample, *_) = epochs_of(loader, [0])[0]
    unshared = loader_of(label_table)
    unshared.set_image_weights(weights)
    assert torch.equal(sample.images, epochs_of(unshared, [0])[0][0].images)  # partners obey the weights too


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanished_is_named_in_one_line(label_table, workers):
    loader = loader_of(label_table, workers=workers)
    Path(label_table.image_paths[9]).unlink()
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(label_table.image_paths[9]) and "\n" not in message and "worker" not in message


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_signals_that_reach_workers_too_disturb_no_batch_and_raise_no_error(monkeypatch, label_table):
    """Terminals send Ctrl-C, and clusters SIGTERM, to all processes; the main one alone answers."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background may have been made deaf
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    loader, paths = plain_loader(label_table, 2, workers=2), []
    before = set(multiprocessing.active_children())
    for batch in loader:
        paths += batch.paths
        workers = set(multiprocessing.active_children()) - before
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    assert paths == list(label_table.image_paths)  # unshuffled
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)  # not their parent's
    for worker in workers:
        worker.join(timeout=30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    loader.close()


def test_workers_and_batch_sizes_are_limited(monkeypatch, label_table):
    monkeypatch.setattr("os.cpu_count", lambda: 6)

    def workers(batch_size, wanted, **options):
        return plain_loader(label_table, batch_size, workers=wanted, **options).workers

    assert [workers(4, 8), workers(16, 8), workers(16, 3), workers(1, 8)] == [4, 6, 3, 0]
    every = plain_loader(label_table, 64)
    assert every.dataset.batch_size == 21 and len(every) == 1 and len(plain_loader(label_table)) == 6
    processes = [(1, 1, 16), (2, 2, 16), (8, 8, 16), (2, 8, 8)]  # which share the machine's cores and each batch
    shared = [workers(size, 8, shard=Shard(0, n), neighbours=neighbours) for neighbours, n, size in processes]
    assert shared == [6, 3, 1, 0]


@pytest.mark.parametrize("switches", [{}, {"quad": True}, {"rect": True}, {"cache": "ram", "workers": 2}], ids=str)
def test_the_shares_of_three_processes_are_what_one_would_see(label_table, switches):
    """21 images by 8: the last batch has 5, which are shared 2, 2, 1; by fours they leave the third process none."""

    def batches(shard):
        options = {"hyp": HYP, "augment": True, "shuffle": True, "shard": shard, **switches}
        loader = plain_loader(label_table, 8, **options)
        loader.set_epoch(1)
        return [(batch, loader.owns(index)) for index, batch in enumerate(loader)]

    whole = batches(None)
    parts = [batches(Shard(rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for index, (batch, owned) in enumerate(whole):
        own = [part[index][0] for part in parts if part[index][1]]
        assert owned and torch.equal(torch.cat([part.images for part in own]), batch.images)
        assert torch.equal(torch.cat([part.targets[:, 1:] for part in own]), batch.targets[:, 1:])
        assert tuple(path for part in own for path in part.paths) == batch.paths
    stand_ins = [part[index][0] for part in parts for index in range(3) if not part[index][1]]
    assert len(stand_ins) == (3 if switches.get("quad") else 0)  # one of two groups, each of three batches
    assert all(len(part.images) == 1 for part in stand_ins)


def test_ranks_of_torch_share_every_batch(label_table, monkeypatch):
    """The halves of two processes, in their order, are what one process alone gets."""
    whole = [batch.paths for batch in plain_loader(label_table, 8, shuffle=True)]
    barriers, halves = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: barriers.append(len(halves)))
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        halves.append([batch.paths for batch in plain_loader(label_table, 4, shuffle=True, rank=rank)])
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    assert barriers == [0, 1]  # the first opens it once it has read the labels, the second waits before


def test_augmentation_needs_hyperparameters_and_ranks_a_group(label_table):
    with pytest.raises(UserError, match="augment=True needs hyp"):
        plain_loader(label_table, augment=True)
    with pytest.raises(UserError, match="init_process_group"):
        plain_loader(label_table, rank=0)


class CollectableObjects(LoadImagesAndLabels):
    """Puts the number of objects that the garbage collector of a worker looks at in place of the path."""

    def __getitem__(self, key: SampleKey) -> Item:
        return super().__getitem__(key)._replace(path=str(len(gc.get_objects())))


def test_workers_collectors_leave_the_parents_objects_alone(label_table):
    """To collect is to write to every object, and to write to a shared page is to copy it: 40 MB for each worker."""
    loader = DetectionLoader(CollectableObjects(label_table, 64, 4), workers=2)
    looked_at = [int(count) for batch in loader for count in batch.paths]
    loader.close()
    assert len(looked_at) == len(label_table)
    assert max(looked_at) < len(gc.get_objects()) / 10


def test_full_size_images_come_alone_with_their_labels(label_table):
    batches = list(full_size_loader(label_table, workers=0))
    assert [tuple(batch.images.shape[:1:-1]) for batch in batches] == [tuple(size) for size in label_table.sizes_wh]
    for index, batch in enumerate(batches):
        rgb = read_image(batch.paths[0])[:, :, ::-1]
        np.testing.assert_array_equal(batch.images[0], rgb.transpose(2, 0, 1))
        assert batch.shapes == ((rgb.shape[:2], ((1.0, 1.0), (0.0, 0.0))),)
        np.testing.assert_allclose(batch.targets[:, 1:], label_table.labels(index), atol=1e-6)
    assert same([batches], [list(full_size_loader(label_table, workers=2))])
