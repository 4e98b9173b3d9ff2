"""Building a model costs what its weights cost: strides without an image, and hostile files refused at no price."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models import config, yolo
from models.common import Conv
from models.yolo import BLOCKS, Model, register_block
from utils.errors import UserError
from utils.files import ROOT

ANCHORS = [[8, 16, 16, 9]]
UP = [-1, 1, "nn.Upsample", [None, 8, "nearest"]]


class Values(TorchFunctionMode):
    """Notes what is done with tensors that have values: convolutions, and the most numbers that one has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type != "meta":
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
            self.convolutions += func in (torch.conv2d, torch.nn.functional.conv2d) and result.numel() > 0
        return result


def detector(*rows: list, **changes) -> dict:
    """A detector of one level: a convolution, `rows`, and Detect."""
    backbone = [[-1, 1, "Conv", [8, 3, 2]], *rows]
    head = [[[-1], 1, "Detect", ["nc", "anchors"]]]
    base = {"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": ANCHORS}
    return {**base, "backbone": backbone, "head": head, **changes}


def test_building_runs_no_image_through_the_weights():
    with Values() as values:
        Model("yolov5n-slimneck.yaml")
    assert values.convolutions == 0
    with Values() as values:  # it can see them
        Model(detector()).eval()(torch.zeros(1, 3, 8, 8))
    assert values.convolutions == 2


START = """
import sys, torch
from models.load import load_model
from models.yolo import Model
weights, cfg = sys.argv[1:]
load_model(weights, fuse=True)(torch.zeros(1, 3, 64, 64))
Model(cfg)
print([name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules])
"""


def test_opening_a_checkpoint_does_not_import_torchs_compiler(weights):
    """It costs every start a second and 120 MB."""
    command = [sys.executable, "-c", START, str(weights), "yolov5n-slimneck.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


NAMES = "yolov5n yolov5n-slimneck-c yolov5n-gsconv hub/yolov5n6 hub/yolov5s-ghost hub/yolov3-tiny hub/yolov5-p2".split()


@pytest.mark.parametrize("name", NAMES)
def test_strides_are_those_of_an_image(name):
    model = Model(ROOT / "models" / f"{name}.yaml", nc=1)
    with torch.no_grad():
        logits = model(torch.zeros(2, 3, 256, 256))
    assert model.stride.tolist() == [256 / maps.shape[2] for maps in logits]


def test_weights_do_not_depend_on_the_meta_device(monkeypatch):
    torch.manual_seed(3)
    model, then = Model("yolov5n-slimneck.yaml"), torch.rand(1)
    monkeypatch.setattr(yolo, "is_ours", lambda row: False)  # as for other people's blocks: once, with values
    torch.manual_seed(3)
    plain = Model("yolov5n-slimneck.yaml")
    assert torch.equal(then, torch.rand(1)) and torch.equal(model.stride, plain.stride)
    assert model.training and all(module.training for module in model.modules())
    pairs = zip(model.state_dict().items(), plain.state_dict().items(), strict=True)
    assert all(key == other_key and torch.equal(tensor, other) for (key, tensor), (other_key, other) in pairs)


HOSTILE = {
    "kernels": (
        detector(*[[-1, 1, "Conv", [100, 310]]] * 3),
        r"row 2 \[-1, 1, 'Conv', \[100, 310\]\]: .* has 1,119,\d+,\d+ parameters and statistics, .*at most 500,000,000",
    ),
    "channels": (detector(*[[-1, 1, "Conv", [8000, 1]]] * 10), r"row 9 .*parameters and statistics, more than any"),
    "repeats": (
        detector(*[[-1, 90, "nn.Hardswish", []]] * 490),
        r"row 6 .*541 layers, repeats counted, .*at most 500\)",
    ),
    "rows": (detector(*[[-1, 1, "nn.Hardswish", []]] * 499), r"model: .* 500 rows"),
    "transformer": (detector([-1, 1, "TransformerBlock", [8, 8, 1, 4000]]), r"row 1 .*more than 20000 operations"),
    "torch's own": (detector([-1, 1, "nn.Transformer", [8, 8, 4000]]), r"row 1 .*more than 20000 operations"),
    "recurrent": (detector([-1, 1, "nn.LSTM", [1, 1, 4000]]), r"row 1 .*more than 20000 operations"),
    "statistics": (
        detector([-1, 1, "nn.InstanceNorm2d", [10**9, 1e-5, 0.1, False, True]]),
        r"row 1 .*2,000,000,\d+ parameters and statistics",
    ),
    "padding": (detector([-1, 1, "nn.ZeroPad2d", [9000]]), r"row 1 \(torch.nn.*\): makes 2,\d+,\d+,\d+ numbers of one"),
    "enlarging": (detector(*[UP] * 3), r"row 2 \(torch.nn.*\): makes 134,217,728 numbers of one small image"),
    "nothing": (detector([-1, 1, "nn.AdaptiveAvgPool2d", [0]]), r"row 1 .*makes a map without cells"),
    "sources": (detector([[-1] * 100, 1, "Concat", [1]]), r"row 1 .*a row with 100 sources .*at most 64"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_before_they_cost_anything(kind):
    hostile, message = HOSTILE[kind]
    state = torch.get_rng_state()
    with Values() as values, pytest.raises(UserError, match=message):
        Model(hostile)
    assert values.largest < 100
    assert torch.equal(torch.get_rng_state(), state)


def test_wherever_building_is_cut_off_torch_is_left_as_it_was(monkeypatch):
    """The limit may be met anywhere, also while torch changes its own state for a moment."""
    cut_off = 0
    for limit in range(0, 200, 1):
        monkeypatch.setattr(config, "MAX_CALLS", limit)
        try:
            Model(detector([-1, 1, "C3TR", [8]]))
        except UserError:
            cut_off += 1
        assert torch.is_grad_enabled() and torch.empty(0).device.type == "cpu"
    assert 60 < cut_off < 200


def test_the_operations_of_a_run_count_too(monkeypatch):
    """Layers that are cheap to make may still be called: building Conv and Detect takes a part of all operations."""
    with monkeypatch.context() as patch:
        patch.setattr(config, "MAX_CALLS", 100)
        with pytest.raises(UserError, match=r"row \d+ \(torch.nn.modules.activation.ReLU, from -1\): .*operations"):
            Model(detector(*[[-1, 1, "nn.ReLU", []]] * 100))


def test_blocks_of_other_programs_may_need_values(monkeypatch):
    monkeypatch.setattr(yolo, "BLOCKS", dict(BLOCKS))

    @register_block()
    class Valued(nn.Module):
        def __init__(self, c1, c2):
            super().__init__()
            self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
            self.conv = Conv(c1, c2, 3, 2)

        def forward(self, x):
            assert float(x.sum()) == float(x.sum())
            return self.conv(x)

    model = Model(detector([-1, 1, "Valued", [16]]))
    assert model.stride.tolist() == [4] and model.model[1].rates == [0, 0.5, 1]
