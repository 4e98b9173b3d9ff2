"""Which device a name stands for, and which precision mixed precision takes on it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import devices
from utils.devices import device_line, prepare_cpu_memory, resolve_amp, select_device
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("count", "name", "expected"),
    [
        (0, "", "cpu"),
        (0, "cpu", "cpu"),
        (2, "CPU ", "cpu"),
        (2, "", "cuda:0"),
        (2, "1", "cuda:1"),
        (2, "cuda:1", "cuda:1"),
        (2, "0,1", "cuda:0"),
        (2, "cuda", "cuda:0"),
        (12, "10", "cuda:10"),
    ],
)
def test_names_of_devices(gpus, count, name, expected):
    made_current = gpus(count)
    assert select_device(name, batch_size=16) == torch.device(expected)
    assert made_current == ([torch.device(expected)] if expected.startswith("cuda") else [])


@pytest.mark.parametrize("name", ["gpu", "cuda:", "-1", "0,", "0;1", "0.5", "cpu0"])
def test_a_name_of_no_device_is_refused_and_shown(gpus, name):
    gpus(2)
    with pytest.raises(UserError, match=f"--device '{name}': expected cpu, mps"):
        select_device(name)


@pytest.mark.parametrize(
    ("count", "name", "seen"),
    [(0, "0", "no CUDA GPU"), (0, "cuda", "no CUDA GPU"), (2, "2", "GPUs 0 to 1"), (2, "0,2", "0 to 1")],
)
def test_a_gpu_that_is_absent_is_refused(gpus, count, name, seen):
    gpus(count)
    with pytest.raises(UserError, match=f"--device '{name}': PyTorch sees .*{seen}"):
        select_device(name)


def test_a_batch_must_divide_by_the_gpus(gpus):
    gpus(4)
    with pytest.raises(UserError, match="--batch-size 16 does not divide by the 3 GPUs"):
        select_device("0,1,2", batch_size=16)
    assert select_device("0,1,2", batch_size=0).index == 0  # no batch size to check


@pytest.mark.parametrize("present", [True, False])
def test_mps(monkeypatch, present):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: present)
    if present:
        assert select_device("mps") == torch.device("mps")
    else:
        with pytest.raises(UserError, match="--device mps: .* Use --device cpu"):
            select_device("mps")


@pytest.mark.parametrize(
    ("mode", "device", "bf16_cpu", "expected"),
    [
        ("off", "cuda", True, None),
        ("off", "cpu", True, None),
        ("auto", "cuda", False, torch.float16),
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, None),
        ("auto", "mps", True, None),
        ("bf16", "cpu", False, torch.bfloat16),
        ("bf16", "cuda", False, torch.bfloat16),
        ("fp16", "cuda", False, torch.float16),
    ],
)
def test_precision_of_each_mode(monkeypatch, mode, device, bf16_cpu, expected):
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: bf16_cpu)
    assert resolve_amp(mode, torch.device(device)) is expected


@pytest.mark.parametrize(
    ("mode", "device", "reason"), [("fp16", "cpu", "needs a CUDA GPU"), ("fp32", "cpu", "expected one of")]
)
def test_a_precision_that_cannot_be_is_refused(mode, device, reason):
    with pytest.raises(UserError, match=f"--amp {mode}.*{reason}"):
        resolve_amp(mode, torch.device(device))


def test_the_device_line_names_versions_and_threads():
    line = device_line(torch.device("cpu"))
    assert f"torch-{torch.__version__} CPU" in line and f"{torch.get_num_threads()} threads" in line


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_cpu_process_keeps_its_memory():
    """Freed blocks stay with the process: its size does not fall when a large tensor goes."""
    program = (
        "import torch\n"
        "from utils.devices import prepare_cpu_memory\n"
        "def pages(): return int(open('/proc/self/statm').read().split()[1])\n"
        "changed = prepare_cpu_memory(torch.device('cpu'))\n"
        "tensor = torch.ones(64 << 20, dtype=torch.uint8)\n"
        "full = pages()\n"
        "del tensor\n"
        "print(changed, full - pages() < 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_other_devices_are_left_alone():
    assert prepare_cpu_memory(torch.device("cuda")) is False


def test_what_decides_the_last_bits_is_on_record(monkeypatch):
    threads = torch.get_num_threads()
    here = devices.versions_here(torch.device("cpu"))
    assert here["threads"] == threads and here["torch"] == torch.__version__ and here["device"] == "cpu"
    assert here["cpu"].startswith(torch.backends.cpu.get_cpu_capability()) and here["processes"] == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert devices.versions_here(torch.device("cuda", 1))["device"] == "card 1"
