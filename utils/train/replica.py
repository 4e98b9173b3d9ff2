"""The model of one process among several: its device, and the averaging of gradients and batch statistics.

Gradients go over NCCL on CUDA, one GPU for each process, and over gloo on CPUs (PyTorch's DistributedDataParallel).
"""

from __future__ import annotations

import contextlib
import datetime

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.checks import UserError
from utils.devices import current, select_devices
from utils.log import LOGGER
from utils.train.distributed import World

GRADIENTS_TIMEOUT = datetime.timedelta(minutes=10)  # all processes begin this exchange together


def own_device(name: str, world: World) -> torch.device:
    """Returns the device of this process: a GPU of its own, or the CPU that all share.

    Args:
        name: `--device`; empty means all GPUs, or the CPU where there are none.
        world: the run's processes.

    Raises:
        UserError: no such device, fewer GPUs than processes, or several GPUs named to a single process.
    """
    devices = select_devices(name)
    kind, count = devices[0].type, len(devices)
    if world.size == 1:
        if count > 1 and name:
            raise UserError(
                f"--device {name} names {count} GPUs, and one process trains on one. Start one for each: "
                f"{World(0, count, 0, count).command} --device {name}, with the other options as they are."
            )
        if count > 1:
            LOGGER.info(f"{count} GPUs are here, one is used. To use all: {World(0, count, 0, count).command} ...")
        return current(devices[0])
    if kind == "mps":
        raise UserError("--device mps: several processes train on CUDA GPUs or on the CPU, not on Metal.")
    if kind == "cpu":
        return devices[0]
    if world.local_size > count:
        raise UserError(
            f"{world.local_size} processes were started on this machine, for {count} GPU{'s'[: count > 1]}: each needs "
            f"one of its own. Use --nproc_per_node {count}, or --device cpu."
        )
    return current(devices[world.local_rank])


def check_sync_bn(device: torch.device, world: World) -> None:
    """Refuses `--sync-bn` where PyTorch cannot do it, and says when it has nothing to do.

    Raises:
        UserError: another device than CUDA.
    """
    if device.type != "cuda":
        raise UserError(f"--sync-bn: PyTorch synchronises batch norm on CUDA GPUs, not on {device.type}. Leave it out.")
    if world.size == 1:
        LOGGER.warning(f"WARNING: --sync-bn: a single process has nobody to synchronise with ({world.command})")


def replicate(model: nn.Module, device: torch.device, world: World, sync_bn: bool = False) -> nn.Module:
    """Returns what to run forward so that gradients are averaged over the processes; a process alone runs the model.

    All take the first process's weights and buffers, at once and (buffers) at every forward pass: so without
    `sync_bn` the running statistics are those of the first process's images.

    Args:
        model: on `device`; keeps its parameters and names.
        device: this process's.
        world: the run's processes.
        sync_bn: take batch statistics over all processes (CUDA).
    """
    if world.size == 1:
        return model
    world.wait()  # the first one may still look for anchors; gradients' connections have less patience
    if device.type != "cuda":
        return DistributedDataParallel(model)
    group = dist.new_group(backend="nccl", timeout=GRADIENTS_TIMEOUT)
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    return DistributedDataParallel(model, device_ids=[device.index], process_group=group)


def exchanging(replica: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Surrounds a forward and backward pass; gradients that are only gathered are not exchanged (`wanted` False)."""
    if wanted or not isinstance(replica, DistributedDataParallel):
        return contextlib.nullcontext()
    return replica.no_sync()
