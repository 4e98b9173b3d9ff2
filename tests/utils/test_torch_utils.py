"""YOLOv5's tools for torch modules."""

import numpy as np
import pytest
import torch
from torch import nn

from models.yolo import Model
from utils import torch_utils


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model("yolov5n.yaml", nc=2)


def test_select_device_tells_what_it_chose(caplog):
    with caplog.at_level("INFO", "yolov5"):
        assert torch_utils.select_device("cpu", batch_size=3) == torch.device("cpu")
        torch_utils.select_device(torch.device("cpu"), newline=False)
    assert "CPU" in caplog.messages[0] and caplog.messages[0] == caplog.messages[1] + "\n"


def test_fused_convolution_does_what_both_did():
    generator = torch.Generator().manual_seed(0)
    conv, bn = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, eps=1e-3).eval()
    for values in (bn.running_mean, bn.running_var, bn.weight.data, bn.bias.data):
        values.copy_(torch.rand(6, generator=generator) + 0.5)
    image = torch.randn(2, 4, 8, 8, generator=generator)
    fused = torch_utils.fuse_conv_and_bn(conv, bn)
    assert torch.allclose(fused(image), bn(conv(image)), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in fused.parameters()) and conv.bias is None


def test_average_follows_the_model(model):
    ema = torch_utils.ModelEMA(nn.DataParallel(model), decay=0.9, updates=1999)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    ema.update(nn.DataParallel(model))
    name, value = next(iter(model.named_parameters()))
    share = 1 - 0.9 * (1 - np.exp(-1))
    average = ema.ema.state_dict()[name]
    assert torch.allclose(average, value - (1 - share), atol=1e-6) and ema.updates == 2000
    model.names = {0: "a", 1: "b"}
    ema.update_attr(model, include=["names"])
    assert ema.ema.names == model.names and not ema.ema.training


def test_copy_attr_chooses():
    class Bag:
        def __init__(self, **values):
            self.__dict__.update(values)

    target = Bag()
    torch_utils.copy_attr(target, Bag(a=1, b=2, _c=3), exclude=("b",))
    assert vars(target) == {"a": 1}
    torch_utils.copy_attr(target, Bag(a=5, b=6), include=("b",))
    assert vars(target) == {"a": 1, "b": 6}


def test_constants_and_summary(model, caplog):
    module = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())
    torch_utils.initialize_weights(module)
    assert (module[0].eps, module[0].momentum, module[1].inplace) == (1e-3, 0.03, True)
    with caplog.at_level("INFO", "yolov5"):
        torch_utils.model_info(model, verbose=True, img_size=320)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f" {parameters} parameters" in caplog.messages[-1] and "model.0.conv.weight" in caplog.messages[0]
    assert torch_utils.is_parallel(nn.DataParallel(model)) and torch_utils.de_parallel(model) is model


def test_one_process_alone_waits_for_nobody():
    with torch_utils.torch_distributed_zero_first(-1):
        pass

    @torch_utils.smart_inference_mode()
    def infer():
        return torch.is_grad_enabled()

    assert not infer()
