"""Which model and which recipe to choose: many trainings, and a table of what they reach and cost.

A cell is a data set, a model, a start and a seed: one command as a user runs it, on one thread, in a process of its
own. Its folder is below --out; what is finished there is not run again, what was interrupted is resumed. The first of
--models is the dense one, which the others inherit from. Cells run in the options' order: data sets, models, starts,
seeds. A model's name may have an option of train.py behind it: yolov5n:box-loss=siou. docs/study.md says what the
tables' columns mean.

    python -m benchmarks.study --data bccd.yaml --models yolov5n yolov5n-slimneck --coco yolov5n.pt --imgsz 320 --jobs 2
    python -m benchmarks.study --models yolov5n yolov5n-slimneck --imgsz 320 --ms      # latency, on an idle machine
    python -m benchmarks.study --tables --doc docs/study.md
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.apart import machine, run
from benchmarks.neck import share_of
from utils.cli import CommandParser, ReportedError, number, run_command, with_hint
from utils.errors import MAX_IMAGE_SIDE_PX, UserError
from utils.files import ROOT, atomic_write, find_file

IMAGES = 12_300  # 60 epochs of BCCD's 205 images
CELL, LOG, FIGURES, LATENCY = "cell.json", "log.txt", "figures.json", "ms.json"
BEGIN, END = "<!-- tables of benchmarks/study.py: begin -->", "<!-- tables of benchmarks/study.py: end -->"
LOG_LINES = 15
POLL_S = 0.2
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "openvino-int8": "OpenVINO int8"}


class Start(NamedTuple):
    """What a model starts from, and by which recipe it is trained.

    Attributes:
        command: of this repository, with the names that `Study.command` fills in.
        share: of the epochs that a training from scratch has; 0 for a command without epochs.
        needs: start of the dense model's cell of the same seed, whose best.pt is `{needed}`.
        slim: is not for the dense model.
    """

    command: str
    share: float = 0
    needs: str = ""
    slim: bool = False


STARTS = {
    "scratch": Start("train.py --cfg {cfg} --recipe auto", 1),
    "scratch-yolov5": Start("train.py --cfg {cfg} --recipe yolov5", 1),
    "coco": Start("train.py --weights {coco} --cfg {cfg} --recipe auto", 1 / 2),
    "coco-no-inherit": Start("train.py --weights {coco} --cfg {cfg} --no-inherit --recipe auto", 1 / 2, slim=True),
    "inherited": Start("-m models.transplant --weights {needed} --cfg {cfg}", needs="coco", slim=True),
    "tuned": Start("train.py --weights {needed} --cfg {cfg} --recipe auto", 1 / 4, needs="coco", slim=True),
    "taught": Start(
        "train.py --weights {needed} --cfg {cfg} --teacher {needed} --recipe auto", 1 / 4, needs="coco", slim=True
    ),
}
DEFAULT_STARTS = ["scratch", "coco", "inherited", "tuned"]
EVERY_START = "--data {data} --imgsz {imgsz} --seed {seed} --workers 0 --project {project} --name {name} --exist-ok"
EVERY_TRAINING = "--epochs {epochs} --noplots"


class Cell(NamedTuple):
    """One command of the study; its text is its folder in --out."""

    data: str
    model: str
    start: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}/{self.model}-{self.start}-{self.seed}"


class Study:
    """The cells that the options mean, and what is done of them.

    Raises:
        UserError: a file that the options name is missing, two have one name, or --out holds cells of other options.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from utils.dataloaders.config import load_spec
        from utils.dataloaders.paths import list_images

        self.out, self.imgsz = options.out.resolve(), options.imgsz
        self.data = by_stem(options.data, "--data")
        self.cfgs = models_of(options.models)
        self.coco = options.coco.resolve()
        self.train_images = {name: len(list_images(load_spec(file).train)) for name, file in self.data.items()}
        self.scratch_epochs = {name: options.images / count for name, count in self.train_images.items()}
        self.dense = next(iter(self.cfgs))
        wanted = [
            Cell(data, model, start, seed)
            for data in self.data
            for model in self.cfgs
            for start in options.starts
            for seed in options.seeds
            if model != self.dense or not STARTS[start].slim
        ]
        self.cells = list(dict.fromkeys(one for cell in wanted for one in (self.needed(cell), cell) if one))
        for cell in self.cells:
            if "{coco}" in STARTS[cell.start].command and not self.coco.is_file():
                raise UserError(f"--coco {options.coco}: no such file. The start '{cell.start}' begins with it.")
            file = self.folder(cell) / CELL
            if file.exists() and (was := read_json(file)["command"]) != self.command(cell):
                raise UserError(f"{file.parent} is of another command: {shlex.join(was)}. Choose another --out.")

    def needed(self, cell: Cell) -> Cell | None:
        """Returns the cell that one starts from."""
        needs = STARTS[cell.start].needs
        return cell._replace(model=self.dense, start=needs) if needs else None

    def folder(self, cell: Cell) -> Path:
        """Returns where a cell's run, log and figures are."""
        return self.out / str(cell)

    def epochs(self, cell: Cell) -> int:
        """Returns how many epochs show a cell's share of --images; 0 for a command without epochs."""
        share = STARTS[cell.start].share
        return share and max(1, round(share * self.scratch_epochs[cell.data]))

    def command(self, cell: Cell) -> list[str]:
        """Returns the arguments of the Python interpreter that make a cell."""
        folder, needed = self.folder(cell), self.needed(cell)
        cfg, option = self.cfgs[cell.model]
        values = {
            **{"cfg": cfg, "data": self.data[cell.data], "coco": self.coco, "imgsz": self.imgsz},
            **{"seed": cell.seed, "epochs": self.epochs(cell), "project": folder.parent, "name": folder.name},
            **{"needed": self.folder(needed) / "weights" / "best.pt" if needed else None},
        }
        training = f"{EVERY_TRAINING} {option}" if values["epochs"] else ""
        words = f"{STARTS[cell.start].command} {EVERY_START} {training}".split()
        return [word.format(**values) for word in words]

    def is_done(self, cell: Cell) -> bool:
        """Says whether a cell is run and measured."""
        return (self.folder(cell) / FIGURES).exists()

    def next_step(self, cell: Cell) -> list[str]:
        """Returns what brings a cell on: its command, that resumed, or its figures' measuring."""
        best, last = (self.folder(cell) / "weights" / name for name in ("best.pt", "last.pt"))
        trained = not self.epochs(cell) and best.exists()
        if last.exists():
            from utils.checkpoint import load_checkpoint

            trained = load_checkpoint(last)["optimizer"] is None
            if not trained:
                return ["train.py", "--resume", str(last)]
        return ["-m", "benchmarks.study", "--measure", str(self.folder(cell))] if trained else self.command(cell)

    def begin(self, cell: Cell, lock: IO[str]) -> subprocess.Popen:
        """Starts the next step of a cell, in a process that holds `lock` too."""
        folder, step = self.folder(cell), self.next_step(cell)
        if "--measure" not in step:
            folder.mkdir(parents=True, exist_ok=True)
            record = {**cell._asdict(), "epochs": self.epochs(cell), "imgsz": self.imgsz}
            record |= {"train_images": self.train_images[cell.data], "data_yaml": str(self.data[cell.data])}
            record |= {"machine": machine(), "seconds": seconds_of(folder), "begun": time.time()}
            write_json(folder / CELL, {**record, "command": self.command(cell)})
        with open(folder / LOG, "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, *step],
                **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": ROOT, "pass_fds": [lock.fileno()]},
                **{"start_new_session": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}},
            )

    def run(self, jobs: int) -> None:
        """Brings all cells to their end, `jobs` at a time.

        Raises:
            UserError: processes of another study, or of one that was killed, still run in the folder.
            ReportedError: cells failed; they are named, and the others are done.
        """
        running: dict[Cell, subprocess.Popen] = {}
        failed: list[Cell] = []
        with locked(self.out) as lock:
            try:
                while True:
                    ready = [cell for cell in self.cells if cell not in (*running, *failed) and self.is_ready(cell)]
                    for cell in ready[: jobs - len(running)]:
                        running[cell] = self.begin(cell, lock)
                    if not running:
                        break
                    time.sleep(POLL_S)
                    for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                        if status := running.pop(cell).returncode:
                            failed.append(cell)
                            log = self.folder(cell) / LOG
                            print(f"{cell} failed with status {status}; {log} ends in:\n{end_of(log)}", flush=True)
                        elif self.is_done(cell):
                            done = sum(map(self.is_done, self.cells))
                            print(f"{time.strftime('%H:%M')} {cell}, {done} of {len(self.cells)} are done", flush=True)
                            write_csv(self.out)
            finally:
                for process in running.values():
                    process.terminate()
                for process in running.values():
                    process.wait()
        if failed:
            left = sum(not self.is_done(cell) for cell in self.cells) - len(failed)
            print(f"failed: {', '.join(map(str, failed))}; {left} that need them were not run")
            raise ReportedError

    def is_ready(self, cell: Cell) -> bool:
        """Says whether a cell is not done, and what it needs is."""
        needed = self.needed(cell)
        return not self.is_done(cell) and (needed is None or self.is_done(needed))


@contextlib.contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
    """Makes a study's folder and locks it; who inherits the file, keeps the lock where this process is killed.

    Raises:
        UserError: it is locked.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"processes of another study, or of a killed one, still run in {out}"
            raise UserError(f"{what}: wait for them, or end them (pgrep -f {out} lists them).") from error
        yield lock


def by_stem(files: Sequence[str], option: str) -> dict[str, Path]:
    """Returns YAML files, whose suffix may be missing, by their names; those of this repository relative to ROOT."""
    names = [name if name.endswith((".yaml", ".yml")) else f"{name}.yaml" for name in files]
    paths = [find_file(name, (".yaml", ".yml"), option).resolve() for name in names]
    found = {path.stem: path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in paths}
    if len(found) < len(files):
        raise UserError(f"{option}: two of the files have one name, by which the study tells them apart. Rename one.")
    return found


def models_of(names: Sequence[str]) -> dict[str, tuple[Path, str]]:
    """Returns models by what they are called: the YAML, and the option of train.py that stood behind a colon."""
    apart = [name.partition(":")[::2] for name in names]
    stated = list(dict.fromkeys(name for name, _ in apart))
    found = dict(zip(stated, by_stem(stated, "--models").items(), strict=True))
    models = {}
    for name, option in apart:
        stem, file = found[name]
        models[f"{stem}:{option}" if option else stem] = (file, f"--{option}" if option else "")
    return models


def seconds_of(folder: Path) -> float:
    """Returns how long a cell's command took to its last checkpoint; after an interruption it goes on from there."""
    if not (folder / CELL).exists():
        return 0
    record = read_json(folder / CELL)
    written = max((file.stat().st_mtime for file in folder.glob("weights/*.pt")), default=0)
    return record["seconds"] + max(0, written - record["begun"])


def end_of(log: Path) -> str:
    """Returns a log's last lines, of a progress bar what stood there last."""
    text = re.sub(r"\x1b\[[0-9;]*[mK]", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.splitlines()]
    return "\n".join([f"    {line}" for line in lines if line.strip()][-LOG_LINES:])


def read_json(file: Path) -> Any:
    """Reads a file that `write_json` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Writes plain data, all or nothing."""
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path) -> None:
    """Measures what a cell's command has made, and writes its figures: after this the cell is done."""
    from models.backends import open_model
    from models.inference.evaluation import make_loader
    from models.inference.predictor import Predictor
    from models.load import load_model
    from models.yolo import count_gflops
    from utils.dataloaders.config import load_spec
    from utils.eval.evaluate import NMS, evaluate

    figures = {**read_json(folder / CELL), "seconds": seconds_of(folder)}
    del figures["begun"]
    spec = load_spec(figures["data_yaml"], need=("val",))
    # A command without epochs chooses none: what it makes is its last.
    files = {"best": "best.pt", "last": "last.pt"} if figures["epochs"] else {"last": "best.pt"}
    for name, file in files.items():
        opened = open_model(folder / "weights" / file)
        loader = make_loader(spec, figures["imgsz"], opened.metadata.stride, workers=0)
        coco = evaluate(Predictor(opened.build(), NMS), loader, names=spec.names, coco_metrics=True).coco
        figures |= {f"map_{name}": coco.ap, f"map50_{name}": coco.ap50}
    model = load_model(folder / "weights" / files["last"])
    figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    figures["gflops"] = count_gflops(model, figures["imgsz"])
    write_json(folder / FIGURES, figures)


def all_figures(out: Path) -> list[dict[str, Any]]:
    """Reads the figures of all cells of a study: by data set, start, and model, the largest first."""
    order = {start: place for place, start in enumerate(STARTS)}
    rows = [read_json(file) for file in out.glob(f"*/*/{FIGURES}")]
    rows.sort(key=lambda row: (row["data"], order[row["start"]], -row["parameters"], row["model"], row["seed"]))
    return rows


def write_csv(out: Path) -> None:
    """Writes a row for each finished cell to results.csv."""
    rows = all_figures(out)
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row if key != "command")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(out / "results.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


COLUMNS = {  # key in figures.json: title, unit, decimals
    "map_last": ("mAP50-95 last", 1, 3),
    "map_best": ("mAP50-95 best", 1, 3),
    "map50_last": ("mAP50 last", 1, 3),
    "map50_best": ("mAP50 best", 1, 3),
    "seconds": ("minutes", 60, 1),
    "parameters": ("M parameters", 1e6, 2),
    "gflops": ("GFLOPs", 1, 2),
}


def tables(out: Path) -> str:
    """Returns the study's tables in Markdown: for each data set and start, and of latency where it was measured."""
    rows = all_figures(out)
    parts = []
    for data, start in dict.fromkeys((row["data"], row["start"]) for row in rows):
        models: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if (row["data"], row["start"]) == (data, start):
                models.setdefault(row["model"], []).append(row)
                about = f"{row['train_images']} training images, {row['epochs'] or 'no'} epochs, {row['imgsz']} px."
        lines = [["model", "seeds", *(title for title, _, _ in COLUMNS.values())]]
        for model, some in models.items():
            cells = [cell_of([row[key] for row in some if row.get(key) is not None], key) for key in COLUMNS]
            lines.append([f"`{model}`", str(len(some)), *cells])
        parts.append(f"### {data}, `{start}`\n\n{about}\n\n{markdown(lines)}")
    if (out / LATENCY).exists():
        parts.append(latency_table(read_json(out / LATENCY)))
    machines = sorted({row["machine"] for row in rows})
    return "\n\n".join([*parts, *(f"Minutes are of: {one}." for one in machines)])


def cell_of(values: Sequence[float], key: str) -> str:
    """Returns the mean over the seeds and, of accuracies, in brackets the largest less the smallest."""
    if not values:
        return "-"
    _, unit, decimals = COLUMNS[key]
    spread = f" ({max(values) - min(values):.{decimals}f})" if key.startswith("map") and len(values) > 1 else ""
    return f"{fmean(values) / unit:.{decimals}f}{spread}"


def latency_table(report: Mapping[str, Any]) -> str:
    """Returns what benchmarks/neck.py measured of the models rewritten for inference: ms, and shares of the first's."""
    places = [place for place, entry in enumerate(report["models"]) if entry["form"] == "rewritten"]
    lines = [["model", *(f"{RUNTIMES[one['runtime']]} {one['version']}" for one in report["runtimes"])]]
    for place in places:
        times = [(one["ms"][place], share_of(one, place, places[0])[0]) for one in report["runtimes"]]
        lines.append([f"`{report['models'][place]['model']}`", *(f"{ms:.1f} ms ({share:.2f})" for ms, share in times)])
    about = f"{report['processor']}, one thread, {report['options']['imgsz']} px, CPU time."
    return f"### Latency\n\n{about}\n\n{markdown(lines)}"


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Returns a table whose first line is its head."""
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *rest])


def write_tables(text: str, doc: Path) -> None:
    """Puts the tables between the two markers of a document.

    Raises:
        UserError: it cannot be read, or does not have both markers.
    """
    try:
        before, begin, rest = doc.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise UserError(f"--doc {doc}: cannot be read ({error.strerror}).") from error
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"--doc {doc}: the tables go between two lines, and they are not there: {BEGIN} and {END}")
    with atomic_write(doc) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """Declares the options."""
    parser = CommandParser("benchmarks.study", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="data set YAMLs")
    add("--models", nargs="+", default=[], help="model YAMLs, .yaml may be left out; the first is the dense one")
    default = f"default: {' '.join(DEFAULT_STARTS)}"
    add("--starts", nargs="+", default=DEFAULT_STARTS, choices=list(STARTS), help=default)
    add("--seeds", nargs="+", type=number(int, 0), default=[0, 1, 2], help="default: 0 1 2")
    add("--imgsz", "--img", "--img-size", type=number(int, 32, MAX_IMAGE_SIDE_PX), default=320, help="image side in px")
    add("--images", type=number(int, 1), default=IMAGES, help="images that a training from scratch sees")
    add("--coco", type=Path, default=Path("yolov5n.pt"), help="checkpoint that the start 'coco' begins with")
    add("--jobs", type=number(int, 1), default=1, help="cells at a time, each on one thread")
    add("--out", type=Path, default=ROOT / "runs" / "study", help="folder of the cells")
    add("--dry-run", action="store_true", help="list the cells, what is done of them, and the commands")
    add("--ms", action="store_true", help="run nothing but benchmarks/neck.py: the models' latency")
    add("--tables", action="store_true", help="run nothing: make the tables of what is done")
    add("--doc", type=Path, help="Markdown file to put the tables into, between its two markers")
    add("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # of the cell whose figures to make
    return parser


def main(options: argparse.Namespace) -> None:
    """Runs the cells, or what else the options say, and prints the tables."""
    if options.measure:
        return measure(options.measure)
    if not options.tables and not (options.models and (options.data or options.ms)):
        raise UserError("--models and --data are needed. See --help.")
    if options.ms:
        line = ["--imgsz", options.imgsz, "--threads", 1, "--clock", "cpu", "--json", options.out / LATENCY]
        line += ["--runtimes", *RUNTIMES, "--models"]
        line += dict.fromkeys(file.stem for file, _ in models_of(options.models).values())
        with locked(options.out):  # trainings would slow it
            print(run(ROOT / "benchmarks" / "neck.py", *line))
    elif not options.tables:
        from utils.eval.coco import require_coco_tools

        require_coco_tools()  # missed before the work, not after it
        study = Study(options)
        if options.dry_run:
            for cell in study.cells:
                state = "done" if study.is_done(cell) else "begun" if (study.folder(cell) / CELL).exists() else "to do"
                print(f"{state:5} {cell}  python {shlex.join(study.command(cell))}")
            return None
        with with_hint(lambda: "Run the same command again to go on."):
            study.run(options.jobs)
    write_csv(options.out)
    text = tables(options.out)
    print(text)
    if options.doc:
        write_tables(text, options.doc)


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
