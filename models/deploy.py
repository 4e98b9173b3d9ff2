"""Exact rewriting of a trained model for inference: the output stays the same up to rounding.

Covers folding batch norm into the convolution before it. Every change of a model's shape for deployment is made here;
`export.py` and `models.yolo` only call it.
"""

from __future__ import annotations

import torch
from torch import nn

from models.common import Conv


@torch.no_grad()
def fold_batchnorm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Changes `conv` so that alone it does what it and then `bn` in evaluation mode did; returns it.

    W' = W * gamma / sqrt(var + eps) for each output channel, b' = beta + (b - mean) * gamma / sqrt(var + eps); computed
    in float64 and kept in the type and memory format of W. The result is not for training: it wants no gradient.
    """
    weight = conv.weight
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    shift = -bn.running_mean.double()
    if conv.bias is not None:
        shift += conv.bias.double()
    if bn.affine:
        scale *= bn.weight.double()
    bias = shift * scale + (bn.bias.double() if bn.affine else 0)
    conv.weight = nn.Parameter((weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return conv


def fold_model(model: nn.Module) -> nn.Module:
    """Folds the batch norm of every `Conv` (and subclass) in `model`, in place; returns the model.

    Batch norms outside a Conv (in BottleneckCSP and MixConv2d) stay. The result is for evaluation only.
    """
    for block in model.modules():
        if isinstance(block, Conv) and block.bn is not None:
            fold_batchnorm(block.conv, block.bn)
            block.bn = None
    return model
