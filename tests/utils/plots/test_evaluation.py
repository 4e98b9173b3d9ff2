"""Plots: the files of contract 7.7, legends that belong to their curves, names in any script, no global state."""

import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.files import ROOT
from utils.metrics import ConfusionMatrix, ap_per_class
from utils.plots import evaluation as plots


def result(classes, detected):
    """An APResult with labels of `classes` and perfect detections of the classes `detected`."""
    detected = np.array(detected)
    correct, confidence = np.ones((len(detected), 10), bool), np.full(len(detected), 0.9)
    return ap_per_class(correct, confidence, detected, np.array(classes))


@pytest.mark.parametrize("nc", [1, 3, 80])
def test_files_are_drawn_whatever_the_number_of_classes(tmp_path, nc):
    names = {index: f"class {index}" for index in range(nc)}
    files = plots.plot_evaluation(result(range(nc), range(nc)), ConfusionMatrix(nc), names, tmp_path)
    expected = {"PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "confusion_matrix.png"}
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()} == expected
    with Image.open(tmp_path / "PR_curve.png") as picture:
        assert picture.size == (9 * 250, 6 * 250)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def curve_figure(monkeypatch, outcome, names):
    """The figures that `plot_curves` would save, by file name."""
    saved = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, file, dpi=0: saved.setdefault(file.name, figure))
    plots.plot_curves(outcome, plots.drawable_names(names), plots.Path("."))
    return saved


def test_legend_belongs_to_the_curves_when_a_class_has_no_detection(monkeypatch):
    """Class 1 has labels but no detection: its curve is 0, and class 2's name stays at class 2's curve."""
    figures = curve_figure(monkeypatch, result([0, 1, 2], [0, 2]), {0: "cat", 1: "dog", 2: "cow"})
    (axes,) = figures["PR_curve.png"].axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines) == ["cat 0.995", "dog 0.000", "cow 0.995", "all classes 0.663 mAP@0.5"]
    assert lines["dog 0.000"].max() == 0
    assert lines["cow 0.995"][:900].min() == 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)


def test_a_study_is_one_line_for_each_model_with_its_sizes(tmp_path, monkeypatch):
    rows = np.zeros((2, 10))
    rows[:, 3], rows[:, 8] = (0.3, 0.4), (5, 9)
    for name in ("small", "large"):
        np.savetxt(tmp_path / f"study_{name}.txt", rows, fmt="%10.4g")
    plots.plot_val_study(tmp_path / "study_small.txt")
    with Image.open(tmp_path / "study.png") as image:
        assert image.size == (9 * 250, 6 * 250)
    saved = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, file, dpi=0: saved.append(figure))
    plots.plot_val_study(dir=tmp_path, x=[256, 384])
    (axes,) = saved[0].axes
    assert [line.get_label() for line in axes.lines] == ["large", "small"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[5, 0.3], [9, 0.4]])
    assert [text.get_text() for text in axes.texts] == ["256", "384"] * 2
    with pytest.raises(UserError, match="holds no study"):
        plots.plot_val_study(dir=tmp_path / "none")
    (tmp_path / "study_bad.txt").write_text("no table")
    with pytest.raises(UserError, match=r"study_bad\.txt: not a table"):
        plots.plot_val_study(dir=tmp_path)


def test_best_mean_and_its_confidence_stand_in_the_legend(monkeypatch):
    figures = curve_figure(monkeypatch, result([0, 1], [0, 1]), {0: "cat", 1: "dog"})
    assert figures["F1_curve.png"].axes[0].lines[-1].get_label() == "all classes 1.00 at 0.000"


def test_more_than_twenty_classes_are_grey_under_one_name(monkeypatch):
    names = {index: f"n{index}" for index in range(21)}
    (axes,) = curve_figure(monkeypatch, result(range(21), range(21)), names)["PR_curve.png"].axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["single classes", "all classes 0.995 mAP@0.5"]
    assert {line.get_color() for line in axes.lines[:-1]} == {"0.75"}


def test_confusion_matrix_shows_shares_and_names(monkeypatch, tmp_path):
    confusion = ConfusionMatrix(2)
    confusion.matrix[:] = [[9, 0, 1], [0, 997, 0], [1, 3, 0]]
    saved = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, file, dpi=0: saved.append(figure))
    plots.plot_confusion(confusion, plots.drawable_names({0: "cat", 1: "dog"}), tmp_path / "confusion_matrix.png")
    axes = saved[0].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat", "dog", "background FP"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog", "background FN"]
    shown = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert shown == {((0, 0), "0.90"), ((0, 2), "0.10"), ((1, 1), "1.00"), ((2, 0), "1.00")}  # 0.003 stays blank


def test_long_names_are_cut_and_formulas_disarmed():
    names = plots.drawable_names({0: "x" * 60, 1: "a$b"}).names
    assert names[0] == "x" * (plots.MAX_NAME_LENGTH - 1) + "…"
    assert names[1] == r"a\$b"


def test_names_without_a_font_become_numbers_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(plots, "_covering_family", lambda characters: None)
    with caplog.at_level(logging.WARNING, "yolov5"):
        lettering = plots.drawable_names({0: "行人", 1: "car"})
    assert lettering.names == {0: "0", 1: "car"}
    assert len(caplog.records) == 1 and "class numbers" in caplog.text


def test_a_font_that_has_the_characters_is_chosen(monkeypatch, caplog):
    monkeypatch.setattr(plots, "_covering_family", lambda characters: "Noto Sans CJK SC")
    lettering = plots.drawable_names({0: "行人"})
    assert lettering.names == {0: "行人"}
    assert lettering.families == ["DejaVu Sans", "Noto Sans CJK SC"]
    assert not caplog.records


def test_pyplot_stays_out_of_it(tmp_path):
    """In a fresh interpreter, so that other tests' imports do not count."""
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from utils.plots.evaluation import plot_evaluation\n"
        "from utils.metrics import ConfusionMatrix, ap_per_class\n"
        "r = ap_per_class(np.ones((1, 10), bool), np.ones(1), np.zeros(1), np.zeros(1))\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot_evaluation(r, ConfusionMatrix(1), {{0: 'a'}}, Path({str(tmp_path)!r}))\n"
        "assert not {'matplotlib.pyplot', 'torch', 'pandas', 'seaborn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
