"""Plots of labels and results: they are written, legible (no text over another, none cut off) and show the data."""

import sys

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.plots import training as plots

HEADER = (
    "epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
    "metrics/mAP_0.5:0.95,val/box_loss,val/obj_loss,val/cls_loss,x/lr0,x/lr1,x/lr2"
)


def label_rows(count, classes, seed=0):
    rng = np.random.Generator(np.random.Philox(seed))
    sides = rng.uniform(0.05, 0.5, (count, 2))
    centres = rng.uniform(sides / 2, 1 - sides / 2)
    return np.column_stack((rng.integers(0, classes, count), centres, sides)).astype(np.float32)


def write_csv(path, epochs, header=HEADER):
    names = header.split(",")
    values = [[f"{(epoch + 1) * column / 100:.5g}" for column in range(1, len(names))] for epoch in range(epochs)]
    lines = [names, *([str(epoch), *row] for epoch, row in enumerate(values))]
    path.write_text("".join(",".join(f"{cell:>20}" for cell in line) + "\n" for line in lines))


def drawn_texts(figure):
    """The texts of a drawn figure with their places in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    for axes in figure.axes:
        (low, high), ticks = axes.get_xlim(), zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        texts += [text for place, text in ticks if low <= place <= high]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts if text.get_text()]


@pytest.mark.parametrize(
    "names",
    [
        {0: "item"},
        {0: "circle", 1: "square", 2: "triangle", 3: "star"},
        {index: f"dining table {index}" for index in range(20)},
        {index: f"traffic light {index}" for index in range(80)},
        {index: f"class {index}" for index in range(365)},
        {0: "圆形", 1: "正方形"},
        {0: "price in $", 1: "a_very_long_name_of_a_class_that_goes_on_and_on"},
    ],
    ids=["1", "4", "20", "80", "365", "chinese", "awkward"],
)
def test_nothing_on_the_label_plot_overlaps_or_is_cut_off(names):
    figure = plots._labels_figure(label_rows(1500, len(names)), names)
    width, height = figure.bbox.size
    texts = drawn_texts(figure)
    for index, (text, box) in enumerate(texts):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text!r} is cut off"
        for other, other_box in texts[index + 1 :]:
            apart = box.x1 <= other_box.x0 + 1 or other_box.x1 <= box.x0 + 1
            assert apart or box.y1 <= other_box.y0 + 1 or other_box.y1 <= box.y0 + 1, f"{text!r} over {other!r}"


def test_bars_show_the_number_of_each_class():
    rows = np.zeros((5, 5), np.float32)
    rows[:, 0] = (0, 2, 2, 2, 0)
    figure = plots._labels_figure(rows, {0: "a", 1: "b", 2: "c"})
    bars = figure.axes[0].containers[0]
    assert [bar.get_height() for bar in bars] == [2, 0, 3]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]


def test_centres_and_sizes_land_in_their_cells():
    # One box: centre (0.25, 0.75), size 0.5 x 0.1; of 50 cells an axis these are number 12 and 37, 25 and 5.
    figure = plots._labels_figure(np.array([[0, 0.25, 0.75, 0.51, 0.11]], np.float32), {0: "a"})
    centres, sizes = (axes.images[0].get_array() for axes in figure.axes[2:])
    assert np.argwhere(~centres.mask).tolist() == [[37, 12]] and centres[37, 12] == 1
    assert np.argwhere(~sizes.mask).tolist() == [[5, 25]]
    low, high = figure.axes[2].get_ylim()
    assert low > high, "y grows downwards, as in an image"


def test_at_most_a_thousand_boxes_are_drawn_small_ones_on_top():
    figure = plots._labels_figure(label_rows(1200, 2), {0: "a", 1: "b"})
    paths = figure.axes[1].collections[0].get_paths()
    areas = [np.ptp(path.vertices, axis=0).prod() for path in paths]
    assert len(paths) == 1000 and areas == sorted(areas, reverse=True)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_label_plots_are_written_without_pyplot_figures(tmp_path, count):
    files = plots.plot_labels(label_rows(count, 2), ["a", "b"], str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.jpg", "labels_correlogram.jpg"]
    for file in files:
        with Image.open(file) as image:
            assert image.format == "JPEG" and min(image.size) > 1000
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_correlogram_shows_all_pairs():
    figure = plots._correlogram_figure(label_rows(200, 1)[:, 1:])
    names = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert len(figure.axes) == 10
    assert [x for x, _ in names if x] == ["x", "y", "width", "height"]
    assert [y for _, y in names if y] == ["labels", "y", "width", "height"]


def test_results_show_ten_columns_in_the_known_order(tmp_path):
    write_csv(tmp_path / "results.csv", epochs=4)
    figure = plots._results_figure({"results": plots._read_results(tmp_path / "results.csv")})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [HEADER.split(",")[column] for column in (1, 2, 3, 4, 5, 8, 9, 10, 6, 7)]
    for axes, column in zip(figure.axes, (1, 2, 3, 4, 5, 8, 9, 10, 6, 7), strict=True):
        epochs, values = axes.lines[0].get_data()
        np.testing.assert_allclose(epochs, range(4))
        np.testing.assert_allclose(values, [(epoch + 1) * column / 100 for epoch in range(4)])
    assert [axes.get_title(loc="right") for axes in figure.axes[8:]] == ["best 0.240", "best 0.280"]


def test_a_term_of_training_alone_has_a_panel_above(tmp_path):
    header = HEADER.replace("train/cls_loss", "train/cls_loss,train/distill_loss")
    write_csv(tmp_path / "results.csv", 4, header)
    figure = plots._results_figure({"results": plots._read_results(tmp_path / "results.csv")})
    columns = (1, 2, 3, 4, 5, 6, 9, 10, 11, 7, 8)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [header.split(",")[column] for column in columns]
    assert [axes.lines[0].get_ydata()[3] for axes in figure.axes] == [column / 25 for column in columns]
    places = [round(axes.get_subplotspec().colspan.start) for axes in figure.axes]
    assert places == [0, 1, 2, 3, 4, 5, 0, 1, 2, 4, 5]


def test_results_overlay_the_other_tables_of_the_folder(tmp_path, caplog):
    write_csv(tmp_path / "results.csv", epochs=3)
    write_csv(tmp_path / "results_before.csv", epochs=50)
    (tmp_path / "results_broken.csv").write_text("a,b\n1,2\n")
    drawn = {}
    make = plots._results_figure

    def remember(tables):
        drawn.update(tables)
        return make(tables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_results_figure", remember)
        patch.setattr(plots.LOGGER, "propagate", True)
        plots.plot_results(tmp_path / "results.csv")
    assert {name: len(table) for name, table in drawn.items()} == {"results": 3, "results_before": 50}
    assert "results_broken.csv" in caplog.text
    with Image.open(tmp_path / "results.png") as image:
        assert image.format == "PNG" and image.width > 2000


@pytest.mark.parametrize("epochs", [1, 2])
def test_short_runs_are_visible(tmp_path, epochs):
    write_csv(tmp_path / "results.csv", epochs)
    figure = plots._results_figure({"results": plots._read_results(tmp_path / "results.csv")})
    assert all(axes.lines[0].get_marker() == "o" for axes in figure.axes)


@pytest.mark.parametrize("text", ["", "epoch\n", f"{HEADER}\n", "epoch,loss\n0,1\n", f"{HEADER}\n{'x,' * 13}x\n"])
def test_what_is_no_results_table_is_refused_by_name(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(UserError, match="results.csv: not a table of training results"):
        plots.plot_results(tmp_path / "results.csv")


def test_scripts_may_name_the_folder(tmp_path, monkeypatch):
    write_csv(tmp_path / "results2.csv", 2)
    saved = []
    monkeypatch.setattr(plots, "save_figure", lambda _figure, file, _dpi: saved.append(file))
    plots.plot_results(dir=str(tmp_path))
    assert saved == [tmp_path / "results.png"]
    with pytest.raises(UserError, match="holds no results"):
        plots.plot_results(dir=tmp_path / "none")
