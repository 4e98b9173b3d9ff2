"""Decoding on the host: the rows are the head's own, whatever the order of the maps and of their axes."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from models.heads import DetectAF
from models.raw import RawHead
from models.yolo import Detect

STRIDES = (8, 16, 32)
ANCHORS_PX = [[10, 13, 16, 30], [30, 61, 62, 45], [116, 90, 156, 198]]


def anchored():
    head = Detect(3, ANCHORS_PX, [6, 7, 8])
    head.arguments = [3, ANCHORS_PX]
    return head


def anchor_free(**options):
    return DetectAF(3, [6, 7, 8], **options)


def ready(head):
    """The head as a model leaves it, its outputs far from those of a new one."""
    head.set_strides(torch.tensor(STRIDES, dtype=torch.float32), "test")
    for conv in head.m:
        torch.nn.init.normal_(conv.weight)
        torch.nn.init.normal_(conv.bias)
    return head.eval().requires_grad_(False)


HEADS = {"anchors": anchored, "bins": anchor_free, "few bins": lambda: anchor_free(bins=2)}


@pytest.fixture(params=HEADS)
def case(request):
    """A head, its score maps for three images of 64x96 px, and its rows."""
    torch.manual_seed(0)
    head = ready(HEADS[request.param]())
    features = [torch.randn(3, 6 + level, 64 // stride, 96 // stride) for level, stride in enumerate(STRIDES)]
    return head, [part.numpy() for part in head.score_maps(features)], head(features)[0].numpy()


def test_rows_are_the_heads(case):
    head, maps, rows = case
    found = head.raw_head().decode(maps)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-4)


def test_maps_come_in_any_order_and_with_channels_at_their_end(case):
    head, maps, rows = case
    last = [np.ascontiguousarray(part.transpose(0, 2, 3, 1)) for part in maps[::-1]]
    np.testing.assert_allclose(head.raw_head().decode(last, channels_last=True), rows, rtol=1e-4, atol=1e-4)


def test_levels_in_another_order_keep_it(case):
    head, maps, rows = case
    raw = head.raw_head()
    counts = [rows.shape[1] * 16 // 21, rows.shape[1] * 4 // 21]  # 96, 24 and 6 cells a box
    fine, middle, coarse = np.split(rows, np.cumsum(counts), axis=1)
    turned = replace(raw, strides=raw.strides[::-1], anchors=raw.anchors[::-1])
    np.testing.assert_allclose(
        turned.decode(maps), np.concatenate((coarse, middle, fine), axis=1), rtol=1e-4, atol=1e-4
    )


def test_float16_and_further_outputs_are_taken(case):
    head, maps, rows = case
    extra = np.zeros((3, 1, 8, 12), np.float16)  # other people's models have sums of scores there
    found = head.raw_head().decode([extra, *(part.astype(np.float16) for part in maps)])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows, rtol=1e-2, atol=0.5)


def test_maps_that_do_not_fit_are_told(case):
    head, maps, _ = case
    raw = head.raw_head()
    coarse = "x".join(map(str, maps[-1].shape[1:]))
    with pytest.raises(ValueError, match=f"no map is {coarse} .channels first.; there are "):
        raw.decode(maps[:-1])
    with pytest.raises(ValueError, match="no map is "):
        replace(raw, nc=4).decode(maps)
    with pytest.raises(ValueError, match="no map is "):
        raw.decode([part[:, :, :, :-1] for part in maps])


def test_it_survives_json(case):
    raw = case[0].raw_head()
    assert RawHead.from_json(json.loads(json.dumps(asdict(raw)))) == raw


@pytest.mark.parametrize(
    "spoilt",
    [
        {"strides": []},
        {"strides": [8, 16, 0]},
        {"strides": "none"},
        {"anchors": [[[1, 2]], [[1, 2]]]},
        {"anchors": [[1, 2], [1, 2], [1, 2]]},
        {"nc": None},
    ],
)
def test_what_is_damaged_is_refused(spoilt):
    said = {"nc": 3, "strides": [8, 16, 32], "anchors": [], "bins": 16}
    RawHead.from_json(said)
    with pytest.raises((LookupError, TypeError, ValueError)):
        RawHead.from_json(said | spoilt)
    del said["bins"]
    with pytest.raises(LookupError):
        RawHead.from_json(said)
