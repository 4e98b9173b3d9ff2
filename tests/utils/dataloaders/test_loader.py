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

from utils.augmentations.pixels import AugmentParams
from utils.dataloaders.dataset import DetectionDataset, Item
from utils.dataloaders.loader import DetectionLoader, create_loader, enlarge_item, join_items, quad_items, tile_items
from utils.dataloaders.sampling import SampleKey, Shard
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
PARAMS = AugmentParams(hsv_s=0.7, translate=0.1, scale=0.5, fliplr=0.5, mosaic=0.9, mixup=0.3, copy_paste=0.5)


def loader_of(table, workers=0, cache=None, quad=False, seed=0):
    dataset = DetectionDataset(table, 64, augment=PARAMS, batch_size=4, cache=cache, seed=seed)
    return DetectionLoader(dataset, workers=workers, shuffle=True, quad=quad)


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
def test_batches_do_not_depend_on_workers_or_caches(pictures, quad):
    expected = epochs_of(loader_of(pictures, quad=quad), (0, 1))
    assert [len(batch.images) for batch in expected[0]] == ([1] * 6 if quad else [4, 4, 4, 4, 4, 1])
    for workers, cache in ((2, None), (3, "ram"), (8, "disk")):
        assert same(epochs_of(loader_of(pictures, workers, cache, quad), (0, 1)), expected)
    assert not same(expected[:1], expected[1:])
    assert not same(epochs_of(loader_of(pictures, quad=quad, seed=1), (0, 1)), expected)


def test_memory_is_pinned_where_the_process_computes_on_a_gpu(pictures, monkeypatch):
    """Not where the machine has one: `--device cpu` would open a context there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for computes in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda computes=computes: computes)
        assert loader_of(pictures)._make_loader().pin_memory is computes


def test_an_epoch_can_be_entered_at_once_and_left_early(pictures):
    loader = loader_of(pictures, workers=2)
    expected = epochs_of(loader, (0, 1, 2))
    assert same(epochs_of(loader_of(pictures, workers=2), (2,)), expected[2:])
    loader.set_epoch(0)
    next(iter(loader))  # the rest of this epoch stays unread
    assert same(epochs_of(loader, (2,)), expected[2:])


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches(pictures, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys
            from utils.augmentations.pixels import AugmentParams
            from utils.dataloaders.dataset import DetectionDataset
            from utils.dataloaders.labels import scan_images
            from utils.dataloaders.loader import DetectionLoader

            def checksum(workers):
                params = AugmentParams(mosaic=1.0, scale=0.5, hsv_s=0.5)
                dataset = DetectionDataset(table, 64, augment=params, batch_size=4, cache="ram")
                loader = DetectionLoader(dataset, workers=workers, shuffle=True, quad=False)
                return [(int(b.images.long().sum()), float(b.targets.sum())) for b in loader]

            if __name__ == "__main__":
                table = scan_images(sys.argv[1:], workers=0)
                multiprocessing.set_start_method("spawn", force=True)
                assert checksum(1) == checksum(0)
                print("same")
            """
        )
    )
    command = [sys.executable, str(script), *pictures.image_paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.stdout.strip() == "same", done.stderr


def test_targets_name_their_image(pictures):
    for batch in loader_of(pictures):
        assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, 64, 64)
        assert batch.targets.dtype == torch.float32 and batch.targets.shape[1] == 6
        assert len(batch.paths) == len(batch.shapes) == len(batch.images)
        numbers = batch.targets[:, 0]
        assert torch.equal(numbers, numbers.sort().values) and (numbers < len(batch.images)).all()


def item(level, *boxes, position=0):
    targets = torch.tensor([[0, level, *box] for box in boxes]).float().reshape(-1, 6)
    return Item(
        torch.full((3, 2, 4), level, dtype=torch.uint8), targets, f"{level}.jpg", None, SampleKey(0, position, 0)
    )


def test_joined_targets_by_hand():
    first, second, third = item(10, (0.5, 0.5, 1, 1)), item(20), item(30, (0.1, 0.2, 0.1, 0.1), (0.3, 0.4, 0.1, 0.1))
    batch = join_items([first, second, third])
    assert batch.targets[:, 0].tolist() == [0, 2, 2]
    assert batch.targets[:, 1].tolist() == [10, 30, 30]
    assert batch.paths == ["10.jpg", "20.jpg", "30.jpg"]
    assert join_items([second]).targets.shape == (0, 6)


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


def test_quads_enlarge_half_of_the_time_and_fill_up_the_last_group():
    kinds = []
    for position in range(0, 800, 4):
        (quad,) = quad_items([item(level, position=position) for level in (10, 20, 30, 40)], seed=0)
        kinds.append(bool((quad.image == 10).all()))
    assert abs(np.mean(kinds) - 0.5) < 0.12
    tiled = {tuple(q.image[0, ::2, ::4].flatten().tolist()) for q in quad_items_of_two()}
    assert tiled == {(10, 10, 10, 10), (10, 10, 20, 20)}  # enlarged, or 10 over 20 twice


def test_seed_epoch_and_place_decide_which_quads_are_enlarged():
    """Each of the three alone gives another choice of 32, and the same three the same one."""

    def enlarged(seed, epoch, first):
        groups = [[item(level, position=first + 4 * group) for level in (10, 20, 30, 40)] for group in range(32)]
        keyed = [[one._replace(key=one.key._replace(epoch=epoch)) for one in group] for group in groups]
        return tuple(bool((quad_items(group, seed)[0].image == 10).all()) for group in keyed)

    choices = [enlarged(0, 0, 0), enlarged(1, 0, 0), enlarged(0, 1, 0), enlarged(0, 0, 1000)]
    assert len(set(choices)) == 4 and enlarged(0, 0, 0) == choices[0]


def quad_items_of_two():
    return [quad_items([item(10, position=p), item(20, position=p)], seed=0)[0] for p in range(20)]


def test_image_weights_reach_the_workers(pictures):
    loader = loader_of(pictures, workers=2)
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
    unshared = loader_of(pictures)
    unshared.set_image_weights(weights)
    assert torch.equal(sample.images, epochs_of(unshared, [0])[0][0].images)  # partners obey the weights too


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanished_is_named_in_one_line(pictures, workers):
    loader = loader_of(pictures, workers=workers)
    Path(pictures.image_paths[9]).unlink()
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(pictures.image_paths[9]) and "\n" not in message and "worker" not in message


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_signals_that_reach_workers_too_disturb_no_batch_and_raise_no_error(monkeypatch, pictures):
    """Terminals send Ctrl-C, and clusters SIGTERM, to all processes; the main one alone answers."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background may have been made deaf
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    dataset = DetectionDataset(pictures, 64, augment=None, batch_size=2)
    loader, paths = create_loader(dataset, 2, workers=2, shuffle=False), []
    before = set(multiprocessing.active_children())
    for batch in loader:
        paths += batch.paths
        workers = set(multiprocessing.active_children()) - before
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    assert paths == list(pictures.image_paths)
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)  # not their parent's
    for worker in workers:
        worker.join(timeout=30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    loader.close()


def test_workers_and_batch_sizes_are_limited(monkeypatch, pictures):
    monkeypatch.setattr("os.cpu_count", lambda: 6)

    def made(batch_size, workers):
        dataset = DetectionDataset(pictures, 64, augment=None, batch_size=batch_size)
        return create_loader(dataset, batch_size, workers=workers, shuffle=False)

    assert [made(4, 8).workers, made(16, 8).workers, made(16, 3).workers, made(1, 8).workers] == [4, 6, 3, 0]
    assert made(64, 0).batch_size == 21 and len(made(64, 0)) == 1 and len(made(4, 0)) == 6
    dataset = DetectionDataset(pictures, 64, augment=None, batch_size=4)
    with pytest.raises(ValueError, match="batch size 8"):
        create_loader(dataset, 8, workers=0, shuffle=False)
    with pytest.raises(ValueError, match="seed 1"):
        create_loader(dataset, 4, workers=0, shuffle=False, seed=1)


def test_unshuffled_batches_follow_the_data_set(pictures):
    dataset = DetectionDataset(pictures, 64, augment=None, batch_size=4)
    loader = create_loader(dataset, 4, workers=0, shuffle=False)
    assert [path for batch in loader for path in batch.paths] == list(pictures.image_paths)


@pytest.mark.parametrize("switches", [{}, {"quad": True}, {"rect": True}, {"cache": "ram", "workers": 2}], ids=str)
def test_the_shares_of_three_processes_are_what_one_would_see(pictures, switches):
    """21 images by 8: the last batch has 5, which are shared 2, 2, 1; by fours they leave the third process none."""
    loading = {"workers": switches.get("workers", 0), "quad": switches.get("quad", False), "shuffle": True}

    def batches(share):
        keywords = {"rect": switches.get("rect", False), "cache": switches.get("cache"), "batch_size": 8}
        dataset = DetectionDataset(pictures, 64, augment=PARAMS, **keywords)
        loader = create_loader(dataset, 8, share=share, **loading)
        loader.set_epoch(1)
        return [(batch, loader.owns(index)) for index, batch in enumerate(loader)]

    whole = batches(None)
    parts = [batches(Shard(rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for index, (batch, owned) in enumerate(whole):
        own = [part[index][0] for part in parts if part[index][1]]
        assert owned and torch.equal(torch.cat([part.images for part in own]), batch.images)
        assert torch.equal(torch.cat([part.targets[:, 1:] for part in own]), batch.targets[:, 1:])
        assert [path for part in own for path in part.paths] == batch.paths
    stand_ins = [part[index][0] for part in parts for index in range(3) if not part[index][1]]
    assert len(stand_ins) == (3 if switches.get("quad") else 0)  # one of two groups, each of three batches
    assert all(len(part.images) == 1 for part in stand_ins)


def test_processes_of_a_machine_share_its_cores(monkeypatch, pictures):
    monkeypatch.setattr("os.cpu_count", lambda: 6)

    def workers(neighbours, size, batch_size=16):
        dataset = DetectionDataset(pictures, 64, augment=None, batch_size=batch_size)
        share = Shard(0, size)
        return create_loader(dataset, batch_size, workers=8, shuffle=False, share=share, neighbours=neighbours).workers

    assert [workers(1, 1), workers(2, 2), workers(8, 8), workers(2, 8, 8)] == [6, 3, 1, 0]


class CollectableObjects(DetectionDataset):
    """Puts the number of objects that the garbage collector of a worker looks at in place of the path."""

    def __getitem__(self, key: SampleKey) -> Item:
        return super().__getitem__(key)._replace(path=str(len(gc.get_objects())))


def test_workers_collectors_leave_the_parents_objects_alone(pictures):
    """To collect is to write to every object, and to write to a shared page is to copy it: 40 MB for each worker."""
    dataset = CollectableObjects(pictures, 64, augment=None, batch_size=4)
    loader = create_loader(dataset, 4, workers=2, shuffle=False)
    looked_at = [int(count) for batch in loader for count in batch.paths]
    loader.close()
    assert len(looked_at) == len(pictures)
    assert max(looked_at) < len(gc.get_objects()) / 10
