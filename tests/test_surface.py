"""The commands' surface: YOLOv5 6.1's options are taken as it took them, all have an effect, Python calls them alike.

The tables are 6.1's command lines. Where a default or a kind differs the second table says why. What each option does
is tested where the scripts are.
"""

import argparse
import ast
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from utils.errors import UserError
from utils.files import ROOT

SCRIPTS = ("train", "val", "detect", "export")
ONE_OF = {
    "flag": [],
    "str": ["x"],
    "int": ["3"],
    "float": ["0.5"],
    "str+": ["x", "y"],
    "int+": ["3", "4"],
    "str?": ["x"],
}
RUNS = Path(ROOT) / "runs"


class Flag(NamedTuple):
    """One option of 6.1: its names, its kind (`+`: one or more values, `?`: none or one), its default."""

    names: str
    kind: str
    default: Any
    const: Any = None  # the value of a `?` option without one

    @property
    def dest(self) -> str:
        return self.names.split()[0].lstrip("-").replace("-", "_")


def switches(names):
    return [Flag(name, "flag", False) for name in names.split()]


FLAGS = {
    "train": [
        Flag("--weights", "str", "yolov5s.pt"),
        Flag("--cfg", "str", ""),
        Flag("--data", "str", "coco128.yaml"),
        Flag("--hyp", "str", str(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")),
        Flag("--epochs", "int", 300),
        Flag("--batch-size", "int", 16),
        Flag("--imgsz --img --img-size", "int", 640),
        Flag("--resume", "str?", False, True),
        Flag("--cache", "str?", None, "ram"),
        Flag("--device", "str", ""),
        Flag("--optimizer", "str", "SGD"),
        Flag("--workers", "int", 8),
        Flag("--project", "str", str(RUNS / "train")),
        Flag("--name", "str", "exp"),
        Flag("--label-smoothing", "float", 0.0),
        Flag("--patience", "int", 100),
        Flag("--freeze", "int+", [0]),
        Flag("--save-period", "int", -1),
        Flag("--local_rank", "int", -1),
        *switches("--rect --nosave --noval --noautoanchor --image-weights --multi-scale --single-cls --sync-bn"),
        *switches("--exist-ok --quad --cos-lr"),
    ],
    "val": [
        Flag("--data", "str", "coco128.yaml"),
        Flag("--weights", "str+", "yolov5s.pt"),
        Flag("--batch-size", "int", 32),
        Flag("--imgsz --img --img-size", "int", 640),
        Flag("--conf-thres", "float", 0.001),
        Flag("--iou-thres", "float", 0.6),
        Flag("--task", "str", "val"),
        Flag("--device", "str", ""),
        Flag("--workers", "int", 8),
        Flag("--project", "str", str(RUNS / "val")),
        Flag("--name", "str", "exp"),
        *switches("--single-cls --augment --verbose --save-txt --save-hybrid --save-conf --save-json --exist-ok"),
        *switches("--half --dnn"),
    ],
    "detect": [
        Flag("--weights", "str+", "yolov5s.pt"),
        Flag("--source", "str", str(ROOT / "data" / "images")),
        Flag("--data", "str", "coco128.yaml"),
        Flag("--imgsz --img --img-size", "int+", [640]),
        Flag("--conf-thres", "float", 0.25),
        Flag("--iou-thres", "float", 0.45),
        Flag("--max-det", "int", 1000),
        Flag("--device", "str", ""),
        Flag("--classes", "int+", None),
        Flag("--project", "str", str(RUNS / "detect")),
        Flag("--name", "str", "exp"),
        Flag("--line-thickness", "int", 3),
        *switches("--view-img --save-txt --save-conf --save-crop --nosave --agnostic-nms --augment --visualize"),
        *switches("--update --exist-ok --hide-labels --hide-conf --half --dnn"),
    ],
    "export": [
        Flag("--data", "str", "coco128.yaml"),
        Flag("--weights", "str+", "yolov5s.pt"),
        Flag("--imgsz --img --img-size", "int+", [640, 640]),
        Flag("--batch-size", "int", 1),
        Flag("--device", "str", "cpu"),
        Flag("--opset", "int", 12),
        Flag("--workspace", "int", 4),
        Flag("--topk-per-class", "int", 100),
        Flag("--topk-all", "int", 100),
        Flag("--iou-thres", "float", 0.45),
        Flag("--conf-thres", "float", 0.25),
        Flag("--include", "str+", ["torchscript", "onnx"]),
        *switches("--half --inplace --train --optimize --int8 --dynamic --simplify --verbose --nms --agnostic-nms"),
    ],
}
# Options that later versions of YOLOv5 added, taken too.
LATER_FLAGS = {
    "train": [Flag("--noplots", "flag", False), Flag("--seed", "int", 0)],
    "val": [Flag("--max-det", "int", 300)],
    "detect": [Flag("--save-csv", "flag", False), Flag("--vid-stride", "int", 1)],
    "export": [],
}
SAMPLES = {  # where not every value will do
    ("train", "batch_size"): ["-1"],
    ("train", "cache"): ["disk"],
    ("train", "optimizer"): ["AdamW"],
    ("val", "task"): ["study"],
    ("export", "opset"): ["17"],
}

NEWEST = "offline nothing is fetched: the newest runs/train/*/weights/best.pt"
DATA_OF_MODEL = "the checkpoint names its data set"
WHETHER_GIVEN = "the same, but whether it was given is known: without --nms it is refused"
DEFAULTS_THAT_DIFFER = {
    ("train", "weights"): ("", "offline nothing is fetched: from scratch"),
    ("train", "label_smoothing"): (None, "0, or what the hyperparameter file says"),
    ("train", "optimizer"): (None, "SGD, or what the hyperparameter file says"),
    ("train", "data"): (str(ROOT / "data" / "shapes.yaml"), "offline nothing is fetched: the embedded data set"),
    ("val", "weights"): ([], NEWEST),
    ("val", "data"): ("", DATA_OF_MODEL),
    ("val", "imgsz"): (None, "640, or the one size that an export takes"),
    ("detect", "weights"): ([], NEWEST),
    ("detect", "data"): ("", "the checkpoint and the exports hold the names"),
    ("detect", "imgsz"): (None, "640, or the one size that an export takes"),
    ("export", "weights"): ([], NEWEST),
    ("export", "data"): ("", "a calibration on 128 images of other things would do harm"),
    ("export", "opset"): (None, "12, or what int8 needs"),
    ("export", "workspace"): (None, "4; without TensorRT it is refused"),
    ("export", "agnostic_nms"): (None, WHETHER_GIVEN),
    ("export", "topk_per_class"): (None, WHETHER_GIVEN),
    ("export", "topk_all"): (None, WHETHER_GIVEN),
    ("export", "iou_thres"): (None, WHETHER_GIVEN),
    ("export", "conf_thres"): (None, WHETHER_GIVEN),
}
KINDS_THAT_DIFFER = {("val", "imgsz"): ("int+", "height and width are taken as well")}
# Options of 6.1 and later that are not taken: the services of other companies, what later versions added.
LEFT_OUT = {
    "train": (
        "--bucket --entity --upload_dataset --bbox_interval --artifact_alias --evolve_population "
        "--resume_evolve".split()
    ),
    "val": [],
    "detect": ["--save-format"],
    "export": "--keras --per-tensor --cache --mlmodel".split(),
}
# 6.1's abbreviations of three letters and more that two options now share.
LOST_ABBREVIATIONS = {"export": {"--int"}}

ALL_FLAGS = [(script, flag) for script in SCRIPTS for flag in (*FLAGS[script], *LATER_FLAGS[script])]
IDS = [f"{script} {flag.names.split()[0]}" for script, flag in ALL_FLAGS]


def parser_of(script):
    return importlib.import_module(script).build_parser()


def dests_of(script):
    return set(vars(parser_of(script).parse_args([])))


def sample_of(script, flag):
    """What follows the option on a command line, and the value that this comes to."""
    kind, _ = KINDS_THAT_DIFFER.get((script, flag.dest), (flag.kind, ""))
    words = SAMPLES.get((script, flag.dest), ONE_OF[kind])
    convert = {"i": int, "f": float, "s": str}[kind[0]] if kind != "flag" else None
    values = [convert(word) for word in words] if convert else [True]
    return words, values if kind.endswith("+") else values[0]


@pytest.mark.parametrize(("script", "flag"), ALL_FLAGS, ids=IDS)
def test_an_option_of_yolov5_is_taken_as_there(script, flag):
    parser = parser_of(script)
    words, value = sample_of(script, flag)
    for name in flag.names.split():
        assert getattr(parser.parse_args([name, *words]), flag.dest) == value
    if flag.kind.endswith("?"):
        assert getattr(parser.parse_args([flag.names]), flag.dest) == flag.const
    default, _ = DEFAULTS_THAT_DIFFER.get((script, flag.dest), (flag.default, ""))
    assert getattr(parser.parse_args([]), flag.dest) == default


def test_the_tables_of_departures_are_up_to_date():
    known = {(script, flag.dest): flag for script, flag in ALL_FLAGS}
    assert set(DEFAULTS_THAT_DIFFER) | set(KINDS_THAT_DIFFER) | set(SAMPLES) <= set(known)
    for place, (default, reason) in DEFAULTS_THAT_DIFFER.items():
        assert default != known[place].default and reason
    for place, (kind, reason) in KINDS_THAT_DIFFER.items():
        assert kind != known[place].kind and reason


@pytest.mark.parametrize(("script", "name"), [(script, name) for script in SCRIPTS for name in LEFT_OUT[script]])
def test_an_option_that_is_left_out_is_refused(script, name, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(script).parse_args([name, "3"])
    assert stop.value.code == 2 and f"unrecognized arguments: {name}" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_abbreviations_of_three_letters_still_mean_the_same(script):
    """As `--batch` does, or `--conf`; new options may not stand in their way."""
    names = {name: flag for flag in FLAGS[script] for name in flag.names.split()}
    parser, lost = parser_of(script), set()
    for name, flag in names.items():
        if flag.dest == "local_rank":  # launchers write it out
            continue
        words, value = sample_of(script, flag)
        for end in range(len("--abc"), len(name)):
            short = name[:end]
            if sum(other.startswith(short) for other in names) > 1 or short in names:
                continue
            try:
                assert getattr(parser.parse_args([short, *words]), flag.dest) == value, short
            except SystemExit:
                lost.add(short)
    assert lost == LOST_ABBREVIATIONS.get(script, set())


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_offer_their_command_line_to_programs(script, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--device", "cpu"])
    options = module.parse_opt()
    assert options.device == "cpu" and set(vars(options)) == dests_of(script) and callable(module.main)


def test_train_passes_over_what_it_does_not_know_where_a_program_asks_for_that(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--mine", "3", "--epochs", "7"])
    assert importlib.import_module("train").parse_opt(known=True).epochs == 7


def value_for(action):
    """A value that the option takes, and that is not its default."""
    if action.nargs == 0:
        return not action.default
    numbers = [] if action.type is None else [number for number in (9, 0.75, 99) if accepted(action.type, number)]
    values = [*(action.choices or ()), *numbers, f"some {action.dest}"]
    return next(value for value in values if value != action.default)


def accepted(convert, number):
    try:
        return convert(str(number)) == number
    except (ValueError, argparse.ArgumentTypeError):
        return False


class Taken(Exception):
    """Ends a call from Python where the work would begin; holds the options that it came to."""


@pytest.mark.parametrize(
    ("script", "entry"),
    [
        ("train", "train.main"),
        ("val", "models.inference.evaluation.run_validation"),
        ("detect", "detect.main"),
        ("export", "export.export"),
    ],
)
def test_python_takes_every_option_by_its_name(script, entry, monkeypatch):
    module = importlib.import_module(script)

    def take(options, *rest, **keywords):
        raise Taken(vars(options))

    monkeypatch.setattr(entry, take)
    given = {action.dest: value_for(action) for action in parser_of(script)._actions if action.dest != "help"}
    with pytest.raises(Taken) as taken:
        module.run(**given)
    found = taken.value.args[0]
    assert set(found) >= set(given)  # what is more is for calls from Python alone
    assert all(found[name] in (value, [value]) for name, value in given.items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_python_is_told_of_a_misspelt_option(script):
    module = importlib.import_module(script)
    with pytest.raises(UserError, match=rf"{script}.py: unknown option 'devise'. Did you mean 'device'"):
        module.run(devise="cpu")


# Where the options of each script are read.
READERS = {
    "train": ["train.py", "utils/train/*.py"],
    "val": ["val.py", "models/inference/evaluation.py", "utils/eval/*.py"],
    "detect": ["detect.py", "models/inference/pipeline.py", "utils/media/writers.py"],
    "export": ["export.py", "models/export/*.py"],
}
NAMED_WITHOUT_USE = {"WRITING", "CHANGEABLE"}  # lists of options for another purpose than to read them


class UseReader(ast.NodeVisitor):
    """Collects which of `names` are read: as `config.name`, or in strings for `getattr`."""

    def __init__(self, names):
        self.names, self.used = names, set()

    def visit_FunctionDef(self, node):
        if node.name != "build_parser":
            self.generic_visit(node)

    def visit_Assign(self, node):
        if not NAMED_WITHOUT_USE & {ast.unparse(target) for target in node.targets}:
            self.generic_visit(node)

    def visit_Attribute(self, node):
        if ast.unparse(node.value).split(".")[-1].lstrip("_") in ("config", "options", "self"):
            self.used.add(node.attr)
        self.generic_visit(node)

    def visit_Constant(self, node):
        words = node.value.split() if isinstance(node.value, str) else []
        if set(words) <= self.names:
            self.used.update(words)


def unused_options(script, names):
    reader = UseReader(names)
    for pattern in READERS[script]:
        for path in sorted(Path(ROOT).glob(pattern)):
            reader.visit(ast.parse(path.read_text(encoding="utf-8")))
    return names - reader.used


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_is_taken_and_then_ignored(script):
    """A guard against the plainest case: an option that no line reads."""
    assert unused_options(script, dests_of(script)) == set()
    assert unused_options(script, {"device", "of_no_use"}) == {"of_no_use"}
