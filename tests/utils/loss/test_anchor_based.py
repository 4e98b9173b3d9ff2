"""The detection loss against golden values, plain formulas and autograd; its gradient is the same in every run."""

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.yolo import Detect, Model
from utils.boxes import bbox_iou, xywh2xyxy
from utils.errors import UserError
from utils.files import ROOT
from utils.loss import ComputeLoss, smooth_BCE
from utils.loss.anchor_based import bce_sum, class_term, last_of_each, objectness_term
from utils.loss.assigners import match_targets
from utils.loss.base import BatchReduction
from utils.loss.iou import BOX_LOSSES, BoxPairs
from utils.train.hyp import Hyp

STRIDES = (8, 16, 32)
PIXELS = [10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326]
ANCHORS = torch.tensor(PIXELS).view(3, 3, 2) / torch.tensor(STRIDES).view(3, 1, 1)


@pytest.fixture
def hyp():
    return Hyp.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml")


def loss_of(hyp, nc=4, anchors=ANCHORS, strides=STRIDES, autobalance=False):
    head = SimpleNamespace(nl=len(anchors), na=3, nc=nc, anchors=anchors, stride=strides)
    head.decode_boxes = Detect.decode_boxes
    return ComputeLoss(SimpleNamespace(model=[head], hyp=hyp.to_dict()), autobalance)


def scene(nc=4, batch=2, labels=20, sides=(20, 10, 5), seed=0):
    """Random outputs, in the model's shapes, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [torch.randn(batch, 3, side, side, 5 + nc, generator=generator) for side in sides]
    images = torch.randint(0, batch, (labels, 1), generator=generator)
    classes = torch.randint(0, nc, (labels, 1), generator=generator)
    boxes = torch.rand(labels, 4, generator=generator) * torch.tensor([1, 1, 0.5, 0.5]) + 0.01
    return outputs, torch.cat((images, classes, boxes.clamp(max=1)), dim=1).float()


def gradients(loss, outputs, targets):
    leaves = [output.clone().requires_grad_() for output in outputs]
    loss(leaves, targets)[0].backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("case", range(7))
def test_golden(golden_dir, case):
    golden = json.loads((golden_dir / "loss.json").read_text())[case]
    with np.load(golden_dir / "loss.npz", allow_pickle=False) as arrays:
        outputs = [torch.from_numpy(arrays[f"case{case}_p{layer}"]) for layer in range(3)]
        targets = torch.from_numpy(arrays[f"case{case}_targets"])
    with torch.random.fork_rng(devices=[]):
        model = Model("yolov5n.yaml", nc=golden["nc"])
    model.hyp = golden["hyp"]
    total, items = ComputeLoss(nn.DataParallel(model))(outputs, targets)
    assert total.shape == (1,) and total.item() == pytest.approx(golden["loss_total"], rel=1e-4)
    assert items.tolist() == pytest.approx([golden[key] for key in ("lbox", "lobj", "lcls")], rel=1e-4)


def plain_loss(hyp, outputs, targets, nc):
    """The same loss with plain indexing, left to autograd."""
    box = obj = cls = 0.0
    shapes = [output.shape[2:4] for output in outputs]
    matches = match_targets(targets, ANCHORS, shapes, hyp.anchor_t)
    for output, match, balance in zip(outputs, matches, (4.0, 1.0, 0.4), strict=True):
        index = (match.image, match.anchor, match.cell_y, match.cell_x)
        rows, wanted = output[index], torch.zeros_like(output[..., 4])
        if len(rows):
            xy, wh = rows[:, :2].sigmoid() * 2 - 0.5, (rows[:, 2:4].sigmoid() * 2) ** 2 * match.anchor_wh
            ciou = bbox_iou(torch.cat((xy, wh), 1), match.box_xywh, CIoU=True)
            box += (1 - ciou).mean()
            for row, cell in enumerate(zip(*(part.tolist() for part in index), strict=True)):
                wanted[cell] = ciou[row].detach().clamp(min=0)  # in order: the last one stays
            one_hot = torch.nn.functional.one_hot(match.cls, nc).float()
            cls += torch.nn.functional.binary_cross_entropy_with_logits(rows[:, 5:], one_hot)
        obj += torch.nn.functional.binary_cross_entropy_with_logits(output[..., 4], wanted) * balance
    return (box * hyp.box + obj * hyp.obj + cls * hyp.cls) * len(outputs[0])


def test_gradient_equals_autograd_of_the_plain_formula(hyp):
    """300 labels on 2 images: many cells are claimed several times, where the last match sets the objectness."""
    outputs, targets = scene(labels=300)
    leaves = [output.clone().requires_grad_() for output in outputs]
    expected = plain_loss(hyp, leaves, targets, nc=4)
    expected.backward()
    loss = loss_of(hyp)
    assert loss(outputs, targets)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, leaf in zip(gradients(loss, outputs, targets), leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-7)


def test_gradient_is_the_same_to_the_bit_in_every_run(hyp):
    """Each layer gathers more than 40,000 numbers; from 32,768 plain indexing differs from run to run."""
    outputs, targets = scene(nc=40, batch=4, labels=500, sides=(40, 20, 10))
    loss = loss_of(hyp, nc=40)
    shapes = [output.shape[2:4] for output in outputs]
    assert all(len(match.cls) * 45 > 40_000 for match in match_targets(targets, ANCHORS, shapes, hyp.anchor_t))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients(loss, outputs, targets)
        for _ in range(19):
            assert all(map(torch.equal, first, gradients(loss, outputs, targets)))
    finally:
        torch.set_num_threads(threads)


def test_a_cell_claimed_twice_learns_the_last_overlap():
    logits = torch.zeros(4)
    cells, overlap = torch.tensor([2, 1, 2]), torch.tensor([0.9, -0.5, 0.25])
    last = last_of_each(cells)
    mean = objectness_term(logits, cells[last], overlap[last])
    targets = torch.tensor([0.0, 0.0, 0.25, 0.0])  # an overlap below 0 counts as 0
    assert mean.count == 4
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert mean.value().item() == pytest.approx(expected.item())


def test_last_of_each_picks_the_last_positions():
    assert last_of_each(torch.tensor([7, 3, 7, 3, 5])).tolist() == [3, 4, 2]
    assert last_of_each(torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    "switches", [{"box_loss": "wiou"}, {"cls_pw": 0.5, "obj_pw": 2.0, "fl_gamma": 1.5, "label_smoothing": 0.1}]
)
def test_nothing_waits_for_the_device(hyp, switches, monkeypatch):
    """Tensors on the meta device have no values: whatever asks for one, or for how many there are, fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    outputs, targets = scene()
    loss = loss_of(dataclasses.replace(hyp, **switches))
    leaves = [output.to("meta").requires_grad_() for output in outputs]
    result = loss.compute(leaves, targets)
    result.total.backward()
    assert result.items.is_meta and result.labels == 20
    assert all(leaf.grad.is_meta and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_objectness_overlaps_carry_no_gradient(hyp):
    """Without box gain no gradient may reach the box outputs, though the objectness targets depend on them."""
    outputs, targets = scene()
    loss = loss_of(dataclasses.replace(hyp, box=0.0))
    assert all(grad[..., :4].abs().max() == 0 for grad in gradients(loss, outputs, targets))


@pytest.mark.parametrize(("keywords", "expected"), [({"gamma": 2.0}, (0.25 + 0.75) * 0.25), ({"pos_weight": 3.0}, 4)])
def test_cross_entropy_by_hand(keywords, expected):
    """Logit 0: p = 0.5, entropy ln 2; focal: positive 0.25 * 0.5^2 * ln 2, negative 0.75 * 0.5^2 * ln 2."""
    total = bce_sum(torch.zeros(2), torch.tensor([1.0, 0.0]), **keywords)
    assert total.item() == pytest.approx(expected * math.log(2))


def test_smoothed_class_targets_by_hand():
    """eps 0.2: 0.9 at the class, 0.1 elsewhere; logit z costs ln(1 + e^z) - t z."""
    mean = class_term(torch.tensor([[1.0, -1.0]]), torch.tensor([0]), smooth_BCE(0.2))
    expected = (math.log1p(math.e) - 0.9) + (math.log1p(1 / math.e) + 0.1)
    assert (mean.total.item(), mean.count) == (pytest.approx(expected), 2)


def test_empty_batch_costs_objectness_alone_and_has_a_gradient(hyp):
    outputs, _ = scene()
    loss = loss_of(hyp)
    items = loss(outputs, torch.zeros(0, 6))[1].tolist()
    assert items[0] == items[2] == 0 < items[1]
    assert all(grad.abs().sum() > 0 for grad in gradients(loss, outputs, torch.zeros(0, 6)))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_outputs_are_reckoned_in_float32(hyp, autocast):
    outputs, targets = scene()
    halves = [output.bfloat16() for output in outputs]
    loss = loss_of(hyp)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = loss.compute(halves, targets)
    expected = loss.compute([half.float() for half in halves], targets)
    assert result.total.dtype == result.items.dtype == torch.float32
    assert torch.equal(result.total, expected.total)
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(loss, halves, targets))


@pytest.mark.parametrize(("column", "term"), [(slice(0, 4), 0), (4, 1), (5, 2)])
def test_an_output_that_is_not_finite_shows_in_its_term(hyp, column, term):
    outputs, targets = scene()
    loss = loss_of(hyp)
    assert loss(outputs, targets)[1].isfinite().all()
    outputs[0][..., column] = math.nan
    assert loss(outputs, targets)[1].isfinite().tolist().index(False) == term


def test_one_class_has_no_class_term(hyp):
    outputs, targets = scene(nc=1)
    assert loss_of(hyp, nc=1)(outputs, targets)[1][2] == 0


@pytest.mark.parametrize(("nl", "balance"), [(2, [4.0, 1.0]), (3, [4.0, 1.0, 0.4]), (4, [4.0, 1.0, 0.25, 0.06])])
def test_balance_of_the_layers(hyp, nl, balance):
    assert loss_of(hyp, 4, torch.ones(nl, 3, 2), [8 * 2**layer for layer in range(nl)]).balance == balance


def test_autobalance_keeps_the_middle_layer_at_one_and_is_resumed(hyp):
    outputs, targets = scene()
    loss = loss_of(hyp, autobalance=True)
    loss(outputs, targets)
    assert loss.balance == [4.0, 1.0, 0.4], "validation must not move the balance"
    leaves = [output.requires_grad_() for output in outputs]
    objectness = [mean.value().item() for mean in loss.means(outputs, targets)[1::4]]
    loss(leaves, targets)
    moved = [0.9999 * old + 0.0001 / new for old, new in zip((4.0, 1.0, 0.4), objectness, strict=True)]
    assert loss.balance == pytest.approx([weight / moved[1] for weight in moved])
    resumed = loss_of(hyp, autobalance=True)
    resumed.load_state_dict(loss.state_dict())
    assert resumed.balance == loss.balance


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_a_box_loss_is_of_the_matched_boxes_in_cells_and_leaves_the_other_terms(name, hyp):
    outputs, targets = scene()
    losses = 0.0
    matches = match_targets(targets, ANCHORS, [output.shape[2:4] for output in outputs], hyp.anchor_t)
    for output, match in zip(outputs, matches, strict=True):
        rows = output[match.image, match.anchor, match.cell_y, match.cell_x]
        xy, wh = rows[:, :2].sigmoid() * 2 - 0.5, (rows[:, 2:4].sigmoid() * 2) ** 2 * match.anchor_wh
        boxes = [xywh2xyxy(boxes) for boxes in (torch.cat((xy, wh), 1), match.box_xywh)]
        losses += BOX_LOSSES[name](BoxPairs(*boxes, (output.shape[3], output.shape[2]), torch.ones(()))).mean()
    expected = loss_of(hyp)(outputs, targets)[1]
    items = loss_of(dataclasses.replace(hyp, box_loss=name))(outputs, targets)[1]
    assert items[0].item() == pytest.approx(losses.item() * hyp.box, rel=1e-6)
    assert (items[0] == expected[0]) == (name == "ciou") and torch.equal(items[1:], expected[1:])


def test_the_running_mean_of_a_box_loss_moves_in_training_alone_and_is_resumed(hyp):
    outputs, targets = scene()
    loss = loss_of(dataclasses.replace(hyp, box_loss="wiou"))
    loss(outputs, targets)
    assert loss.box_loss.mean_distance == 1, "validation must not move the mean"
    leaves = [output.requires_grad_() for output in outputs]
    loss(leaves, targets)
    moved = loss.box_loss.mean_distance
    assert 0.9999 < moved < 1
    resumed = loss_of(dataclasses.replace(hyp, box_loss="wiou"))
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(leaves, targets)[0], loss(leaves, targets)[0])
    assert (
        torch.equal(resumed.box_loss.mean_distance, loss.box_loss.mean_distance) and loss.box_loss.mean_distance < moved
    )


def test_autobalance_needs_stride_16(hyp):
    with pytest.raises(UserError, match="stride 16"):
        loss_of(hyp, 4, ANCHORS[:1], [8], autobalance=True)


class Exchange:
    """Plays the other processes: first collects the figures of all parts, then returns their sum to each."""

    def __init__(self):
        self.figures, self.collecting = [], True

    def __call__(self, figures):
        if self.collecting:
            self.figures.append(figures)
        return torch.stack(self.figures).sum(dim=0)


@pytest.mark.parametrize("labels", [0, 1, 40])
def test_parts_of_a_batch_add_up_to_the_whole(hyp, labels):
    """Five images as 2, 2 and 1, and a stand-in for the last: gradients, averaged over four, are the whole batch's."""
    hyp = dataclasses.replace(hyp, box_loss="wiou")  # the one with a state
    outputs, targets = scene(batch=5, labels=labels)
    loss = loss_of(hyp, autobalance=True)
    whole = [output.clone().requires_grad_() for output in outputs]
    parts, exchange = [(0, 2, 1.0), (2, 4, 1.0), (4, 5, 1.0), (4, 5, 0.0)], Exchange()
    leaves = [output.clone().requires_grad_() for output in outputs]
    sharing = [loss_of(hyp, autobalance=True) for _ in parts]

    def run(number):
        start, stop, weight = parts[number]
        mine = targets[(targets[:, 0] >= start) & (targets[:, 0] < stop)] - torch.tensor([start, 0, 0, 0, 0, 0])
        reduction = BatchReduction(exchange, len(parts), weight)
        return sharing[number].compute([leaf[start:stop] for leaf in leaves], mine, reduction)

    with torch.no_grad():  # also keeps the balance
        for number in range(len(parts)):
            run(number)
    exchange.collecting = False
    results = [run(number) for number in range(len(parts))]
    expected = loss.compute(whole, targets)
    expected.total.backward()
    sum(result.total for result in results).div(len(parts)).backward()
    for leaf, wanted in zip(leaves, whole, strict=True):
        torch.testing.assert_close(leaf.grad, wanted.grad, rtol=1e-5, atol=1e-9)
    for number, result in enumerate(results):
        assert result.items.tolist() == pytest.approx(expected.items.tolist(), rel=1e-6)
        assert result.labels == labels
        assert sharing[number].balance == sharing[0].balance == pytest.approx(loss.balance, rel=1e-9)
        means = [one.box_loss.mean_distance.item() for one in (sharing[number], sharing[0], loss)]
        assert means[0] == means[1] == pytest.approx(means[2], rel=1e-7) and (means[0] == 1) == (labels == 0)


def test_a_part_that_is_not_finite_shows_in_the_items_of_all_and_in_its_own_total(hyp):
    outputs, targets = scene()
    broken = [torch.full_like(output, math.nan) for output in outputs]
    loss, exchange = loss_of(hyp), Exchange()
    loss.compute(broken, targets, BatchReduction(exchange, 2))
    result = loss.compute(outputs, targets, BatchReduction(exchange, 2))
    assert result.items.isnan().all() and torch.isfinite(result.total)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 1.0, 88.0, 1e3, 1e4]),
    nc=st.sampled_from([1, 4]),
    labels=st.sampled_from([0, 1, 20]),
    gamma=st.sampled_from([0.0, 1.5]),
)
def test_loss_and_gradient_are_finite_for_every_prediction_within_ten_thousand(seed, scale, nc, labels, gamma):
    generator = torch.Generator().manual_seed(seed)
    outputs, targets = scene(nc=nc, labels=labels, seed=seed)
    signs = [torch.randint(-1, 2, output.shape, generator=generator).float() for output in outputs]
    outputs = [(output * 0.1 + sign) * scale for output, sign in zip(outputs, signs, strict=True)]
    outputs = [output.clamp(-1e4, 1e4) for output in outputs]
    hyp = dataclasses.replace(Hyp.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml"), fl_gamma=gamma)
    loss = loss_of(hyp, nc=nc)
    result = loss.compute(outputs, targets)
    assert torch.isfinite(result.total) and result.items.isfinite().all() and (result.items >= 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, outputs, targets))


LEVELS = [0.0, 1e-6, 1e-3, 1.0, 17.0, 88.0, 104.0, 1e3, 1e4]  # 88 and 104: where exp overflows and underflows float32


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    single=st.sampled_from([None, *LEVELS, *(-level for level in LEVELS)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    sides=st.tuples(*[st.sampled_from([0.0, 1e-7, 1e-3, 0.3, 1.0])] * 2),
    smoothing=st.sampled_from([0.0, 0.1]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
)
def test_loss_is_finite_whatever_each_output_is_beside_labels_of_any_size(seed, single, dtype, sides, smoothing, gamma):
    """Every output at a level of its own, or all at one; labels down to nothing, in corners and on the edges."""
    generator = torch.Generator().manual_seed(seed)
    outputs, targets = scene(labels=30, sides=(8, 4, 2), seed=seed)
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)])
    outputs = [levels[torch.randint(0, len(levels), output.shape, generator=generator)] for output in outputs]
    if single is not None:
        outputs = [torch.full_like(output, single) for output in outputs]
    outputs = [output.to(dtype) for output in outputs]
    targets[:, 2:4] = torch.randint(0, 3, (30, 2), generator=generator) / 2  # 0, middle, 1
    targets[:, 4:] = torch.tensor(sides)
    targets[::3, 4:] = 0.3  # some that match an anchor, whatever was drawn
    hyp = Hyp.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml")
    hyp = dataclasses.replace(hyp, fl_gamma=gamma, label_smoothing=smoothing)
    loss = loss_of(hyp)
    result = loss.compute(outputs, targets)
    assert torch.isfinite(result.total) and result.items.isfinite().all() and (result.items >= 0).all()
    assert result.items[0] > 0  # something was matched
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, outputs, targets))


@pytest.mark.parametrize(
    ("nl", "nc", "imgsz", "box", "cls", "obj"), [(3, 1, 640, 0.05, 0.5 / 80, 1), (4, 80, 1280, 0.0375, 0.375, 3)]
)
def test_gains_go_with_layers_classes_and_image_size(hyp, nl, nc, imgsz, box, cls, obj):
    scaled = ComputeLoss.scaled(hyp, SimpleNamespace(nl=nl, nc=nc), imgsz)
    assert (scaled.box, scaled.cls, scaled.obj) == pytest.approx((box, cls, obj))
