"""benchmarks/study.py: its cells and their commands, what is taken up again, COCO's figures, and the tables."""

import argparse
import csv
import json
import os
import shutil
import signal
import threading
import time
from importlib.util import find_spec

import cv2
import pytest

import train
from benchmarks import study
from models import transplant
from utils.files import ROOT

EPOCHS = 20


@pytest.fixture
def options(tiny_shapes, tmp_path):
    """Makes the parsed options of a study on the small data set of 24 images; later ones take the place of earlier."""
    (tmp_path / "coco.pt").touch()

    def make(*more) -> argparse.Namespace:
        line = ["--data", tiny_shapes, "--models", "yolov5n", "yolov5n-slimneck", "--seeds", "0", "1"]
        line += ["--coco", tmp_path / "coco.pt", "--out", tmp_path / "out", "--images", "240", *more]
        return study.build_parser().parse_args(list(map(str, line)))

    return make


def test_seeds_stand_together_and_the_dense_model_s_cell_before_what_starts_from_it(options):
    cells = study.Study(options("--starts", "tuned", "scratch", "coco-no-inherit")).cells
    assert list(map(str, cells)) == [
        *("tiny/yolov5n-scratch-0", "tiny/yolov5n-scratch-1"),
        *("tiny/yolov5n-coco-0", "tiny/yolov5n-slimneck-tuned-0"),
        *("tiny/yolov5n-coco-1", "tiny/yolov5n-slimneck-tuned-1"),
        *("tiny/yolov5n-slimneck-scratch-0", "tiny/yolov5n-slimneck-scratch-1"),
        *("tiny/yolov5n-slimneck-coco-no-inherit-0", "tiny/yolov5n-slimneck-coco-no-inherit-1"),
    ]


def test_every_command_is_one_that_the_program_takes(options, tmp_path):
    """And what differs between the starts is what their names say."""
    one = study.Study(options("--starts", *study.STARTS, "--seeds", "3"))
    folder, told, teachers = tmp_path / "out" / "tiny", {}, {}
    for cell in one.cells:
        script, *words = one.command(cell)
        if script == "-m":
            assert words.pop(0) == "models.transplant"
        taken = (transplant if script == "-m" else train).build_parser().parse_args(words)
        assert (taken.seed, taken.workers, taken.exist_ok) == (3, 0, True)
        assert (taken.project, taken.name) == (str(folder), f"{cell.model}-{cell.start}-3")
        assert taken.cfg == f"models/{cell.model}.yaml"
        told[cell.model, cell.start] = [getattr(taken, name, None) for name in ("weights", "recipe", "epochs")]
        teachers[cell.start] = getattr(taken, "teacher", "")
    coco, teacher = str(tmp_path / "coco.pt"), str(folder / "yolov5n-coco-3" / "weights" / "best.pt")
    for model in ("yolov5n", "yolov5n-slimneck"):
        assert told.pop((model, "scratch")) == ["", "auto", 10]
        assert told.pop((model, "scratch-yolov5")) == ["", "yolov5", 10]
        assert told.pop((model, "coco")) == [coco, "auto", 5]
    assert told == {
        ("yolov5n-slimneck", "coco-no-inherit"): [coco, "auto", 5],
        ("yolov5n-slimneck", "inherited"): [teacher, None, None],
        ("yolov5n-slimneck", "tuned"): [teacher, "auto", 2],
        ("yolov5n-slimneck", "taught"): [teacher, "auto", 2],
    }
    assert {start: file for start, file in teachers.items() if file} == {"taught": teacher}


def test_a_model_may_have_an_option_of_a_training_behind_its_name(options):
    line = ("--models", "yolov5n", "yolov5n:box-loss=siou", "yolov5n-slimneck:act=relu", "--seeds", "3")
    one = study.Study(options(*line, "--starts", "coco", "inherited"))
    told = {}
    for cell in one.cells:
        if cell.start == "coco":
            taken = train.build_parser().parse_args(one.command(cell)[1:])
            told[cell.model] = (taken.cfg, taken.box_loss, taken.act)
        else:
            assert not {"--box-loss=siou", "--act=relu"} & set(one.command(cell)), "nothing is trained"
    assert told == {
        "yolov5n": ("models/yolov5n.yaml", None, None),
        "yolov5n:box-loss=siou": ("models/yolov5n.yaml", "siou", None),
        "yolov5n-slimneck:act=relu": ("models/yolov5n-slimneck.yaml", None, "relu"),
    }


def test_other_options_are_refused_where_cells_are(options, refusal):
    one = study.Study(options())
    folder = one.folder(one.cells[0])
    folder.mkdir(parents=True)
    (folder / study.CELL).write_text(json.dumps({"command": one.command(one.cells[0])}))
    study.Study(options())
    assert "--out" in refusal(study.Study, options("--imgsz", "64"))
    assert "--coco gone.pt" in refusal(study.Study, options("--coco", "gone.pt"))


def test_an_interrupted_study_goes_on_and_a_cell_that_fails_does_not_end_it(command, tiny_shapes, tiny_cfg, tmp_path):
    out, page = tmp_path / "out", tmp_path / "study.md"
    folder = out / "tiny" / "tiny-scratch-0"
    (tmp_path / "coco.pt").touch()  # empty
    line = ["--data", tiny_shapes, "--models", tiny_cfg, "--seeds", 0, "--imgsz", 64, "--images", 24 * EPOCHS]
    line += ["--coco", tmp_path / "coco.pt", "--out", out]

    def interrupt() -> None:
        while not (folder / "weights" / "last.pt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    stopped = command(study, *line, "--starts", "scratch")
    assert stopped.status == 130 and "same command again" in stopped.said
    with study.locked(out):  # nobody holds it any more; now this test does
        assert "pgrep" in command(study, *line, "--starts", "scratch").said
    assert "begun tiny/tiny-scratch-0" in command(study, *line, "--dry-run").said
    both = command(study, *line, "--starts", "coco", "scratch")
    assert both.status == 1 and "failed: tiny/tiny-coco-0; 0 " in both.said
    assert "coco.pt: " in both.said and "Traceback" not in both.said  # the end of its log
    assert "Resuming training" in (folder / "log.txt").read_text()
    with open(folder / "results.csv", encoding="utf-8") as rows:
        assert [int(row.split(",")[0]) for row in list(rows)[1:]] == list(range(EPOCHS))
    with open(out / "results.csv", encoding="utf-8", newline="") as rows:
        (row,) = csv.DictReader(rows)
    assert (row["data"], row["model"], row["start"], row["epochs"]) == ("tiny", "tiny", "scratch", str(EPOCHS))
    begun = json.loads((folder / "cell.json").read_text())
    assert 0 < begun["seconds"] < float(row["seconds"])  # of the first attempt, of both
    shutil.copy(ROOT / "docs" / "study.md", page)
    again = command(study, *line, "--starts", "scratch", "--doc", page)
    assert again.status == 0 and json.loads((folder / "cell.json").read_text()) == begun
    assert f"24 training images, {EPOCHS} epochs, 64 px." in page.read_text(encoding="utf-8")


@pytest.mark.skipif(not (find_spec("pycocotools") or find_spec("faster_coco_eval")), reason="no COCO library")
def test_figures_are_coco_s_at_the_size_of_the_run(golden_dir, datasets_dir, command, tmp_path):
    """Of COCO's YOLOv5n, against the library on val.py's detections and on boxes made from the label files here."""
    import val

    if find_spec("pycocotools"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    kinds = [tmp_path / kind for kind in ("images", "labels")]
    truth, images = [], []
    for source in sorted((datasets_dir / "coco128" / "images" / "train2017").iterdir())[:12]:
        label = datasets_dir / "coco128" / "labels" / "train2017" / f"{source.stem}.txt"
        for folder, file in zip(kinds, (source, label), strict=True):
            folder.mkdir(exist_ok=True)
            shutil.copy(file, folder)
        height, width = cv2.imread(str(source)).shape[:2]
        images.append({"id": int(source.stem), "height": height, "width": width})
        for number in label.read_text().splitlines():
            kind, x, y, w, h = map(float, number.split())
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            truth.append({"image_id": int(source.stem), "category_id": int(kind), "bbox": box, "area": box[2] * box[3]})
            truth[-1] |= {"id": len(truth), "iscrowd": 0}
    names = (datasets_dir / "coco128" / "coco128.yaml").read_text().partition("names:")[2]
    data = tmp_path / "mine.yaml"
    data.write_text(f"path: .\ntrain: images\nval: images\nnames:{names}")
    weights = tmp_path / "cell" / "weights"
    weights.mkdir(parents=True)
    shutil.copy(golden_dir / "yolov5n-v6-coco.pt", weights / "best.pt")
    os.utime(weights / "best.pt", (1030, 1030))
    cell = {"epochs": 0, "imgsz": 256, "data_yaml": str(data), "seconds": 5, "begun": 1000}
    (weights.parent / "cell.json").write_text(json.dumps(cell))
    study.measure(weights.parent)
    figures = json.loads((weights.parent / "figures.json").read_text())
    assert {"map_best", "begun"}.isdisjoint(figures) and figures["seconds"] == 35
    assert figures["parameters"] == 1_872_157 and figures["gflops"] == pytest.approx(4.5 * (256 / 640) ** 2, rel=0.03)
    outcome = command(
        *(val, "--weights", weights / "best.pt", "--data", data, "--img", 256, "--save-json", "--noplots"),
        *("--project", tmp_path, "--name", "val", "--workers", 0),
    )
    assert outcome.status == 0, outcome.said
    known = COCO()
    categories = [{"id": number, "name": str(number)} for number in range(80)]
    known.dataset = {"info": {}, "images": images, "annotations": truth, "categories": categories}
    known.createIndex()
    evaluation = COCOeval(known, known.loadRes(str(tmp_path / "val" / "best_predictions.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.1
    assert [figures["map_last"], figures["map50_last"]] == pytest.approx(list(evaluation.stats[:2]), abs=5e-4)


def test_tables_give_means_and_spreads_of_seeds(tmp_path):
    def row(model, start, seed, parameters, **figures):
        folder = tmp_path / "a" / f"{model}-{start}-{seed}"
        folder.mkdir(parents=True)
        content = {"data": "a", "model": model, "start": start, "seed": seed, "epochs": 2, "imgsz": 64}
        content |= {"train_images": 7, "machine": "M", "parameters": parameters, "gflops": 0.5, **figures}
        (folder / study.FIGURES).write_text(json.dumps(content))

    row("slim", "inherited", 0, 1_500_000, epochs=0, seconds=30, map_last=0.2, map50_last=0.3)
    for seed, last, best, seconds in ((0, 0.40, 0.41, 90), (1, 0.50, 0.52, 150)):
        row(
            "slim",
            "scratch",
            seed,
            1_500_000,
            seconds=seconds,
            map_last=last,
            map_best=best,
            map50_last=0.8,
            map50_best=0.9,
        )
    row("dense", "scratch", 0, 2_000_000, seconds=60, map_last=0.3, map_best=0.3, map50_last=0.6, map50_best=0.7)
    report = {"processor": "P", "options": {"imgsz": 64}}
    report["models"] = [
        {"model": name, "form": form} for name in ("dense", "slim") for form in ("as trained", "rewritten")
    ]
    report["runtimes"] = [
        {"runtime": "openvino-int8", "version": "1.2", "ms": [9, 4, 9, 3], "loads_ms": [[9, 4, 9, 3]]}
    ]
    (tmp_path / study.LATENCY).write_text(json.dumps(report))
    lines = study.tables(tmp_path).splitlines()
    assert [line for line in lines if line and "---" not in line and "| model" not in line] == [
        "### a, `scratch`",
        "7 training images, 2 epochs, 64 px.",
        "| `dense` | 1 | 0.300 | 0.300 | 0.600 | 0.700 | 1.0 | 2.00 | 0.50 |",
        "| `slim` | 2 | 0.450 (0.100) | 0.465 (0.110) | 0.800 (0.000) | 0.900 (0.000) | 2.0 | 1.50 | 0.50 |",
        "### a, `inherited`",
        "7 training images, no epochs, 64 px.",
        "| `slim` | 1 | 0.200 | - | 0.300 | - | 0.5 | 1.50 | 0.50 |",
        "### Latency",
        "P, one thread, 64 px, CPU time.",
        "| `dense` | 4.0 ms (1.00) |",
        "| `slim` | 3.0 ms (0.75) |",
        "Minutes are of: M.",
    ]
    heads = [line for line in lines if "| model" in line]
    assert heads[0].split(" | ")[2:6] == ["mAP50-95 last", "mAP50-95 best", "mAP50 last", "mAP50 best"]
    assert heads[-1] == "| model | OpenVINO int8 1.2 |"
    assert lines[lines.index(heads[-1]) + 1] == "| --- | --- |"


def test_latency_is_measured_once_of_a_model_with_several_options(options, monkeypatch):
    called = []
    monkeypatch.setattr(study, "run", lambda *words: called.append(list(map(str, words))) or "")
    study.main(options("--models", "yolov5n", "yolov5n:box-loss=siou", "yolov5n-slimneck:act=relu", "--ms"))
    (words,) = called
    assert words[words.index("--models") + 1 :] == ["yolov5n", "yolov5n-slimneck"]


def test_tables_stand_between_the_markers_of_the_page(tmp_path, refusal):
    page = tmp_path / "study.md"
    page.write_text((ROOT / "docs" / "study.md").read_text(encoding="utf-8") + "after\n", encoding="utf-8")
    study.write_tables("FIRST", page)
    once = page.read_text(encoding="utf-8")
    assert once.count("FIRST") == 1 and once.endswith("after\n") and once.startswith("# Which model")
    study.write_tables("SECOND", page)
    assert page.read_text(encoding="utf-8") == once.replace("FIRST", "SECOND")
    page.write_text(once.replace(study.END, ""), encoding="utf-8")
    assert study.END in refusal(study.write_tables, "THIRD", page)
