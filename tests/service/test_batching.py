"""The queue before the model: who shares a batch, who waits, who is dropped, what an error does."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest

from models.inference.predictor import Window
from service.batching import Batcher, InferenceError, Prepared
from utils.nms import NMSConfig

LIMIT_S = 20


class Model:
    """Stands in for a model: answers with the first pixel, counts batches, can be held back."""

    def __init__(self):
        self.batches, self.threads = [], set()
        self.free = threading.Event()
        self.free.set()

    def __call__(self, batch):
        assert self.free.wait(LIMIT_S)
        self.threads.add(threading.current_thread().name)
        inputs = [item.windows[0].inputs for item in batch]
        self.batches.append([int(image.flat[0]) for image in inputs])
        assert len({image.shape for image in inputs}) == 1
        if 13 in self.batches[-1]:
            raise RuntimeError("no luck")
        return [image.reshape(-1)[:1].astype(float) for image in inputs]


def prepared(value, width=32):
    return Prepared([Window(np.full((3, 32, width), value, np.uint8), (0, 0, width, 32), None)], NMSConfig())


def play(scene, batch_size=4, wait_s=0.01):
    """Runs a scene with a started queue; returns the model, the number dropped, and what the scene returned."""
    model, dropped = Model(), []

    async def run():
        batcher = Batcher(model, batch_size, wait_s, on_batch=lambda size: None, on_drop=dropped.append)
        batcher.start()
        result = await scene(batcher, model)
        await batcher.close()
        return result

    result = asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    return model, sum(dropped), result


def test_images_of_one_shape_go_together_up_to_the_batch_size_and_get_their_own_answers():
    async def scene(batcher, model):
        queued = [batcher.enqueue(prepared(value, 32 + 32 * (value % 2))) for value in range(12)]
        return [await item for item in queued]

    model, _, outcomes = play(scene)
    assert sorted(model.batches) == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10], [9, 11]]
    assert [int(outcome.detections[0]) for outcome in outcomes] == list(range(12))
    assert [outcome.batch for outcome in outcomes] == [4] * 8 + [2] * 4
    assert len(model.threads) == 1


def test_nothing_of_an_answered_image_is_kept():
    async def scene(batcher, model):
        references = []
        for round_ in range(5):
            images = [prepared(20 * round_ + value) for value in range(6)]
            references += [weakref.ref(image.windows[0].inputs) for image in images]
            queued = [batcher.enqueue(image) for image in images]
            outcomes = [await item for item in queued]
            references += [weakref.ref(outcome.detections) for outcome in outcomes]
            del images, queued, outcomes
        await batcher.enqueue(prepared(0))  # so the thread has let go of the last batch
        gc.collect()
        return [reference() is None for reference in references]

    model, _, gone = play(scene)
    assert len(model.batches) >= 6 and gone == [True] * 60


def test_lone_image_does_not_wait():
    async def scene(batcher, model):
        return await batcher.enqueue(prepared(1))

    assert play(scene, wait_s=LIMIT_S)[2].batch == 1


def test_image_waits_for_one_that_is_expected():
    async def scene(batcher, model):
        with batcher.expected():
            first = batcher.enqueue(prepared(1))
            await asyncio.sleep(0.05)
            assert not first.done()
            second = batcher.enqueue(prepared(2))
        return [(await first).batch, (await second).batch]

    assert play(scene, wait_s=LIMIT_S)[2] == [2, 2]


def test_wait_ends_when_the_expected_one_does_not_come_or_comes_too_late():
    async def scene(batcher, model):
        with batcher.expected():
            late = await batcher.enqueue(prepared(1))
        with batcher.expected():
            lost = batcher.enqueue(prepared(2))
        return late.batch, (await lost).batch

    assert play(scene, wait_s=0.05)[2] == (1, 1)


def test_abandoned_image_never_reaches_the_model():
    async def scene(batcher, model):
        model.free.clear()
        first = batcher.enqueue(prepared(1))
        await asyncio.sleep(0.05)  # it holds the model
        queued = [batcher.enqueue(prepared(value)) for value in (2, 3, 4)]
        queued[1].cancel()
        model.free.set()
        await asyncio.gather(first, queued[0], queued[2])

    model, dropped, _ = play(scene)
    assert model.batches == [[1], [2, 4]] and dropped == 1


def test_error_reaches_its_batch_alone_and_the_next_batch_runs():
    async def scene(batcher, model):
        bad = batcher.enqueue(prepared(13))
        with pytest.raises(InferenceError, match="no luck"):
            await bad
        assert batcher.failing
        await batcher.enqueue(prepared(5))
        return batcher.failing

    assert play(scene)[2] is False


def test_image_that_fails_leaves_the_others_of_its_batch_alone():
    async def scene(batcher, model):
        queued = [batcher.enqueue(prepared(value)) for value in (1, 2, 13)]
        outcomes = await asyncio.gather(*queued, return_exceptions=True)
        assert not batcher.failing, "the model works"
        return outcomes

    model, _, (*good, bad) = play(scene)
    assert model.batches == [[1, 2, 13], [1], [2], [13]]
    assert [int(outcome.detections[0]) for outcome in good] == [1, 2]
    assert isinstance(bad, InferenceError)


def test_full_batch_does_not_wait_for_more():
    async def scene(batcher, model):
        with batcher.expected():
            queued = [batcher.enqueue(prepared(value)) for value in range(4)]
            return [(await asyncio.wait_for(item, LIMIT_S / 2)).batch for item in queued]

    assert play(scene, batch_size=4, wait_s=LIMIT_S)[2] == [4] * 4


def test_closing_finishes_what_is_queued():
    async def scene(batcher, model):
        model.free.clear()
        queued = [batcher.enqueue(prepared(value)) for value in range(6)]
        asyncio.get_running_loop().call_later(0.05, model.free.set)
        await batcher.close()
        return [item.done() for item in queued]

    assert play(scene)[2] == [True] * 6
