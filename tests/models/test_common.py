"""Blocks: golden outputs, hand-worked reorderings, shapes, gradients, activations."""

import json
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import common, experimental
from models.yolo import Model

GOLDEN_BLOCKS = {
    "GSConv_k1": lambda: common.GSConv(8, 16),
    "GSConv_k3s2": lambda: common.GSConv(8, 16, 3, 2),
    "GSConv_noact": lambda: common.GSConv(8, 16, 3, act=False),
    "GSBottleneck_e1": lambda: common.GSBottleneck(8, 8, e=1.0),
    "GSBottleneck_e05": lambda: common.GSBottleneck(8, 8),
    "GSBottleneckC": lambda: common.GSBottleneckC(8, 8),
    "VoVGSCSP_n1": lambda: common.VoVGSCSP(12, 16),
    "VoVGSCSP_n3": lambda: common.VoVGSCSP(12, 16, 3),
    "VoVGSCSPC": lambda: common.VoVGSCSPC(12, 16),
}

BLOCKS_8_TO_16 = [  # every block with parameters, from 8 channels to 16; the second value is the stride
    (lambda: common.Conv(8, 16, 3, 2), 2),
    (lambda: common.DWConv(8, 16, 3), 1),
    (lambda: common.TransformerBlock(8, 16, 4, 2), 1),
    (lambda: common.Bottleneck(8, 16), 1),
    (lambda: common.Bottleneck(8, 16, g=2), 1),
    (lambda: common.BottleneckCSP(8, 16, 2), 1),
    (lambda: common.C3(8, 16, 2), 1),
    (lambda: common.C3TR(8, 16, 1), 1),
    (lambda: common.C3SPP(8, 16, (3, 5)), 1),
    (lambda: common.C3Ghost(8, 16, 2), 1),
    (lambda: common.C3GS(8, 16, 2), 1),
    (lambda: common.SPP(8, 16), 1),
    (lambda: common.SPPF(8, 16), 1),
    (lambda: common.Focus(8, 16, 3), 2),
    (lambda: common.GhostConv(8, 16, 3, 2), 2),
    (lambda: common.GhostBottleneck(8, 16, 3, 2), 2),
    (lambda: common.GSConv(8, 16, 3, 2), 2),
    (lambda: common.GSConv(8, 16, 3, 2, d=3), 2),
    (lambda: common.GSConvns(8, 16, 3, 2), 2),
    (lambda: common.GSBottleneck(8, 16, s=2), 2),
    (lambda: common.GSBottleneckC(8, 16), 1),
    (lambda: common.VoVGSCSP(8, 16, 2, False, 2), 1),
    (lambda: common.VoVGSCSPC(8, 16), 1),
    (lambda: common.ShuffleV2Block(8, 16, 2), 2),
    (lambda: common.CrossConv(8, 16, 3, 2), 2),
    (lambda: common.MixConv2d(8, 16, (1, 3, 5), 2), 2),
    (lambda: common.MixConv2d(8, 16, (1, 3), 1, False), 1),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", GOLDEN_BLOCKS)
def test_gs_blocks_give_golden_outputs(golden_dir, name, memory_format):
    data = np.load(golden_dir / "gsconv.npz", allow_pickle=False)
    prefix = f"{name}/w/"
    weights = {key[len(prefix) :]: torch.from_numpy(data[key]) for key in data.files if key.startswith(prefix)}
    published = sum(tensor.numel() for key, tensor in weights.items() if "running" not in key)
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("res.")}
    block = GOLDEN_BLOCKS[name]().eval()
    own = {key for key in block.state_dict() if "num_batches" not in key}
    assert own == set(weights)
    block.load_state_dict(weights, strict=False)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    with torch.no_grad():
        y = block.to(memory_format=memory_format)(torch.from_numpy(data[f"{name}/x"]).to(memory_format=memory_format))
    np.testing.assert_allclose(y.numpy(), data[f"{name}/y"], atol=1e-5)
    assert published == json.loads((golden_dir / "gsconv.json").read_text())[name]["params"]


@pytest.mark.parametrize(("make", "stride"), BLOCKS_8_TO_16)
def test_every_parameter_of_every_block_gets_a_gradient(make, stride):
    torch.manual_seed(0)
    block = make()
    y = block(torch.randn(2, 8, 16, 12))
    assert y.shape == (2, 16, 16 // stride, 12 // stride)
    (y * torch.randn_like(y)).sum().backward()
    without = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_shuffle_takes_even_channels_then_odd_ones():
    x = torch.arange(8.0).view(1, 8, 1, 1).expand(3, 8, 2, 5)
    assert common.interleave_halves(x)[2, :, 1, 4].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_shuffle_keeps_channels_last_and_traces_for_any_batch_and_size():
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    assert common.interleave_halves(x).is_contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(common.interleave_halves, torch.randn(1, 6, 3, 3))
    assert torch.equal(traced(x), common.interleave_halves(x))


def test_an_exported_program_has_the_shuffle_in_reshaping_form():
    """Core ML's converter knows no other."""
    program = torch.export.export(common.ShuffleV2Block(8, 8).eval(), (torch.zeros(1, 8, 4, 4),))
    assert not [node for node in program.graph.nodes if "channel_shuffle" in str(node.target)]


def test_shuffle_on_a_gpu_keeps_channels_last_so_that_no_convolution_copies_back():
    with FakeTensorMode(), torch.device("cuda"):  # works out what each kernel makes, without one
        last = torch.empty(2, 8, 5, 7).contiguous(memory_format=torch.channels_last)
        assert common.GSConv(8, 16)(last).is_contiguous(memory_format=torch.channels_last)
        assert common.interleave_halves(torch.empty(2, 8, 5, 7)).is_contiguous()
    x = torch.randn(2, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    assert torch.equal(common.shuffle_channels_last(x, 4), common.interleave_halves(x))


def test_shufflenets_shuffle_takes_one_of_each_half_and_undoes_the_other():
    x = torch.arange(8.0).view(1, 8, 1, 1).expand(3, 8, 2, 5)
    assert common.alternate_halves(x)[2, :, 1, 4].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(common.alternate_halves(common.interleave_halves(x)), x)


@pytest.mark.parametrize(
    ("block", "parameters"),
    [
        # 1x1 24 * 58 twice, 58 * 58; depthwise 24 * 9, 58 * 9; norms of 24 and four times 58 channels
        (lambda: common.ShuffleV2Block(24, 116, 2), 2 * 1392 + 3364 + 216 + 522 + 2 * (24 + 4 * 58)),
        (lambda: common.ShuffleV2Block(116, 116), 2 * 3364 + 522 + 2 * 3 * 58),
        (lambda: common.DySample(64, 2), 64 * 32 + 32),  # 2 axes, 4 groups, 2 x 2 points
        # from the finest level 3x3, from the coarsest 1x1; three times to 16; 48 to 3; 3x3 behind
        (
            lambda: common.ASFF((64, 128, 256), 1),
            (64 * 9 + 256 + 4) * 128 + 3 * (128 * 16 + 32) + 147 + (128 * 9 + 2) * 128,
        ),
        (lambda: common.MSCA(256, 256), 256 * (26 + 2 * (8 + 12 + 22) + 257)),
    ],
)
def test_parameters_by_hand(block, parameters):
    assert sum(parameter.numel() for parameter in block().parameters()) == parameters


def test_the_shufflenet_backbone_is_torchvisions():
    from torchvision.models import shufflenet_v2_x1_0

    reference, own = shufflenet_v2_x1_0().eval(), Model("yolov5n-shufflenet.yaml").model[:8].eval()
    stages = [getattr(reference, name) for name in ("conv1", "maxpool", "stage2", "stage3", "stage4")]
    expected = nn.Sequential(*stages)
    torch.manual_seed(0)
    for module in (*expected.modules(), *own.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    own.load_state_dict(dict(zip(own.state_dict(), expected.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        y = own(x)
        assert y.shape == (2, 464, 2, 3) and y.std() > 0.1
        torch.testing.assert_close(y, expected(x), rtol=1e-5, atol=1e-5)


def test_a_shuffle_unit_of_stride_1_keeps_its_channels():
    with pytest.raises(ValueError, match="8, not 16"):
        common.ShuffleV2Block(8, 16)


def test_dysample_without_offsets_is_bilinear_upsampling():
    block, x = common.DySample(8, 3), torch.randn(2, 8, 5, 7)
    nn.init.zeros_(block.offset.weight)
    expected = nn.functional.interpolate(x, scale_factor=3, mode="bilinear", align_corners=False)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_dysample_samples_where_its_offsets_say():
    """Point by point: of channel k in group k // 2, at (i, j), by the four cells around the moved place."""
    torch.manual_seed(0)
    block, x = common.DySample(8, 2), torch.randn(1, 8, 3, 4)
    nn.init.normal_(block.offset.weight)
    y, offset = (tensor[0].detach().numpy() for tensor in (block(x), block.offset(x) * 0.25))
    assert np.abs(offset).max() > 1  # past neighbours, and over the border
    offset = offset.reshape(2, 4, 2, 2, 3, 4)  # axis, group, point's row and column, cell
    for k, i, j in np.ndindex(y.shape):
        moved = offset[:, k // 2, i % 2, j % 2, i // 2, j // 2]
        column = np.clip((j + 0.5) / 2 + moved[0] - 0.5, 0, 3)
        row = np.clip((i + 0.5) / 2 + moved[1] - 0.5, 0, 2)
        share_x, share_y = np.array([1 - column % 1, column % 1]), np.array([1 - row % 1, row % 1])
        rows, columns = (np.minimum([int(at), int(at) + 1], last) for at, last in ((row, 2), (column, 3)))
        expected = share_y @ x[0, k].numpy()[np.ix_(rows, columns)] @ share_x
        assert y[k, i, j] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_asff_adds_up_the_resized_levels_by_their_weights(level):
    torch.manual_seed(0)
    block = common.ASFF((8, 12, 16), level).eval()
    maps = [torch.randn(2, c, side, side) for c, side in ((8, 16), (12, 8), (16, 4))]
    nn.init.zeros_(block.weights.weight)
    block.weights.bias.data = torch.tensor([0.2, 0.3, 0.5]).log()
    block.expand = nn.Identity()
    convs = [part for resize in block.resize for part in resize.children() if isinstance(part, common.Conv)]
    enlarge, shrink = nn.functional.interpolate, nn.functional.max_pool2d
    a, b, c = maps
    with torch.no_grad():
        resized = {
            0: lambda: (a, enlarge(convs[0](b), scale_factor=2), enlarge(convs[1](c), scale_factor=4)),
            1: lambda: (convs[0](a), b, enlarge(convs[1](c), scale_factor=2)),
            2: lambda: (convs[0](shrink(a, 3, 2, 1)), convs[1](b), c),
        }[level]()
        expected = 0.2 * resized[0] + 0.3 * resized[1] + 0.5 * resized[2]
        torch.testing.assert_close(block(maps), expected)


def test_asff_weighs_cell_by_cell_and_learns_all_of_it():
    torch.manual_seed(0)
    block = common.ASFF((8, 12), 0)
    maps = [torch.randn(2, 8, 6, 8), torch.randn(2, 12, 3, 4)]
    y = block(maps)
    (y * torch.randn_like(y)).sum().backward()
    assert y.shape == (2, 8, 6, 8) and all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


def test_msca_is_a_gate_of_depthwise_kernels_of_7_11_and_21():
    """A 1 x k strip behind a k x 1 one is the k x k kernel of their products."""
    torch.manual_seed(0)
    block, x = common.MSCA(4, 4), torch.randn(1, 4, 24, 25)
    for conv in (part for strip in block.strips for part in strip):
        nn.init.zeros_(conv.bias)
    with torch.no_grad():
        near = total = block.local(x)
        for k, strip in zip((7, 11, 21), block.strips, strict=True):
            kernel = strip[1].weight @ strip[0].weight  # (4, 1, k, k)
            total = total + nn.functional.conv2d(near, kernel, padding=k // 2, groups=4)
        torch.testing.assert_close(block(x), block.mix(total) * x, rtol=1e-4, atol=1e-5)
    block(x).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


def test_sppf_is_spp_with_windows_5_9_13():
    torch.manual_seed(0)
    fast, slow = common.SPPF(8, 8, 5).eval(), common.SPP(8, 8, (5, 9, 13)).eval()
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(1, 8, 20, 17)
    with torch.no_grad():
        assert torch.equal(fast(x), slow(x))


def test_focus_takes_the_four_phases_by_column_then_row():
    focus = common.Focus(1, 4, act=False).eval()
    focus.conv.conv.weight.data = torch.eye(4).view(4, 4, 1, 1)
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 2, 2)
    with torch.no_grad():
        y = focus(x).flatten() * (1 + 1e-5) ** 0.5  # the new batch norm divides by sqrt(1 + eps)
    assert y.tolist() == pytest.approx([0, 2, 1, 3])  # (row, column): (0,0) (1,0) (0,1) (1,1)


def test_contract_moves_squares_into_channels_and_expand_moves_them_back():
    x = torch.arange(8.0).view(1, 2, 2, 2)  # channel 0: 0 1 / 2 3, channel 1: 4 5 / 6 7
    contracted = common.Contract(2)(x)
    assert contracted.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(common.Expand(2)(contracted), x)
    large = torch.randn(2, 12, 6, 8).contiguous(memory_format=torch.channels_last)
    assert torch.equal(common.Contract(2)(common.Expand(2)(large)), large)


def test_classify_pools_one_map_or_several():
    head = common.Classify(12, 5)
    assert head([torch.randn(2, 8, 6, 6), torch.randn(2, 4, 3, 3)]).shape == (2, 5)
    assert head(torch.randn(2, 12, 6, 6)).shape == (2, 5)


def test_bottleneck_adds_its_input_only_where_channels_agree():
    x = torch.randn(1, 8, 4, 4)
    for c2, shortcut, adds in ((8, True, True), (8, False, False), (16, True, False)):
        block = common.Bottleneck(8, c2, shortcut).eval()
        with torch.no_grad():
            own = block.cv2(block.cv1(x))
            assert torch.equal(block(x), own + x if adds else own)


def test_odd_output_channels_cannot_be_halved():
    with pytest.raises(ValueError, match="even number of output channels, got 7"):
        common.GSConv(8, 7)


def test_a_gsconv_of_another_depthwise_side_is_the_same_with_fewer_taps():
    """A 5x5 kernel that is zero around its middle does what the 3x3 in the middle does."""
    small, large = common.GSConv(4, 8, 3, d=3).eval(), common.GSConv(4, 8, 3).eval()
    taps = small.state_dict()
    taps["cv2.conv.weight"] = nn.functional.pad(taps["cv2.conv.weight"], (1, 1, 1, 1))
    large.load_state_dict(taps)
    x = torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(small(x), large(x))


@pytest.mark.parametrize("side", [4, 0, -3, 3.0, True, "3"])
def test_a_depthwise_side_is_odd(side):
    with pytest.raises(ValueError, match=re.escape(f"must be an odd whole number, got {side!r}")):
        common.GSConv(8, 8, d=side)


@pytest.mark.parametrize(
    ("text", "key"),
    [("relu", "nn.ReLU()"), ("HARDSWISH", "nn.Hardswish()"), ("nn.leakyrelu(0.1)", "nn.LeakyReLU(0.1)")]
    + [(" torch.nn.SiLU() ", "nn.SiLU()"), ("ReLU6", "nn.ReLU6()")],
)
def test_an_activation_of_the_command_line_is_what_a_yaml_says(text, key):
    assert common.activation_key(text) == key


@pytest.mark.parametrize("text", ["relux", "relu(", "", "LeakyReLU(a=1)", "linear"])
def test_what_is_no_activation_is_refused(text):
    with pytest.raises(ValueError, match="is not an activation"):
        common.activation_key(text)


@pytest.mark.parametrize(
    ("text", "cls", "attribute"),
    [
        ("nn.SiLU()", nn.SiLU, {}),
        ("SiLU", nn.SiLU, {}),
        ("torch.nn.Mish()", nn.Mish, {}),
        ("nn.LeakyReLU(0.1)", nn.LeakyReLU, {"negative_slope": 0.1}),
        ("LeakyReLU(negative_slope=-0.2)", nn.LeakyReLU, {"negative_slope": -0.2}),
    ],
)
def test_activations_are_made_from_their_names(text, cls, attribute):
    act = common.parse_activation(text)
    assert type(act) is cls
    assert {name: getattr(act, name) for name in attribute} == attribute


@pytest.mark.parametrize(
    "text", ["nn.Silu()", "__import__('os').system('true')", "nn.LeakyReLU(print(1))", "SiLU(1, 2)", "", "nn.Conv2d"]
)
def test_other_texts_are_no_activation(text):
    with pytest.raises(ValueError, match="is not an activation"):
        common.parse_activation(text)


def test_the_models_activation_replaces_defaults_but_not_choices():
    block = nn.Sequential(common.C3(8, 8), common.Conv(8, 8, act=nn.ReLU()), common.Conv(8, 8, act=False))
    common.set_activation(block, "nn.Mish()")
    assert {type(block[0].cv1.act), type(block[0].m[0].cv2.act)} == {nn.Mish}
    assert type(block[1].act) is nn.ReLU
    assert type(block[2].act) is nn.Identity
    csp = common.BottleneckCSP(8, 8)
    common.set_activation(csp, {"BottleneckCSP": "nn.LeakyReLU(0.1)"})
    assert (type(csp.act), type(csp.cv1.act)) == (nn.LeakyReLU, nn.SiLU)


def test_mixconv_shares_channels_evenly():
    assert [conv.out_channels for conv in common.MixConv2d(8, 16, (1, 3, 5)).m] == [6, 5, 5]


def test_mixconv_shares_channels_for_equal_weights():
    """Sides 1 and 3: shares s and t with s = 9t and s + t = 20 are 18 and 2; rounding never loses a channel."""
    assert [conv.out_channels for conv in common.MixConv2d(4, 20, (1, 3), equal_ch=False).m] == [18, 2]
    for c2 in range(30, 60):
        assert sum(conv.out_channels for conv in common.MixConv2d(4, c2, (1, 3, 5), equal_ch=False).m) == c2


def test_sum_adds_its_inputs_plain_or_weighted():
    x = [torch.full((1, 1, 1, 1), value) for value in (1.0, 10.0, 100.0)]
    assert common.Sum(3)(x).item() == 111
    weighted = common.Sum(3, weight=True)
    assert weighted.w.tolist() == [-0.5, -1.0]
    expected = 1 + 10 * 2 * torch.tensor(0.5).neg().sigmoid() + 100 * 2 * torch.tensor(1.0).neg().sigmoid()
    assert weighted(x).item() == pytest.approx(expected.item())


def test_crossconv_adds_its_input_when_asked():
    block = common.CrossConv(8, 8, shortcut=True).eval()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        assert torch.equal(block(x), x + block.cv2(block.cv1(x)))


def test_rare_blocks_are_pickled_under_yolov5s_names():
    """`export.py --include yolov5` saves whole modules; YOLOv5 looks for these in its own models/experimental.py."""
    for block in (common.CrossConv(8, 8), common.MixConv2d(8, 8), common.Sum(2)):
        pickled = pickle.dumps(block, protocol=2)  # as torch.save
        assert f"cmodels.experimental\n{type(block).__name__}\n".encode() in pickled
        assert type(pickle.loads(pickled)) is type(block) is getattr(experimental, type(block).__name__)
