"""benchmarks/study.py: which cells there are, their commands, what is taken up again, and the tables."""

import argparse
import json

import pytest

from benchmarks import study
from utils.files import ROOT


@pytest.fixture
def options(tiny_shapes, tmp_path):
    """Makes the parsed options of a study on the small data set, with others in their place."""
    (tmp_path / "coco.pt").touch()

    def make(*more) -> argparse.Namespace:
        line = ["--data", tiny_shapes, "--models", "yolov5n", "yolov5n-slimneck", "--seeds", "0", "1"]
        line += ["--coco", tmp_path / "coco.pt", "--out", tmp_path / "out", "--images", "240", *more]
        return study.build_parser().parse_args(list(map(str, line)))

    return make


def test_cells_stand_behind_what_they_need_and_all_seeds_together(options):
    cells = study.Study(options("--starts", "tuned", "scratch")).cells
    assert list(map(str, cells)) == [
        *("tiny/yolov5n-scratch-0", "tiny/yolov5n-scratch-1"),
        *("tiny/yolov5n-coco-0", "tiny/yolov5n-slimneck-inherited-0", "tiny/yolov5n-slimneck-tuned-0"),
        *("tiny/yolov5n-coco-1", "tiny/yolov5n-slimneck-inherited-1", "tiny/yolov5n-slimneck-tuned-1"),
        *("tiny/yolov5n-slimneck-scratch-0", "tiny/yolov5n-slimneck-scratch-1"),
    ]


def test_the_tables_stand_between_the_markers_and_the_page_has_both(tmp_path):
    page = tmp_path / "study.md"
    page.write_text((ROOT / "docs" / "study.md").read_text(encoding="utf-8") + "after\n", encoding="utf-8")
    study.write_tables("FIRST", page)
    once = page.read_text(encoding="utf-8")
    study.write_tables("SECOND", page)
    assert once.count("FIRST") == 1 and once.endswith("after\n") and once.startswith("# Which model")
    assert page.read_text(encoding="utf-8") == once.replace("FIRST", "SECOND")


def test_a_mean_of_seeds_has_its_spread():
    assert study.cell_of([0.4, 0.5, 0.45], "map_last") == "0.450 (0.100)"
    assert study.cell_of([0.4], "map_last") == "0.400"
    assert study.cell_of([None], "map_best") == "-"
    assert study.cell_of([90, 150], "seconds") == "2.0"


def test_other_options_are_refused_where_cells_are(options, refusal):
    one = study.Study(options())
    folder = one.folder(one.cells[0])
    folder.mkdir(parents=True)
    (folder / study.CELL).write_text(json.dumps({"command": one.command(one.cells[0])}))
    study.Study(options())
    assert "--out" in refusal(study.Study, options("--imgsz", "64"))
