"""The model that a training starts from: an architecture with the data's classes, and the weights that fit it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from models.load import read_weights, transfer
from models.yolo import Model
from utils.checks import UserError
from utils.files import find_file
from utils.log import LOGGER


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        try:
            model = Model(cfg, nc=len(names), anchors=anchors, verbose=not checkpoint)
        except UserError as error:
            if holder is None:
                raise
            raise UserError(f"{holder}: {error}") from error
    model.names = dict(names)
    if weights:
        exclude = ("anchor",) if options.cfg or anchors else ()
        LOGGER.info(transfer(model, weights, exclude).told(options.weights))
    return model
