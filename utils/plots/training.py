"""Plots of a training run: what the labels are like (labels.jpg, labels_correlogram.jpg), how it went (results.png).

And of a hyperparameter search: evolve.png.

Drawn on matplotlib figures of their own (Agg): no display, no pyplot state. matplotlib, seaborn and pandas are imported
when something is drawn. Curves of an evaluation are drawn by `utils.plots.evaluation`, images with boxes by
`utils.plots.boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import UserError, printable
from utils.log import LOGGER
from utils.plots.boxes import as_mapping, colors
from utils.plots.evaluation import drawable_names, save_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


DPI = 150
BINS = 50  # of the histograms, per axis
MAX_DRAWN_BOXES = 1000
MAX_COUNTED_CLASSES = 30  # with more, bars have no figure on top
MAX_NAMED_CLASSES = 100  # with more, the axis counts classes
HISTOGRAM_COLORS = ("#C7E9B4", "#41B6C4", "#225EA8", "#081D58")  # few to many; none is white
RESULT_COLORS = ("#0018EC", "#FF701F", "#1A9334", "#CB38FF", "#00C2FF", "#344593")


def plot_labels(
    labels: np.ndarray, names: Mapping[int, str] | Sequence[str] = (), save_dir: str | Path = ""
) -> list[Path]:
    """Draws labels.jpg and labels_correlogram.jpg.

    Args:
        labels: (M, 5), class and box x, y, width, height in 0 to 1 of the image, of all labels.
        names: name of every class.
        save_dir: an existing folder.

    Returns:
        The files written.

    Raises:
        UserError: a file cannot be written.
    """
    files = [Path(save_dir, "labels.jpg"), Path(save_dir, "labels_correlogram.jpg")]
    save_figure(_labels_figure(labels, as_mapping(names)), files[0], DPI)
    save_figure(_correlogram_figure(labels[:, 1:]), files[1], DPI)
    return files


def _labels_figure(rows: np.ndarray, names: Mapping[int, str]) -> Figure:
    """Draws the instances of every class above, and the boxes' shapes, places and sizes below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.1))
    _draw_class_counts(figure.add_subplot(grid[0, :]), rows[:, 0].astype(np.int64), names)
    _draw_centred_boxes(figure.add_subplot(grid[1, 0]), rows)
    _draw_histogram(figure.add_subplot(grid[1, 1]), rows[:, 1:3], "x", "y", "Centres")
    figure.axes[-1].invert_yaxis()  # as in the image
    _draw_histogram(figure.add_subplot(grid[1, 2]), rows[:, 3:5], "width", "height", "Sizes")
    return figure


def _draw_class_counts(axes: Axes, classes: np.ndarray, names: Mapping[int, str]) -> None:
    """Draws one bar for each class; `classes` is int64 (M,)."""
    counts = np.bincount(classes, minlength=len(names))
    ids = range(len(counts))
    axes.bar(ids, counts, color=[np.array(colors(class_id)) / 255 for class_id in ids], width=0.8)
    side = max(0.6, 2.1 - len(counts) / 2)  # a few bars stay slim
    kinds = "class" if len(names) == 1 else "classes"
    axes.set(ylabel="instances", title=f"{len(classes)} labels of {len(names)} {kinds}")
    axes.set(xlim=(-side, len(counts) - 1 + side), ylim=(0, max(1, 1.12 * counts.max(initial=0))))
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    if len(counts) <= MAX_COUNTED_CLASSES:
        axes.bar_label(axes.containers[0], fontsize=9 if len(counts) <= 15 else 7, padding=2)
    if len(counts) > MAX_NAMED_CLASSES:
        axes.set_xlabel("class")
        return
    lettering = drawable_names(names)
    ticks = [lettering.names.get(class_id, str(class_id)) for class_id in ids]
    size = float(np.clip(760 / len(counts), 6, 11))
    letters = max(len(tick) + sum(letter >= "\u1100" for letter in tick) for tick in ticks)  # CJK: twice as wide
    fits = letters * size * 0.62 < 760 / len(counts)  # points: of a name, of a bar
    axes.set_xticks(ids, ticks, rotation=0 if fits else 90, fontproperties={"family": lettering.families, "size": size})


def _draw_centred_boxes(axes: Axes, rows: np.ndarray) -> None:
    """Draws the first boxes of `rows` (M, 5) around one centre, large ones first."""
    from matplotlib.collections import PolyCollection

    shown = rows[:MAX_DRAWN_BOXES]
    shown = shown[np.argsort(-shown[:, 3] * shown[:, 4], kind="stable")]
    unit_square = np.array(((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)))
    corners = 0.5 + unit_square * shown[:, None, 3:5]
    edges = [np.array(colors(class_id)) / 255 for class_id in shown[:, 0]]
    axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors=edges, linewidths=0.6, alpha=0.8))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(), yticks=())
    axes.set_title(f"Box shapes{f' (first {MAX_DRAWN_BOXES})' if len(rows) > MAX_DRAWN_BOXES else ''}")


def _draw_histogram(axes: Axes, points: np.ndarray, x_name: str, y_name: str, title: str) -> None:
    """Draws a two-dimensional histogram of points (M, 2) in 0 to 1; empty cells stay white."""
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=BINS, range=((0, 1), (0, 1)))
    shown = np.ma.masked_equal(counts.T, 0)
    axes.imshow(shown, origin="lower", extent=(0, 1, 0, 1), cmap=_histogram_colors(), interpolation="nearest")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=x_name, ylabel=y_name, title=title)


def _histogram_colors() -> Colormap:
    """The colours of a histogram's cells."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("labels", HISTOGRAM_COLORS)


def _correlogram_figure(boxes_xywh_norm: np.ndarray) -> Figure:
    """Draws how each two of x, y, width and height go together; `boxes_xywh_norm` is (M, 4)."""
    import pandas as pd
    import seaborn as sns
    from matplotlib.figure import Figure

    columns = ["x", "y", "width", "height"]
    frame = pd.DataFrame(boxes_xywh_norm, columns=columns)
    figure = Figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(4, 4, sharex="col")
    bins = {"bins": BINS, "binrange": (0, 1)}
    for row, vertical in enumerate(columns):
        for column, horizontal in enumerate(columns):
            axes = panels[row, column]
            if column > row:
                axes.remove()
                continue
            if column == row:
                sns.histplot(frame, x=horizontal, ax=axes, color="#2C99A8", element="step", **bins)
            elif len(frame):
                pairs = {"bins": (BINS, BINS), "binrange": ((0, 1), (0, 1))}
                sns.histplot(frame, x=horizontal, y=vertical, ax=axes, cmap=_histogram_colors(), **pairs)
            outer = "" if column else vertical if row else "labels"
            axes.set(xlabel=horizontal if row == 3 else "", ylabel=outer, xlim=(0, 1))
            if column < row:
                axes.set_ylim(0, 1)
    figure.suptitle("How box centres and sizes go together")
    return figure


def plot_results(file: str | Path = "path/to/results.csv", dir: str | Path = "") -> None:
    """Draws results.png beside a results.csv: curves over the epochs, of it and of every other results*.csv there.

    Args:
        file: a results.csv as training writes it.
        dir: in its place: a folder, of which the first results*.csv is taken.

    Raises:
        UserError: there is none, it is not such a file, or the image cannot be written.
    """
    csv_file = next(iter(sorted(Path(dir).glob("results*.csv"))), None) if dir else Path(file)
    if csv_file is None:
        raise UserError(f"{dir}: holds no results*.csv.")
    image = csv_file.parent / "results.png"
    tables = {printable(csv_file.stem): _read_results(csv_file)}
    for other in sorted(csv_file.parent.glob("results*.csv")):
        if other.name == csv_file.name:
            continue
        try:
            tables[printable(other.stem)] = _read_results(other)
        except UserError as error:
            LOGGER.warning(f"WARNING: left out of {image.name}: {error}")
    save_figure(_results_figure(tables), image, DPI)


def plot_evolve(evolve_csv: str | Path = "path/to/evolve.csv") -> None:
    """Draws evolve.png beside an evolve.csv: the fitness of all trials over each hyperparameter that varies.

    Raises:
        UserError: it is not such a file, or the image cannot be written.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    from utils.metrics import fitness

    csv_file = Path(evolve_csv)
    try:
        table = pd.read_csv(csv_file, skipinitialspace=True).rename(columns=str.strip).astype(float)
        scores = fitness(table.iloc[:, :4].to_numpy())
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{csv_file}: not a table of a hyperparameter search ({error}).") from error
    drawn = [name for name in table if "/" not in name and (len(table) == 1 or table[name].nunique() > 1)]
    figure = Figure(figsize=(15, 2.6 * -(-len(drawn) // 6)), layout="constrained")
    best = int(scores.argmax())
    for number, name in enumerate(drawn, 1):
        axes = figure.add_subplot(-(-len(drawn) // 6), 6, number)
        axes.scatter(table[name], scores, c=range(len(scores)), cmap="viridis", s=14, alpha=0.8)  # early ones are dark
        axes.plot(table[name][best], scores[best], "+", color="#FF3838", markersize=14, markeredgewidth=2)
        axes.set_title(f"{name} = {table[name][best]:.3g}", fontsize=9)
        axes.tick_params(labelsize=7)
        if number % 6 == 1:
            axes.set_ylabel("fitness", fontsize=8)
    save_figure(figure, csv_file.with_name("evolve.png"), DPI)


def _read_results(csv_file: Path) -> pd.DataFrame:
    """Reads a results.csv: one row an epoch, by the names of its columns."""
    import pandas as pd

    try:
        table = pd.read_csv(csv_file, skipinitialspace=True)
        table.columns = [str(name).strip() for name in table.columns]
        table = table.astype(float)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{csv_file}: not a table of training results ({error}).") from error
    losses, metrics = ([name for name in table.columns if name.startswith(kind)] for kind in ("train/", "metrics/"))
    if "epoch" not in table or not losses or len(metrics) != 4 or not len(table):
        raise UserError(
            f"{csv_file}: not a table of training results: {table.shape[0]} rows, {table.shape[1]} columns."
        )
    return table


def _results_figure(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draws a panel for each loss and metric of the first table; `tables` are the runs by name.

    Above are the training losses, precision and recall, below the validation losses and both mAPs.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(next(iter(tables.values())).columns)
    kinds = ("train/", "val/", "metrics/")
    above, below, metrics = ([name for name in names if name.startswith(kind)] for kind in kinds)
    width = len(above) + 2
    below += [""] * (len(above) - len(below))  # terms of training alone
    figure = Figure(figsize=(3 * width, 6.5), layout="constrained")
    panels = figure.subplots(2, width, sharex=True)
    for axes, name in zip(panels.ravel(), (*above, *metrics[:2], *below, *metrics[2:]), strict=True):
        if not name:
            axes.remove()
            continue
        for number, (run, table) in enumerate(tables.items()):
            if name not in table:
                continue
            epochs, values = table["epoch"].to_numpy(), table[name].to_numpy()
            marker = {"marker": "o", "markersize": 4} if len(epochs) <= 40 else {}
            shade = RESULT_COLORS[number % len(RESULT_COLORS)]
            axes.plot(epochs, values, color=shade, linewidth=1.8, label=run, **marker)
            if len(tables) == 1 and name in metrics and np.isfinite(values).any():
                _mark_best(axes, epochs, values)
        axes.set_title(name, fontsize=11, loc="left")
        axes.grid(alpha=0.25)
        axes.margins(y=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axes in panels[1]:
        axes.set_xlabel("epoch")
    if len(tables) > 1:
        handles = panels[0, -1].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(len(tables), 4))
    return figure


def _mark_best(axes: Axes, epochs: Sequence[float], values: np.ndarray) -> None:
    """Rings the highest value (n,) and writes it beside the title."""
    best = int(np.nanargmax(values))
    axes.plot(epochs[best], values[best], "o", markersize=9, markerfacecolor="none", markeredgecolor="#FF3838")
    axes.set_title(f"best {values[best]:.3f}", fontsize=10, loc="right", color="#C00000")
