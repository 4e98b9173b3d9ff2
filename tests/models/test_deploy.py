"""Folding batch norm changes nothing but rounding, and leaves exactly what the published counts say."""

import pytest
import torch
from torch import nn

from models.common import Conv
from models.deploy import fold_batchnorm, fold_model
from models.yolo import Model


def randomise_norms(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -1, 1),
                (norm.running_mean, -1, 1),
                (norm.running_var, 0.3, 3),
            ):
                tensor.data.uniform_(low, high, generator=generator)


@pytest.mark.parametrize(("bias", "groups", "affine"), [(False, 1, True), (True, 1, True), (True, 4, False)])
def test_one_convolution_does_what_convolution_and_norm_did(bias, groups, affine):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, 2, 1, groups=groups, bias=bias).double()
    norm = nn.BatchNorm2d(12, eps=1e-3, affine=affine).double().eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.3, 3)
    if affine:
        norm.weight.data.uniform_(-1, 1)
        norm.bias.data.uniform_(-1, 1)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(conv(x))
        torch.testing.assert_close(fold_batchnorm(conv, norm)(x), expected, atol=1e-12, rtol=1e-12)


def test_folding_keeps_type_and_memory_format():
    block = Conv(8, 8, 3).half().to(memory_format=torch.channels_last)
    fold_model(block)
    assert block.bn is None
    assert block.conv.weight.dtype == block.conv.bias.dtype == torch.float16
    assert block.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("cfg", "parameters", "layers", "keys"),
    [
        ("yolov5n.yaml", 1867405, 213, 121),
        ("yolov5s-ghost.yaml", 3888789, 366, 181),
        ("yolov5s-transformer.yaml", 7226653, 216, 128),
    ],
)
def test_a_folded_model_has_the_published_counts_and_the_same_output(cfg, parameters, layers, keys):
    torch.manual_seed(0)
    model = Model(cfg).eval()
    randomise_norms(model)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        before = model(x)[0]
        after = model.fuse()(x)[0]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(1 for _ in model.modules()) == layers
    assert len(model.state_dict()) == keys
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)


def test_norms_outside_a_conv_are_left_alone():
    from models.common import BottleneckCSP

    block = BottleneckCSP(8, 8).eval()
    randomise_norms(block)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        before = block(x)
        torch.testing.assert_close(fold_model(block)(x), before, rtol=1e-4, atol=1e-5)
    assert isinstance(block.bn, nn.BatchNorm2d)
