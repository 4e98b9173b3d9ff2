"""What a machine runs out of is told in words, with the options to lower; everything else keeps its form."""

import errno

import numpy as np
import pytest
import torch

from utils.checks import UserError
from utils.limits import limits_explained

SIZES = {"--batch-size": 16, "--imgsz": [640, 480], "--workers": 8}
GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.2 GiB is free."
)
CPU = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate: you tried to allocate 2097152 bytes."
BUS = (
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
TOLD = {
    "gpu": (torch.OutOfMemoryError(GPU), r"out of GPU memory \(2.50 GiB more were asked for\), with --batch-size 16, "),
    "gpu library": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        "^out of GPU mem",
    ),
    "cpu": (RuntimeError(CPU), r"^out of memory \(2 MiB more .*--imgsz 640 480.* Lower --batch-size or --imgsz, or "),
    "numpy": (
        MemoryError("Unable to allocate 3.66 GiB for an array with shape (700, 700)"),
        r"^out of memory \(3.66 GiB",
    ),
    "in a worker": (RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0."), "^out of memory, with"),
    "shared memory": (RuntimeError(BUS), "^out of shared memory.*--shm-size 8g.*--workers 0"),
    "worker": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        "worker process was killed.*fewer",
    ),
    "worker later": (
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
        "worker process was killed.*-w",
    ),
    "files": (RuntimeError("received 0 items of ancdata"), "too many files are open"),
    "disk": (
        OSError(errno.ENOSPC, "No space left on device", "/runs/a.png"),
        r"^/runs/a.png: cannot be used \(No space",
    ),
}


@pytest.mark.parametrize(("error", "message"), TOLD.values(), ids=TOLD)
def test_shortages_are_told_in_one_line(error, message):
    with pytest.raises(UserError, match=message) as told, limits_explained(SIZES):
        raise error
    assert "\n" not in str(told.value)


OTHERS = [
    ValueError("a defect"),
    RuntimeError("shape mismatch"),
    KeyError("MemoryCache"),
    OSError(errno.ENOENT, "none"),
]


@pytest.mark.parametrize("error", [*OTHERS, UserError("out of memory"), KeyboardInterrupt("MemoryError")], ids=repr)
def test_everything_else_keeps_its_form(error):
    with pytest.raises(type(error)) as kept, limits_explained(SIZES):
        raise error
    assert kept.value is error


def test_numpy_really_running_out_is_told():
    with pytest.raises(
        UserError, match=r"out of memory \(8.00 EiB more were asked for\), with --imgsz 64\. Lower --imgsz"
    ):
        with limits_explained({"--imgsz": 64, "--batch-size": None}):
            np.empty((2**60 - 1,), np.float64)


def test_an_interrupt_goes_before_what_breaks_while_it_is_answered():
    with pytest.raises(KeyboardInterrupt, match="^first$"), limits_explained(SIZES):
        try:
            raise KeyboardInterrupt("first")
        finally:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
