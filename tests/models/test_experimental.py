"""Rare blocks: how channels are shared, sums, and an ensemble's output."""

import pytest
import torch
from torch import nn

from models.experimental import CrossConv, Ensemble, MixConv2d, Sum


def test_mixconv_shares_channels_evenly():
    assert [conv.out_channels for conv in MixConv2d(8, 16, (1, 3, 5)).m] == [6, 5, 5]


def test_mixconv_shares_channels_for_equal_weights():
    """Sides 1 and 3: shares s and t with s = 9t and s + t = 20 are 18 and 2; rounding never loses a channel."""
    assert [conv.out_channels for conv in MixConv2d(4, 20, (1, 3), equal_ch=False).m] == [18, 2]
    for c2 in range(30, 60):
        assert sum(conv.out_channels for conv in MixConv2d(4, c2, (1, 3, 5), equal_ch=False).m) == c2


def test_sum_adds_its_inputs_plain_or_weighted():
    x = [torch.full((1, 1, 1, 1), value) for value in (1.0, 10.0, 100.0)]
    assert Sum(3)(x).item() == 111
    weighted = Sum(3, weight=True)
    assert weighted.w.tolist() == [-0.5, -1.0]
    expected = 1 + 10 * 2 * torch.tensor(0.5).neg().sigmoid() + 100 * 2 * torch.tensor(1.0).neg().sigmoid()
    assert weighted(x).item() == pytest.approx(expected.item())


def test_crossconv_adds_its_input_when_asked():
    block = CrossConv(8, 8, shortcut=True).eval()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        assert torch.equal(block(x), x + block.cv2(block.cv1(x)))


class FixedDetector(nn.Module):
    """Gives the same rows for every image."""

    def __init__(self, value: float, rows: int, strides: list[float], name: str):
        super().__init__()
        self.value, self.rows, self.stride, self.names = value, rows, torch.tensor(strides), {0: name}

    def forward(self, x, augment=False):
        return torch.full((x.shape[0], self.rows, 6), self.value), []


def test_ensemble_puts_rows_side_by_side():
    ensemble = Ensemble([FixedDetector(1.0, 3, [8, 64], "first"), FixedDetector(2.0, 2, [8, 32], "last")])
    y, raw = ensemble(torch.zeros(2, 3, 64, 64))
    assert raw is None
    assert y[1, :, 0].tolist() == [1, 1, 1, 2, 2]
    assert ensemble.names == {0: "last"}
    assert ensemble.stride.tolist() == [8, 64]
