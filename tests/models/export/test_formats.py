"""The table of formats, and what is refused of the options before anything is loaded."""

from pathlib import Path

import pytest

import export
from models.export.formats import FORMATS, LEAST_OPSETS, TOLERANCES, UNABLE, ExportConfig, find_formats
from models.yolo import BLOCKS, Model
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def complete(*words):
    return ExportConfig(**vars(export.build_parser().parse_args(list(words)))).checked()


def test_6_1s_arguments_and_suffixes_are_kept():
    table = {entry.argument: entry.suffix for entry in FORMATS.values()}
    assert table.pop("ncnn") == "_ncnn_model" and table.pop("yolov5") == "_yolov5.pt"
    assert table.pop("web") == "_web_page" and table.pop("rknn") == "_rknn_model"
    assert table == {
        "torchscript": ".torchscript",
        "onnx": ".onnx",
        "openvino": "_openvino_model",
        "engine": ".engine",
        "coreml": ".mlmodel",
        "mnn": ".mnn",
        "executorch": ".pte",
        "saved_model": "_saved_model",
        "pb": ".pb",
        "tflite": ".tflite",
        "edgetpu": "_edgetpu.tflite",
        "tfjs": "_web_model",
    }


@pytest.mark.parametrize("entry", FORMATS.values(), ids=FORMATS)
def test_every_format_has_its_module_its_section_and_its_limit(entry):
    assert (ROOT / "models" / "export" / f"{entry.module}.py").is_file()
    assert entry.precision in TOLERANCES
    sections = (ROOT / "requirements-export.txt").read_text()
    assert bool(entry.packages) == bool(entry.extra)
    assert not entry.extra or f"\n# {entry.extra}: " in sections


def test_formats_come_in_order_once_and_in_any_case():
    assert [entry.argument for entry in find_formats(["YOLOv5", "onnx", "TorchScript", "ONNX"])] == [
        "torchscript",
        "onnx",
        "yolov5",
    ]
    with pytest.raises(UserError, match=r"--include onxx: no such format. Did you mean 'onnx'\?.*torchscript, engine"):
        find_formats(["onxx"])
    with pytest.raises(UserError, match="name a format"):
        find_formats([])


def test_a_missing_package_is_named_with_its_section():
    entry = FORMATS["onnx"].__class__("Foo", "foo", ".foo", "foo", ("json", "no_such_package"), "foo-extra")
    with pytest.raises(
        UserError, match="needs no_such_package: install the section 'foo-extra' of requirements-export"
    ):
        entry.check_packages()


def test_where_a_format_runs(monkeypatch):
    assert FORMATS["torchscript"].why_not_here(cuda=False) == ""
    assert "GPU" in FORMATS["engine"].why_not_here(cuda=False)
    assert "own device" in FORMATS["tfjs"].why_not_here(cuda=True)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert FORMATS["coreml"].why_not_here(cuda=False) == "it runs on Darwin only"
    monkeypatch.setattr("models.export.formats.find_spec", lambda name: None)
    assert FORMATS["onnx"].why_not_here(cuda=False) == "onnxruntime is not installed"


def test_limits_get_their_documented_defaults():
    options = complete("--nms", "--include", "onnx", "--topk-all", "20")
    assert (options.topk_all, options.topk_per_class, options.iou_thres, options.conf_thres) == (20, 100, 0.45, 0.25)
    assert complete("--int8", "--data", "x.yaml", "--include", "onnx").int8_max_drop == 0.01
    assert complete("--int8", "--data", "x.yaml", "--include", "onnx", "--int8-max-drop", "0").int8_max_drop == 0
    help_text = export.build_parser().format_help()
    for default in ("default 0.01", "default 0.45", "default 0.25", "default 100", "default 12"):
        assert default in " ".join(help_text.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--half --int8 --data x --include onnx", "--half with --int8: .*choose one"),
        ("--train --nms --include onnx", "--train with --nms: "),
        ("--train --int8 --data x --include onnx", "--train with --int8: "),
        ("--raw --nms --include onnx", "--raw with --nms: .*leave one of them out"),
        ("--raw --train --include onnx", "--raw with --train: .*after the sigmoid"),
        (
            "--raw --include openvino",
            "--raw: OpenVINO cannot. Formats that can: onnx, rknn, mnn, executorch, tflite, edge",
        ),
        ("--torch-export --include tflite", "--torch-export has no effect here: it is for the formats onnx, openvino"),
        ("--int8 --include onnx", "--int8 is calibrated .* --data"),
        ("--optimize", "--optimize .* no longer builds"),
        ("--inplace", "--inplace would change nothing"),
        (
            "--int8 --data x",
            "--int8: TorchScript cannot. Formats that can: engine, onnx, openvino, coreml, rknn, tflite",
        ),
        ("--dynamic --include onnx ncnn tflite", "--dynamic: NCNN, TensorFlow Lite cannot"),
        ("--nms", "--nms: TorchScript cannot. Formats that can: engine, onnx, openvino, coreml, tflite"),
        ("--half --include onnx saved_model", "--half: TensorFlow SavedModel cannot"),
        ("--train --include openvino", "--train: OpenVINO cannot. Formats that can: torchscript, onnx"),
        ("--simplify --include torchscript", "--simplify has no effect here: it is for the formats .*onnx"),
        ("--opset 13 --include ncnn", "--opset has no effect here"),
        ("--workspace 2", "--workspace has no effect here: it is for the formats engine"),
        ("--verbose", "--verbose has no effect here"),
        ("--conf-thres 0.25", "--conf-thres has no effect without --nms"),
        ("--iou-thres 0", "--iou-thres has no effect without --nms"),
        ("--topk-all 5", "--topk-all has no effect without --nms"),
        ("--topk-per-class 5", "--topk-per-class has no effect without --nms"),
        ("--agnostic-nms", "--agnostic-nms has no effect without --nms"),
        ("--int8-max-drop 0", "--int8-max-drop has no effect without --int8"),
        ("--half", "--half: TorchScript in float16 needs a GPU: add --device 0"),
        ("--imgsz 1 2 3", "--imgsz 1 2 3: give one side, or height and width"),
        ("--include engine", "--device cpu: TensorRT is built on the GPU"),
    ],
)
def test_what_contradicts_itself_or_changes_nothing_is_refused_in_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        complete(*words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "--half --include onnx",
        "--simplify --opset 13",
        "--half --dynamic --include onnx openvino",
        "--nms --agnostic-nms --include onnx tflite",
        "--include engine --device 0 --half --workspace 2 --verbose",
        "--half --device 0",
    ],
)
def test_what_makes_sense_is_accepted(words):
    assert complete(*words.split()).batch_size == 1


@pytest.mark.parametrize(
    ("name", "block"),
    [("asff", "ASFF"), ("dysample", "DySample"), ("msca", "MSCA"), ("shufflenet", "ShuffleV2Block")],
)
def test_a_block_that_a_format_cannot_carry_is_refused_at_once(name, block):
    model = Model(f"yolov5n-{name}.yaml", nc=1)
    with pytest.raises(UserError, match=f"cannot carry {block}: YOLOv5 has no such block"):
        FORMATS["yolov5"].check_blocks(model)
    for able in ("onnx", "ncnn", "openvino", "tflite"):
        FORMATS[able].check_blocks(model)
    FORMATS["yolov5"].check_blocks(Model("yolov5n-slimneck.yaml", nc=1))


def test_tables_of_blocks_name_blocks_and_formats():
    assert {block for block, _ in UNABLE} | set(LEAST_OPSETS) <= set(BLOCKS) and {name for _, name in UNABLE} <= set(
        FORMATS
    )
