"""export.py from the command line and from Python: what it prints and returns, its exit status, failures on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
from models.export import formats, run
from models.export import verify as parity_module
from models.heads import Head
from models.yolo import Detect, Model
from utils.checkpoint import save_checkpoint
from utils.cli import ReportedError, run_command
from utils.errors import UserError
from utils.files import ROOT


def parse(*words):
    return export.build_parser().parse_args([*map(str, words)])


@pytest.fixture
def weights(tmp_path, tiny_cfg):
    """A small model of three classes that was trained at 96 pixels."""
    torch.manual_seed(0)
    model = Model(tiny_cfg, nc=3)
    content = {"epoch": -1, "model": model.state_dict(), "ema": None, "yaml": model.yaml, "names": model.names}
    file = tmp_path / "weights" / "best.pt"
    file.parent.mkdir()
    extra = {"nc": 3, "stride": [8, 16], "opt": {"imgsz": 96}, "hyp": {}, "data": ""}
    save_checkpoint(file, {**content, **extra})
    return file


@pytest.fixture
def log(caplog):
    with caplog.at_level("INFO", "yolov5"):
        yield caplog


def fake_export(monkeypatch, **by_format):
    """Replaces formats' modules by functions of the job."""
    for name, function in by_format.items():
        module = formats.FORMATS[name].module
        monkeypatch.setitem(sys.modules, f"models.export.{module}", module_with(function))


def module_with(function):
    return type("Module", (), {"export": staticmethod(function)})


def failing(job):
    raise ValueError("the converter does not like it")


def test_the_command_line_writes_checks_and_says_so(weights):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    words = ["--weights", weights, "--img", "64", "--include", "ONNX", "TorchScript"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "export.py", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert "export: data=, weights=" in said
    assert f"PyTorch: starting from {weights} with output shape (1, 240, 8) (" in said
    for title, suffix in (("TorchScript", ".torchscript"), ("ONNX", ".onnx")):
        file = weights.with_suffix(suffix)
        megabytes = file.stat().st_size / 1e6
        assert f"{title}: export success, saved as {file} ({megabytes:.1f} MB)" in said
        assert f"{title}: parity with best.pt on 6 images: scores within" in said
    assert said.index("TorchScript: export") < said.index("ONNX: export")
    assert "Export complete (" in said and f"Results saved to {weights.parent}" in said
    assert f"python detect.py --weights {weights.with_suffix('.onnx')}\n" in said
    assert f"python val.py --weights {weights.with_suffix('.onnx')}\n" in said
    assert "Warning" not in said
    assert sorted(path.name for path in weights.parent.iterdir()) == ["best.onnx", "best.pt", "best.torchscript"]


def test_a_failing_format_does_not_stop_the_others(weights, monkeypatch, log):
    fake_export(monkeypatch, onnx=failing)
    paths = export.run(weights=weights, imgsz=64, include=["onnx", "torchscript", "yolov5"])
    assert paths == [str(weights.with_suffix(".torchscript")), str(weights.with_name("best_yolov5.pt"))]
    assert "ONNX: export failure: ValueError: the converter does not like it" in log.messages


def test_a_failure_is_told_by_the_exit_status(weights, monkeypatch, log):
    fake_export(monkeypatch, onnx=failing)
    with pytest.raises(ReportedError, match="ONNX was not exported"):
        export.main(parse("--weights", weights, "--img", "64", "--include", "onnx", "yolov5"))
    monkeypatch.setattr(sys, "argv", ["export.py", "--weights", str(weights), "--include", "onnx", "--img", "64"])
    assert run_command(export.main, export.build_parser()) == 1


def test_a_missing_library_is_a_failure_that_says_what_to_install(weights, monkeypatch, log):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert export.run(weights=str(weights), imgsz=64, include="openvino") == []
    wanted = "OpenVINO: export failure: needs onnx, openvino: install the section 'openvino' of requirements-export.txt"
    assert wanted in log.messages


def test_a_file_that_disagrees_stays_but_fails(weights, monkeypatch, log):
    def wrong(job):
        with torch.no_grad():
            job.model.trunk.get_submodule("model.4.m.0").bias.add_(1)
        return original(job)

    from models.export.torchscript import export as original

    fake_export(monkeypatch, torchscript=wrong)
    with pytest.raises(ReportedError, match="TorchScript failed the check of its parity"):
        export.main(parse("--weights", weights, "--img", "64", "--include", "torchscript"))
    assert weights.with_suffix(".torchscript").is_file()
    assert any(m.startswith("TorchScript: parity failure:") and "scores differ by" in m for m in log.messages)


def test_a_file_that_does_not_load_fails(weights, monkeypatch, log):
    def empty(job):
        path = job.path(".torchscript")
        path.write_bytes(b"")
        return path

    fake_export(monkeypatch, torchscript=empty)
    with pytest.raises(ReportedError, match="TorchScript failed the check of its parity"):
        export.main(parse("--weights", weights, "--img", "64", "--include", "torchscript"))


def test_what_cannot_run_here_is_said(weights, monkeypatch, log):
    def written(job):
        path = job.path("_web_model")
        path.mkdir()
        (path / "model.json").write_bytes(b"x" * 1_200_000)
        return path

    fake_export(monkeypatch, tfjs=written)
    monkeypatch.setattr(formats.Format, "check_packages", lambda self: None)
    assert export.run(weights=weights, imgsz=64, include="tfjs") == [str(weights.parent / "best_web_model")]
    assert "TensorFlow.js: export success, saved as " + str(weights.parent / "best_web_model (1.2 MB)") in log.messages
    assert "WARNING: TensorFlow.js: parity was not checked: it runs on its own device only." in log.messages


@pytest.mark.parametrize(("loss", "status"), [(0.02, "fails"), (0.009, "passes"), (-0.1, "passes")])
def test_int8_must_not_lose_too_much(weights, tiny_shapes, monkeypatch, log, loss, status):
    seen = []

    def compare_map(*arguments):
        seen.append(arguments)
        return 0.5, 0.5 - loss

    def written(job):
        path = job.path("-int8.onnx")
        path.write_bytes(b"x")
        return path

    fake_export(monkeypatch, onnx=written)
    monkeypatch.setattr(formats.Format, "check_packages", lambda self: None)
    monkeypatch.setattr(formats.Format, "why_not_here", lambda self, cuda: "")
    monkeypatch.setattr(run, "check_parity", lambda *_: parity_module.Parity())
    monkeypatch.setattr(run, "compare_map", compare_map)
    words = ["--weights", weights, "--include", "onnx", "--img", "64", "96", "--int8", "--data", tiny_shapes]
    if status == "fails":
        with pytest.raises(ReportedError, match="ONNX failed the check of its quality"):
            export.main(parse(*words))
        assert "ONNX: quality failure: mAP50-95 falls by 0.0200 (--int8-max-drop 0.01)" in log.messages
    else:
        export.main(parse(*words))
    assert any(f"checkpoint 0.5000, int8 {0.5 - loss:.4f}" in message for message in log.messages)
    assert seen == [(weights, weights.with_name("best-int8.onnx"), str(tiny_shapes), (64, 96), "cpu")]


def test_raw_maps_of_a_head_that_nothing_decodes_are_refused(weights, monkeypatch):
    monkeypatch.setattr(Detect, "raw_head", Head.raw_head)
    with pytest.raises(UserError, match="--raw: nothing here decodes Detect on the host"):
        export.run(weights=weights, imgsz=64, include="onnx", raw=True)


def test_sides_are_rounded_up_to_the_stride_and_the_trained_size_is_told(weights, log):
    export.run(weights=weights, imgsz=[60, 100], include=["yolov5"])
    assert any("must be a multiple of the model's stride 32: using [64, 128]" in message for message in log.messages)
    assert any("Image size 64x128; the checkpoint was trained at 96" in message for message in log.messages)


def test_each_of_several_checkpoints_is_exported(weights, log):
    other = weights.with_name("other.pt")
    other.write_bytes(weights.read_bytes())
    paths = export.run(weights=[weights, str(other)], imgsz=64, include="yolov5", half=True)
    assert [Path(path).name for path in paths] == ["best_yolov5.pt", "other_yolov5.pt"]


def test_without_weights_the_newest_run_is_taken(weights, tmp_path, monkeypatch, log):
    monkeypatch.setattr("utils.cli.ROOT", tmp_path)
    with pytest.raises(UserError, match="no --weights given and none trained yet"):
        export.run(include="yolov5")
    newest = tmp_path / "runs" / "train" / "exp" / "weights" / "best.pt"
    newest.parent.mkdir(parents=True)
    newest.write_bytes(weights.read_bytes())
    assert export.run(include="yolov5", imgsz=64) == [str(newest.with_name("best_yolov5.pt"))]


def test_the_table_of_formats():
    table = export.export_formats()
    assert list(table.columns) == ["Format", "Argument", "Suffix"]
    assert table.values[0].tolist() == ["PyTorch", "-", ".pt"]
    assert ["ONNX", "onnx", ".onnx"] in table.values.tolist() and len(table) == len(formats.FORMATS) + 1


def test_6_1s_defaults_and_abbreviations():
    options = parse("--batch", "2", "--img-size", "320", "--conf", "0.3", "--iou", "0.5")
    assert (options.batch_size, options.imgsz, options.conf_thres, options.iou_thres) == (2, [320], 0.3, 0.5)
    options = parse()
    assert (options.include, options.imgsz, options.device) == (["torchscript", "onnx"], [640, 640], "cpu")
    with pytest.raises(UserError, match="unknown option 'dynamics'. Did you mean 'dynamic'"):
        export.run(dynamics=True)


def test_nothing_is_loaded_before_the_options_are_found_good(monkeypatch):
    monkeypatch.setattr(run, "read_weights", lambda path: pytest.fail("read"))
    with pytest.raises(UserError, match="--half with --int8"):
        export.run(weights="best.pt", half=True, int8=True)
