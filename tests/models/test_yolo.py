"""Models: every YAML's published counts, decoding worked out by hand, initial state, and mistakes in YAMLs."""

import csv
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import yolo
from models.common import Conv, GSConv
from models.yolo import BLOCKS, Detect, Model, count_gflops, parse_model, register_block
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "models").rglob("yolo*.yaml"))

# Published: state-dict entries and the rows whose output is read later.
KEYS_AND_SAVED = {
    "yolov5n.yaml": (349, [4, 6, 10, 14, 17, 20, 23]),
    "yolov5s6.yaml": (459, [4, 6, 8, 12, 16, 20, 23, 26, 29, 32]),
    "yolov5-bifpn.yaml": (613, [4, 6, 6, 10, 14, 17, 20, 23]),
    "yolov5s-ghost.yaml": (529, [4, 6, 10, 14, 17, 20, 23]),
    "yolov5s-transformer.yaml": (348, [4, 6, 10, 14, 17, 20, 23]),
    "yolov3-tiny.yaml": (71, [8, 14, 15, 19]),
}
YOLOV5S_ROW_PARAMETERS = (
    *(3520, 18560, 18816, 73984, 115712, 295424, 625152, 1180672, 1182720, 656896, 131584, 0, 0, 361984, 33024, 0, 0),
    *(90880, 147712, 0, 296448, 590336, 0, 1182720, 229245),
)


def tiny(**changes) -> dict:
    """A small two-level detector as a model YAML."""
    config = {
        "nc": 3,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": [[8, 16], [32, 64]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[[1, 2], 1, "Detect", ["nc", "anchors"]]],
    }
    return {**config, **changes}


@pytest.fixture(scope="module")
def built() -> dict[str, Model]:
    """Every model YAML of the repository, without memory for its weights."""
    with torch.device("meta"):
        return {path.name: Model(path) for path in YAMLS}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_modules_and_strides_of_every_published_model(golden_dir, built):
    rows = list(csv.DictReader((golden_dir / "model_zoo.csv").open()))
    got = {name: (parameters(m), sum(1 for _ in m.modules()), m.stride.tolist()) for name, m in built.items()}
    assert len(rows) == 22
    for row in rows:
        expected = (int(row["params"]), int(row["modules"]), json.loads(row["strides"]))
        assert got[row["yaml"].split("/")[-1]] == expected, row["yaml"]


def test_parameters_of_every_slim_model(golden_dir, built):
    rows = list(csv.DictReader((golden_dir / "slim_zoo.csv").open()))
    assert len(rows) == 20
    for row in rows:
        name = f"yolov5{row['size']}-{row['neck']}.yaml"
        assert parameters(built[name]) == int(row["params_without_unused_res"]), name


def test_every_yaml_states_its_parameters(built):
    assert len(built) == 61
    for path in YAMLS:
        head = path.read_text().split("\n\n")[0]
        assert f"# {parameters(built[path.name]):,} parameters, " in head, path.name


@pytest.mark.parametrize("cfg", ["yolov5n.yaml", "yolov5s-ghost.yaml", "yolov5n-slimneck-c.yaml", "yolov5n6.yaml"])
def test_gflops_agree_with_the_published_ones(golden_dir, cfg):
    pytest.importorskip("thop")
    published = {row["yaml"].split("/")[-1]: row for row in csv.DictReader((golden_dir / "model_zoo.csv").open())}
    slim = csv.DictReader((golden_dir / "slim_zoo.csv").open())
    published |= {f"yolov5{row['size']}-{row['neck']}.yaml": row for row in slim}
    expected = float(published[cfg]["gflops_640_thop"])
    assert count_gflops(Model(cfg)) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", KEYS_AND_SAVED)
def test_state_dict_entries_and_saved_rows(built, name):
    assert (len(built[name].state_dict()), built[name].save) == KEYS_AND_SAVED[name]


def test_parameters_of_every_row_of_yolov5s(built):
    assert tuple(layer.np for layer in built["yolov5s.yaml"].model) == YOLOV5S_ROW_PARAMETERS
    assert [built["yolov5s.yaml"].model[i].type for i in (0, 11, 24)] == [
        "models.common.Conv",
        "torch.nn.modules.upsampling.Upsample",
        "models.yolo.Detect",
    ]


def test_rows_of_the_output(built):
    """Three anchors on 80 x 80, 40 x 40 and 20 x 20 cells are 25200 rows; P6 at 1280 px has 102000."""
    for name, size, rows in (("yolov5n.yaml", 640, 25200), ("yolov5n6.yaml", 1280, 102000)):
        logits = built[name].train()(torch.zeros(1, 3, size, size, device="meta"))
        assert sum(maps[..., 0].numel() for maps in logits) == rows
    decoded, logits = Model("yolov5n-slimneck.yaml").eval()(torch.zeros(2, 3, 64, 96))
    assert decoded.shape == (2, 3 * (8 * 12 + 4 * 6 + 2 * 3), 85)
    assert [maps.shape for maps in logits] == [(2, 3, 8, 12, 85), (2, 3, 4, 6, 85), (2, 3, 2, 3, 85)]


@pytest.mark.parametrize("shape_hw", [None, (8, 16)])
def test_boxes_are_decoded_as_worked_out_by_hand(shape_hw):
    """One level, stride 8, one anchor of 16 x 32 px, one class, 1 x 2 cells, logits ln 3 (sigmoid 0.75) throughout.

    x = (2 * 0.75 - 0.5 + column) * 8 = 8, 16; y = 8; w = 1.5^2 * 16 = 36, h = 72; scores 0.75.
    """
    detect = Detect(1, [[16, 32]], [4]).eval()
    detect.stride.fill_(8)
    detect.anchors /= 8
    rows = detect.decoder(shape_hw)([torch.full((1, 6, 1, 2), math.log(3))])
    expected = torch.tensor([[8, 8, 36, 72, 0.75, 0.75], [16, 8, 36, 72, 0.75, 0.75]])
    torch.testing.assert_close(rows[0], expected)


def test_rows_go_by_anchor_then_y_then_x():
    detect = Detect(1, [[8, 8, 16, 16]], [4]).eval()
    detect.stride.fill_(8)
    detect.anchors /= 8
    with torch.no_grad():
        detect.m[0].weight.zero_()
        detect.m[0].bias.zero_()
        y = detect([torch.zeros(1, 4, 2, 3)])[0][0]
    assert y[:, 2].tolist() == [8.0] * 6 + [16.0] * 6
    assert y[:6, :2].tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


def test_decoded_boxes_carry_gradients():
    model = Model(tiny()).eval()
    model(torch.rand(1, 3, 32, 32))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("cfg", [tiny(), "yolov5n-slimneck-af.yaml", "yolov5n-gsconv.yaml"])
def test_every_parameter_of_a_model_gets_a_gradient(cfg):
    torch.manual_seed(0)
    model = Model(cfg)
    sum((maps * torch.randn_like(maps)).sum() for maps in model(torch.rand(2, 3, 64, 64))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_channels_last_and_bf16_change_the_output_by_rounding_only():
    torch.manual_seed(0)
    model, x = Model("yolov5n-slimneck.yaml").eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(x)[0]
        model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x)[0], plain, rtol=1e-4, atol=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x)[0]
    assert rough.dtype == torch.float32
    assert (rough[..., :4] - plain[..., :4]).abs().mean() < 0.5


def test_logits_are_float32_under_autocast():
    """A new head's objectness lies at -5 to -8, where bfloat16 has steps of 1/32: each logit would be off by 0.01."""
    torch.manual_seed(0)
    model, x = Model("yolov5n.yaml", nc=3), torch.rand(2, 3, 64, 64)
    biases = torch.cat([conv.bias.detach().view(3, -1)[:, 4] for conv in model.head.m])
    assert -9 < biases.min() and biases.max() < -3.5
    kept = []
    model.head.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert {maps.dtype for maps in kept[0]} == {torch.bfloat16} and {maps.dtype for maps in logits} == {torch.float32}
    exact = model.head([maps.float() for maps in kept[0]])
    assert all(torch.equal(maps, others) for maps, others in zip(logits, exact, strict=True))
    sum(maps.sum() for maps in logits).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_only_the_last_layers_of_an_anchor_free_head_are_float32_under_autocast():
    """Its branches are convolutions like the neck's, and twice as fast in bfloat16."""
    torch.manual_seed(0)
    model, x = Model("yolov5n-af.yaml", nc=3), torch.rand(2, 3, 64, 64)
    kept = []
    for branch in (*model.head.box, *model.head.cls):
        branch.register_forward_hook(lambda *given: kept.append(given[2]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert {maps.dtype for maps in kept} == {torch.bfloat16} and {maps.dtype for maps in logits} == {torch.float32}
    exact = model.head.predict([maps.float() for maps in kept])
    for level, maps in zip(logits, exact, strict=True):
        assert torch.equal(level[:, 0], maps.permute(0, 2, 3, 1))


def test_no_size_is_baked_into_a_traced_model():
    model = Model("yolov5n-slimneck.yaml").eval()
    x = torch.rand(2, 3, 96, 128)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, torch.rand(1, 3, 64, 64), check_trace=False)
        torch.testing.assert_close(traced(x)[0], model(x)[0], rtol=1e-4, atol=1e-3)


def test_strides_stay_float32_in_a_half_model():
    model = Model(tiny()).half()
    assert (model.stride.dtype, model.stride.tolist()) == (torch.float32, [4, 8])
    assert (model.head.stride.dtype, model.head.stride.tolist()) == (torch.float16, [4, 8])


class Clones(TorchDispatchMode):
    """Counts copies of whole tensors, which autograd makes of what a layer that needs its input overwrites."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.clone
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["nn.SiLU()", "nn.Hardswish()", "nn.LeakyReLU(0.1)"])
def test_activations_overwrite_their_input_where_no_gradient_needs_it(activation):
    model = Model(tiny(activation=activation))
    with Clones() as clones:
        model.model[0](torch.zeros(1, 3, 8, 8))
    assert clones.count == 0
    x = torch.ones(1, 4)
    assert model.fuse().model[0].act(x) is x


def test_new_models_state(built):
    model = Model(tiny())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}
    assert all(norm.running_mean.eq(0).all() and norm.running_var.eq(1).all() for norm in norms)
    assert all(norm.num_batches_tracked == 0 for norm in norms)
    assert model.training and all(module.training for module in model.modules())
    assert model.names == {0: "0", 1: "1", 2: "2"}
    assert model.head.anchors.flatten().tolist() == [2, 4, 4, 8]  # 8 x 16 px at stride 4, 32 x 64 px at stride 8


def test_biases_expect_eight_objects_and_even_classes():
    torch.manual_seed(0)
    model = Model(tiny())
    torch.manual_seed(0)
    fresh = parse_model(tiny(), [3])[0][-1]
    for level, stride in enumerate((4, 8)):
        added = (model.head.m[level].bias - fresh.m[level].bias).view(1, 8)[0]
        objectness, classes = math.log(8 / (640 / stride) ** 2), math.log(0.6 / (3 - 0.999999))
        assert added.tolist() == pytest.approx([0, 0, 0, 0, objectness, classes, classes, classes], abs=1e-5)


def test_anchor_free_biases_expect_five_objects_on_each_level():
    head = Model("yolov5n-af.yaml", nc=3).head
    classes = [math.log(5 / 3 / (640 / stride) ** 2) for stride in (8, 16, 32)]
    for level in range(3):
        assert head.m[level].bias.tolist() == [2.0] * 4 * head.bins
        assert head.m[3 + level].bias.tolist() == pytest.approx([classes[level]] * 3)


def test_weights_are_a_function_of_torchs_seed():
    torch.manual_seed(5)
    first, then = Model(tiny()), torch.rand(1)
    torch.manual_seed(5)
    second = Model(tiny())
    assert torch.equal(then, torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_anchors_in_the_wrong_order_are_turned_round():
    model = Model(tiny(anchors=[[32, 64], [8, 16]]))
    assert model.head.anchors.flatten().tolist() == [2, 4, 4, 8]


def test_number_of_classes_and_anchors_can_be_overridden():
    config = tiny()
    model = Model(config, nc=7, anchors=4.4)
    assert (model.nc, model.yaml["nc"], model.yaml["anchors"], config["nc"]) == (7, 7, 4, 3)
    assert model.head.m[0].out_channels == 4 * (7 + 5)
    assert (model.head.anchors[0] * 4).flatten().tolist() == list(range(8))


def test_repeats_and_channels_are_scaled_half_to_even_and_up():
    config = tiny(depth_multiple=0.5, width_multiple=0.3)
    config["backbone"] += [[-1, 5, "C3", [40]], [-1, 5, "Bottleneck", [40]], [-1, 1, "C3", [24]]]
    layers = parse_model(config, [3])[0]
    assert len(layers[3].m) == 2  # 2.5 repeats
    assert isinstance(layers[4], nn.Sequential) and len(layers[4]) == 2
    assert layers[3].cv3.conv.out_channels == 16  # 40 * 0.3 = 12, up to a multiple of 8
    assert layers[5].cv3.conv.out_channels == 8 and len(layers[5].m) == 1
    config["channel_multiple"] = 4
    assert parse_model(config, [3])[0][3].cv3.conv.out_channels == 12


def test_the_yamls_activation_is_the_models():
    model = Model(tiny(activation="nn.LeakyReLU(0.1)"))
    acts = [module.act for module in model.modules() if isinstance(module, Conv)]
    assert {(type(act), act.negative_slope, act.inplace) for act in acts} == {(nn.LeakyReLU, 0.1, True)}


def test_arguments_of_a_row_may_be_literals_and_activations():
    config = tiny()
    config["backbone"][2] = [-1, 1, "Conv", [16, 3, 2, "None", 1, "nn.ReLU()"]]
    config["backbone"].append([-1, 1, "SPP", [16, "(3, 5)"]])
    layers = parse_model(config, [3])[0]
    assert isinstance(layers[2].act, nn.ReLU)
    assert [pool.kernel_size for pool in layers[3].m] == [3, 5]


def test_a_registered_block_can_be_used_at_once(monkeypatch):
    monkeypatch.setattr(yolo, "BLOCKS", dict(BLOCKS))

    @register_block()
    class Twice(nn.Module):
        def __init__(self, c1, c2):
            super().__init__()
            self.both = nn.Sequential(Conv(c1, c2), Conv(c2, c2))

        def forward(self, x):
            return self.both(x)

    config = tiny()
    config["backbone"].append([-1, 1, "Twice", [24]])
    config["head"] = [[[1, 3], 1, "Detect", ["nc", "anchors"]]]
    assert Model(config).head.m[1].in_channels == 24
    assert "Twice" not in BLOCKS


def test_layers_and_their_outputs_can_be_watched():
    seen = []
    model = Model(tiny()).eval()
    model(torch.zeros(1, 3, 32, 32), visualize=lambda layer, y: seen.append((layer.i, layer.type, tuple(y.shape))))
    assert seen == [(i, "models.common.Conv", (1, c, s, s)) for i, c, s in ((0, 8, 16), (1, 8, 8), (2, 16, 4))]


def with_row(row: list) -> dict:
    config = tiny()
    config["backbone"][2] = row
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_row([-1, 1, "GSConvv", [16, 3, 2]]), r"model: row 2 \[.*unknown block 'GSConvv'. Did you mean 'GSConv'"),
        (with_row([-1, 1, "nn.Upsampel", [16]]), r"row 2 .*unknown block 'nn.Upsampel'. Did you mean 'nn.Upsample'"),
        (with_row([-1, 1, "nn.init", [16]]), r"unknown block 'nn.init'"),
        (with_row([-1, 1, "os.system", ["true"]]), r"unknown block 'os.system'"),
        (with_row([-1, 1, "Conv"]), r"row 2 .*a row is \[from, number, module, \[args\]\]"),
        (with_row([7, 1, "Conv", [16]]), r"row 2 .*reads from row 7, but only rows before it"),
        (with_row([-1, 1, "Conv", []]), r"row 2 .*number of output channels"),
        (with_row([-1, 1, "Conv", [16, 3, 2, None, 5]]), r"row 2 .*divisible by groups"),
        (with_row([-1, 1, "SPPF", [16, 5, 1, 2]]), r"row 2 .*takes from 3 to 4 positional arguments"),
        (with_row([[0, 1], 1, "Concat", [1]]), r"row 2 \(models.common.Concat, from \[0, 1\]\): Sizes of tensors"),
        (with_row([-1, 1, "Conv", [16, 3, 2, None, 1, "nn.Sillu()"]]), r"row 2 .*'nn.Sillu\(\)'"),
        (tiny(anchors=[[8, 16]]), r"row 3 .*1 rows of anchors for 2 detection levels"),
        (tiny(anchors=[[8, 16], [32, 64], [1, 2]]), r"row 3 .*3 rows of anchors for 2 detection levels"),
        (tiny(anchors=[[8, 16, 3], [32, 64, 3]]), r"row 3 .*pairs of width and height"),
        (tiny(anchors=[[8, 16], [32, 64, 3, 4]]), r"row 3 .*the same number of anchors, got rows of \[2, 4\]"),
        (tiny(anchors=[8, 16]), r"anchors: \[8, 16\]: give one list"),
        (tiny(anchors=0), r"anchors: 0: give one list"),
        (with_row([-1, 5000, "C3", [16]]), r"row 2 .*repeats are more than any detector has"),
        (with_row([-1, 0, "Conv", [16]]), r"row 2 .*at least one source and one repeat"),
        (tiny(anchors=[[1e308, 16], [32, 64]]), r"anchors: .*give one list"),
        (tiny(head=[[[1, 2], 1, "Detect", [-1, "anchors"]]]), r"row 3 .*nc and anchors: a whole number from 1"),
        (tiny(head=[[[1, 2], 1, "Detect", [0, "anchors"]]]), r"row 3 .*nc and anchors: a whole number from 1"),
        (tiny(head=[[[1, 2], 1, "Detect", ["nc", [[1, "x"], [3, 4]]]]]), r"row 3 .*its arguments are nc and anchors"),
        (tiny(head=[[[1, 2], 1, "Detect", [7, "anchors"]]]), r"Detect has 7 classes, but nc is 3"),
        (tiny(nc=0), r"nc: 0: a detector needs at least one class"),
        (tiny(nc="many"), r"'nc: many' is of the wrong kind"),
        (tiny(head=[]), r"the last row must be Detect or another head, not models.common.Conv"),
        (tiny(activation="nn.Sillu()"), r"row 0 .*'nn.Sillu\(\)' is not an activation"),
        ({"nc": 3}, r"'depth_multiple' is missing"),
    ],
)
def test_mistakes_in_a_yaml_are_named_with_their_row(config, message):
    with pytest.raises(UserError, match=message):
        Model(config)


def test_mistakes_in_a_file_are_named_with_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / "models/yolov5n.yaml").read_text().replace("SPPF, ", "SPPFF,"))
    with pytest.raises(UserError, match="mine.yaml: row 9 .*unknown block 'SPPFF'. Did you mean 'SPPF'"):
        Model(path)
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="mine.yaml: not a model YAML"):
        Model(path)
    with pytest.raises(UserError, match="yolov5n.yaml"):
        Model("yolov5nn.yaml")


def test_the_script_shows_the_layers_and_their_times():
    line = [sys.executable, ROOT / "models/yolo.py", "--cfg", "yolov5n-slimneck.yaml", "--device", "cpu", "--profile"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert any(line.split()[:5] == ["13", "-1", "1", "76224", "models.common.VoVGSCSP"] for line in lines)
    assert any(line.startswith("Model Summary: 350 layers, 1669693 parameters, 1669693 gradients") for line in lines)
    assert sum("models.common.GSConv" in line for line in lines) == 2 * 4
    assert lines[-1].endswith("total") and float(lines[-1].split()[0]) > 0


def test_the_script_reports_mistakes_without_a_traceback(command):
    outcome = command(yolo, "--cfg", "yolov5q.yaml", "--device", "cpu")
    assert outcome.status == 1 and "'yolov5q.yaml': not found" in outcome.said and "Traceback" not in outcome.said


@pytest.mark.slow
def test_the_script_builds_every_yaml(command):
    outcome = command(yolo, "--cfg", "yolov5n.yaml", "--device", "cpu", "--test")
    assert outcome.status == 0 and f"{len(YAMLS)}/{len(YAMLS)}" in outcome.said


def test_gsconv_models_replace_what_they_say(built):
    def kinds(name, rows):
        return {type(built[name].model[row]).__name__ for row in rows}

    backbone, neck = (1, 3, 5, 7), (10, 14, 18, 21)
    assert kinds("yolov5n-gsconv.yaml", backbone + neck) == {GSConv.__name__}
    assert kinds("yolov5n-gsconv.yaml", (0,)) == {"Conv"}
    assert kinds("yolov5n-gsneck.yaml", backbone) == {"Conv"}
    assert kinds("yolov5n-gsneck.yaml", neck) == {"GSConv"}
    assert kinds("yolov5n-slimneck.yaml", (13, 17, 20, 23)) == {"VoVGSCSP"}
    assert kinds("yolov5n-slimneck-c.yaml", (13, 17, 20, 23)) == {"VoVGSCSPC"}
    assert kinds("yolov5n-slimneck-q.yaml", (10, 14)) == {"Conv"}
    assert kinds("yolov5n-slimneck-q.yaml", (18, 21)) == {GSConv.__name__}


@pytest.mark.parametrize("size", "nsmlx")
def test_the_neck_for_int8_has_gsconv_in_place_of_3x3_convolutions_alone(built, size):
    model = built[f"yolov5{size}-slimneck-q.yaml"].model
    blocks = [block for block in model.modules() if isinstance(block, GSConv)]
    depthwise = [block.cv2.conv for block in blocks]
    assert {block.cv1.conv.kernel_size for block in blocks} == {(3, 3)} and len(blocks) >= 6
    assert {conv.kernel_size for conv in depthwise} == {(3, 3)}
    assert all(conv.groups == conv.in_channels and conv.in_channels % 16 == 0 for conv in depthwise)
    neck = [conv for row in model[10:24] for conv in row.modules() if isinstance(conv, nn.Conv2d)]
    assert sum(conv.kernel_size == (3, 3) and conv.groups == 1 for conv in neck) == len(blocks)
