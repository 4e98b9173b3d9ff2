"""A slim model fitted to a dense one: the least squares against other solvers, the rows, the command."""

import itertools
import math
import re

import pytest
import torch
from torch import nn

from models import transplant
from models.common import Conv, DySample, GSBottleneck, GSConv
from models.heads import DetectAF
from models.load import load_model
from models.transplant import LeastSquares, check_rows, fit_conv, inherit, match, patches_at, shuffled
from models.yolo import Detect, Model
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

ANCHORS = "anchors: [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]]\ndepth_multiple: 1.0\nwidth_multiple: 1.0\n"
BACKBONE = "backbone: [[-1, 1, Conv, [8, 6, 2, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]]]\n"
NECK = """head:
  [[-1, 1, {conv}, [16, 1, 1]], [-1, 1, {conv}, [32, 3, 2]], [-1, 1, nn.Upsample, [None, 2, nearest]],
   [[-1, 3], 1, Concat, [1]], [-1, {n}, {c3}, [32, False]], [[7, 4], 1, Detect, [nc, anchors]]]
"""
ANCHOR_FREE = {"Detect, [nc, anchors]": "DetectAF, [nc, 8, [GSConv, null, 1], [DWConv, null, 1]]"}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A function that writes a model YAML of two levels with these blocks in the neck."""
    folder = tmp_path_factory.mktemp("cfg")

    def write(conv="Conv", c3="C3", n=1, **changes):
        text = f"nc: 4\n{ANCHORS}{BACKBONE}{NECK.format(conv=conv, c3=c3, n=n)}"
        for old, new in changes.get("replace", {}).items():
            text = text.replace(old, new)
        path = folder / f"{len(list(folder.iterdir()))}.yaml"
        path.write_text(text)
        return str(path)

    return write


def drawn(cfg, seed, lively=False):
    """A model with weights of a seed; `lively`: with batch norms and biases as of a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(cfg, nc=4).eval()
        if lively:
            for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
                norm.running_mean.normal_(0, 0.2)
                norm.running_var.uniform_(0.05, 0.3)
                nn.init.uniform_(norm.weight, 0.8, 1.2)
                nn.init.normal_(norm.bias, 0, 0.3)
            for layer in model.head.m:
                nn.init.normal_(layer.weight, std=0.2)
                if model.head.objectness:
                    layer.bias.data.view(3, -1)[:, 4] = -2.0
    return model.requires_grad_(False)


def coarse_images(batches=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batches, 8, 3, 16, 16, generator=generator)
    return [nn.functional.interpolate(one, 64, mode="bilinear").mul(255).byte() for one in coarse]


# --------------------------------------------------------------------------------------------- least squares


def test_least_squares_are_those_of_a_solver_in_whatever_parts_the_samples_come():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=generator) + 3, torch.randn(60, 2, generator=generator) - 7
    weights = torch.rand(60, generator=generator) + 0.1
    squares = LeastSquares()
    for part in (slice(0, 7), slice(7, 60)):
        squares.add(x[part], y[part], weights[part])
    weight, bias, r2 = squares.solve(0.0)
    root = weights.sqrt()[:, None]
    ones = torch.cat((x, torch.ones(60, 1)), 1)
    expected = torch.linalg.lstsq((ones * root).double(), (y * root).double()).solution
    # what rounding adds to the inputs' variance is the only difference
    torch.testing.assert_close(weight.T.double(), expected[:-1], atol=2e-3, rtol=0)
    torch.testing.assert_close(bias.double(), expected[-1], atol=2e-2, rtol=0)
    error = ((y - x @ weight.T - bias).square() * weights[:, None]).sum(0) / weights.sum()
    mean = (y * weights[:, None]).sum(0) / weights.sum()
    variance = ((y - mean).square() * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(r2, 1 - error / variance, atol=1e-4, rtol=0)


def test_autocast_takes_no_digits():
    """Products of 16 bits would make noise of what is nearly collinear."""
    x = torch.randn(200, 1) + 0.01 * torch.randn(200, 8)
    y, found = x.sum(1, keepdim=True), []
    for enabled in (False, True):
        squares = LeastSquares()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            squares.add(x, y)
        found.append(squares.solve(1e-4)[0])
    assert torch.equal(*found)


def test_a_strong_pull_gives_the_weights_that_it_pulls_towards():
    x, y = torch.randn(50, 3), torch.randn(50, 2)
    squares, towards = LeastSquares(), torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    squares.add(x, y)
    weight, bias, _ = squares.solve(1e6, towards)
    torch.testing.assert_close(weight, towards, atol=1e-3, rtol=0)
    torch.testing.assert_close(bias, y.mean(0) - towards @ x.mean(0), atol=1e-2, rtol=0)


def test_problems_side_by_side_are_solved_each_for_itself():
    x, y = torch.randn(3, 40, 4), torch.randn(3, 40, 1)
    together = LeastSquares()
    together.add(x, y)
    for number in range(3):
        alone = LeastSquares()
        alone.add(x[number], y[number])
        for ours, theirs in zip(together.solve(0.1), alone.solve(0.1), strict=True):
            torch.testing.assert_close(ours[number], theirs)


def test_channels_are_paired_so_that_no_exchange_of_two_pairs_is_better():
    loss = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    tellers, told = match(loss)
    assert sorted([*tellers.tolist(), *told.tolist()]) == list(range(16))
    assert all(loss[a, b] <= loss[b, a] for a, b in zip(tellers, told, strict=True))
    cost = torch.minimum(loss, loss.T)
    for (a, b), (c, d) in itertools.combinations(list(zip(tellers.tolist(), told.tolist(), strict=True)), 2):
        assert cost[a, b] + cost[c, d] <= min(cost[a, c] + cost[b, d], cost[a, d] + cost[b, c]) + 1e-6


def test_channels_that_tell_each_other_are_paired():
    loss, order = torch.ones(12, 12), torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    for teller, told in zip(order[::2], order[1::2], strict=True):
        loss[teller, told] = 0.1
    assert sorted(zip(*(one.tolist() for one in match(loss)), strict=True)) == sorted(
        zip(order[::2], order[1::2], strict=True)
    )


# ------------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize(("k", "s", "groups"), [(1, 1, 1), (3, 2, 1), (3, 1, 1), (5, 1, 6)])
def test_a_convolution_is_found_again(k, s, groups):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    source, receiver = (Conv(6, 6, k, s, g=groups).eval().requires_grad_(False) for _ in range(2))
    inputs = [torch.randn(4, 6, 12, 10, generator=generator) for _ in range(2)]
    targets = [source.conv(maps) + torch.arange(6.0)[:, None, None] for maps in inputs]
    places = transplant.draw_places(targets, generator)
    r2 = fit_conv(receiver, inputs, targets, places, 1e-9)
    assert r2.min() > 0.999
    for maps, target in zip(inputs, targets, strict=True):
        torch.testing.assert_close(receiver.bn(receiver.conv(maps)), target, atol=5e-3, rtol=0)
    outputs = torch.cat([receiver.conv(maps) for maps in inputs])
    torch.testing.assert_close(receiver.bn.running_mean, outputs.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(receiver.bn.running_var, outputs.var((0, 2, 3)), atol=1e-3, rtol=1e-1)


def test_patches_are_what_the_convolution_reads():
    conv = nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 2))
    maps = torch.randn(2, 3, 9, 8)
    output = conv(maps)
    places = torch.tensor([[0, 0, 0], [1, 4, 7], [1, 2, 3]])
    seen = patches_at(maps, places, conv).flatten(1) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(seen, transplant.values_at(output, places), atol=1e-5, rtol=1e-5)


def test_the_order_of_channels_is_the_shuffles():
    block = GSConv(4, 8).eval()
    maps = torch.randn(1, 4, 3, 3)
    first = block.cv1(maps)
    joined = torch.cat((first, block.cv2(first)), 1)
    torch.testing.assert_close(block(maps), joined[:, shuffled(torch.arange(8))])


@pytest.mark.parametrize(
    ("conv", "c3", "n", "least", "head"),
    [
        ("GSConv", "C3", 1, 0.85, {}),
        ("GSConv", "VoVGSCSP", 1, 0.8, ANCHOR_FREE),
        ("Conv", "VoVGSCSP", 2, 0.8, {}),
        ("GSConv", "VoVGSCSPC", 2, 0.6, {}),
        ("Conv", "C3GS", 2, 0.8, {}),
        ("GSConv", "C3GS", 1, 0.7, {"[32, False]": "[32]"}),
    ],
)
def test_rows_give_what_their_twins_give(cfg, conv, c3, n, least, head):
    teacher, student = drawn(cfg(n=n, replace=head), 0, lively=True), drawn(cfg(conv, c3, n, replace=head), 1)
    images, fresh = coarse_images(), coarse_images(seed=1)[0].float() / 255
    with torch.no_grad():
        wanted, before = teacher(fresh)[0], student(fresh)[0]
    fits = inherit(student, teacher, images, steps=0)
    assert [fit.row for fit in fits] == [row for row in (3, 4, 7) if row == 7 or conv == "GSConv"]
    assert fits[-1].r2 > least
    with torch.no_grad():
        after = student(fresh)[0]
    # confidences on images that the fit has not seen
    error, distance = ((one[..., 4:] - wanted[..., 4:]).square().mean().sqrt() for one in (after, before))
    assert error < 0.35 * distance
    assert not student.training
    if not head:
        assert torch.equal(student.head.anchors, teacher.head.anchors)


@pytest.mark.parametrize("args", ["[32, False]", "[32]"])
def test_a_c3_of_fewer_hidden_channels_keeps_those_that_tell_most(cfg, args):
    wide, narrow = ({"[32, False]": one} for one in (args, f"{args[:-1]}, {'True, ' * (args == '[32]')}1, 0.25]"))
    teacher, images = drawn(cfg(n=2, replace=wide), 0, lively=True), coarse_images()
    for bottleneck in teacher.model[7].m:  # without add they would have a choice of their own
        assert bottleneck.add == (args == "[32]")
    with torch.no_grad():
        for conv in (teacher.model[7].cv1, teacher.model[7].m[1].cv2, teacher.model[7].cv2):
            conv.bn.weight[::2] *= 0.01  # half of the channels hardly vary
            conv.bn.bias[::2] *= 0.01
    (fit,) = inherit(drawn(cfg(n=2, replace=narrow), 1), teacher, images, steps=0)
    assert fit.row == 7 and fit.r2 > 0.85


def test_the_pull_is_towards_the_twins_filters_in_the_order_of_the_inputs(cfg, monkeypatch):
    teacher, student, given = drawn(cfg(), 0, lively=True), drawn(cfg("GSConv", "VoVGSCSP"), 1), {}
    fit_head = transplant._fit_head
    monkeypatch.setattr(transplant, "_fit_head", lambda *parts: given.update(parts[3]) or fit_head(*parts))
    monkeypatch.setattr(transplant, "RIDGE", 1e6)
    monkeypatch.setattr(transplant, "RIDGE_OF_HEAD", 1e6)
    inherit(student, teacher, coarse_images(), steps=0)
    assert given[3].tolist() != list(range(16)) and torch.equal(given[6], torch.cat((given[5], given[3] + 32)))
    dense = given[4][torch.argsort(shuffled(torch.arange(32)))[:16]]  # channels of the twin that row 4 computes densely
    wanted = [
        (student.model[4].cv1, transplant.folded_weight(teacher.model[4], given[3])[dense]),
        (student.model[7].cv1, transplant.folded_weight(teacher.model[7].cv1, given[6])),
    ]
    for block, weight in wanted:
        torch.testing.assert_close(transplant.folded_weight(block), weight, atol=1e-3, rtol=1e-3)
    own, twin = (transplant.folded_weight(model.model[7].cv3) for model in (student, teacher))
    torch.testing.assert_close(own[:, :16], twin[:, 16:], atol=1e-3, rtol=1e-3)  # the passed branch comes first here
    torch.testing.assert_close(own[:, 16:].sum(1), twin[:, :16].sum(1), atol=1e-3, rtol=1e-3)
    for layer, original, row in zip(student.head.m, teacher.head.m, (7, 4), strict=True):
        torch.testing.assert_close(layer.weight, original.weight[:, given[row]], atol=1e-3, rtol=1e-3)


def test_the_shortcut_of_a_bottleneck_takes_its_share():
    """A twin that is linear in its input: neither of the GSConvs could give that."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.cv1 = Conv(8, 8).eval()
            self.map = nn.Conv2d(8, 8, 1)

        def forward(self, maps):
            return self.map(maps)

    torch.manual_seed(0)
    block, twin = GSBottleneck(8, 8, e=1.0).eval().requires_grad_(False), Linear().requires_grad_(False)
    inputs = [torch.randn(4, 8, 12, 12) for _ in range(2)]
    targets, order = transplant.fit_bottleneck(block, [twin], inputs, inputs, torch.Generator().manual_seed(0))
    wanted, given = torch.cat(targets)[:, order], torch.cat([block(maps) for maps in inputs])
    assert ((given - wanted).square().mean((0, 2, 3)) < 0.01 * wanted.var((0, 2, 3))).all()


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("scale", [2, 3])
def test_a_dysample_begins_as_the_upsampling_that_it_replaces(mode, scale):
    block, twin = DySample(8, scale).requires_grad_(False), nn.Upsample(scale_factor=scale, mode=mode)
    maps, order = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(0)), torch.randperm(8)
    assert transplant.FITS[DySample, nn.Upsample](block, twin, [maps], [maps], order, None) is order
    torch.testing.assert_close(block(maps), twin(maps), rtol=0, atol=1e-5)


def test_rows_beside_a_dysample_are_fitted(cfg):
    changes = {"nn.Upsample, [None, 2, nearest]": "DySample, [2]"}
    teacher, student = drawn(cfg(), 0, lively=True), drawn(cfg("GSConv", "VoVGSCSP", replace=changes), 1)
    fits = inherit(student, teacher, coarse_images(), steps=0)
    assert [(fit.row, fit.block) for fit in fits if fit.block == "DySample"] == [(5, "DySample")]
    assert fits[-1].row == 7 and fits[-1].r2 > 0.6


@pytest.mark.parametrize("head", [{}, ANCHOR_FREE], ids=["anchors", "anchor-free"])
def test_gradient_steps_bring_the_logits_nearer_and_leave_the_backbone(cfg, head):
    teacher, images = drawn(cfg(replace=head), 0, lively=True), coarse_images(8)
    errors = []
    for steps in (0, 40):
        student = drawn(cfg("GSConv", "VoVGSCSPC", replace=head), 1)
        inherit(student, teacher, images, steps=steps)
        with torch.no_grad():
            rows = [torch.cat([model(batch.float() / 255)[0] for batch in images]) for model in (student, teacher)]
        errors.append((rows[0][..., 4:] - rows[1][..., 4:]).square().mean().item())
        for key, value in teacher.state_dict().items():
            if int(key.split(".")[1]) < 3:
                assert torch.equal(student.state_dict()[key], value)
        assert all(norm.momentum == 0.03 for norm in student.modules() if isinstance(norm, nn.BatchNorm2d))
    assert errors[1] < errors[0]


def test_sixteen_bits_fit_as_well(cfg):
    teacher, found = drawn(cfg(), 0, lively=True), []
    for dtype in (None, torch.bfloat16):
        student = drawn(cfg("GSConv", "VoVGSCSP"), 1)
        found.append([fit.r2 for fit in inherit(student, teacher, coarse_images(), steps=1, dtype=dtype)])
        assert all(value.dtype != torch.bfloat16 for value in student.state_dict().values())
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_the_same_seed_gives_the_same_model(cfg):
    teacher = drawn(cfg(), 0, lively=True)
    states = []
    for seed in (0, 0, 1):
        student = drawn(cfg("GSConv", "VoVGSCSP"), 1)
        inherit(student, teacher, coarse_images(), steps=2, seed=seed)
        states.append(student.state_dict())
    different = [[key for key in states[0] if not torch.equal(states[0][key], other[key])] for other in states[1:]]
    assert not different[0] and different[1]


@pytest.mark.parametrize("head", [Detect(4, [[8] * 6], [8]), DetectAF(4, [8], 8)], ids=["anchors", "anchor-free"])
def test_logits_that_agree_cost_nothing(head):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, head.na * head.channels, 4, 4, generator=generator)
    loss = transplant.HEADS[type(head)].logit_loss
    assert loss(logits, logits, head).item() == pytest.approx(0, abs=1e-4)
    for part in (slice(0, 4), slice(-4, None)):  # boxes, classes
        other = logits.unflatten(1, (head.na, -1)).clone()
        other[:, :, part] += torch.tensor([2.0, 0.0, -2.0, 1.0])[:, None, None]
        assert loss(other.flatten(1, 2), logits, head) > 0.01


def test_a_slim_model_has_its_teachers_activation(cfg):
    relu = {"nc: 4": "nc: 4\nactivation: nn.ReLU()"}
    teacher, silu = drawn(cfg(replace=relu), 0), drawn(cfg(), 0)
    student = transplant.make_student(teacher, cfg("GSConv"), 0)
    assert {type(block.act) for block in student.modules() if getattr(block, "default_act", False)} == {nn.ReLU}
    assert transplant.make_student(teacher.for_inference(), cfg("GSConv", replace=relu), 0).yaml == student.yaml
    with pytest.raises(UserError, match=r"not the same activation \(ReLU\(\) and SiLU\(\)\)"):
        transplant.make_student(silu, cfg("GSConv", replace=relu), 0)


@pytest.mark.parametrize("kind", ["Conv", "DWConv", "GSConv"])
def test_branches_of_a_head_are_found_again_in_another_order_of_their_inputs(kind):
    """What only the channels' order keeps from being equal is equal after the fit."""
    torch.manual_seed(0)
    twin, own = (DetectAF(2, [16], 8, [kind, 1]).eval().requires_grad_(False).box[0] for _ in range(2))
    order, generator = torch.randperm(16), torch.Generator().manual_seed(0)
    originals = [torch.randn(4, 16, 16, 16, generator=generator) for _ in range(4)]
    maps, target, channels = [one[:, order] for one in originals], originals, order
    for block, other in zip(own, twin, strict=True):
        fit = transplant.FITS[type(block), type(other)]
        channels = fit(block, other, maps, target, channels, generator)
        maps, target = [block(one) for one in maps], [other(one) for one in target]
    torch.testing.assert_close(maps[0], target[0][:, channels], atol=2e-2, rtol=0)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("slim", "message"),
    [
        ({}, "the same rows"),
        ({"conv": "GhostConv"}, r"row 3 \(GhostConv for Conv\): there is no way"),
        ({"conv": "GSConvns"}, r"row 3 \(GSConvns for Conv\)"),
        ({"conv": "GSConv", "replace": {"[[7, 4], 1, Detect": "[[7, 3], 1, Detect"}}, "the heads read other rows"),
        ({"replace": {"[[-1, 3], 1, Concat, [1]]": "[[-1, 2], 1, Concat, [1]]"}}, "row 6 .* reads other rows"),
        (
            {"conv": "GSConv", "replace": {"GSConv, [16": "GSConv, [24"}},
            r"row 3 .* gives maps \(24, 16, 16\), not \(16",
        ),
        ({"replace": {"head:\n  [": "head:\n  [[-1, 1, Conv, [16, 1, 1]], "}}, "8 .*rows|9 .*rows|10 and 9 rows"),
    ],
    ids=str,
)
def test_models_that_are_no_twins_are_refused_by_row(cfg, slim, message):
    if "replace" in slim and "head" in next(iter(slim["replace"])):
        slim["replace"] |= {"[-1, 3], 1, Concat": "[-1, 4], 1, Concat", "[7, 4], 1, Detect": "[8, 5], 1, Detect"}
    with pytest.raises(UserError, match=message):
        check_rows(drawn(cfg(**slim), 0), drawn(cfg(), 0))


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def dense(cfg, tiny_shapes, tmp_path_factory):
    """A dense model trained for a moment."""
    import train

    project = tmp_path_factory.mktemp("dense")
    options = {"cfg": cfg(), "data": str(tiny_shapes), "imgsz": 64, "batch_size": 8, "epochs": 2, "workers": 0}
    return (
        train.run(**options, device="cpu", amp="off", noplots=True, project=str(project)).save_dir + "/weights/best.pt"
    )


def run(dense, cfg, tmp_path, *more):
    arguments = ["--weights", dense, "--cfg", cfg, "--project", str(tmp_path), "--device", "cpu", "--amp", "off"]
    options = transplant.build_parser().parse_args([*arguments, "--workers", "0", "--images", "48", *more])
    return transplant.main(options)


def test_the_command_writes_a_checkpoint_that_every_command_takes(dense, cfg, tmp_path, monkeypatch, caplog):
    import val

    monkeypatch.setattr(transplant, "MIN_IMAGES", 16)
    caplog.set_level("INFO")
    before, after = run(dense, cfg("GSConv", "VoVGSCSP"), tmp_path, "--steps", "3")
    file = tmp_path / "exp" / "weights" / "best.pt"
    model = load_model(file)
    assert {value.dtype for value in load_checkpoint(file)["model"].values()} == {torch.float16, torch.int64}
    assert [type(row).__name__ for row in model.model][3:8:4] == ["GSConv", "VoVGSCSP"]
    assert model.names == {0: "circle", 1: "square", 2: "triangle", 3: "star"}
    figures, _, _ = val.run(weights=str(file), plots=False, project=str(tmp_path), device="cpu", workers=0, imgsz=64)
    assert figures[3] == pytest.approx(after.map, abs=2e-3) and math.isfinite(before.map)
    assert "row   3  GSConv for Conv" in caplog.text and f"{before.map:.4f} -> {after.map:.4f}" in caplog.text


def test_training_a_slim_model_from_dense_weights_fits_it_first(dense, cfg, tiny_shapes, tmp_path, monkeypatch, caplog):
    import train

    monkeypatch.setattr(transplant, "IMAGES", 48)
    monkeypatch.setattr(transplant, "STEPS", 3)
    caplog.set_level("INFO")
    slim = cfg("GSConv", "VoVGSCSP", replace={"[[10, 13,": "[[11, 14,"})  # a fitted model has its teacher's anchors
    options = {"data": str(tiny_shapes), "imgsz": 64, "batch_size": 8, "epochs": 1, "workers": 0, "amp": "off"}
    options |= {"device": "cpu", "noplots": True, "project": str(tmp_path), "noval": True}
    few = train.run(weights=dense, cfg=slim, **options)
    assert "24 training images are too few" in caplog.text
    monkeypatch.setattr(transplant, "MIN_IMAGES", 16)
    run(dense, slim, tmp_path, "--name", "fitted")
    in_two_steps = train.run(weights=str(tmp_path / "fitted" / "weights" / "best.pt"), **options)
    caplog.clear()
    in_one_step = train.run(weights=dense, cfg=slim, **options)
    assert "rows 0 to 2: copied" in caplog.text and "row   7  VoVGSCSP for C3" in caplog.text
    without = train.run(weights=dense, cfg=slim, no_inherit=True, **options)
    states = [
        load_checkpoint(f"{one.save_dir}/weights/last.pt")["model"] for one in (in_two_steps, in_one_step, few, without)
    ]
    for equal, (one, other) in ((True, states[:2]), (True, states[2:]), (False, states[1:3])):
        assert equal == all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_slim_model_with_another_head_inherits_the_neck(dense, cfg, tiny_shapes, tmp_path, monkeypatch, caplog):
    import train

    slim = cfg("GSConv", "VoVGSCSP", replace=ANCHOR_FREE)
    with pytest.raises(UserError, match=r"the heads differ: only a training with labels"):
        run(dense, slim, tmp_path)
    monkeypatch.setattr(transplant, "IMAGES", 48)
    monkeypatch.setattr(transplant, "MIN_IMAGES", 16)
    caplog.set_level("INFO")
    options = {"data": str(tiny_shapes), "imgsz": 64, "batch_size": 8, "epochs": 1, "workers": 0, "amp": "off"}
    train.run(weights=dense, cfg=slim, device="cpu", noplots=True, noval=True, project=str(tmp_path), **options)
    assert "row   3  GSConv for Conv" in caplog.text and "row 8: DetectAF: nothing" in caplog.text


def test_a_head_of_another_kind_stays_as_it_is(cfg):
    teacher, images = drawn(cfg(), 0, lively=True), coarse_images(8)
    student = drawn(cfg("GSConv", "VoVGSCSP", replace=ANCHOR_FREE), 1)
    before = {key: value.clone() for key, value in student.head.state_dict().items()}
    fits = inherit(student, teacher, images, steps=4)
    assert [fit.row for fit in fits] == [3, 4, 7] and all(0 < fit.r2 < 1 for fit in fits)
    assert all(torch.equal(value, before[key]) for key, value in student.head.state_dict().items())


def test_a_model_that_is_no_twin_takes_what_is_the_same(dense, cfg, tiny_shapes, tmp_path, caplog):
    import train

    caplog.set_level("INFO")
    other = cfg(replace={"Conv, [32, 3, 2]": "Conv, [24, 3, 2]"})
    options = {"data": str(tiny_shapes), "imgsz": 64, "batch_size": 8, "epochs": 1, "workers": 0, "device": "cpu"}
    train.run(weights=dense, cfg=other, noplots=True, noval=True, project=str(tmp_path), **options)
    assert re.search(r"is not fitted to .*: not the same body: row 4 .* gives maps", caplog.text)
    assert "row 4: Conv: nothing" in caplog.text


def test_a_model_of_another_activation_is_no_twin(dense, cfg, tiny_shapes, tmp_path, caplog):
    import train

    caplog.set_level("INFO")
    options = {"data": str(tiny_shapes), "imgsz": 64, "batch_size": 8, "epochs": 1, "workers": 0, "device": "cpu"}
    options |= {"act": "relu", "noplots": True, "noval": True, "project": str(tmp_path)}
    train.run(weights=dense, cfg=cfg("GSConv", "VoVGSCSP"), **options)
    assert "is not fitted to" in caplog.text and "Fitting" not in caplog.text


def test_weights_that_name_no_data_need_them(cfg, write_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"does not say which data set it was trained on: give --data"):
        run(str(write_checkpoint(data=None)), cfg("GSConv"), tmp_path / "runs")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r"24 training images are too few to fit a model on: at least 32"),
        (("--data", "others.yaml"), r"knows the classes circle, square, triangle, star, .*\(a, b, c, d\)"),
    ],
    ids=["few images", "other classes"],
)
def test_data_that_do_not_suit_are_refused(dense, cfg, tiny_shapes, tmp_path, more, message):
    text = tiny_shapes.read_text().replace("path: .", f"path: {tiny_shapes.parent}")
    others = tmp_path / "others.yaml"
    others.write_text(text.replace("[circle, square, triangle, star]", "[a, b, c, d]"))
    more = [str(others) if one == "others.yaml" else one for one in more]
    with pytest.raises(UserError, match=message):
        run(dense, cfg("GSConv"), tmp_path / "runs", *more)
    assert not (tmp_path / "runs").exists()
