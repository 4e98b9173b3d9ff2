"""The model that a training starts from: an architecture with the data's classes, and the weights that fit it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from models.load import read_weights, transfer
from models.yolo import Model
from utils.checks import UserError
from utils.files import find_file
from utils.log import LOGGER

# Functions of torch that take a generator
_DRAWS = frozenset(
    "bernoulli_ exponential_ kaiming_uniform_ normal normal_ rand randint randn random_ uniform_".split()
)


class _OwnGenerator(TorchFunctionMode):
    """Within it, and in this thread alone, layers draw their weights from a generator of this seed.

    torch's own belongs to all threads: two trainings at once would draw from one sequence of numbers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _DRAWS and kwargs.get("generator") is None:
            filled = args[0] if args else kwargs.get("tensor")
            device = filled.device if isinstance(filled, torch.Tensor) else torch.device(kwargs.get("device") or "cpu")
            if device.type == "cpu":  # and not meta, where nothing is drawn
                kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def build_for_training(
    options: Namespace,
    names: Mapping[int, str],
    anchors: int | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> Model:
    """Builds the architecture of `--cfg`, or of `--weights`, and takes over what weights fit; on the CPU, float32.

    Args:
        options: `cfg`, `weights`, and the `seed` of the initial weights; no other generator is touched.
        names: the data's class names by number.
        anchors: anchors per level, in place of the YAML's (the hyperparameter of that name).
        checkpoint: of the run to be resumed: its architecture is built; its weights are the trainer's business.

    Raises:
        UserError: a file is missing or unsound.
    """
    weights = read_weights(options.weights) if options.weights and not checkpoint else None
    if checkpoint:
        cfg, holder, anchors = checkpoint["yaml"], options.resume, None
    elif options.cfg:
        cfg, holder = find_file(options.cfg, (".yaml", ".yml"), "--cfg"), None
    else:
        cfg, holder = weights.yaml, weights.path
    with torch.random.fork_rng(devices=[]), _OwnGenerator(options.seed):
        torch.manual_seed(options.seed)  # for blocks that draw in ways not listed above
        try:
            model = Model(cfg, nc=len(names), anchors=anchors, verbose=not checkpoint)
        except UserError as error:
            if holder is None:
                raise
            raise UserError(f"{holder}: {error}") from error
    model.names = dict(names)
    if weights:
        exclude = ("anchor",) if options.cfg or anchors else ()
        moved = transfer(model, weights.state_dict, exclude)
        LOGGER.info(f"Transferred {moved.loaded}/{moved.total} items from {options.weights}")
    return model
