"""Long work in short: what fifty detections and three epochs must not leave behind; and that a leak would be seen.

The long runs are endurance.py and many_images.py. Here files, Python's objects and traced memory
are counted before and after; that memory which Python does not see is flat is theirs to show.
"""

import contextlib
import gc
import itertools
import json
import mmap
import os
import subprocess
import sys
import threading
import tracemalloc
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.campaigns.usage import Sample, Usage, Watch, complaints, growth_of, usage_of
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux' /proc")
IMGSZ = 64
OBJECTS = 200  # that may come and go: caches of libraries, the interpreter's own
TRACED_BYTES = 64 * 1024


def held() -> tuple[int, int, int]:
    """Counts open files, threads and Python's objects."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects())


def series(memory_mb, descriptors=lambda _: 7, items: int = 1000) -> list[Sample]:
    """Makes samples of every tenth item from functions of the item's number."""
    return [Sample(item, Usage(memory_mb(item), 500.0, descriptors(item))) for item in range(10, items + 1, 10)]


# ------------------------------------------------------------------------------------------------ what counts as flat


def test_growth_is_the_slope_of_a_leak():
    """100 MB and 10 KB more an item: after the warm-up of 200 the halves' middles are 400 items apart."""
    growth = growth_of(series(lambda item: 100 + item * 10 / 1024), "private_mb")
    assert growth.items == pytest.approx(400)
    assert growth.difference == pytest.approx(400 * 10 / 1024)
    assert growth.per_thousand * 1024 == pytest.approx(10_000)


@pytest.mark.parametrize(
    "memory_mb",
    [
        lambda item: 300 + 64 * (item > 150),  # an arena, taken while warming up
        lambda item: 300 + 64 * (item > 600),  # a step in the middle: once, not with every item
        lambda item: 300 + 20 * (item % 100 < 30),  # cycles freed in batches
        lambda item: 400 - item / 10,
    ],
)
def test_steps_and_waves_are_flat(memory_mb):
    assert complaints(series(memory_mb)) == []


def test_leaks_of_memory_and_of_files_are_told():
    assert complaints(series(lambda item: 100 + 0.01 * item)) == ["memory +4.0 MB"]
    assert complaints(series(lambda item: 100 + 0.01 * item + 64 * (item > 600))) == ["memory +3.9 MB"]
    assert complaints(series(lambda item: 100 + 4 * (item // 100))) == ["memory +16.0 MB"]  # in steps
    assert complaints(series(lambda _: 100, lambda item: 7 + item // 250)) == ["open files +2"]


def test_too_few_samples_are_no_verdict():
    with pytest.raises(UserError, match="0 samples after the warm-up"):
        complaints([])
    with pytest.raises(UserError, match="7 samples"):
        complaints(series(lambda _: 100, items=80))


@ON_LINUX
def test_a_watch_sees_memory_and_files_that_are_kept():
    watch, kept = Watch(total=40, samples=20), []
    for _ in range(40):
        block = mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE)  # not from what the process has freed
        block.write(b"x" * len(block))
        kept.append((block, open(os.devnull)))
        watch.passed()
    for _, file in kept:
        file.close()
    assert [sample.items for sample in watch.samples] == list(range(2, 41, 2))
    assert growth_of(watch.samples, "private_mb").difference == pytest.approx(32, abs=4)  # 16 items between the middles
    assert growth_of(watch.samples, "descriptors").difference == 16
    assert "open files +16" in complaints(watch.samples)  # how much memory is too much depends on the process's size


@ON_LINUX
def test_pages_shared_with_a_parent_are_not_private():
    shared = np.ones(8 << 20)  # 64 MB
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.read(read_end, 1)
        os._exit(0)
    usage = usage_of(child)
    os.write(write_end, b".")
    os.waitpid(child, 0)
    os.close(read_end)
    os.close(write_end)
    assert usage.resident_mb > shared.nbytes / 2**20 > usage.private_mb


# --------------------------------------------------------------------------------------------------------- nothing kept


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of ten images, one of them cut short."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(10):
        noise = np.random.default_rng(index).integers(0, 255, (48, 64, 3), np.uint8)
        data = cv2.imencode(".jpg", noise)[1].tobytes()
        (folder / f"{index}.jpg").write_bytes(data[: len(data) // 2] if index == 9 else data)
    return folder


@pytest.fixture
def options(weights, images):
    """Of detect.py: everything written for every image."""
    import detect
    from utils.cli import options_from

    keywords = {"weights": [str(weights)], "source": str(images), "imgsz": [IMGSZ], "device": "cpu", "max_det": 3}
    return options_from(detect.build_parser(), {**keywords, "save_txt": True, "save_crop": True, "save_csv": True})


@ON_LINUX
@pytest.mark.usefixtures("one_thread")
def test_fifty_detections_leave_nothing_behind(options, tmp_path):
    """Reading, detecting, drawing and writing, ten images five times, after ten to warm up; damage included."""
    import detect
    from models.inference.pipeline import Pipeline, open_pipeline
    from utils.media.sources import LoadImages

    opened = open_pipeline(options)

    def detect_ten(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        pipeline = Pipeline(LoadImages(opened.source.inputs), opened._predictor, opened.names)
        detect.write_all(pipeline, folder, options)
        assert len(pipeline.damaged) == 1
        assert len(list(folder.glob("*.jpg"))) == 9

    tracemalloc.start()
    try:
        detect_ten("first")
        files, threads, objects = held()
        traced_bytes = tracemalloc.get_traced_memory()[0]
        for name in "abcde":
            detect_ten(name)
        files_after, threads_after, objects_after = held()
        traced_after_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert (files_after, threads_after) == (files, threads)
    assert objects_after - objects < OBJECTS
    assert traced_after_bytes - traced_bytes < TRACED_BYTES


@ON_LINUX
@pytest.mark.usefixtures("one_thread")
def test_a_closed_pipeline_gives_its_model_and_files_back(options):
    """Also after a break in the middle, with the reader ahead."""
    from models.inference.pipeline import open_pipeline

    files, threads, _ = held()
    for count in (1, 2):
        pipeline = open_pipeline(options)
        gone = weakref.ref(pipeline._predictor)
        with contextlib.closing(pipeline.results()) as results:
            assert len(list(itertools.islice(results, count))) == count
        del pipeline, results
        assert held()[:2] == (files, threads)
        assert gone() is None


@pytest.mark.usefixtures("one_thread")
def test_nothing_of_an_image_is_kept_once_its_result_was_used(options):
    """Neither the image nor what was found in it, however little that is."""
    from models.inference.pipeline import open_pipeline

    references, alive = [], []
    for result in open_pipeline(options):
        assert len(result.detections)
        references += [weakref.ref(result.image), weakref.ref(result.detections)]
        del result
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
    gc.collect()
    assert len(references) == 18 and max(alive) <= 2, alive  # this image's own
    assert not [reference for reference in references if reference() is not None]


@ON_LINUX
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_epochs_leave_nothing_behind(tiny_shapes, tiny_cfg, tmp_path):
    """Two epochs to warm up, then five, with worker processes, validation and checkpoints."""
    import train
    from utils.callbacks import Callbacks

    counts, callbacks = [], Callbacks()
    callbacks.register_action("on_fit_epoch_end", "count", lambda *_: counts.append(held()))
    keywords = {"cfg": str(tiny_cfg), "data": str(tiny_shapes), "imgsz": IMGSZ, "device": "cpu", "noplots": True}
    train.run(callbacks, epochs=8, workers=2, batch_size=12, project=str(tmp_path), **keywords)
    files, threads, objects = zip(*counts[1:7], strict=True)  # the last epoch closes what is not needed any more
    assert len(set(threads)) == 1
    # The next epoch's batches are on their way meanwhile, each in a file of shared memory
    assert max(files) - min(files) <= 2 and files[-1] - files[0] <= 2, files
    assert abs(objects[-1] - objects[0]) < OBJECTS


# ------------------------------------------------------------------------------------------------------ the commands


def run_campaign(name: str, *options: object) -> str:
    command = [sys.executable, "-m", f"tests.campaigns.{name}", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@ON_LINUX
@pytest.mark.slow
def test_the_endurance_command_runs_a_part(weights):
    pytest.importorskip("trackers")
    line = run_campaign("endurance", "--measure", "stream", "--weights", weights, "--scale", 0.01, "--imgsz", IMGSZ)
    assert line.split()[:3] == ["stream", ".pt", "50"]


@ON_LINUX
@pytest.mark.slow
def test_the_many_images_command_finds_what_is_cut_short(tmp_path):
    """The scan's figure must count every image, the damaged one among them."""
    from tests.campaigns.many_images import write_images

    many, few = tmp_path / "many", tmp_path / "few"
    assert (write_images(many, 1000, seed=0), write_images(few, 150, seed=0)) == (1, 0)
    for stage, folder, expected in (("first scan", many, "scan_per_s"), ("epochs", few, "epochs_main_mb")):
        said = run_campaign("many_images", "--measure", stage, "--folder", folder)
        figures = json.loads(said.splitlines()[-1])
        assert figures[expected] > 0
        assert figures.get("corrupt", 1) == 1
