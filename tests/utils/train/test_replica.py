"""Which device each of several processes takes, what is refused, and what is wrapped round the model."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn

from utils.errors import UserError
from utils.log import LOGGER
from utils.train import distributed as replica
from utils.train.distributed import ALONE, World, no_sync_unless, own_device, replicate


@pytest.fixture
def gpus(monkeypatch):
    """Returns a function that makes PyTorch see a number of GPUs, and returns a list of those made the current one."""
    chosen = []

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return see


@pytest.mark.parametrize(
    ("count", "name", "world", "expected"),
    [
        (0, "", World(1, 2, 1, 2), "cpu"),
        (4, "cpu", World(1, 2, 1, 2), "cpu"),
        (4, "", World(3, 4, 3, 4), "cuda:3"),
        (4, "", World(6, 8, 2, 4), "cuda:2"),
        (4, "2,3", World(1, 2, 1, 2), "cuda:3"),
        (4, "3", ALONE, "cuda:3"),
        (4, "", ALONE, "cuda:0"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(gpus, count, name, world, expected):
    made_current = gpus(count)
    assert own_device(name, world) == torch.device(expected)
    assert made_current == ([torch.device(expected)] if expected.startswith("cuda") else [])


def test_one_process_on_many_gpus_says_how_to_use_all(gpus, caplog):
    caplog.set_level(logging.INFO, LOGGER.name)
    LOGGER.propagate = True
    gpus(1)
    own_device("", ALONE)
    assert not caplog.messages
    gpus(4)
    own_device("", ALONE)
    (message,) = caplog.messages
    assert message.startswith("4 GPUs are here, one is used")
    assert "python -m torch.distributed.run --nproc_per_node 4 train.py" in message


def test_several_gpus_for_one_process_are_refused_with_the_command(gpus):
    gpus(4)
    with pytest.raises(UserError, match=r"--device 0,1 names 2 GPUs.*--nproc_per_node 2 train\.py --device 0,1"):
        own_device("0,1", ALONE)


@pytest.mark.parametrize(("name", "words"), [("", "for 1 GPU: .*--nproc_per_node 1"), ("0", "--device cpu")])
def test_more_processes_than_gpus_are_refused(gpus, name, words):
    gpus(1)
    with pytest.raises(UserError, match=f"2 processes were started on this machine.*{words}"):
        own_device(name, World(1, 2, 1, 2))


def test_metal_is_for_one_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert own_device("mps", ALONE).type == "mps"
    with pytest.raises(UserError, match="--device mps"):
        own_device("mps", World(0, 2, 0, 2))


class Wrapped(nn.Module):
    """Stands in for DistributedDataParallel, which wants a GPU here."""

    def __init__(self, module, device_ids=None, process_group=None):
        super().__init__()
        self.module, self.device_ids, self.process_group = module, device_ids, process_group


@pytest.mark.parametrize("sync_bn", [False, True])
def test_sync_bn_replaces_batch_norm_and_keeps_its_parameters_and_names(monkeypatch, sync_bn):
    monkeypatch.setattr(replica, "DistributedDataParallel", Wrapped)
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: f"{backend} group")
    monkeypatch.setattr(dist, "barrier", lambda: None)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)))
    before, names = list(model.parameters()), list(model.state_dict())
    wrapped = replicate(model, torch.device("cuda", 1), World(1, 2, 1, 2), sync_bn)
    assert (wrapped.module, wrapped.device_ids, wrapped.process_group) == (model, [1], "nccl group")
    norm = model[1][0]
    assert type(norm) is (nn.SyncBatchNorm if sync_bn else nn.BatchNorm2d)
    assert (norm.eps, norm.momentum, getattr(norm, "process_group", None)) == (
        1e-3,
        0.03,
        "nccl group" if sync_bn else None,
    )
    assert all(first is second for first, second in zip(before, model.parameters(), strict=True))
    assert list(model.state_dict()) == names


def test_a_process_alone_runs_the_model_itself():
    model = nn.Linear(1, 1)
    assert replicate(model, torch.device("cpu"), ALONE) is model
    with no_sync_unless(model, wanted=False):
        model(torch.ones(1, 1)).sum().backward()
    assert model.weight.grad.item() == 1
