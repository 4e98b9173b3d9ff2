"""Folding batch norm and rewriting for inference change nothing but rounding, and leave out what they should."""

import gc
import inspect
import linecache

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import _symbolic_trace, graph_module

from models.common import Conv, alternate_halves, interleave_halves
from models.config import read_config, scaled_channels
from models.deploy import fold_batchnorm, fold_model, rewrite
from models.heads import RawOutputs
from models.load import load_model
from models.yolo import BLOCKS, Block, Model, register_block
from utils.files import ROOT
from utils.images import letterbox


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Such small maps are not worth sharing out, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise_norms(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -1, 1),
                (norm.running_mean, -1, 1),
                (norm.running_var, 0.3, 3),
            ):
                tensor.data.uniform_(low, high, generator=generator)


@pytest.mark.parametrize(("bias", "groups", "affine"), [(False, 1, True), (True, 1, True), (True, 4, False)])
def test_one_convolution_does_what_convolution_and_norm_did(bias, groups, affine):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, 2, 1, groups=groups, bias=bias).double()
    norm = nn.BatchNorm2d(12, eps=1e-3, affine=affine).double().eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.3, 3)
    if affine:
        norm.weight.data.uniform_(-1, 1)
        norm.bias.data.uniform_(-1, 1)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(conv(x))
        torch.testing.assert_close(fold_batchnorm(conv, norm)(x), expected, atol=1e-12, rtol=1e-12)


def test_folding_keeps_type_and_memory_format():
    block = Conv(8, 8, 3).half().to(memory_format=torch.channels_last)
    fold_model(block)
    assert block.bn is None
    assert block.conv.weight.dtype == block.conv.bias.dtype == torch.float16
    assert block.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("cfg", "parameters", "layers", "keys"),
    [
        ("yolov5n.yaml", 1867405, 213, 121),
        ("yolov5s-ghost.yaml", 3888789, 366, 181),
        ("yolov5s-transformer.yaml", 7226653, 216, 128),
    ],
)
def test_a_folded_model_has_the_published_counts_and_the_same_output(cfg, parameters, layers, keys):
    torch.manual_seed(0)
    model = Model(cfg).eval()
    randomise_norms(model)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        before = model(x)[0]
        after = model.fuse()(x)[0]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(1 for _ in model.modules()) == layers
    assert len(model.state_dict()) == keys
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)


def test_norms_outside_a_conv_are_left_alone():
    from models.common import BottleneckCSP

    block = BottleneckCSP(8, 8).eval()
    randomise_norms(block)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        before = block(x)
        torch.testing.assert_close(fold_model(block)(x), before, rtol=1e-4, atol=1e-5)
    assert isinstance(block.bn, nn.BatchNorm2d)


# ---- rewriting for inference ----

HEAD_GAIN = 30  # fresh heads hardly tell maps apart


def trained_like(cfg, seed: int = 0) -> Model:
    """A model in evaluation mode with batch norm and outputs that differ from place to place."""
    torch.manual_seed(seed)
    model = Model(cfg).eval()
    randomise_norms(model)
    for conv in model.head.m:
        conv.weight.data *= HEAD_GAIN
    return model


def narrow(name: str) -> dict:
    """A model YAML with all its rows and repeats at half the width of the n size: quick to build and to run."""
    config = read_config(name)[0]
    config["width_multiple"] = 0.125
    return config


def assert_same_maps(model: Model, rewritten, shape) -> None:
    """The head's maps before decoding, within 1e-4 of the largest value there; and the decoded rows."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows, logits = model(x)
        maps = rewritten.trunk(x)
        for expected, found in zip(logits, RawOutputs(model.head)(maps), strict=True):
            assert expected.std() > 1e-2
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        decoded = rewritten(x)
    torch.testing.assert_close(decoded[..., :4], rows[..., :4], rtol=1e-4, atol=0.05)
    torch.testing.assert_close(decoded[..., 4:], rows[..., 4:], rtol=1e-3, atol=1e-4)


def shuffles(rewritten) -> int:
    return sum(node.target in (alternate_halves, interleave_halves) for node in rewritten.trunk.graph.nodes)


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


ALL_YAMLS = sorted(path.stem for path in (ROOT / "models").rglob("yolo*.yaml"))

# Before a split of channels, of which 16 units have 13; before a block that groups its channels.
KEPT_SHUFFLES = {"yolov5n-shufflenet": 13, "yolov5n-dysample": 2}


@pytest.mark.parametrize("name", ALL_YAMLS)
def test_every_model_keeps_its_output_and_loses_norms_and_shuffles(name):
    model = trained_like(narrow(name + ".yaml"))
    rewritten = rewrite(model)
    largest = max(int(model.stride.max()), 32)
    assert_same_maps(model, rewritten, (1, 3, largest, largest))
    assert_same_maps(model, rewritten, (2, 3, largest, 2 * largest))
    assert shuffles(rewritten) == KEPT_SHUFFLES.get(name, 0)
    assert norms(rewritten.trunk) == 0
    assert norms(model) > 0, "the model itself must stay as it was"


@pytest.mark.parametrize("name", ["yolov5n-slimneck", "yolov5n"])
def test_no_1x1_convolution_reads_an_upsampled_map(name):
    trunk = rewrite(trained_like(name + ".yaml")).trunk

    def layer(node) -> nn.Module | None:
        return trunk.get_submodule(node.target) if node.op == "call_module" else None

    pointwise = [node for node in trunk.graph.nodes if getattr(layer(node), "kernel_size", None) == (1, 1)]
    assert len(pointwise) > 20
    for node in pointwise:
        source = node.args[0]
        for part in source.args[0] if source.target is torch.cat else [source]:
            assert not isinstance(layer(part), nn.Upsample)
    assert sum(isinstance(layer(node), nn.Upsample) for node in trunk.graph.nodes) == 4  # cv1 and cv2 at two places


def test_a_published_model_gives_the_same_rows_on_photographs(golden_dir):
    model = load_model(golden_dir / "yolov5n-v6-coco.pt")
    rewritten = rewrite(model)
    for name in ("bus.jpg", "zidane.jpg"):
        boxed = letterbox(cv2.imread(str(golden_dir / "images" / name)), (320, 320), auto=True, stride=32).image
        x = torch.from_numpy(np.ascontiguousarray(boxed[..., ::-1].transpose(2, 0, 1))).float()[None] / 255
        assert x.shape[2] != x.shape[3]
        with torch.no_grad():
            expected, found = model(x)[0], rewritten(x)
        torch.testing.assert_close(found[..., :4], expected[..., :4], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(found[..., 4:], expected[..., 4:], rtol=1e-4, atol=1e-5)


def small(rows: list, levels: list[int]) -> dict:
    """A model YAML of 16 channels at stride 2, then `rows`, then a head that reads `levels`."""
    return {
        "nc": 2,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": [[10, 13, 16, 30]] * len(levels),
        "backbone": [[-1, 1, "Conv", [16, 3, 2]]],
        "head": [*rows, [levels, 1, "Detect", ["nc", "anchors"]]],
    }


KEPT = {
    "contract": ([[-1, 1, "GSConv", [16, 1]], [-1, 1, "Contract", [2]], [-1, 1, "Conv", [16, 1]]], 1),
    "expand": ([[-1, 1, "GSConv", [16, 1]], [-1, 1, "Expand", [2]], [-1, 1, "Conv", [16, 3, 2]]], 1),
    "grouped reader": ([[-1, 1, "GSConv", [16, 1]], [-1, 1, "Conv", [16, 3, 1, None, 4]]], 1),
    "weighted sum": ([[-1, 1, "GSConv", [16, 1]], [[-1, 0], 1, "Sum", [2, True]]], 1),
    "transformer": ([[-1, 1, "GSConv", [16, 1]], [-1, 1, "TransformerBlock", [16, 16, 4, 1]]], 1),
    "norm of its own": ([[-1, 1, "GSConv", [16, 1]], [-1, 1, "nn.BatchNorm2d", []]], 1),
    "sums around a shuffle": ([[-1, 1, "Square", [16]]], 1),
    "split": ([[-1, 1, "ShuffleV2Block", [32, 2]], [-1, 1, "ShuffleV2Block", [32]]], 1),
    "grouped sampling": ([[-1, 1, "GSConv", [16, 3, 2]], [-1, 1, "DySample", [2]]], 1),
    "one of two": ([[-1, 1, "GSConv", [16, 1]], [-1, 1, "GSConv", [16, 3]], [-1, 1, "Contract", [2]]], 1),
}


class Square(nn.Module):
    """x + GSConv(x) and that again with the same x, whose shuffle no order of x's channels undoes."""

    def __init__(self, c1: int, c2: int):
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c2), Conv(c2, c2, 5, g=c2)

    def forward(self, x):
        y = self.cv1(x)
        return y + interleave_halves(self.cv2(y))


@pytest.fixture
def square_block(monkeypatch):
    """`Square` as a block that YAML rows may name, and that is followed like the program's own."""
    monkeypatch.setattr(Square, "__module__", "models.common")
    monkeypatch.setitem(BLOCKS, "Square", Block(Square, scaled_channels))


@pytest.mark.parametrize("case", KEPT)
def test_a_shuffle_that_cannot_be_folded_stays(case, square_block):
    rows, kept = KEPT[case]
    model = trained_like(small(rows, [len(rows)]))
    rewritten = rewrite(model)
    assert shuffles(rewritten) == kept
    assert_same_maps(model, rewritten, (1, 3, 64, 64))
    assert_same_maps(model, rewritten, (2, 3, 64, 96))


FOLDED = {
    "learned shuffle": [[-1, 1, "GSConvns", [16, 3]]],
    "plain sum of shuffled maps": [[-1, 1, "GSBottleneck", [16]], [-1, 2, "GSBottleneckC", [16]]],
    "through joins, upsampling and pooling": [
        [-1, 1, "GSConv", [16, 1]],
        [-1, 1, "nn.MaxPool2d", [2, 2]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 1], 1, "Concat", [1]],
        [-1, 1, "VoVGSCSP", [16]],
    ],
    "of ShuffleNet": [[-1, 1, "ShuffleV2Block", [32, 2]], [-1, 1, "ShuffleV2Block", [32, 2]], [-1, 1, "Conv", [16, 1]]],
    "of two depthwise sides": [[-1, 1, "GSConv", [16, 3, 2, 1, True, 3]], [-1, 2, "C3GS", [32, False]]],
    "several branches": [[-1, 2, "VoVGSCSP", [32]], [-1, 1, "VoVGSCSPC", [32]], [-1, 1, "SPPF", [16, 5]]],
}


@pytest.mark.parametrize("case", FOLDED)
def test_no_shuffle_stays_where_it_can_be_folded(case):
    rows = FOLDED[case]
    model = trained_like(small(rows, [len(rows)]))
    rewritten = rewrite(model)
    assert shuffles(rewritten) == 0
    assert_same_maps(model, rewritten, (2, 3, 64, 96))


SHRUNK = [[-1, 1, "nn.MaxPool2d", [2, 2]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]], [[-1, 0], 1, "Concat", [1]]]
UNMOVED = {
    "a grouped reader": [*SHRUNK, [-1, 1, "Conv", [16, 1, 1, None, 2]]],
    "a 3x3 reader": [*SHRUNK, [-1, 1, "Conv", [16, 3]]],
    "a second reader that needs the joint map": [*SHRUNK, [-1, 1, "Conv", [32, 1]], [[-1, 3], 1, "Sum", [2]]],
    "a layer that shrinks": [[-1, 1, "nn.Upsample", [None, 0.5, "nearest"]], [-1, 1, "Conv", [16, 1]]],
}


@pytest.mark.parametrize("case", UNMOVED)
def test_a_convolution_stays_behind_the_upsampling_for(case):
    rows = UNMOVED[case]
    model = trained_like(small(rows, [len(rows)]))
    rewritten = rewrite(model)
    assert_same_maps(model, rewritten, (2, 3, 64, 96))
    assert not [name for name, _ in rewritten.trunk.named_modules() if "_small" in name]


def test_a_norm_stays_where_something_else_reads_what_it_normalises():
    rows = [[-1, 1, "nn.Conv2d", [16, 16, 1]], [-1, 1, "nn.BatchNorm2d", []], [[-1, 1], 1, "Concat", [1]]]
    model = trained_like(small(rows, [3]))
    rewritten = rewrite(model)
    assert norms(rewritten.trunk) == 1
    assert_same_maps(model, rewritten, (1, 3, 64, 64))


def test_a_block_of_ones_own_is_taken_as_it_is():
    class Gate(nn.Module):  # tells its channels apart, so that it must see them in order
        def __init__(self, c1: int, c2: int):
            super().__init__()
            self.cv = Conv(c1, c2)
            self.register_buffer("factors", torch.linspace(0.5, 2, c1).view(1, -1, 1, 1))

        def forward(self, x):
            return self.cv(x * self.factors)

    register_block()(Gate)
    try:
        model = trained_like(small([[-1, 1, "GSConv", [16, 1]], [-1, 1, "Gate", [16]]], [2]))
    finally:
        del BLOCKS["Gate"]
    rewritten = rewrite(model)
    assert shuffles(rewritten) == 1
    assert norms(rewritten.trunk) == 0
    assert_same_maps(model, rewritten, (1, 3, 64, 64))


ROWS = [
    *(["GSConv", [16, k, 1, g]] for k, g in ((1, 1), (3, 2))),
    *([name, [16]] for name in ("GSConvns", "GSBottleneck", "GSBottleneckC", "VoVGSCSP", "VoVGSCSPC", "C3", "C3TR")),
    *([name, [16]] for name in ("GhostConv", "BottleneckCSP", "Bottleneck", "MixConv2d", "C3Ghost", "C3GS", "SPPF")),
    *(["Conv", [16, 3, 1, None, g]] for g in (1, 2, 4)),
    *(
        ["Conv", [16, 1]],
        ["DWConv", [16]],
        ["CrossConv", [16, 3, 1, 1, 1.0, True]],
        ["nn.ReLU", []],
        ["nn.BatchNorm2d", []],
    ),
    *(["nn.MaxPool2d", [3, 1, 1]], ["Sum", [2, True]], ["Sum", [2]], ["Concat", [1]], ["shrink"], ["fold"]),
]


@st.composite
def models(draw):
    """Rows of 16 channels at one size; some read an earlier row beside the last, some change size and back."""
    rows, whole = [], [0]
    for _ in range(draw(st.integers(1, 6))):
        block, *args = draw(st.sampled_from(ROWS))
        earlier = draw(st.sampled_from(whole))
        if block == "shrink":
            rows += [[earlier, 1, "GSConv", [16, 3, 2]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]]]
        elif block == "fold":
            rows += [[earlier, 1, "Contract", [2]], [-1, 1, "GSConv", [64, 1]], [-1, 1, "Expand", [2]]]
        elif block == "Concat":
            rows += [[[-1, earlier], 1, "Concat", [1]], [-1, 1, draw(st.sampled_from(["Conv", "GSConv", "C3"])), [16]]]
        else:
            rows.append([[-1, earlier] if block == "Sum" else -1, 1, block, *args])
        whole.append(len(rows))
    return small(rows, [len(rows)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(config=models(), seed=st.integers(0, 3))
def test_any_small_graph_of_these_blocks_keeps_its_output(config, seed):
    model = trained_like(config, seed)
    assert_same_maps(model, rewrite(model), (2, 3, 32, 64))


def test_graphs_that_are_gone_leave_nothing_with_torch():
    """Torch keeps the source and the globals of every graph ever compiled, for tracebacks; ours go with their graph."""
    model = trained_like(small([[-1, 1, "GSConv", [16, 1]], [-1, 1, "nn.ChannelShuffle", [4]]], [2]))
    gc.collect()
    kept = linecache.cache, graph_module._loader.eval_cache, _symbolic_trace._wrapped_fns_to_patch
    before = [set(names) for names in kept]
    graphs = [rewrite(model) for _ in range(2)]
    assert shuffles(graphs[0]) == 1
    assert [len(set(names) - old) for names, old in zip(kept, before, strict=True)] == [2, 2, 2]
    assert "def forward" in inspect.getsource(graphs[0].trunk.forward)
    del graphs
    gc.collect()
    assert all(set(names) <= old for names, old in zip(kept, before, strict=True))
