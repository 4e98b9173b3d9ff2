"""Which runtime a name stands for, and what is said where it cannot be had."""

import builtins
import platform
import subprocess
import sys

import pytest

from models.backends import load_backend, runtime_of
from models.backends.base import require, thread_count
from utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("best.pt", "pytorch"),
        ("runs/best.torchscript", "torchscript"),
        ("best.pt.onnx", "onnxruntime"),
        ("best.ptq.onnx", "onnxruntime"),
        ("best-int8_openvino_model/", "openvino"),
        ("folder/best.xml", "openvino"),
        ("best_openvino_model_v2", "openvino"),
        ("best_ncnn_model", "ncnn"),
        ("best_rknn_model", "rknn"),
        ("best.mnn", "mnn"),
        ("best.pte", "executorch"),
        ("best-int8.tflite", "tflite"),
        ("best-int8_edgetpu.tflite", "tflite"),
        ("best_saved_model", "tensorflow"),
        ("best.pb", "tensorflow"),
        ("best.mlmodel", "coreml"),
        ("best.mlpackage", "coreml"),
        ("BEST.ENGINE", "tensorrt"),
    ],
)
def test_the_end_of_the_name_decides_else_what_occurs_in_it(name, runtime):
    assert runtime_of(name) == runtime


def test_a_browsers_model_is_refused(tmp_path):
    (tmp_path / "best_web_model").mkdir()
    with pytest.raises(UserError, match="run in a browser only"):
        load_backend(tmp_path / "best_web_model")


@pytest.mark.parametrize("name", ["best_openvino_model", "best_ncnn_model", "best_rknn_model"])
def test_an_empty_folder_is_told(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="is expected in this folder, there is none"):
        load_backend(tmp_path / name, "cpu")


@pytest.mark.skipif(platform.system() == "Darwin", reason="Core ML runs here")
def test_core_ml_is_for_macos(tmp_path):
    (tmp_path / "best.mlmodel").touch()
    with pytest.raises(UserError, match="Core ML models run on macOS only"):
        load_backend(tmp_path / "best.mlmodel")


def test_engines_are_for_cuda(tmp_path):
    (tmp_path / "best.engine").touch()
    with pytest.raises(UserError, match="TensorRT engines run on a CUDA GPU only"):
        load_backend(tmp_path / "best.engine", "cpu")


@pytest.mark.parametrize(
    ("form", "module", "package"),
    [("onnx", "onnxruntime", "onnxruntime"), ("openvino", "openvino", "openvino"), ("ncnn", "ncnn", "ncnn")],
)
def test_a_missing_library_is_one_line_that_names_it(exported, monkeypatch, form, module, package):
    path = exported(form)
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)
        return real(name, *arguments, **keywords)

    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"needs {package}: pip install {package}$"):
        load_backend(path, "cpu")


def test_a_library_that_lacks_another_is_told_apart(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"lacks nowhere_to_be_found: pip install nowhere_to_be_found"):
        require("halfway", "halfway", "best.onnx")


def test_threads_are_all_cores_or_what_the_variable_says(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_count() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert thread_count() >= 1


def test_choosing_loads_no_runtime():
    program = "import sys; import models.backends as b; b.runtime_of('a.onnx')\n"
    program += "print(sorted({'torch', 'onnxruntime', 'openvino', 'ncnn', 'cv2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_path_that_is_not_utf_8_is_told_and_not_handed_to_native_code(tmp_path):
    folder = tmp_path / "\udcd5"
    folder.mkdir()
    (folder / "best.onnx").touch()
    with pytest.raises(UserError, match="runtimes take no path that is not UTF-8: rename the file or its folder"):
        load_backend(folder / "best.onnx", "cpu")
