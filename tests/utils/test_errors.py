"""Suggestions for misspelt names, image sizes that fit a stride, and what a machine runs out of, told in words."""

import errno
import logging
import os

import numpy as np
import pytest
import torch

from utils.errors import (
    UserError,
    check_img_size,
    did_you_mean,
    explain_resource_errors,
    make_divisible,
    memory_left,
)


@pytest.mark.parametrize(
    ("name", "options", "suggestion"),
    [
        ("yolov5s.yml", ["yolov5s.yaml", "voc.yaml"], " Did you mean 'yolov5s.yaml'?"),
        ("LR0", ["lr0", "lrf", "momentum"], " Did you mean 'lr0'"),
        ("c3", ["C3", "C3TR", "Concat"], " Did you mean 'C3'"),
        ("zebra", ["lr0", "lrf"], ""),
        ("lr0", [], ""),
    ],
)
def test_nearest_names_are_suggested_whatever_their_case(name, options, suggestion):
    answer = did_you_mean(name, options)
    assert answer.startswith(suggestion) and bool(answer) == bool(suggestion)


@pytest.mark.parametrize(("value", "divisor", "expected"), [(1, 32, 32), (32, 32, 32), (33, 32, 64), (30.2, 2, 32)])
def test_round_up(value, divisor, expected):
    assert make_divisible(value, divisor) == expected


@pytest.mark.parametrize(
    ("size", "stride", "floor", "expected"),
    [
        (640, 32, 0, 640),
        ((320, 640), 32, 0, [320, 640]),
        (100, 32, 0, 128),
        (641, 64, 0, 704),
        (32, 32, 64, 64),
        ((100, 640), 32, 0, [128, 640]),
    ],
)
def test_a_size_that_does_not_fit_is_rounded_up_and_named(caplog, size, stride, floor, expected):
    with caplog.at_level(logging.WARNING, "yolov5"):
        assert check_img_size(size, stride, floor) == expected
    if expected in (size, list(size) if isinstance(size, tuple) else None):
        assert not caplog.records
    else:
        assert f"--img-size {size} " in caplog.text and str(expected) in caplog.text


@pytest.mark.parametrize("size", [0, -32, (640, 0)])
def test_a_side_below_one_pixel_is_refused(size):
    with pytest.raises(UserError, match="at least 1 pixel"):
        check_img_size(size, 32)


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
    "gpu library": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas"), "^out of GPU mem"),
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
    with pytest.raises(UserError, match=message) as told, explain_resource_errors(SIZES):
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
    with pytest.raises(type(error)) as kept, explain_resource_errors(SIZES):
        raise error
    assert kept.value is error


def test_numpy_really_running_out_is_told():
    with pytest.raises(
        UserError, match=r"out of memory \(8.00 EiB more were asked for\), with --imgsz 64\. Lower --imgsz"
    ):
        with explain_resource_errors({"--imgsz": 64, "--batch-size": None}):
            np.empty((2**60 - 1,), np.float64)


def test_an_interrupt_goes_before_what_breaks_while_it_is_answered():
    with pytest.raises(KeyboardInterrupt, match="^first$"), explain_resource_errors(SIZES):
        try:
            raise KeyboardInterrupt("first")
        finally:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")


GIB = 1 << 30


def system(root, **files) -> int | None:
    """What is left on a machine of 8 GiB, of which 6 are available, with these files."""
    files = {"proc/meminfo": f"MemTotal:       {8 << 20} kB\nMemAvailable:   {6 << 20} kB\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return memory_left(root)


def version_2(folder: str, limit: object, used: int, caches: int = 0) -> dict:
    folder = f"sys/fs/cgroup{folder}"
    stat = f"anon 5\ninactive_file {caches // 2}\nactive_file {caches // 2}\nshmem 7\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def version_1(folder: str, limit: object, used: int, caches: int = 0) -> dict:
    folder = f"sys/fs/cgroup/memory{folder}"
    stat = f"inactive_file 1\ntotal_inactive_file {caches}\ntotal_active_file 0\n"
    names = {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}
    return {f"{folder}/{name}": text for name, text in names.items()}


LEFT = {
    "no container": ({}, 6),
    "unlimited": ({"proc/self/cgroup": "0::/\n", **version_2("", "max", GIB)}, 6),
    "docker": ({"proc/self/cgroup": "0::/\n", **version_2("", 2 * GIB, GIB)}, 1),
    "caches are free": ({"proc/self/cgroup": "0::/\n", **version_2("", 4 * GIB, 3 * GIB, 2 * GIB)}, 3),
    "slurm, limited above": (
        {"proc/self/cgroup": "0::/job/step\n", **version_2("/job", 3 * GIB, GIB), **version_2("/job/step", "max", 0)},
        2,
    ),
    "used up": ({"proc/self/cgroup": "0::/\n", **version_2("", GIB, GIB + 4096)}, 0),
    "larger than the machine": ({"proc/self/cgroup": "0::/\n", **version_2("", 64 * GIB, GIB)}, 6),
    "version 1": ({"proc/self/cgroup": "3:cpu:/\n2:memory:/a\n0::/\n", **version_1("/a", 2 * GIB, GIB, GIB // 2)}, 1.5),
    "version 1, unlimited": ({"proc/self/cgroup": "2:memory:/\n", **version_1("", 2**63 - 4096, GIB)}, 6),
    "version 1, seen from inside": (
        {"proc/self/cgroup": "2:cpu,memory:/docker/0123\n", **version_1("", 2 * GIB, GIB)},
        1,
    ),
}


@pytest.mark.parametrize(("files", "gib"), LEFT.values(), ids=LEFT)
def test_the_memory_that_is_left_is_the_containers_where_it_has_less(files, gib, tmp_path):
    assert system(tmp_path, **files) == gib * GIB


def test_the_memory_that_is_left_here_is_part_of_what_there_is():
    assert 0 < memory_left() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_system_that_does_not_tell_what_is_left_tells_what_it_has(tmp_path):
    assert memory_left(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
