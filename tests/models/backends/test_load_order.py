"""Loading PyTorch, TensorFlow and triton in one process."""

import subprocess
import sys

import pytest

from models.backends.base import COMPILER, before_tensorflow
from models.export.formats import missing_packages
from utils.files import ROOT


def test_without_pytorch_nothing_is_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was loaded"))
    before_tensorflow()


def test_without_triton_nothing_is_missed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr("models.backends.base.find_spec", lambda name: None)
    before_tensorflow()


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_packages(("tensorflow", COMPILER))), reason="needs TensorFlow and triton")
def test_triton_can_be_used_after_tensorflow():
    program = (
        "import torch; from models.backends.base import before_tensorflow; before_tensorflow();"
        "import tensorflow; import triton, torchvision; print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr[-500:]
