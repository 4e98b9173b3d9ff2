"""Who is who among several processes, their devices, what they tell each other, and how they end.

Training itself: test_train_ddp.
"""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from utils.errors import UserError
from utils.log import LOGGER
from utils.train import distributed
from utils.train.distributed import ALONE, World, lost_processes, no_sync_unless, own_device, process_group, replicate

ROOT = Path(__file__).resolve().parents[3]
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
PAIR = World(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("environment", "option", "expected"),
    [
        ({}, -1, ALONE),
        ({"LOCAL_RANK": "3", "WORLD_SIZE": "8"}, -1, ALONE),  # leftovers of somebody else's
        ({"RANK": "0", "WORLD_SIZE": "1"}, -1, ALONE),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, -1, World(5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 0, PAIR),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, PAIR),  # an old launcher: --local_rank
        ({"RANK": "1", "WORLD_SIZE": "2"}, -1, PAIR),
    ],
)
def test_the_launcher_says_who_is_who(environment, option, expected):
    assert World.from_environment(option, {**MEETING, **environment}) == expected
    with pytest.raises(UserError, match="RANK is set, but not WORLD_SIZE"):
        World.from_environment(option, {**MEETING, "RANK": "1"})


def test_commands_start_as_many_processes():
    assert ALONE.command == "python train.py"
    assert PAIR.command == "python -m torch.distributed.run --nproc_per_node 2 train.py"
    assert World(5, 8, 1, 4).command == "python -m torch.distributed.run --nnodes 2 --nproc_per_node 4 train.py"


@pytest.mark.parametrize(
    ("count", "name", "world", "expected"),
    [
        (0, "", PAIR, "cpu"),
        (4, "cpu", PAIR, "cpu"),
        (4, "", World(3, 4, 3, 4), "cuda:3"),
        (4, "", World(6, 8, 2, 4), "cuda:2"),
        (4, "2,3", PAIR, "cuda:3"),
        (4, "3", ALONE, "cuda:3"),
        (4, "", ALONE, "cuda:0"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(gpus, count, name, world, expected):
    made_current = gpus(count)
    assert own_device(name, world) == torch.device(expected)
    assert made_current == ([torch.device(expected)] if expected.startswith("cuda") else [])


@pytest.mark.parametrize(
    ("count", "name", "world", "words"),
    [
        (4, "0,1", ALONE, r"--device 0,1 names 2 GPUs.*--nproc_per_node 2 train\.py --device 0,1"),
        (1, "", PAIR, "2 processes were started on this machine.* for 1 GPU: .*--nproc_per_node 1"),
        (1, "0", PAIR, "2 processes were started on this machine.*--device cpu"),
        (0, "mps", PAIR, "--device mps"),
    ],
)
def test_devices_that_do_not_suit_the_processes_are_refused(gpus, count, name, world, words, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    gpus(count)
    with pytest.raises(UserError, match=words):
        own_device(name, world)


def test_one_process_on_many_gpus_says_how_to_use_all(gpus, caplog):
    caplog.set_level(logging.INFO, LOGGER.name)
    gpus(1)
    own_device("", ALONE)
    assert not caplog.messages
    gpus(4)
    own_device("", ALONE)
    (message,) = caplog.messages
    assert message.startswith("4 GPUs are here, one is used")
    assert "python -m torch.distributed.run --nproc_per_node 4 train.py" in message


class Wrapped(nn.Module):
    """Stands in for DistributedDataParallel, which wants a GPU here."""

    def __init__(self, module, device_ids=None, process_group=None):
        super().__init__()
        self.module, self.device_ids, self.process_group = module, device_ids, process_group


@pytest.mark.parametrize("sync_bn", [False, True])
def test_sync_bn_replaces_batch_norm_and_keeps_its_parameters_and_names(monkeypatch, sync_bn):
    monkeypatch.setattr(distributed, "DistributedDataParallel", Wrapped)
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: f"{backend} group")
    monkeypatch.setattr(dist, "barrier", lambda: None)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)))
    before, names = list(model.parameters()), list(model.state_dict())
    wrapped = replicate(model, torch.device("cuda", 1), PAIR, sync_bn)
    assert (wrapped.module, wrapped.device_ids, wrapped.process_group) == (model, [1], "nccl group")
    norm = model[1][0]
    assert type(norm) is (nn.SyncBatchNorm if sync_bn else nn.BatchNorm2d)
    assert (norm.eps, norm.momentum) == (1e-3, 0.03)
    assert getattr(norm, "process_group", None) == ("nccl group" if sync_bn else None)
    assert all(first is second for first, second in zip(before, model.parameters(), strict=True))
    assert list(model.state_dict()) == names


def test_a_process_alone_connects_to_nobody_and_runs_the_model_itself():
    with process_group(ALONE), ALONE.rank_zero_first():
        assert not dist.is_initialized()
        assert ALONE.broadcast(True) and not ALONE.broadcast(False) and ALONE.broadcast(198) == 198
        assert ALONE.broadcast_str("runs/exp") == "runs/exp"
    model = nn.Linear(1, 1)
    assert replicate(model, torch.device("cpu"), ALONE) is model
    with no_sync_unless(model, wanted=False):
        model(torch.ones(1, 1)).sum().backward()
    assert model.weight.grad.item() == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:4"), True),
        (RuntimeError("Connection reset by peer"), True),
        (dist.DistNetworkError("Failed to recv, got 0 bytes"), True),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_only_lost_connections_are_taken_for_lost_processes(error, told):
    expected = (UserError, "the process of rank 0 has ended.*Rank 1") if told else (RuntimeError, str(error)[:4])
    with pytest.raises(expected[0], match=expected[1]), lost_processes(PAIR):
        raise error
    with pytest.raises(type(error)), lost_processes(ALONE):
        raise error


def test_others_are_silent_while_all_find_out_the_same():
    LOGGER.setLevel(logging.WARNING)
    with PAIR.rank_zero_logging():
        assert LOGGER.level == logging.ERROR
    with World(0, 2, 0, 2).rank_zero_logging():
        assert LOGGER.level == logging.WARNING
    assert LOGGER.level == logging.WARNING


PROGRAM = """
import sys, time
import torch
from utils.errors import UserError
from utils.cli import ReportedError
from utils.train.distributed import World, process_group

log = open(sys.argv[1], "a", buffering=1)
with process_group(World.from_environment()) as world:
    total = world.all_reduce_sum(torch.tensor([1.0, world.rank], dtype=torch.float64)).tolist()
    assert total == [3.0, 3.0], total
    text = world.broadcast_str("ordner/\u00e4" if world.is_main else "")
    assert text == "ordner/\u00e4" and world.broadcast(world.is_main) is True
    assert world.broadcast(300 + world.rank) == 300
    with world.rank_zero_first():
        log.write(f"{world.rank} in\\n")
        time.sleep(0.1)
        log.write(f"{world.rank} out\\n")
try:
    with process_group(World.from_environment()):
        raise UserError("all alike")
except ReportedError:
    log.write("silent\\n")
except UserError:
    log.write("told\\n")
while world.is_main and open(sys.argv[1]).read().count("\\n") < 9:  # rank 0 keeps the store, as a launcher does else
    time.sleep(0.05)
"""


def test_three_processes_talk_take_turns_and_tell_a_common_mistake_once(tmp_path):
    """Ranks 0 and 1 on one machine, rank 2 on another: 0 goes first, then the first of the other machine, then 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = tmp_path / "log.txt"
    running = []
    for rank, local in enumerate((("0", "2"), ("1", "2"), ("0", "1"))):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **MEETING, "MASTER_PORT": port}
        environment |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": local[0], "LOCAL_WORLD_SIZE": local[1]}
        running.append(subprocess.Popen([sys.executable, "-c", PROGRAM, str(log)], env=environment, cwd=ROOT))
    assert [process.wait(240) for process in running] == [0, 0, 0]
    lines = log.read_text().splitlines()
    assert lines[:6] == ["0 in", "0 out", "2 in", "2 out", "1 in", "1 out"]
    assert sorted(lines[6:]) == ["silent", "silent", "told"]
