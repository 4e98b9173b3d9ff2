"""The loss by YOLOv5's signatures: formulas worked out by hand; golden values are in test_anchor_based.py."""

import numpy as np
import pytest
import torch
from torch import nn

from models.yolo import Model
from utils import loss
from utils.errors import UserError


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        made = Model("yolov5n.yaml", nc=2)
    made.hyp = {"box": 0.05, "obj": 1.0, "cls": 0.5, "obj_pw": 1.0, "cls_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}
    return made


def test_build_targets_finds_cells_and_anchors(model):
    """A label of 16 x 30 px at (42, 46) of 160 px: the second anchor of stride 8, in the cell (5, 5), and two beside.

    At (5.25, 5.75) cells the neighbours to the left and below learn it too; other anchors within a factor of 4 as well.
    """
    grids = [torch.zeros(1, 3, side, side, 7) for side in (20, 10, 5)]
    target = torch.tensor([[0.0, 1, 42 / 160, 46 / 160, 16 / 160, 30 / 160]])
    compute_loss = loss.ComputeLoss(nn.DataParallel(model))
    tcls, tbox, indices, anchors = compute_loss.build_targets(grids, target)
    image, anchor, cell_y, cell_x = indices[0]
    second = anchor == 1
    assert {(int(x), int(y)) for x, y in zip(cell_x[second], cell_y[second], strict=True)} == {(5, 5), (4, 5), (5, 6)}
    assert torch.allclose(anchors[0][second], torch.tensor([16.0, 30.0]) / 8)
    assert torch.allclose(tbox[0][second][0], torch.tensor([0.25, 0.75, 2.0, 3.75])) and (tcls[0] == 1).all()
    assert (image == 0).all() and (compute_loss.nl, compute_loss.na, compute_loss.nc) == (3, 3, 2)


def test_a_model_without_hyperparameters_is_told_which():
    with torch.random.fork_rng(devices=[]):
        bare = Model("yolov5n.yaml", nc=1)
    with pytest.raises(UserError, match="model.hyp lacks box, obj, cls"):
        loss.ComputeLoss(bare)


def test_focal_losses_by_hand():
    """A logit of 0 is a probability of 1/2: its cross entropy is ln 2, whatever the target."""
    pred, ln2 = torch.zeros(2), float(np.log(2))
    true = torch.tensor([1.0, 0.0])
    focal = loss.FocalLoss(nn.BCEWithLogitsLoss(), gamma=2.0)
    assert focal(pred, true).item() == pytest.approx(ln2 * 0.25 * (0.25 + 0.75) / 2)
    each = loss.FocalLoss(nn.BCEWithLogitsLoss(reduction="none"), gamma=1.0)(pred, true)
    assert each.tolist() == pytest.approx([ln2 * 0.25 * 0.5, ln2 * 0.75 * 0.5])
    soft = loss.QFocalLoss(nn.BCEWithLogitsLoss(reduction="sum"), gamma=1.0)(pred, torch.tensor([0.75, 0.5]))
    assert soft.item() == pytest.approx(ln2 * (0.75 * 0.25 + 0.25 * 0.75) * 0.25)


def test_blurred_loss_forgives_a_missing_label():
    sure, wrong = torch.tensor([8.0]), torch.tensor([0.0])
    assert loss.BCEBlurWithLogitsLoss()(sure, wrong) < 0.01 * nn.BCEWithLogitsLoss()(sure, wrong)
    assert loss.BCEBlurWithLogitsLoss()(-sure, wrong) == pytest.approx(nn.BCEWithLogitsLoss()(-sure, wrong).item())
