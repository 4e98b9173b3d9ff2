"""Devices: which one `--device` names, what is on it, and which precision suits it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re

import torch

from utils.errors import UserError

AMP_MODES = ("auto", "off", "fp16", "bf16")
# mallopt(3): M_MMAP_MAX (-4) no blocks mapped on their own, M_TRIM_THRESHOLD (-1) never, M_TOP_PAD (-2) grow by 64 MiB,
# M_ARENA_MAX (-8) one pool for all threads: what one thread takes aligned and another frees, as images are, makes a
# thread's own pool grow by a kilobyte an image for ever (glibc 2.36)
GLIBC_KEEPS_MEMORY = {-4: 0, -1: -1, -2: 64 << 20, -8: 1}


def select_device(device: str = "", batch_size: int = 0) -> torch.device:
    """Returns the device for `''` (CUDA 0, else the CPU), `cpu`, `mps`, `cuda`, `0`, `cuda:0`, `0,1`: the first one.

    Args:
        device: the value of `--device`.
        batch_size: the total batch; it must divide by the number of GPUs named.

    Raises:
        UserError: an unknown name, a GPU that is not there, or a batch that does not divide.
    """
    chosen = select_devices(device)
    if str(device).strip() and batch_size > 0 and batch_size % len(chosen):
        raise UserError(f"--batch-size {batch_size} does not divide by the {len(chosen)} GPUs of --device {device}.")
    return current(chosen[0])


def current(device: torch.device) -> torch.device:
    """Makes a CUDA device the one that this process uses where none is named, and returns it; others it just returns.

    Else GPU 0 would be waited for, and would hold a context, pinned memory and what libraries put there.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def select_devices(device: str = "") -> list[torch.device]:
    """Returns all devices that `--device` names: `0,1` are two, `''` is every GPU, or the CPU where there is none.

    Raises:
        UserError: an unknown name, or a GPU that is not there.
    """
    name = str(device).strip().lower()
    name = "0" if name == "cuda" else name
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (not name and not available):
        return [torch.device("cpu")]
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine or this PyTorch has no Metal (MPS) device. Use --device cpu.")
        return [torch.device("mps")]
    if not re.fullmatch(r"((cuda:)?\d{1,4}(,\d{1,4})*)?", name):
        raise UserError(f"--device '{device}': expected cpu, mps, a GPU number such as 0, or a list such as 0,1.")
    numbers = [int(number) for number in name.removeprefix("cuda:").split(",")] if name else range(available)
    if max(numbers) >= available:
        have = f"GPUs 0 to {available - 1}" if available else "no CUDA GPU"
        raise UserError(f"--device '{device}': PyTorch sees {have} here. Use --device cpu or a GPU that exists.")
    return [torch.device("cuda", number) for number in numbers]


def device_line(device: torch.device) -> str:
    """Returns what a run prints about its versions and its device."""
    head = f"Python-{platform.python_version()} torch-{torch.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{head} CUDA:{device.index or 0} ({properties.name}, {properties.total_memory >> 20}MiB)"
    threads = f" ({os.cpu_count()} cores, {torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    return f"{head} {device.type.upper()}{threads}"


def resolve_amp(mode: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of automatic mixed precision, or None for plain float32.

    `auto` takes float16 on CUDA and bfloat16 on a CPU that computes it in hardware; elsewhere float32.

    Raises:
        UserError: an unknown mode, or float16 on a device without it.
    """
    if mode not in AMP_MODES:
        raise UserError(f"--amp {mode}: expected one of {', '.join(AMP_MODES)}.")
    if mode == "off":
        return None
    if mode == "bf16":
        return torch.bfloat16
    if mode == "fp16":
        if device.type != "cuda":
            raise UserError(f"--amp fp16 needs a CUDA GPU; on {device.type} use --amp auto, bf16 or off.")
        return torch.float16
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else None


def prepare_cpu_memory(device: torch.device) -> bool:
    """Lets a process that computes on the CPU keep the memory it frees, where the C library is glibc.

    Every batch takes and frees hundreds of megabytes. By default glibc hands large blocks back to the kernel, which
    maps and clears them anew for the next batch: a quarter of the time of a forward pass. The process then stays at
    its peak size until it ends.

    Returns:
        Whether anything was changed.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in GLIBC_KEEPS_MEMORY.items())


def cpu_has_bf16() -> bool:
    """Says whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def gpus_in_use() -> list[str]:
    """Returns the UUID, as nvidia-smi has it, of the CUDA GPU that this process computes on, if it does."""
    if not torch.cuda.is_initialized():
        return []
    return [f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"]


def versions_here(device: torch.device) -> dict[str, str | int]:
    """Returns what, beside data and options, decides the last bits of what a process computes on `device`."""
    import cv2
    import numpy

    connected = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": _version_of("torchvision"),
        "numpy": numpy.__version__,
        "opencv": cv2.__version__,
        "albumentations": _version_of("albumentations"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability() + (" with bf16" if cpu_has_bf16() else ""),  # see `--amp auto`
        "threads": torch.get_num_threads(),
        "processes": torch.distributed.get_world_size() if connected else 1,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _version_of(package: str) -> str:
    """Returns the version of an installed package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
