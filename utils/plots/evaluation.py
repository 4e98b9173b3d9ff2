"""Curves of an evaluation: precision, recall and F1 curves, the confusion matrix; and of a study of image sizes.

Drawn on matplotlib figures of their own (Agg), so that no display, window or global state is involved; matplotlib is
imported when something is drawn. Names in any script are shown where an installed font has their characters.
Images with boxes are drawn by `utils.plots.boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import east_asian_width

import cv2
import numpy as np

from utils.errors import UserError, printable
from utils.files import atomic_write
from utils.log import LOGGER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from utils.metrics import APResult, ConfusionMatrix

CURVE_SIZE_INCHES = (9, 6)
CURVE_AREA = (0.07, 0.09, 0.63, 0.85)  # left, bottom, width, height: what is left holds the legend
CURVE_DPI = 250
MATRIX_DPI = 200
JPEG_QUALITY = 92
MAX_NAMED_CURVES = 20  # with more classes the single curves are grey and nameless
MAX_ANNOTATED_CLASSES = 29  # with more, the confusion matrix shows colours without figures
MAX_NAMED_TICKS = 98
MAX_NAME_LENGTH = 22
MIN_SHOWN_SHARE = 0.005  # smaller cells of the confusion matrix stay blank
MEAN_COLOR = "#0018EC"
STUDY_MAP, STUDY_INFERENCE_MS = 3, 8  # columns of a study's rows
CJK_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Microsoft YaHei",
    "PingFang SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "SimHei",
    "Hiragino Sans GB",
    "Arial Unicode MS",
)


class Lettering(NamedTuple):
    """Class names as they can be drawn, and the font families to draw them with."""

    names: dict[int, str]
    families: list[str]


def load_libraries() -> None:
    """Imports what drawing needs; half a second that a thread may take while a model computes."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401


def plot_evaluation(result: APResult, confusion: ConfusionMatrix, names: Mapping[int, str], folder: Path) -> list[Path]:
    """Draws PR_curve.png, F1_curve.png, P_curve.png, R_curve.png and confusion_matrix.png; without labels that alone.

    Args:
        result: the figures and curves.
        confusion: the counts.
        names: name of every class.
        folder: an existing folder.

    Returns:
        The files written.

    Raises:
        UserError: a file cannot be written.
    """
    lettering = drawable_names(names)
    file = folder / "confusion_matrix.png"
    plot_confusion(confusion, lettering, file)
    return [*(plot_curves(result, lettering, folder) if result.label_counts.sum() else ()), file]


def plot_curves(result: APResult, lettering: Lettering, folder: Path) -> list[Path]:
    """Draws the four curves of `result` into `folder` and returns their files."""
    labels = [lettering.names.get(int(class_id), str(class_id)) for class_id in result.classes]
    files = [folder / "PR_curve.png"]
    with_ap = [f"{label} {ap:.3f}" for label, ap in zip(labels, result.ap[:, 0], strict=True)]
    mean = f"all classes {result.map50:.3f} mAP@0.5"
    axis_names = ("Recall", "Precision")
    save_figure(_curve_figure(result.pr_curve, with_ap, mean, axis_names, lettering.families), files[0])
    over_confidence = {"F1": result.f1_curve, "P": result.precision_curve, "R": result.recall_curve}
    titles = {"F1": "F1", "P": "Precision", "R": "Recall"}
    for key, curves in over_confidence.items():
        average = curves.mean(0) if len(curves) else np.zeros(curves.shape[1])
        mean = f"all classes {average.max():.2f} at {average.argmax() / (len(average) - 1):.3f}"
        figure = _curve_figure(curves, labels, mean, ("Confidence", titles[key]), lettering.families)
        files.append(folder / f"{key}_curve.png")
        save_figure(figure, files[-1])
    return files


def _curve_figure(
    curves: np.ndarray, labels: list[str], mean_label: str, axis_names: tuple[str, str], families: list[str]
) -> Figure:
    """Draws curves (k, CURVE_POINTS), one for each label, below their mean; the legend stands at the right."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=CURVE_SIZE_INCHES)
    axes = figure.add_axes(CURVE_AREA)
    axis = np.linspace(0, 1, curves.shape[1])
    named = len(labels) <= MAX_NAMED_CURVES
    palette = colormaps["tab10" if len(labels) <= 10 else "tab20"]
    for row, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        if named:
            axes.plot(axis, curve, color=palette(row % palette.N), linewidth=1.2, label=label)
        else:
            axes.plot(axis, curve, color="0.75", linewidth=0.7, label="" if row else "single classes")
    mean = curves.mean(0) if len(curves) else np.zeros_like(axis)
    axes.plot(axis, mean, linewidth=3, color=MEAN_COLOR, alpha=0.85, label=mean_label)
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel=axis_names[0], ylabel=axis_names[1])
    axes.set_title(f"{axis_names[1]} over {axis_names[0].lower()}")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, prop={"family": families, "size": 9})
    return figure


def plot_confusion(confusion: ConfusionMatrix, lettering: Lettering, file: Path) -> None:
    """Draws the confusion matrix, every column as shares of its true class, into a PNG `file`."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    nc = confusion.nc
    shares = confusion.normalised()
    named = len(lettering.names) == nc <= MAX_NAMED_TICKS
    ticks = [lettering.names[class_id] for class_id in range(nc)] if named else []
    tick_size = float(np.clip(420 / (nc + 1), 5.5, 11))
    upright = nc < 5 and sum(map(len, ticks)) < 40
    side = float(np.clip(3 + 0.25 * nc, 5.5, 10))  # of the matrix itself, in inches
    left = 0.6 + max(map(_width_in_ems, [*ticks, "background FN"])) * tick_size / 72
    bottom = 0.7 if upright else left
    width, height = left + side + 1.3, bottom + side + 0.5
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    scale = figure.add_axes(((left + side + 0.25) / width, bottom / height, 0.25 / width, side / height))
    blues = colormaps["Blues"].with_extremes(under="white")
    # Coloured cell by cell: matplotlib would colour the figure's pixels one by one.
    cells = blues(np.where(shares < MIN_SHOWN_SHARE, -1, shares), bytes=True)
    axes.imshow(cells, interpolation="nearest")
    figure.colorbar(ScalarMappable(cmap=blues), cax=scale, label="share of the true class")
    for row, column in np.argwhere(shares >= MIN_SHOWN_SHARE) if nc <= MAX_ANNOTATED_CLASSES else ():
        share = shares[row, column]
        style = {"color": "white" if share > 0.5 else "black", "fontsize": float(np.clip(160 / (nc + 1), 6, 12))}
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", **style)
    if named:
        style = {"size": tick_size, "family": lettering.families}
        rotation = 0 if upright else 90
        axes.set_xticks(range(nc + 1), [*ticks, "background FP"], rotation=rotation, fontproperties=style)
        axes.set_yticks(range(nc + 1), [*ticks, "background FN"], fontproperties=style)
    axes.set(xlabel="True", ylabel="Predicted", title="Confusion matrix")
    save_figure(figure, file, MATRIX_DPI)


def _width_in_ems(text: str) -> float:
    """About how wide a text is, in units of its font size."""
    return sum(1.0 if east_asian_width(character) in "WF" else 0.62 for character in text)


def plot_val_study(
    file: str | Path | Sequence[str | Path] = "", dir: str | Path = "", x: Sequence[int] | None = None
) -> None:
    """Draws mAP50-95 over the time of inference as study.png: a line for each model, with the image sizes along it.

    Args:
        file: a table that `val.py --task study` wrote, or several: a row for each size (n, 10): P, R, mAP50, mAP50-95,
            box, objectness and class loss, milliseconds per image of pre-processing, inference and NMS.
        dir: in their place: a folder, of which every study*.txt is taken.
        x: the n image sizes; None numbers them.

    Raises:
        UserError: there is no table, it cannot be read, or the image cannot be written.
    """
    from matplotlib.figure import Figure

    files = (
        [file] if isinstance(file, (str, Path)) and str(file) else list(file) or sorted(Path(dir).glob("study*.txt"))
    )
    if not files:
        raise UserError(f"{dir or '.'}: holds no study*.txt.")
    studies = {}
    for table in map(Path, files):
        try:
            rows = np.loadtxt(table, ndmin=2)
            studies[table.stem.removeprefix("study_")] = rows[:, [STUDY_MAP, STUDY_INFERENCE_MS]]
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{table}: not a table of val.py --task study ({error}).") from error
    lettering = drawable_names(dict(enumerate(studies)))
    figure = Figure(figsize=CURVE_SIZE_INCHES)
    axes = figure.add_axes(CURVE_AREA)
    for number, rows in enumerate(studies.values()):
        maps, milliseconds = rows.T
        axes.plot(milliseconds, maps, ".-", linewidth=2, markersize=8, label=lettering.names[number])
        sizes_px = range(len(rows)) if x is None else x
        for size_px, place in zip(sizes_px, zip(milliseconds, maps, strict=True), strict=True):
            axes.annotate(str(size_px), place, (3, -9), textcoords="offset points", fontsize=7, color="0.4")
    axes.set(
        xlabel="Inference, milliseconds per image", ylabel="mAP@0.5:0.95", title="Accuracy over speed by image size"
    )
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    style = {"family": lettering.families, "size": 9}
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, prop=style)
    save_figure(figure, Path(files[0]).parent / "study.png")


def drawable_names(names: Mapping[int, str]) -> Lettering:
    """Shortens long names and finds fonts for them; names that no installed font can show become class numbers.

    Args:
        names: name of every class, in any script.
    """
    from matplotlib import font_manager

    short = {index: _shorten(printable(name)) for index, name in names.items()}
    default = "DejaVu Sans"  # shipped with matplotlib
    missing = set("".join(short.values())) - {" "} - _characters(font_manager.findfont(default))
    if not missing:
        return Lettering(short, [default])
    family = _covering_family(missing)
    if family:
        return Lettering(short, [default, family])
    LOGGER.warning(
        "WARNING: no installed font has the characters of all class names: plots show class numbers instead. "
        "Install one, such as fonts-noto-cjk."
    )
    numbers = {index: str(index) if set(name) & missing else name for index, name in short.items()}
    return Lettering(numbers, [default])


def _shorten(name: str) -> str:
    """Cuts a name to MAX_NAME_LENGTH characters and shields `$`, which starts a formula in matplotlib."""
    name = name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"
    return name.replace("$", r"\$")


def _characters(font_file: str) -> set[str]:
    from matplotlib.font_manager import get_font

    return {chr(code) for code in get_font(font_file).get_charmap()}


def _covering_family(characters: set[str]) -> str | None:
    """The family of an installed font that has all `characters`: a well-known one if possible."""
    from matplotlib.font_manager import fontManager

    entries = [entry for entry in reversed(fontManager.ttflist) if "last resort" not in entry.name.lower()]
    files = {entry.name: entry.fname for entry in entries}  # less the font that draws every character as a frame
    known = [family for family in CJK_FAMILIES if family in files]
    for family in [*known, *(family for family in sorted(files) if family not in known)]:
        try:
            if characters <= _characters(files[family]):
                return family
        except (OSError, RuntimeError) as error:  # a broken font file is no reason to stop
            LOGGER.debug(f"{files[family]}: {error}")
    return None


def save_figure(figure: Figure, file: Path, dpi: int = CURVE_DPI) -> None:
    """Writes a figure as PNG or JPEG, all or nothing.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR)
    png, jpeg = (cv2.IMWRITE_PNG_COMPRESSION, 1), (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY)
    options = png if file.suffix == ".png" else jpeg  # several times Pillow's speed
    _, data = cv2.imencode(file.suffix, pixels, options)
    with atomic_write(file) as temporary:
        temporary.write_bytes(data.tobytes())
