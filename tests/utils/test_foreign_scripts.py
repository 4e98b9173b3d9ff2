"""Scripts written for YOLOv5, with its imports alone, run from another folder: they detect and train as our own do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.files import read_yaml, write_yaml

ROOT = Path(__file__).resolve().parents[2]

# As scripts of 6.1 begin: the loader, suppression, scaling back, drawing, label files.
DETECT = """
import sys
from pathlib import Path

import cv2
import torch

from models.common import DetectMultiBackend
from utils.datasets import IMG_FORMATS, VID_FORMATS, LoadImages, LoadStreams
from utils.general import (LOGGER, check_file, check_img_size, check_imshow, check_requirements, colorstr,
                           increment_path, non_max_suppression, print_args, scale_coords, strip_optimizer, xyxy2xywh)
from utils.plots import Annotator, colors, save_one_box
from utils.torch_utils import select_device, time_sync

weights, source, project = sys.argv[1:]
save_dir = increment_path(Path(project) / "exp", exist_ok=False)
(save_dir / "labels").mkdir(parents=True, exist_ok=True)
device = select_device("cpu")
model = DetectMultiBackend(weights, device=device, dnn=False, data=None)
stride, names, pt = model.stride, model.names, model.pt
imgsz = check_img_size((640, 640), s=stride)
dataset = LoadImages(source, img_size=imgsz, stride=stride, auto=pt)
model.warmup(imgsz=(1, 3, *imgsz), half=False)
for path, im, im0s, vid_cap, s in dataset:
    t1 = time_sync()
    im = torch.from_numpy(im).to(device).float()
    im /= 255
    if len(im.shape) == 3:
        im = im[None]
    pred = model(im, augment=False, visualize=False)
    pred = non_max_suppression(pred, 0.25, 0.45, None, False, max_det=1000)
    for i, det in enumerate(pred):
        p, im0, frame = path, im0s.copy(), getattr(dataset, "frame", 0)
        p = Path(p)
        txt_path = str(save_dir / "labels" / p.stem) + ("" if dataset.mode == "image" else f"_{frame}")
        s += "%gx%g " % im.shape[2:]
        gn = torch.tensor(im0.shape)[[1, 0, 1, 0]]
        imc = im0.copy()
        annotator = Annotator(im0, line_width=3, example=str(names))
        if len(det):
            det[:, :4] = scale_coords(im.shape[2:], det[:, :4], im0.shape).round()
            for c in det[:, -1].unique():
                n = (det[:, -1] == c).sum()
                s += f"{n} {names[int(c)]}{'s' * (n > 1)}, "
            for *xyxy, conf, cls in reversed(det):
                xywh = (xyxy2xywh(torch.tensor(xyxy).view(1, 4)) / gn).view(-1).tolist()
                with open(txt_path + ".txt", "a") as f:
                    f.write(("%g " * 6).rstrip() % (cls, *xywh, conf) + "\\n")
                c = int(cls)
                annotator.box_label(xyxy, f"{names[c]} {conf:.2f}", color=colors(c, True))
                save_one_box(xyxy, imc, file=save_dir / "crops" / names[c] / f"{p.stem}.jpg", BGR=True)
        cv2.imwrite(str(save_dir / p.name), annotator.result())
    LOGGER.info(f"{s}Done. ({time_sync() - t1:.3f}s)")
LOGGER.info(f"Results saved to {colorstr('bold', save_dir)}")
"""

# As scripts of 7.0 and home-made ones do it: attempt_load, OpenCV and letterbox by hand.
BY_HAND = """
import sys

import numpy as np
import torch

from models.experimental import attempt_load
from utils.augmentations import letterbox
from utils.general import Profile, cv2, non_max_suppression, scale_boxes, xyxy2xywhn
from utils.torch_utils import smart_inference_mode

@smart_inference_mode()
def run(weights, source, target):
    dt = (Profile(), Profile())
    model = attempt_load(weights, map_location="cpu").eval()
    im0 = cv2.imread(source)
    im, ratio, (dw, dh) = letterbox(im0, 640, stride=int(model.stride.max()), auto=True)
    im = np.ascontiguousarray(im.transpose((2, 0, 1))[::-1])
    im = torch.from_numpy(im).float()[None] / 255
    with dt[0]:
        pred = model(im)[0]
    with dt[1]:
        det = non_max_suppression(pred, 0.25, 0.45, max_det=1000)[0]
    det[:, :4] = scale_boxes(im.shape[2:], det[:, :4], im0.shape).round()
    rows = torch.cat((det[:, 5:], xyxy2xywhn(det[:, :4], im0.shape[1], im0.shape[0]), det[:, 4:5]), 1)
    np.savetxt(target, rows.numpy())
    assert 0 < dt[0].dt == dt[0].t

run(*sys.argv[1:])
"""

TRAIN = """
import sys
from copy import deepcopy

import torch
import yaml

from models.yolo import Model
from utils.autoanchor import check_anchors
from utils.callbacks import Callbacks
from utils.dataloaders import create_dataloader
from utils.general import (LOGGER, check_dataset, check_img_size, init_seeds, intersect_dicts, labels_to_class_weights,
                           one_cycle)
from utils.loss import ComputeLoss
from utils.metrics import fitness
from utils.torch_utils import EarlyStopping, ModelEMA, de_parallel, select_device

data, hyp = sys.argv[1:]
init_seeds(1)
device = select_device("cpu")
hyp = yaml.safe_load(open(hyp, errors="ignore"))
data_dict = check_dataset(data)
nc, names = data_dict["nc"], data_dict["names"]
model = Model("yolov5n.yaml", ch=3, nc=nc, anchors=hyp.get("anchors")).to(device)
csd = intersect_dicts(deepcopy(model).state_dict(), model.state_dict(), exclude=["anchor"])
model.load_state_dict(csd, strict=False)
gs = max(int(model.stride.max()), 32)
imgsz = check_img_size(64, gs, floor=gs * 2)
optimizer = torch.optim.SGD(model.parameters(), lr=hyp["lr0"], momentum=hyp["momentum"], nesterov=True)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=one_cycle(1, hyp["lrf"], 3))
train_loader, dataset = create_dataloader(data_dict["train"], imgsz, 8, gs, False, hyp=hyp, augment=True, cache=None,
                                          rect=False, rank=-1, workers=0, prefix="train: ", shuffle=True)
check_anchors(dataset, model=model, thr=hyp["anchor_t"], imgsz=imgsz)
nl = de_parallel(model).model[-1].nl
hyp["box"] *= 3 / nl
hyp["cls"] *= nc / 80 * 3 / nl
hyp["obj"] *= (imgsz / 640) ** 2 * 3 / nl
hyp["label_smoothing"] = 0.0
model.nc, model.hyp, model.names = nc, hyp, names
model.class_weights = labels_to_class_weights(dataset.labels, nc).to(device) * nc
ema, stopper, callbacks, compute_loss = ModelEMA(model), EarlyStopping(patience=2), Callbacks(), ComputeLoss(model)
seen = []
callbacks.register_action("on_train_batch_end", callback=seen.append)
model.train()
for epoch in range(2):
    for i, (imgs, targets, paths, _) in enumerate(train_loader):
        pred = model(imgs.to(device).float() / 255)
        loss, loss_items = compute_loss(pred, targets.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        callbacks.run("on_train_batch_end", loss_items)
    scheduler.step()
    ema.update_attr(model, include=["yaml", "nc", "hyp", "names", "stride", "class_weights"])
assert len(train_loader) == 3 and len(seen) == ema.updates == 6
assert ema.ema.names == names and tuple(loss.shape) == (1,) and torch.isfinite(loss_items).all()
state = ema.ema.state_dict()
changed = [k for k, v in state.items() if v.dtype.is_floating_point and not torch.equal(v, csd.get(k, v))]
assert len(changed) > 100, changed
print("classes", nc, "losses", loss_items.tolist())
"""

# As validation loops of 6.1 do it: its loader, boxes back to each image in place, matching, average precision.
EVALUATE = """
import sys

import numpy as np
import torch

from models.experimental import attempt_load
from utils.datasets import create_dataloader
from utils.general import check_dataset, non_max_suppression, scale_coords, xywh2xyxy
from utils.metrics import ConfusionMatrix, ap_per_class
from val import process_batch

weights, data = sys.argv[1:]
model = attempt_load(weights, map_location="cpu")
model.eval()
data = check_dataset(data)
confusion_matrix, iouv, stats = ConfusionMatrix(nc=data["nc"]), torch.linspace(0.5, 0.95, 10), []
for im, targets, paths, shapes in create_dataloader(data["val"], 320, 4, 32, pad=0.5, rect=True, workers=0)[0]:
    im = im.float() / 255
    nb, _, height, width = im.shape
    with torch.no_grad():
        out = model(im)[0]
    targets[:, 2:] *= torch.tensor([width, height, width, height])
    out = non_max_suppression(out, 0.001, 0.6, labels=[], multi_label=True)
    for si, pred in enumerate(out):
        labels, predn = targets[targets[:, 0] == si, 1:], pred.clone()
        scale_coords(im[si].shape[1:], predn[:, :4], shapes[si][0], shapes[si][1])
        tbox = xywh2xyxy(labels[:, 1:5])
        scale_coords(im[si].shape[1:], tbox, shapes[si][0], shapes[si][1])
        labelsn = torch.cat((labels[:, 0:1], tbox), 1)
        confusion_matrix.process_batch(predn, labelsn)
        stats.append((process_batch(predn, labelsn, iouv), pred[:, 4], pred[:, 5], labels[:, 0]))
tp, fp, p, r, f1, ap, ap_class = ap_per_class(*[torch.cat(x, 0).numpy() for x in zip(*stats)])
print(p.mean(), r.mean(), ap[:, 0].mean(), ap.mean(), int(confusion_matrix.matrix.sum()))
"""


def run_script(text, folder, *arguments):
    script = folder / "script.py"
    script.write_text(text)
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def ours(golden_dir, tmp_path_factory):
    """What detect.py finds: rows (k, 6) [class, x, y, w, h, confidence] of each image, by name."""
    import detect

    project = tmp_path_factory.mktemp("detect")
    keywords = {"weights": [str(golden_dir / "yolov5n-v6-coco.pt")], "source": str(golden_dir / "images")}
    detect.run(**keywords, project=str(project), save_txt=True, save_conf=True, nosave=True, device="cpu")
    return {path.stem: np.loadtxt(path, ndmin=2) for path in (project / "exp" / "labels").glob("*.txt")}


@pytest.mark.slow
def test_a_detection_script_finds_what_detect_py_finds(golden_dir, ours, tmp_path):
    run = run_script(DETECT, tmp_path, golden_dir / "yolov5n-v6-coco.pt", golden_dir / "images", tmp_path / "runs")
    found = {path.stem: np.loadtxt(path, ndmin=2) for path in (tmp_path / "runs" / "exp" / "labels").glob("*.txt")}
    assert set(found) == set(ours) == {"bus", "zidane"}
    for name, rows in ours.items():
        np.testing.assert_allclose(found[name], rows, atol=2e-6)
        original = cv2.imread(str(golden_dir / "images" / f"{name}.jpg"))
        drawn = cv2.imread(str(tmp_path / "runs" / "exp" / f"{name}.jpg"))
        assert drawn.shape == original.shape and (cv2.absdiff(drawn, original) > 100).any(axis=2).mean() > 0.01
    assert f"image 1/2 {os.path.abspath(golden_dir)}/images/bus.jpg: 640x480 4 persons, 1 bus, " in run.stderr
    assert len(list((tmp_path / "runs" / "exp" / "crops").rglob("*.jpg"))) == sum(map(len, ours.values()))


@pytest.mark.slow
def test_a_script_that_does_all_by_hand_finds_what_detect_py_finds(golden_dir, ours, tmp_path):
    target = tmp_path / "rows.txt"
    run_script(BY_HAND, tmp_path, golden_dir / "yolov5n-v6-coco.pt", golden_dir / "images" / "zidane.jpg", target)
    np.testing.assert_allclose(np.loadtxt(target, ndmin=2)[::-1], ours["zidane"], atol=2e-6)


@pytest.mark.slow
def test_the_script_of_the_document_runs(golden_dir, ours, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "imports.md").read_text(encoding="utf-8"), re.S)
    places = {"best.pt": golden_dir / "yolov5n-v6-coco.pt", "photos/": golden_dir / "images"}
    for written, real in places.items():
        code = code.replace(f'"{written}"', repr(str(real)))
    code = code.replace("    annotator = Annotator(im0)", "    print(len(det))\n    annotator = Annotator(im0)")
    assert run_script(code, tmp_path).stdout.split() == [str(len(ours[name])) for name in ("bus", "zidane")]


@pytest.mark.slow
def test_an_evaluation_script_finds_the_figures_of_val_py(golden_dir, datasets_dir, tmp_path):
    import val

    weights, data, coco = golden_dir / "yolov5n-v6-coco.pt", tmp_path / "data.yaml", datasets_dir / "coco128"
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for path in sorted((coco / kind / "train2017").iterdir())[:12]:
            shutil.copy(path, tmp_path / kind)
    splits = {"path": str(tmp_path), "train": "images", "val": "images"}
    write_yaml(data, {**splits, "names": read_yaml(coco / "coco128.yaml")["names"]})
    found = [float(word) for word in run_script(EVALUATE, tmp_path, weights, data).stdout.split()]
    keywords = {"imgsz": 320, "batch_size": 4, "device": "cpu", "workers": 0, "plots": False}
    results, _, _ = val.run(str(data), str(weights), **keywords, project=str(tmp_path))
    assert found[:4] == pytest.approx(results[:4], abs=1e-6) and results[2] > 0.3 and found[4] > 50


@pytest.mark.slow
def test_a_training_script_takes_its_steps(tiny_shapes, tmp_path):
    run = run_script(TRAIN, tmp_path, tiny_shapes, ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")
    assert run.stdout.startswith("classes 4 losses [")
    assert "train: " in run.stderr and "AutoAnchor: " in run.stderr
