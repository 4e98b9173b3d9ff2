"""What follows the head: rows as Detect gives them, and NMS inside the model as NMS outside of it."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.common import Conv, DWConv, GSConv
from models.heads import SUPPRESSION_ROUNDS, DetectAF, NMSHead, RawOutputs
from models.yolo import Detect
from utils.nms import NMSConfig, non_max_suppression

SHAPE_HW = (96, 64)
STRIDES = (8, 16, 32)
LOOSE = NMSConfig(conf_thres=0.25, iou_thres=0.45, max_det=20, agnostic=False)


@pytest.fixture(scope="module")
def detect() -> Detect:
    """A head of three levels and three anchors, 4 classes; its convolutions pass the maps on."""
    anchors_px = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
    head = Detect(4, anchors_px, [27, 27, 27]).eval()
    head.stride = torch.tensor(STRIDES, dtype=torch.float32)
    head.anchors /= head.stride.view(-1, 1, 1)
    for conv in head.m:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    return head


def random_maps(shape_hw=SHAPE_HW, batch: int = 2, spread: float = 2.0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [[side // stride for side in shape_hw] for stride in STRIDES]
    return [spread * torch.randn(batch, 27, *size, generator=generator) for size in sizes]


class GivenRows(nn.Module):
    """Stands in for a decoder: the "maps" are the rows."""

    def __init__(self, count: int):
        super().__init__()
        self.row_count = count

    def forward(self, rows):
        return rows


def choose(rows: torch.Tensor, suppression: NMSConfig, topk_per_class: int | None = None) -> torch.Tensor:
    return NMSHead(GivenRows(rows.shape[1]), suppression, topk_per_class)(rows)


def row(x, y, w, h, score, label=0) -> list[float]:
    """A row of two classes whose objectness is 1."""
    return [x, y, w, h, 1.0, *(score if place == label else 0.0 for place in range(2))]


# ---- rows ----


@pytest.mark.parametrize("shape_hw", [SHAPE_HW, (64, 64), (32, 160)])
@pytest.mark.parametrize("fixed", [True, False])
def test_rows_are_those_of_the_head_in_evaluation(detect, shape_hw, fixed):
    maps = random_maps(shape_hw)
    expected, logits = detect(maps)
    decoder = detect.output(shape_hw if fixed else None)
    torch.testing.assert_close(decoder(maps), expected, rtol=1e-6, atol=1e-4)
    assert decoder.row_count == (expected.shape[1] if fixed else None)
    for expected_level, level in zip(logits, RawOutputs(detect)(maps), strict=True):
        assert torch.equal(level, expected_level)


def test_normalised_boxes_are_fractions_of_width_and_height(detect):
    maps = random_maps()
    unit = torch.tensor([64, 96, 64, 96.0])
    rows = detect.output(SHAPE_HW)(maps)
    fractions = detect.output(SHAPE_HW, normalised=True)(maps)
    torch.testing.assert_close(fractions[..., :4] * unit, rows[..., :4], rtol=1e-5, atol=1e-4)
    assert torch.equal(fractions[..., 4:], rows[..., 4:])
    pixels, fractions = (detect.output(SHAPE_HW, LOOSE, None, normalised)(maps) for normalised in (False, True))
    torch.testing.assert_close(fractions[..., :4] * unit, pixels[..., :4], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("nms", [None, LOOSE])
def test_normalised_boxes_need_a_fixed_size(detect, nms):
    with pytest.raises(ValueError, match="fixed image size"):
        detect.output(None, nms, normalised=True)


@pytest.mark.parametrize("nms", [None, LOOSE])
def test_a_half_model_decodes_in_float32(detect, nms):
    maps = [level.half() for level in random_maps()]
    head = detect.output(SHAPE_HW, nms)
    expected = head([level.float() for level in maps])
    found = head.half()(maps)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# ---- without anchors ----


@pytest.mark.parametrize("shape_hw", [None, (64, 96)])
@pytest.mark.parametrize("normalised", [False, True])
def test_distances_come_back_as_the_boxes_that_they_are_of(shape_hw, normalised):
    """Boxes whose sides lie whole cells from a cell's centre: one bin of each side is sure."""
    if normalised and shape_hw is None:
        return
    head, generator = DetectAF(2, [8, 8], bins=8), torch.Generator().manual_seed(0)
    head.set_strides(torch.tensor([8.0, 32.0]), "head")
    maps, expected = [], []
    for stride, (ny, nx) in ((8, (8, 12)), (32, (2, 3))):
        sides = torch.randint(0, 8, (1, 4, ny, nx), generator=generator)
        scores = torch.rand(1, 2, ny, nx, generator=generator) * 0.8 + 0.1
        logits = 50.0 * nn.functional.one_hot(sides, 8).permute(0, 1, 4, 2, 3).flatten(1, 2)
        maps.append(torch.cat((logits, scores.logit()), 1))
        for row in range(ny):
            for column in range(nx):
                left, up, right, down = sides[0, :, row, column].tolist()
                x1, x2, y1, y2 = column + 0.5 - left, column + 0.5 + right, row + 0.5 - up, row + 0.5 + down
                box = [one * stride for one in ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)]
                expected.append([*box, 1.0, *scores[0, :, row, column].tolist()])
    expected = torch.tensor(expected)
    if normalised:
        expected[:, :4] /= torch.tensor([96, 64, 96, 64])
    rows = head.decoder(shape_hw, normalised)(maps)
    torch.testing.assert_close(rows[0], expected, rtol=1e-5, atol=1e-4)


def test_branches_are_as_published_or_as_the_row_says():
    """c2 = max(16, 64 / 4, 4 * 16), c3 = max(64, min(3, 100)); a share of 0.3 of 64 channels is 24, a multiple of 8."""
    head = DetectAF(3, [64, 128])
    assert [(conv.in_channels, conv.out_channels) for conv in head.m] == [(64, 64)] * 2 + [(64, 3)] * 2
    box, cls = (
        [(type(one), one.conv.in_channels, one.conv.out_channels) for one in of[1]] for of in (head.box, head.cls)
    )
    assert box == [(Conv, 128, 64), (Conv, 64, 64)]
    assert cls == [(DWConv, 128, 128), (Conv, 128, 64), (DWConv, 64, 64), (Conv, 64, 64)]
    head = DetectAF(3, [64, 128], 8, ["GSConv", 0.3, 1], [None, None, 0])
    assert [type(one) for one in head.box[0]] == [GSConv] and head.m[0].in_channels == 24 and head.channels == 35
    assert [conv.in_channels for conv in head.m[2:]] == [64, 128] and not list(head.cls.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1,), "bins are a whole number from 2, not 1"),
        ((8, ["C3"]), r"a branch is \[kind, width, steps\] .*kinds are Conv, DWConv, GSConv.*not \['C3'\]"),
        ((8, [], ["Conv", "wide"]), r"not \['Conv', 'wide'\]"),
        ((8, ["Conv", 1, 2, 3]), "a branch is"),
        ((8, 64), "a branch is .* not 64"),
    ],
    ids=str,
)
def test_arguments_of_a_row_that_are_none_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        DetectAF(3, [16, 16], *given)


# ---- NMS ----


def random_rows(seed: int, count: int, classes: int, size_px: float = 640) -> torch.Tensor:
    """Boxes that crowd each other, some outside the limits of sides, scores on both sides of every threshold."""
    rng = np.random.Generator(np.random.Philox(seed))
    crowds = rng.uniform(0, size_px, (max(count // 12, 1), 2))
    centres = crowds[rng.integers(0, len(crowds), (2, count))] + rng.normal(0, 12, (2, count, 2))
    sides = np.exp(rng.normal(4, 0.3, (2, count, 2)))
    sides[:, ::17] = rng.choice([0.5, 1.9, 2.1, 7000, 8000], sides[:, ::17].shape)
    scores = rng.uniform(0, 1, (2, count, 1 + classes))
    return torch.from_numpy(np.concatenate((centres, sides, scores), 2)).float()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    count=st.sampled_from([1, 7, 100, 900]),
    classes=st.sampled_from([1, 2, 30]),
    conf_thres=st.sampled_from([0.0, 0.05, 0.25, 0.6]),
    iou_thres=st.sampled_from([0.0, 0.2, 0.45, 0.7, 1.0]),
    max_det=st.sampled_from([1, 30, 300, 1200]),
    agnostic=st.booleans(),
)
def test_the_same_detections_as_outside(seed, count, classes, conf_thres, iou_thres, max_det, agnostic):
    rows = random_rows(seed, count, classes)
    found = choose(rows, NMSConfig(conf_thres, iou_thres, max_det, agnostic))
    assert found.shape == (2, max_det, 6)
    outside = non_max_suppression(rows, conf_thres, iou_thres, agnostic=agnostic, max_det=max_det)
    for inside, expected in zip(found, outside, strict=True):
        torch.testing.assert_close(inside[: len(expected)], expected, rtol=1e-5, atol=1e-3)
        assert not inside[len(expected) :].any()


def test_more_candidates_than_enter_leave_out_the_least_confident_alone():
    rows = random_rows(0, 6000, 3, size_px=3000)
    found = choose(rows, NMSConfig(0.001, 0.45, 300, False))
    outside = non_max_suppression(rows, 0.001, 0.45, max_det=300)
    for inside, expected in zip(found, outside, strict=True):
        kept = inside[inside[:, 4] > 0]
        assert 50 < len(kept) <= len(expected)
        torch.testing.assert_close(kept, expected[: len(kept)], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("length", [2, 3, SUPPRESSION_ROUNDS, SUPPRESSION_ROUNDS + 1])
def test_a_chain_of_boxes_keeps_every_other_one(length):
    """Each box, 3 px to the right of the one before, overlaps it by 7 / 13 and the one before that by 4 / 16."""
    rows = torch.tensor([[row(20 + 3 * place, 20, 10, 10, 0.9 - 0.01 * place) for place in range(length)]])
    found = choose(rows, NMSConfig(0.1, 0.45, 100, False))[0]
    assert found[found[:, 4] > 0, 0].tolist() == [15 + 3 * place for place in range(0, length, 2)]


def test_a_crowd_on_one_object_leaves_one():
    rows = torch.tensor([[row(50, 50, 20, 20, 0.9 - 0.0005 * place) for place in range(500)]])
    found = choose(rows, NMSConfig(0.1, 0.45, 100, False))[0]
    assert (found[:, 4] > 0).sum() == 1
    torch.testing.assert_close(found[0], torch.tensor([40, 40, 60, 60, 0.9, 0]))


def test_classes_suppress_each_other_only_where_that_is_asked_for():
    rows = torch.tensor([[row(50, 50, 20, 20, 0.9, 0), row(50, 50, 20, 20, 0.8, 1)]])
    assert (choose(rows, NMSConfig(0.1, 0.45, 9, False))[0, :, 4] > 0).sum() == 2
    assert (choose(rows, NMSConfig(0.1, 0.45, 9, True))[0, :, 4] > 0).sum() == 1


@pytest.mark.parametrize("agnostic", [False, True])
def test_of_each_class_no_more_than_asked_for(agnostic):
    """Six boxes apart from each other, of class 0, 0, 1, 0, 1, 0 by falling confidence: two of each class stay."""
    labels = [0, 0, 1, 0, 1, 0]
    rows = torch.tensor([[row(60 * n + 40, 50, 20, 20, 0.9 - 0.1 * n, label) for n, label in enumerate(labels)]])
    found = choose(rows, NMSConfig(0.1, 0.45, 9, agnostic), topk_per_class=2)[0]
    assert found[found[:, 4] > 0, 0].tolist() == [30, 90, 150, 270]


def test_boxes_at_the_limits():
    """Sides from 2 to 7680 px count, and confidences above the threshold, not at it."""
    sides_px = [2, 1.99, 7680, 7681]
    rows = torch.tensor([[row(10_000 * n, 0, side, 50, 0.9 - 0.1 * n) for n, side in enumerate(sides_px)]])
    found = choose(rows, NMSConfig(0.1, 0.45, 9, False))[0]
    assert found[found[:, 4] > 0, 4].tolist() == pytest.approx([0.9, 0.7])
    rows = torch.tensor([[row(100, 100, 50, 50, 0.5), row(300, 100, 50, 50, 0.5001)]])
    found = choose(rows, NMSConfig(0.5, 0.45, 9, False))[0]
    assert found[found[:, 4] > 0, 0].tolist() == [275]


# ---- converters ----


def export_onnx(head: nn.Module, path, opset: int, dynamic: bool) -> None:
    class OfMaps(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, *maps):
            return self.head(maps)

    names = ["p3", "p4", "p5"]
    axes = {name: {0: "batch", 2: f"rows {name}", 3: f"columns {name}"} for name in names} | {"output": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)  # a size that is fixed for good
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter itself
        torch.onnx.export(
            *(OfMaps().eval(), tuple(random_maps()), str(path)),
            **{"dynamo": False, "opset_version": opset, "input_names": names, "output_names": ["output"]},
            dynamic_axes=axes if dynamic else None,
        )


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("nms", [None, LOOSE])
def test_onnx_runtime_and_openvino_do_the_same(detect, tmp_path, opset, dynamic, nms):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    openvino = pytest.importorskip("openvino")
    head = detect.output(None if dynamic else SHAPE_HW, nms, 5 if nms else None)
    path = tmp_path / "head.onnx"
    export_onnx(head, path, opset, dynamic)
    assert path.stat().st_size < 200_000, "tables of candidates x candidates must not be stored"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for maps in [random_maps(seed=1), *([random_maps((32, 64), 3, seed=2)] if dynamic else [])]:
        expected = head(maps).numpy()
        feed = {node.name: level.numpy() for node, level in zip(session.get_inputs(), maps, strict=True)}
        np.testing.assert_allclose(session.run(None, feed)[0], expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(compiled(list(feed.values()))[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("nms", [None, LOOSE])
def test_a_trace_follows_the_size_of_its_maps(detect, nms):
    head = detect.output(None, nms)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of the tracer itself
        traced = torch.jit.trace(head, (random_maps(),))
    maps = random_maps((32, 160), 1, seed=3)
    torch.testing.assert_close(traced(maps), head(maps))


@pytest.mark.slow
def test_tflite_does_the_same(detect, tmp_path):
    litert_torch = pytest.importorskip("litert_torch")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    head, maps = detect.output(SHAPE_HW, LOOSE, 5, normalised=True), random_maps(batch=1)
    path = tmp_path / "head.tflite"
    litert_torch.convert(head.eval(), (maps,)).export(str(path))
    runner = interpreter.Interpreter(str(path))
    runner.allocate_tensors()
    for detail, level in zip(runner.get_input_details(), maps, strict=True):
        runner.set_tensor(detail["index"], level.numpy())
    runner.invoke()
    found = runner.get_tensor(runner.get_output_details()[0]["index"])
    np.testing.assert_allclose(found, head(maps).numpy(), rtol=1e-4, atol=1e-5)
