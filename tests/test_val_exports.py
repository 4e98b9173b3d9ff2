"""val.py on exported models: the checkpoint's figures at the same shapes, and what is refused or warned of."""

import logging
import shutil

import pytest
import torch

import export
import val
from models.yolo import Model
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.files import read_yaml, write_yaml

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SHAPE_HW = [96, 128]


@pytest.fixture(scope="module")
def data(part_of_coco128):
    return part_of_coco128(14)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, golden_dir, data):
    """A function that exports the COCO checkpoint to ONNX, once for each set of options."""
    made = {}

    def make(**options):
        key = tuple(options.items())
        if key not in made:
            weights = tmp_path_factory.mktemp("export") / "coco.pt"
            shutil.copy(golden_dir / "yolov5n-v6-coco.pt", weights)
            (made[key],) = export.run(
                weights=[str(weights)], include=["onnx"], imgsz=SHAPE_HW, data=str(data), **options
            )
        return made[key]

    return make


@pytest.fixture
def run(tmp_path, data):
    def run(weights, **options):
        plain = {"data": str(data), "device": "cpu", "workers": 0, "plots": False, "project": str(tmp_path / "runs")}
        return val.run(weights=str(weights), **{**plain, **options})[0]

    return run


@pytest.fixture
def checkpoint(golden_dir):
    return golden_dir / "yolov5n-v6-coco.pt"


@pytest.mark.parametrize("options, batch_size", [({}, 5), ({}, 1), ({"batch_size": 3}, 5)])
def test_a_fixed_shape_scores_as_the_checkpoint_padded_to_it(run, checkpoint, exported, options, batch_size):
    """Fourteen images in fives, one or three at a time in the model: the last parts of batches are filled up."""
    figures = run(exported(**options), batch_size=batch_size)
    assert figures == pytest.approx(run(checkpoint, imgsz=SHAPE_HW, batch_size=batch_size), abs=1e-3)
    assert figures[3] > 0.1


def test_opencv_scores_the_same(run, exported):
    assert run(exported(), dnn=True) == pytest.approx(run(exported()), abs=1e-3)


def test_a_dynamic_export_gets_the_checkpoints_rectangles(run, checkpoint, exported):
    figures = run(exported(dynamic=True), imgsz=128, batch_size=5)
    assert figures == pytest.approx(run(checkpoint, imgsz=128, batch_size=5), abs=1e-3)
    assert figures[3] > 0.1
    assert figures[3] != pytest.approx(run(exported(), batch_size=5)[3], abs=1e-5)  # other shapes, other figures


@pytest.mark.parametrize(
    "options, message",
    [
        ({"imgsz": 128}, "--imgsz 128: .* exported for 96 128 .* takes no other"),
        ({"imgsz": [128, 96]}, "--imgsz 128 96: .* exported for 96 128"),
        ({"imgsz": [1, 2, 3]}, "one side, or height and width"),
        ({"half": True}, "--half: .* precision that it was exported in"),
        ({"bf16": True}, "--bf16: .* precision that it was exported in"),
        ({"device": "7"}, "--device 7"),
        ({"data": ""}, "give --data"),
    ],
)
def test_mistakes_are_named(run, tmp_path, exported, options, message):
    with pytest.raises(UserError, match=message):
        run(exported(), **options)
    assert not (tmp_path / "runs").exists()


def test_dnn_is_for_onnx(run, checkpoint):
    with pytest.raises(UserError, match="--dnn"):
        run(checkpoint, dnn=True)


def test_an_export_that_says_nothing_takes_the_data_sets_names(run, tmp_path, exported, data, caplog):
    model = onnx.load(exported())
    del model.metadata_props[:]
    bare = tmp_path / "bare.onnx"
    onnx.save(model, bare)
    with caplog.at_level(logging.WARNING, "yolov5"):
        figures = run(bare)
    assert "does not name its classes" in caplog.text
    assert figures == pytest.approx(run(exported()), abs=1e-6)
    few = data.with_name("few.yaml")
    write_yaml(few, {**read_yaml(data), "names": ["cat", "dog"]})
    with pytest.raises(UserError, match="knows 80 classes"):
        run(bare, data=str(few))


def test_nms_inside_is_warned_of_and_measured(run, checkpoint, exported, caplog):
    weights = exported(nms=True, conf_thres=0.01, iou_thres=0.6, topk_all=300)
    with caplog.at_level(logging.WARNING, "yolov5"):
        inside = run(weights)
    assert "NMS is inside" in caplog.text and "confidence above 0.01" in caplog.text
    outside = run(checkpoint, imgsz=SHAPE_HW)
    assert 0.5 * outside[3] < inside[3] <= outside[3] + 0.01


def test_an_export_remembers_its_data_set(tmp_path, tiny_shapes):
    torch.manual_seed(0)
    model = Model("yolov5n-slimneck.yaml", nc=4)
    names = dict(enumerate(["circle", "square", "triangle", "star"]))
    content = {"epoch": -1, "model": model.state_dict(), "ema": None, "yaml": model.yaml, "names": names, "nc": 4}
    weights = tmp_path / "best.pt"
    save_checkpoint(weights, {**content, "stride": [8, 16, 32], "opt": {}, "hyp": {}, "data": str(tiny_shapes)})
    (path,) = export.run(weights=[str(weights)], include=["onnx"], imgsz=[64], data=str(tiny_shapes))
    options = {"device": "cpu", "workers": 0, "plots": False, "project": str(tmp_path / "runs")}
    figures, maps, _ = val.run(weights=path, batch_size=3, **options)
    assert maps.shape == (4,)
    assert figures == pytest.approx(val.run(weights=str(weights), imgsz=[64, 64], **options)[0], abs=1e-3)
