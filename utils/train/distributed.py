"""Several processes that train as one: ranks, collectives, gradients, and how all end when one fails.

Started by torch.distributed.run, a process for every GPU, or as many as wanted on CPUs. Figures and decisions go over
gloo, so that every batch notices a process that is gone; gradients over NCCL on CUDA, over gloo on CPUs. A process
alone is a `World` of one, and nothing here changes what it computes.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.cli import ReportedError
from utils.dataloaders.sampling import Shard
from utils.devices import current, select_devices
from utils.errors import UserError
from utils.log import LOGGER, logging_from

# Others wait as long while the first process scans labels or validates; a process that is gone is noticed at once.
FIGURES_TIMEOUT = datetime.timedelta(days=1)
MEETING_TIMEOUT = datetime.timedelta(minutes=10)
GRADIENTS_TIMEOUT = datetime.timedelta(minutes=10)  # all processes begin this exchange together
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that every launcher sets
LOST_CONNECTION = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is.

    Attributes:
        rank: this process among all; rank 0 alone writes files, logs and validates.
        size: how many there are.
        local_rank: this process among those of its machine.
        local_size: how many there are on its machine.
        store: where connected processes leave word; None before and where this one is alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: dist.Store | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_environment(cls, local_rank: int = -1, environment: Mapping[str, str] = os.environ) -> World:
        """Reads what the launcher says; without one, or with a single process, this process is alone.

        Args:
            local_rank: `--local_rank`, which launchers pass that do not set LOCAL_RANK.
            environment: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        Raises:
            UserError: variables are missing.
        """
        if "RANK" not in environment or environment.get("WORLD_SIZE") == "1":
            return cls()
        missing = [name for name in NEEDED if name not in environment]
        if missing:
            raise UserError(f"RANK is set, but not {', '.join(missing)}: start with python -m torch.distributed.run.")
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        here, own = int(environment.get("LOCAL_WORLD_SIZE", size)), int(environment.get("LOCAL_RANK", local_rank))
        return cls(rank, size, rank % here if own < 0 else own, here)

    @property
    def is_main(self) -> bool:
        """Whether this process logs, writes and decides."""
        return self.rank == 0

    @property
    def share(self) -> Shard:
        """This process's part of every batch."""
        return Shard(self.rank, self.size)

    @property
    def command(self) -> str:
        """How such processes are started, less the options."""
        if self.size == 1:
            return "python train.py"
        nodes = f" --nnodes {self.size // self.local_size}" if self.size > self.local_size else ""
        return f"python -m torch.distributed.run{nodes} --nproc_per_node {self.local_size} train.py"

    def all_reduce_sum(self, figures: Tensor) -> Tensor:
        """Returns the sum over all processes of (n,) float64 on the CPU, in the same order and so the same on all."""
        parts = [torch.empty_like(figures) for _ in range(self.size)]
        dist.all_gather(parts, figures)
        return torch.stack(parts).sum(dim=0)

    def broadcast(self, value: int) -> int:
        """Returns what the first process hands in, a whole number or a bool as all of them; the others wait for it."""
        if self.size == 1:
            return value
        decision = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(decision, src=0)
        return type(value)(decision.item())

    def broadcast_str(self, text: str) -> str:
        """Returns the text that the first process hands in, once in a run; the others wait for it."""
        if self.size == 1:
            return text
        if self.is_main:
            self.store.set("text", os.fsencode(text))
        self.barrier()  # has more patience than the store
        return os.fsdecode(self.store.get("text"))

    def broadcast_str_local(self, text: str = "") -> str:
        """Returns the text that the first process of this machine hands in, once in a run; the others wait for it."""
        if self.local_size == 1:
            return text
        key = f"text of {self.rank - self.local_rank}"
        if self.local_rank == 0:
            self.store.set(key, text)
        return self.store.get(key).decode()

    def barrier(self) -> None:
        """Waits for all."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Lets the first process do something, then the first of every other machine, then the rest at once.

        So what is kept on disk is made once, and found by those that come later.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(turn, 2):
            self.barrier()

    def rank_zero_logging(self) -> contextlib.AbstractContextManager[None]:
        """Lets rank 0 alone log what all processes find out alike; the others log errors only meanwhile."""
        return logging_from(logging.NOTSET if self.is_main else logging.ERROR)


ALONE = World()


@contextlib.contextmanager
def process_group(world: World) -> Iterator[World]:
    """Connects the processes while something runs. When one fails the others lose their connection and end as well.

    Yields:
        `world`, connected.

    Raises:
        UserError: the processes do not find each other, or another one has ended; and what the body raises.
        ReportedError: in place of these and of Ctrl-C, where another process was the first to fail and tells why.
    """
    if world.size == 1:
        yield world
        return
    world = replace(world, store=_connect(world))
    try:
        with lost_processes(world):
            yield world
    except ReportedError:
        raise
    except (UserError, KeyboardInterrupt) as error:
        try:
            others_first = world.store.add("failures", 1) > 1
        except dist.DistError:  # rank 0, which keeps the store where no launcher does, is gone
            others_first = False
        if others_first:
            raise ReportedError("ended with another process, which has told why.") from error
        raise
    finally:
        dist.destroy_process_group()


def _connect(world: World) -> dist.Store:
    """Meets the other processes; returns the store that outlives their connection."""
    try:
        common, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=MEETING_TIMEOUT))
        number = common.add(f"runs of rank {world.rank}", 1)  # its store outlives a run, others may follow
        store = dist.PrefixStore(f"run {number}", common)
        groups = dist.PrefixStore("groups", store)
        dist.init_process_group("gloo", store=groups, rank=world.rank, world_size=world.size, timeout=FIGURES_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"process {world.rank} of {world.size} does not find the others at {address}: {reason}"
        ) from error
    return store


@contextlib.contextmanager
def lost_processes(world: World) -> Iterator[None]:
    """Makes a `UserError` of what the libraries raise in this process when another one is gone."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistNetworkError) or any(sign in str(error) for sign in LOST_CONNECTION)
        if world.size == 1 or not lost:
            raise
        others = [str(rank) for rank in range(world.size) if rank != world.rank]
        who = f"the process of rank {others[0]}" if len(others) == 1 else f"a process of ranks {', '.join(others)}"
        raise UserError(
            f"{who} has ended: where it left no message of its own, it was killed, ran out of memory or lost its "
            f"connection. Rank {world.rank} ends with it."
        ) from error


def own_device(name: str, world: World) -> torch.device:
    """Returns the device of this process, as `--device` says: a GPU of its own, or the CPU that all share.

    Raises:
        UserError: no such device, fewer GPUs than processes, or several GPUs named to a single process.
    """
    devices = select_devices(name)
    kind, count = devices[0].type, len(devices)
    if world.size == 1:
        command = World(0, count, 0, count).command
        if count > 1 and name:
            raise UserError(
                f"--device {name} names {count} GPUs, and one process trains on one. Start one for each: "
                f"{command} --device {name}, with the other options as they are."
            )
        if count > 1:
            LOGGER.info(f"{count} GPUs are here, one is used. To use all: {command} ...")
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


def replicate(model: nn.Module, device: torch.device, world: World, sync_bn: bool = False) -> nn.Module:
    """Returns what to run forward so that gradients are averaged over the processes; a process alone runs the model.

    All take the first process's weights and buffers, at once and (buffers) at every forward pass: so without
    `sync_bn`, batch statistics over all processes (CUDA), the running statistics are those of the first process's
    images. The model, on `device`, keeps its parameters and names.
    """
    if world.size == 1:
        return model
    world.barrier()  # the first one may still look for anchors; gradients' connections have less patience
    if device.type != "cuda":
        return DistributedDataParallel(model)
    group = dist.new_group(backend="nccl", timeout=GRADIENTS_TIMEOUT)
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    return DistributedDataParallel(model, device_ids=[device.index], process_group=group)


def no_sync_unless(replica: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Surrounds a forward and backward pass; gradients that are only gathered are not exchanged (`wanted` False)."""
    if wanted or not isinstance(replica, DistributedDataParallel):
        return contextlib.nullcontext()
    return replica.no_sync()
