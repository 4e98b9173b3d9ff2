"""TorchScript files as torch.jit.load and libtorch see them."""

import json

import pytest
import torch

import export
from models.export.formats import ExportConfig
from models.export.run import make_jobs
from models.export.torchscript import export as write
from models.load import load_model
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def opened(path):
    texts = {"config.txt": "", "metadata": ""}
    return torch.jit.load(path, _extra_files=texts), {name: json.loads(text) for name, text in texts.items()}


def test_it_says_what_yolov5s_own_files_say_and_more(write_checkpoint):
    (path,) = export.run(weights=[str(write_checkpoint())], include=["TorchScript"], imgsz=(64, 96), batch_size=2)
    _, texts = opened(path)
    assert texts["config.txt"] == {"shape": [2, 3, 64, 96], "stride": 32, "names": ["ant", "bee", "fly"]}
    assert (texts["metadata"]["shape_hw"], texts["metadata"]["data"]) == ([64, 96], "ants.yaml")


def test_train_gives_the_maps_of_each_level(write_checkpoint):
    weights = write_checkpoint("yolov5n.yaml")
    (path,) = export.run(weights=str(weights), include=["torchscript"], imgsz=64, train=True)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for own, other in zip(load_model(weights)(images)[1], opened(path)[0](images), strict=True):
            torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-4)


def test_half_is_refused_where_the_device_turns_out_to_be_a_cpu(write_checkpoint):
    words = ["--half", "--device", "", "--imgsz", "64", "--include", "torchscript"]
    config = ExportConfig(**vars(export.build_parser().parse_args(words))).checked()
    (job,) = make_jobs(write_checkpoint("yolov5n.yaml"), config, torch.device("cpu"))
    with pytest.raises(UserError, match="--half needs a GPU"):
        write(job)
