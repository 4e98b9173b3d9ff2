"""serve.py's command line: mistakes in one line, the warning about open addresses, what it loads."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import serve
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_missing_packages_are_named_with_the_file_that_lists_them(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(UserError, match=r"uvicorn.* pip install -r requirements-serve\.txt"):
        serve.run()


def test_every_package_it_asks_for_is_in_the_requirements():
    named = (ROOT / "requirements-serve.txt").read_text().replace("-", "_")
    assert all(f"\n{package}>=" in named for package in serve.PACKAGES)


def test_taken_port_and_unknown_host_are_told():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose another --port"):
        serve.listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot listen on no.such.host.invalid"):
        serve.listen("no.such.host.invalid", 0)


def test_only_an_open_address_is_warned_of(caplog):
    for host, warnings in (("127.0.0.1", 0), ("0.0.0.0", 1)):
        caplog.clear()
        with caplog.at_level("WARNING", "yolov5"):
            serve.listen(host, 0).close()
        assert len(caplog.records) == warnings
    assert "lets other machines in" in caplog.text


def test_weights_that_do_not_exist_are_told_without_a_traceback(tmp_path):
    pytest.importorskip("prometheus_client")
    command = [sys.executable, "serve.py", "--port", "0", "--weights", str(tmp_path / "no.onnx")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr and "no.onnx" in run.stderr
