"""Who is who among several processes, what they tell each other, and how they end; training itself: test_train_ddp."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from utils.errors import UserError
from utils.log import LOGGER
from utils.train.distributed import ALONE, World, explained, process_group

ROOT = Path(__file__).resolve().parents[3]
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "option", "expected"),
    [
        ({}, -1, ALONE),
        ({"LOCAL_RANK": "3", "WORLD_SIZE": "8"}, -1, ALONE),  # leftovers of somebody else's
        ({"RANK": "0", "WORLD_SIZE": "1"}, -1, ALONE),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, -1, World(5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 0, World(1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, World(1, 2, 1, 2)),  # an old launcher: --local_rank
        ({"RANK": "1", "WORLD_SIZE": "2"}, -1, World(1, 2, 1, 2)),
    ],
)
def test_the_launcher_says_who_is_who(environment, option, expected):
    assert World.from_environment(option, {**MEETING, **environment}) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, "RANK is set, but not WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "two"}, "not a whole number.*'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK 2 of 2"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_told(environment, words):
    with pytest.raises(UserError, match=words):
        World.from_environment(-1, {**MEETING, **environment})


def test_commands_start_as_many_processes():
    assert ALONE.command == "python train.py"
    assert World(1, 2, 1, 2).command == "python -m torch.distributed.run --nproc_per_node 2 train.py"
    assert World(5, 8, 1, 4).command == "python -m torch.distributed.run --nnodes 2 --nproc_per_node 4 train.py"


def test_a_process_alone_connects_to_nobody():
    with process_group(ALONE), ALONE.rank_zero_first():
        assert not dist.is_initialized()
        assert ALONE.broadcast(True) and not ALONE.broadcast(False)
        assert ALONE.broadcast_str("runs/exp") == "runs/exp"


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
    expected = (UserError, "the process of rank 0 has ended.*Resume so.") if told else (RuntimeError, str(error)[:4])
    with pytest.raises(expected[0], match=expected[1]), explained(World(1, 2, 1, 2), lambda: "Resume so."):
        raise error
    with pytest.raises(RuntimeError), explained(ALONE, str):
        raise error


def test_others_are_silent_while_all_find_out_the_same():
    LOGGER.setLevel(logging.WARNING)
    with World(1, 2, 1, 2).rank_zero_logging():
        assert LOGGER.level == logging.ERROR
    with World(0, 2, 0, 2).rank_zero_logging():
        assert LOGGER.level == logging.WARNING
    assert LOGGER.level == logging.WARNING


PAIR = """
import os, sys, time
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
        running.append(subprocess.Popen([sys.executable, "-c", PAIR, str(log)], env=environment, cwd=ROOT))
    assert [process.wait(240) for process in running] == [0, 0, 0]
    lines = log.read_text().splitlines()
    assert lines[:6] == ["0 in", "0 out", "2 in", "2 out", "1 in", "1 out"]
    assert sorted(lines[6:]) == ["silent", "silent", "told"]
