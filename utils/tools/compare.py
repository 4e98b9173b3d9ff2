"""Compare two runs on the same images: the mAP of each class, and the images that got better or worse.

`python -m utils.tools.compare A B --data mine.yaml`, where A and B are folders of val.py with --save-json, or with
--save-txt --save-conf, or JSON files of COCO results. The labels are those of a data set YAML, or of a COCO file. Both
runs go through validation's own matching and average precision. An image is judged by its F1 at IoU 0.5, of the
detections above a confidence: each run's best one unless one is given. The page holds its pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.boxes import xywhn2xyxy
from utils.cli import CommandParser, number, run_command
from utils.dataloaders.config import SPLITS, load_spec
from utils.dataloaders.labels import load_labels
from utils.errors import UserError, explain_resource_errors, printable
from utils.eval.coco import category_ids, result_numbers
from utils.eval.figures import judge
from utils.eval.report_page import LEGEND, error_picture
from utils.files import ROOT, atomic_write, increment_path, run_folder
from utils.log import LOGGER, colorstr
from utils.media.writers import OutputStems
from utils.metrics import APResult, ap_per_class, match_detections
from utils.page import fill_page, html_table
from utils.tools.convert import Images, Lost, Reading, box_of, folder_of_images, read_coco, read_json

ROW = "%20s" + "%9s" * 7
COLUMNS = ("Class", "Labels", "mAP50 A", "B", "B - A", "mAP A", "B", "B - A")


class Truth(NamedTuple):
    """N labelled images."""

    paths: list[str]  # empty texts for images that are not there
    sizes_wh: np.ndarray  # (N, 2) px
    labels: list[np.ndarray]  # N of (m, 5) [class, x1, y1, x2, y2] in px
    names: dict[int, str]
    ids: Sequence[int | str]  # what results call the images
    categories: Sequence[int]  # and the classes


class Scores(NamedTuple):
    """What a run is worth."""

    confidence: float
    detections: list[np.ndarray]  # N of (n, 6) [x1, y1, x2, y2, confidence, class], of at least that
    result: APResult  # of all detections
    counts: np.ndarray  # (N, 3) int: right, wrong and missed in each image
    f1: np.ndarray  # (N,), 1 where nothing is there and nothing found


def read_truth(data: str, split: str) -> Truth:
    """Reads the labels of a data set YAML's split, or of a COCO file.

    Raises:
        UserError: it cannot be read, or has no labels.
    """
    if data.lower().endswith(".json"):
        return _coco_truth(Path(data))
    spec = load_spec(data, need=[split], download=False)
    table = load_labels(getattr(spec, split), spec)
    paths, sizes_wh = list(table.image_paths), table.sizes_wh
    labels = []
    for index, (width, height) in enumerate(sizes_wh.tolist()):
        rows = table.labels(index).astype(np.float64)
        labels.append(np.column_stack((rows[:, 0], xywhn2xyxy(rows[:, 1:], width, height))))
    annotations = spec.root / "annotations" / "instances_val2017.json"
    ids, categories, _ = result_numbers(paths, spec.names, category_ids(spec.val, spec.names), annotations)
    return Truth(paths, sizes_wh, labels, spec.names, ids, categories)


def _coco_truth(path: Path) -> Truth:
    content = read_json(path)
    try:
        found = list(read_coco(path, content, Reading(Lost())))
        categories = {str(one["name"]): one["id"] for one in sorted(content["categories"], key=lambda one: one["id"])}
        ids = [one["id"] for one in content["images"]]
        classes = {name: index for index, name in enumerate(categories)}
        labels = [
            [(classes[shape.name], *box_of(shape.xy)) for shape in one.shapes if "crowd" not in shape.flags]
            for one in found
        ]
        sizes_wh = np.array([one.size_wh for one in found], dtype=float).reshape(-1, 2)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a usable COCO annotation file ({type(error).__name__}: {error}).") from error
    images = Images(folder_of_images(path))
    places = [images.find(one.image, path, "") for one in found]
    paths = [str(place[0]) if len(place) == 1 else "" for place in places]
    arrays = [np.array(rows, dtype=float).reshape(-1, 5) for rows in labels]
    return Truth(paths, sizes_wh, arrays, dict(enumerate(classes)), ids, list(categories.values()))


def read_run(path: Path, truth: Truth) -> list[np.ndarray]:
    """Returns a run's detections (n, 6) in each image, the most confident first.

    Raises:
        UserError: there are none, they lack confidences, or they are of other images or classes.
    """
    files = sorted(path.glob("*predictions.json")) if path.is_dir() else [path]
    if len(files) > 1:
        raise UserError(f"{path}: holds several results, {', '.join(one.name for one in files)}. Give one of them.")
    if files:
        rows = _json_rows(files[0], truth)
    elif (path / "labels").is_dir():
        rows = _text_rows(path / "labels", truth)
    else:
        weights = path / "weights" / "best.pt"
        whose = weights if weights.is_file() else "best.pt"
        raise UserError(
            f"{path}: holds no detections. Make them: python val.py --weights {whose} --data mine.yaml --save-json, "
            "and give the folder that it names."
        )
    arrays = [np.array(some, dtype=float).reshape(-1, 6) for some in rows]
    if not all(np.isfinite(some).all() for some in arrays):
        raise UserError(f"{path}: holds numbers that are not finite.")
    return [some[np.argsort(-some[:, 4], kind="stable")] for some in arrays]


def _json_rows(path: Path, truth: Truth) -> list[list[tuple[float, ...]]]:
    images = {image: index for index, image in enumerate(truth.ids)}
    classes = {category: index for index, category in enumerate(truth.categories)}
    rows: list[list[tuple[float, ...]]] = [[] for _ in truth.ids]
    try:
        for one in read_json(path):
            for key, known in (("image_id", images), ("category_id", classes)):
                if one[key] not in known:
                    raise UserError(f"{path}: {key} {one[key]!r:.80} is not in the data set. Is this its --split?")
            left, top, width, height = map(float, one["bbox"])
            box = (left, top, left + width, top + height)
            rows[images[one["image_id"]]].append((*box, float(one["score"]), classes[one["category_id"]]))
    except (LookupError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not COCO results ({type(error).__name__}: {error}).") from error
    return rows


def _text_rows(folder: Path, truth: Truth) -> list[list[tuple[float, ...]]]:
    """Reads label files with confidences, which val.py names after the images."""
    stems = OutputStems(truth.paths)
    files = {path.stem: path for path in folder.glob("*.txt")}
    rows = []
    for image, (width, height) in zip(truth.paths, truth.sizes_wh.tolist(), strict=True):
        path = files.pop(stems[image], None)
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
        try:
            numbers = np.array([[float(token) for token in line.split()] for line in lines]).reshape(-1, 6)
        except ValueError as error:
            raise UserError(
                f"{path}: lines of class, box and confidence are expected. val.py writes them with --save-conf."
            ) from error
        boxes = xywhn2xyxy(numbers[:, 1:5], width, height)
        unknown = [int(label) for label in numbers[:, 0] if label not in truth.names]
        if unknown:
            raise UserError(f"{path}: class {unknown[0]} is not in the data set.")
        rows.append(np.column_stack((boxes, numbers[:, 5], numbers[:, 0])).tolist())
    if files:
        raise UserError(f"{next(iter(files.values()))}: is of no image in the data set. Is this its --split?")
    return rows


def score(truth: Truth, detections: Sequence[np.ndarray], confidence: float | None = None) -> Scores:
    """Scores a run; `confidence` None takes the one of its best mean F1."""
    right = [match_detections(*pair) for pair in zip(detections, truth.labels, strict=True)]
    everything = np.concatenate(detections)
    result = ap_per_class(np.concatenate(right), everything[:, 4], everything[:, 5], np.concatenate(truth.labels)[:, 0])
    confidence = result.confidence if confidence is None else confidence
    kept = [some[some[:, 4] >= confidence] for some in detections]
    counts = np.array([judge(*pair).counts for pair in zip(kept, truth.labels, strict=True)]).reshape(-1, 3)
    total = counts @ (2, 1, 1)
    return Scores(confidence, kept, result, counts, np.where(total == 0, 1.0, 2 * counts[:, 0] / np.maximum(total, 1)))


def changes(a: Scores, b: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images that got worse and those that got better, the most changed first.

    An image's F1 decides, and of equal changes the number of wrong and missed objects.
    """
    gain = b.f1 - a.f1
    errors = (b.counts - a.counts)[:, 1:].sum(1)
    order = np.lexsort((-errors, gain))
    return order[gain[order] < 0], order[gain[order] > 0][::-1]


def class_rows(truth: Truth, a: Scores, b: Scores) -> list[tuple[str, ...]]:
    """Returns the cells below COLUMNS: all classes together, then each that has labels, the greatest loss first."""
    counts, aps = a.result.label_counts, [one.result.ap for one in (a, b)]  # at each IoU threshold
    rows = [("all", counts.sum(), *(ap.mean(0) for ap in aps))]
    for index in np.argsort((aps[1] - aps[0]).mean(1), kind="stable"):
        rows.append((truth.names[int(a.result.classes[index])], counts[index], *(ap[index] for ap in aps)))
    cells_of_rows = []
    for name, count, *pair in rows:
        cells = [printable(name), str(count)]
        for before, after in ([ap[0] for ap in pair], [ap.mean() for ap in pair]):
            cells += [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
        cells_of_rows.append(tuple(cells))
    return cells_of_rows


def picture(truth: Truth, scores: Scores, image: int) -> str:
    """Returns an image with its right, wrong and missed objects as an <img> with its data; a text where it is gone."""
    found, labels = scores.detections[image], truth.labels[image]
    return error_picture(truth.paths[image], truth.sizes_wh[image], found, labels, truth.names)


def page(truth: Truth, titles: Sequence[str], scores: Sequence[Scores], most: int) -> str:
    """Returns the comparison as one HTML file: at most `most` images that got worse, and as many that got better."""
    sections = []
    for heading, images in zip(("Worse", "Better"), changes(*scores), strict=True):
        figures = []
        for image in images[:most].tolist():
            told = [
                f"{letter}: F1 {one.f1[image]:.2f}, {_counts(one.counts[image])}"
                for letter, one in zip("AB", scores, strict=True)
            ]
            name = truth.paths[image] or truth.ids[image]
            figures.append(
                f"<figure><div>{''.join(picture(truth, one, image) for one in scores)}</div>"
                f"<figcaption>{escape(printable(f'{name}. {told[0]}. {told[1]}.'))}</figcaption></figure>"
            )
        sections.append(
            f'<section><h2>{heading}: {len(images)} images</h2><div class="shown">{"".join(figures)}</div></section>'
        )
    runs = "".join(f"<p>{letter}: {escape(printable(title))}</p>" for letter, title in zip("AB", titles, strict=True))
    body = f"""<header><h1>Comparison of two runs</h1>{runs}</header>
<main>
<section><h2>Classes</h2>{html_table([COLUMNS, *class_rows(truth, *scores)])}</section>
<section><p>Images by their F1 at IoU 0.5, A on the left, B on the right: {LEGEND}</p></section>
{"".join(sections)}
</main>"""
    return fill_page("Comparison of two runs", body)


def _counts(counts: np.ndarray) -> str:
    return "{} right, {} wrong, {} missed".format(*counts.tolist())


def main(options: argparse.Namespace) -> tuple[Scores, Scores]:
    """Compares as the parsed `options` say.

    Raises:
        UserError: a run or the data set cannot be read, or the page cannot be written.
    """
    project = ROOT / "runs" / "compare"
    if options.html is None:
        run_folder(project, "exp")  # refused, if at all, before anything is read
    with explain_resource_errors({}):
        truth = read_truth(options.data, options.split)
        a, b = (score(truth, read_run(path, truth), options.conf_thres) for path in (options.a, options.b))
        for row in [COLUMNS, *class_rows(truth, a, b)]:
            LOGGER.info(ROW % row)
        worse, better = changes(a, b)
        same = len(truth.labels) - len(worse) - len(better)
        LOGGER.info(f"F1 at IoU 0.5: {len(worse)} images are worse in B, {len(better)} better, {same} as good")
        for name, one in (("A", a), ("B", b)):
            LOGGER.info(f"{name}: {_counts(one.counts.sum(0))} above confidence {one.confidence:.3f}")
        html = options.html or increment_path(project / "exp", mkdir=True) / "index.html"
        html.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as temporary:
            content = page(truth, (options.a, options.b), (a, b), options.images)
            temporary.write_text(content, encoding="utf-8")
    LOGGER.info(f"Page: {colorstr('bold', html)}")
    return a, b


def build_parser() -> CommandParser:
    """Declares the options."""
    parser = CommandParser("utils.tools.compare", description="Compare two runs' detections in the same images.")
    add = parser.add_argument
    add(
        "a", type=Path, help="folder of val.py with --save-json, or with --save-txt --save-conf; or COCO results (JSON)"
    )
    add("b", type=Path, help="the same of the other run")
    add("--data", required=True, help="data set YAML, or COCO annotation file, with the labels")
    add("--split", choices=SPLITS, default="val", help="of the YAML")
    add("--conf-thres", type=number(float, 0, 1), help="confidence of the images' F1; default: each run's best")
    add("--images", type=number(int, 0), default=12, help="images to show that got worse, and that got better")
    add("--html", type=Path, help="where the page goes; default: runs/compare/exp/index.html, exp2 and so on")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
