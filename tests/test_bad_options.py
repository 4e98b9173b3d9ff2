"""Values that the commands must refuse, generated for every option of every command.

The parsers are walked, so that a new option is covered at once: numbers by their bounds, choices, switches, options
that lack their value, misspelt names. What a text means no parser knows: `TEXTS` has bad values for each, and a new
text option fails here until it has a row. All commands are otherwise sound, and what they would do next raises
`WorkBegan`: so nothing runs, hangs or listens where a value is taken that should not be.
"""

import _socket
import argparse
import functools
import inspect
import os
import re
import shutil
import signal
import socket
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cv2
import numpy as np
import pytest

import detect
import export
import serve
import train
import val
from models.backends import BACKENDS

SMALL = ("--imgsz", "64", "--device", "cpu")
DATASET = ("--data", "data/tiny.yaml", "--workers", "0", "--noplots")
SOUND = {
    train: ("--cfg", "small.yaml", *DATASET, *SMALL, "--epochs", "1", "--project", "runs"),
    val: ("--weights", "good.pt", *DATASET, *SMALL, "--project", "runs"),
    detect: ("--weights", "good.pt", "--source", "good.jpg", *SMALL, "--project", "runs"),
    export: ("--weights", "good.pt", "--include", "torchscript", *SMALL),
    serve: ("--weights", "good.pt", "--port", "0", *SMALL),
}
WORK = (
    "utils.train.engine.Trainer",
    "models.inference.evaluation.evaluate",
    "models.inference.pipeline.Pipeline.results",
    "models.export.run._export_one",
    "serve.serve_forever",
)
PATIENCE_S = 60
FEWEST_CASES = 2000  # a generator that goes empty shall be noticed


class Case(NamedTuple):
    """A command line that must be refused with `status`, and what the message must name: all words, or the value."""

    script: ModuleType
    arguments: tuple[str, ...]
    words: tuple[str, ...]
    status: int = 2
    value: str = ""
    taken: bool = False  # it is not to be refused

    def __str__(self) -> str:
        return f"{self.script.__name__} {' '.join(self.arguments)[:60]!r}"


# Numbers ------------------------------------------------------------------------------------------------------------

LONGEST_READ = 4300  # digits: Python reads no longer ones as a whole number
LARGEST_INT = 2**31 - 1  # what options without a maximum take: libraries overflow beyond
LARGEST_FLOAT = Decimal("1.7e308")
LONG_NUMBER, LONG_TEXT = "9" * 5000, "n" * 5000
NUMBERS = "nan|inf|-inf|-1|0|1e99|1e999|1.5|0x10|many|| |640px|50%|0,5|640 640|1\0|９９９９９９９９９９９".split("|")
NUMBERS += [LONG_NUMBER, LONG_TEXT]


class Bounds(NamedTuple):
    """What a number option takes."""

    kind: type
    minimum: float | None
    maximum: float | None
    besides: frozenset[str] = frozenset()  # texts that it takes, too


# Types that are not made by `utils.cli.number`: what they take is told here.
OWN_TYPES = {int: Bounds(int, None, None), train._batch_size: Bounds(int, 1, LARGEST_INT, frozenset({"-1"}))}


def bounds_of(action: argparse.Action) -> Bounds:
    """What an option with a type takes, as it was declared."""
    if action.type in OWN_TYPES:
        return OWN_TYPES[action.type]
    declared = inspect.getclosurevars(action.type).nonlocals if inspect.isfunction(action.type) else {}
    assert {"kind", "minimum", "maximum"} <= set(declared), f"{action.dest}: tell in OWN_TYPES what its type takes"
    return Bounds(declared["kind"], declared["minimum"], declared["maximum"])


def number_texts(bounds: Bounds) -> list[str]:
    """`NUMBERS`, and what is just outside the bounds."""
    step = 1 if bounds.kind is int else 0.001
    below = [] if bounds.minimum is None else [str(bounds.minimum - step)]
    above = [] if bounds.maximum is None else [str(bounds.maximum + step)]
    return NUMBERS + below + above


def is_legal(text: str, bounds: Bounds) -> bool:
    """The rule by which values are left out: a decimal number in the option's bounds is to be taken.

    Digits of other scripts are digits, as for Python: `８` typed in full width means 8. -1 means "as much as fits"
    where the option says so, and "never" where its minimum is -1.
    """
    digits = unicodedata.normalize("NFKC", text)
    if digits in bounds.besides:
        return True
    form = r"-?\d+" if bounds.kind is int else r"-?\d+(\.\d+)?(e-?\d+)?"
    if not re.fullmatch(form, digits) or (bounds.kind is int and len(digits) > LONGEST_READ):
        return False
    value = Decimal(digits)
    above = bounds.minimum is None or value >= Decimal(str(bounds.minimum))
    return above and value <= (LARGEST_FLOAT if bounds.maximum is None else Decimal(str(bounds.maximum)))


def typed(flag: str, text: str) -> tuple[str, ...]:
    """An option and its value; joined where the value would pass for another option."""
    return (f"{flag}={text}",) if text.startswith("-") else (flag, text)


# Texts --------------------------------------------------------------------------------------------------------------

FILES = {"cfg": ".yaml", "data": ".yaml", "hyp": ".yaml", "source": ".jpg", "annotations": ".json", "api_keys": ".keys"}
FILES |= dict.fromkeys(("weights", "teacher", "resume"), ".pt")
# {} is the suffix of the files that the option takes; what the names mean is in the fixture `place`
PATHS = (
    "gone{}|'gone{}'|gone|no/gone{}|text.md/gone{}|~nobody-here/gone{}|folder{}|..|text.md| ||a\0b{}|\x1b[2Jgone{}|"
    "broken{}|circle{}|/dev/null|device{}|pipe{}|ftp://host.invalid/gone{}|file:///gone{}|rubbish{}|nothing{}|text{}"
).split("|")
PATHS += ["n" * 300 + "{}", LONG_TEXT + "{}", "n/" * 5000 + "gone{}"]
NO_UTF8 = os.fsdecode(b"\xff\xfe")


def texts(listed: str, *others: str) -> list[str]:
    """Values, and two that every option with a language of its own meets."""
    return [*listed.split("|"), *others, LONG_TEXT, NO_UTF8]


TEXTS = {
    **{name: [path.replace("{}", suffix) for path in [*PATHS, NO_UTF8 + "{}"]] for name, suffix in FILES.items()},
    "device": texts(
        "gpu|97|cuda:97|９７|0,97|0,,1|,|cpu,0|cpu:1|cuda:|cuda:a|-1|0.5|0-3|0 1|0x0|1e0|cpu\0", LONG_NUMBER
    ),
    "count": texts(
        "line|1,2|1,2,3|1,2,3,4,5|a,b,c,d|,,,|1;2;3;4|1 2 3 4|1px,2px,3px,4px|0x1,0,10,10|0,0,10,10\0| |5,5,5,5|screen|"
        "0,0,1,1,2,2|nan,0,10,10|inf,0,10,10|-1,0,10,10|1e99,0,10,10|0,0,10,-10",
        f"{LONG_NUMBER},0,10,10",
        ",".join("5" * 5000),
    ),
    "act": texts(
        "reluu|nn.Nothing|nn.LeakyReLU(0.1|eval(1)|1|nn.Conv2d(1, 2, 3)|os.system('x')|nn.LeakyReLU(a)|relu\0|| "
    ),
    "box_loss": texts("cious|CIoU|ciou,giou|1|ciou\0|| "),
    "chip": texts("3588|rk3588,rk3566|rk 3588|RK3588|rk3588\0|| "),
    "ort_web": texts("gone.tgz|no/gone.tgz|gone.tgz\0|..| "),
    "live_out": texts(
        "live|live.mp4|ftp://127.0.0.1/live|http://|http://127.0.0.1/live|http://127.0.0.1:0/x|http://127.0.0.1:99999/x|"
        "http://[::1/x|:8090|rtsp|//x| |http://127.0.0.1:8090/live"  # of an image
    ),
    "logger": texts("wanbd|tensorboard|MLflow|mlflow,wandb|1|mlflow\0|| "),
    "storage": texts("nonsense|runs.db|sqlite:///runs.db|1| "),  # without --evolve
    "include": texts("onxn|.onnx|onnx,openvino|onnx openvino|1|onnx\0|| "),
    "host": texts(
        "host.invalid|127.0.0.1:80|http://127.0.0.1|127.0.0.1.1|127.0.0.256|::1::1|..|localhost\0|| |[::1]|203.0.113.7",
        "n" * 64,
    ),
    "trusted_hosts": texts("http://cam|cam/x|two names|a,b|| |cam\0|кам", "n" * 254),
    "name": ["..", "../other", "a/../../other", "..\\other", "/tmp/other", "C:other", "a\0b", "n" * 300, LONG_TEXT],
    "project": "text.md|text.md/runs|broken|circle|/dev/null|/dev/null/runs|/proc/runs|a\0b".split("|"),
}
TEXTS["project"] += ["n" * 300, LONG_TEXT]
TEXTS["data"] += ["rubbish.zip", "gone.zip", "folder.zip"]
TEXTS["source"] += [LONG_NUMBER, "9" * 20]  # cameras; below also screens, streams and lists
TEXTS["source"] += (
    "997|９９７|-1|*.nothing|[gone.jpg|rtsp://|http://[::1/a.jpg|screen 0 1|screen 0 0 0 0 0|screen left|screen 5,5|"
    "nothing.txt|rubbish.txt|missing.txt|mixed.txt|folder.txt|empty"
).split("|")
EMPTY_IS_NONE = {  # options that mean "none given" by an empty text
    *(("train", "weights"), ("train", "teacher"), ("train", "device"), ("train", "storage"), ("val", "device")),
    *(("detect", name) for name in ("weights", "data", "device", "live_out")),
    *(("export", "data"), ("serve", "weights"), ("serve", "device"), ("serve", "api_keys"), ("val", "annotations")),
}
FOUND_OUT_AT_WORK = ("rubbish.jpg", "nothing.jpg", "text.jpg", "missing.txt")  # what an image or a list holds
NEEDED = {
    "count": ("--track",),
    "ort_web": ("--include", "web"),
    "chip": ("--include", "rknn"),
}  # options without which this one means nothing


def is_taken(script: ModuleType, dest: str, text: str) -> bool:
    """The rules by which texts are left out."""
    none_given = text == "" and (script.__name__, dest) in EMPTY_IS_NONE
    return none_given or (dest == "source" and text in FOUND_OUT_AT_WORK)


# What is a number or a combination like any other, until a model, a data set or this machine is asked.
HUGE = ("--imgsz", "2147483647")
THREE = ("--imgsz", "64", "64", "64")
LATER = [
    *((script, THREE, "--im 64 64 64") for script in (val, detect, export, serve)),
    *((script, HUGE, "--img 2147483647 16384") for script in (val, detect, export, serve)),
    (train, ("--cfg", ""), "--cfg --weights"),
    (train, ("--weights", "model.onnx"), "--weights .pt"),
    (train, ("--cfg", "yolov5s-slimnek.yaml"), "yolov5s-slimnek.yaml yolov5s-slimneck.yaml"),
    (train, ("--data", "coco129.yaml"), "coco129.yaml coco128.yaml"),
    (train, ("--hyp", "hyp.scratch-lo.yaml"), "hyp.scratch-lo.yaml hyp.scratch-low.yaml"),
    (train, ("--freeze", "99"), "--freeze 99 nothing to train"),  # the model has fewer layers
    (train, ("--batch-size", "-1"), "--batch-size -1 CUDA"),  # what fits, on a CPU
    (train, ("--sync-bn",), "--sync-bn CUDA"),
    (train, ("--quad", "--batch-size", "5"), "--quad --batch-size 5"),  # it takes batches by fours
    (train, ("--amp", "fp16"), "--amp fp16 CUDA"),
    (train, ("--resume", "good.pt"), "good.pt nothing to resume"),  # it has ended
    (train, ("--resume",), "--resume last*.pt"),
    (val, ("--half", "--bf16"), "--half and --bf16"),
    (val, ("--half",), "--half CUDA"),
    (val, ("--weights", "good.pt", "rubbish.onnx"), "--weights rubbish.onnx"),  # ensembles are of checkpoints
    (detect, ("--classes", "4"), "--classes 4 0 to 3"),
    (detect, ("--count", "0,0,9,9"), "--count --track"),
    (detect, ("--track",), "--track"),  # images are not frames
    (detect, ("--visualize", "--tile", "64"), "--visualize --tile"),
    (detect, ("--dnn",), "--dnn good.pt"),  # OpenCV reads ONNX
    (export, ("--half", "--int8"), "--half with --int8"),
    (export, ("--int8", "--include", "onnx"), "--int8 --data"),
    (export, ("--topk-all", "5"), "--topk-all --nms"),
    (export, ("--optimize",), "--optimize"),
]


# The walk -----------------------------------------------------------------------------------------------------------


def actions_of(script: ModuleType) -> list[argparse.Action]:
    return [action for action in script.build_parser()._actions if action.dest != "help"]


def wrong_values(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    """All that an option must refuse, by its kind."""
    flag = action.option_strings[0]
    if action.type:
        yield from wrong_numbers(script, action)
    elif action.choices:
        known = list(map(str, action.choices))
        wrong = ["", "best", ",".join(known[:2]), "1", LONG_TEXT]
        wrong += [spoilt for choice in known for spoilt in (choice.swapcase(), f"{choice}x", f"{choice} ")]
        yield from (Case(script, (flag, text), (flag, *known)) for text in wrong if text not in known)
    elif action.nargs != 0:
        yield from wrong_texts(script, action)
    else:
        yield from (Case(script, (f"{flag}={text}",), (flag,)) for text in ("True", "0", ""))
    if action.nargs not in (0, "?"):
        yield from (Case(script, (flag, *rest), (flag,)) for rest in ((), ("--half",)))  # without its value


def wrong_numbers(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    flag, bounds = action.option_strings[0], bounds_of(action)
    for text in number_texts(bounds):
        if not is_legal(text, bounds):
            yield Case(script, typed(flag, text), (flag,))
            if action.nargs == "+":  # argparse takes -inf for an option of its own
                words = (text if text == "-inf" else flag,)
                yield Case(script, (flag, str(bounds.minimum), text), words)


def wrong_texts(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    flag = action.option_strings[0]
    assert action.dest in TEXTS, f"write a row of bad values for {flag} into TEXTS"
    values = TEXTS[action.dest]
    if action.dest == "weights" and script not in (train, export):
        values = values + [f"{kind}{end}" for end in BACKENDS for kind in ("gone", "pipe")]
    for text in values:
        line, value = (*NEEDED.get(action.dest, ()), *typed(flag, text)), text if action.dest in FILES else ""
        yield Case(script, line, (flag,), 1, value, is_taken(script, action.dest, text))


def misspelt(script: ModuleType, action: argparse.Action) -> Iterator[Case]:
    """The option with two letters exchanged: the message names it and the right one."""
    flag = action.option_strings[0]
    places = [at for at in range(2, len(flag) - 1) if flag[at] != flag[at + 1]]
    wrong = next(flag[:at] + flag[at + 1] + flag[at] + flag[at + 2 :] for at in reversed(places))
    names = [name for other in actions_of(script) for name in other.option_strings]
    # but for what launchers give, and where a short form of another option is left
    if action.help != argparse.SUPPRESS and not any(name.startswith(wrong) for name in names):
        yield Case(script, (wrong,), (wrong, "Did you mean", f"'{flag}'"))


def all_cases() -> dict[str, list[Case]]:
    """The cases by command and option."""
    found = {}
    for script in SOUND:
        for action in actions_of(script):
            found[f"{script.__name__} {action.option_strings[0]}"] = [
                *wrong_values(script, action),
                *misspelt(script, action),
            ]
        later = [(line, tuple(words.split())) for one, line, words in LATER if one is script]
        found[f"{script.__name__} together"] = [Case(script, line, words, 1) for line, words in later]
    return found


CASES = all_cases()
TAKEN = [case for cases in CASES.values() for case in cases if case.taken]


class WorkBegan(BaseException):
    """A command was about to do what it is for."""


class Hangs(BaseException):
    """A command waits for something that never comes."""


@pytest.fixture(scope="module")
def place(tiny_shapes, more_weights, tmp_path_factory) -> Path:
    """A working folder with a sound model, image and data set, and with everything that `PATHS` and others name."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_shapes.parent, place / "data", ignore=shutil.ignore_patterns("*.cache.npz"))
    more_weights(place / "good.pt", dict(enumerate(("circle", "square", "triangle", "star"))))
    cv2.imwrite(str(place / "good.jpg"), np.zeros((64, 64, 3), np.uint8))
    suffixes = {*FILES.values(), ".onnx", ".txt", ".zip"}
    for suffix in suffixes:
        (place / f"rubbish{suffix}").write_bytes(np.random.default_rng(0).bytes(2000))
        (place / f"nothing{suffix}").write_bytes(b"")
        (place / f"text{suffix}").write_text("no such thing")
        (place / f"folder{suffix}").mkdir()
        (place / f"device{suffix}").symlink_to("/dev/null")
    for suffix in suffixes | set(BACKENDS):
        os.mkfifo(place / f"pipe{suffix}")
    for suffix in ("", *suffixes):
        (place / f"broken{suffix}").symlink_to(place / "nowhere" / f"at-all{suffix}")
        (place / f"circle{suffix}").symlink_to(place / f"circle{suffix}")
    small = (train.ROOT / "models" / "yolov5n.yaml").read_text()
    assert "width_multiple: 0.25" in small
    (place / "small.yaml").write_text(small.replace("width_multiple: 0.25", "width_multiple: 0.05"))
    (place / "text.md").write_text("a text")
    (place / "missing.txt").write_text("gone.jpg\n")
    (place / "mixed.txt").write_text("good.jpg\nrtsp://host.invalid/door\n")
    (place / "empty").mkdir()
    (place / "runs").mkdir()
    return place


def things(place: Path) -> set[str]:
    """All there is, but for what is kept of labels that were read."""
    found = {os.path.join(folder, name) for folder, *names in os.walk(place) for name in sum(names, [])}
    found = {path for path in found if not path.endswith(".cache.npz")}
    assert len(found) > 100
    return found


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Keeps the sound model, for it takes most of the time to read it again for each value that is refused after it."""
    from models import backends, load

    keep_backend = functools.cache(lambda files, *others: backends.load_backend(list(files), *others))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "models.inference.pipeline.load_backend", lambda files, *others: keep_backend(tuple(files), *others)
        )
        patch.setattr("models.backends.pytorch.read_weights", functools.cache(load.read_weights))
        yield


@pytest.fixture
def attempt(command, place, monkeypatch):
    """Runs a command in that folder, up to its work; no name is looked up but addresses in numbers."""

    def begin(*_arguments, **_keywords):
        raise WorkBegan

    def give_up(*_arguments):
        raise Hangs

    def look_up(host, port, type=0, **_others):
        return _socket.getaddrinfo(host, port, type=type, flags=socket.AI_NUMERICHOST)

    monkeypatch.chdir(place)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for name in WORK:
        monkeypatch.setattr(name, begin)
    former = signal.signal(signal.SIGALRM, give_up)

    def attempt(script: ModuleType, *arguments: str):
        signal.alarm(PATIENCE_S)
        try:
            return command(script, *SOUND[script], *arguments)
        finally:
            signal.alarm(0)

    yield attempt
    signal.signal(signal.SIGALRM, former)


def problem_of(case: Case, attempt) -> str:
    """What is wrong with how a case is refused; empty where nothing is."""
    try:
        outcome = attempt(case.script, *case.arguments)
        outcome.assert_refused()
    except (WorkBegan, Hangs, AssertionError) as error:
        return f"{type(error).__name__} {error}"
    before, _, message = outcome.said.partition(f"{outcome.prog}: error: ")
    if outcome.status != case.status:
        return f"status {outcome.status}: {message}"
    if not all(word in message for word in case.words) and not (case.value.strip() and case.value in message):
        return f"not named: {message}"
    if case.status == 2 and (before or f"See {outcome.prog} --help" not in message):
        return f"something was done before, or no hint: {outcome.said}"
    return f"a warning: {message}" if "WARNING" in message else ""


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_it_is_refused_in_words_before_any_work(cases, attempt, place):
    before, problems = things(place), {}
    for case in cases:
        if not case.taken:
            problems[str(case)] = problem_of(case, attempt)[:1000]
    wrong = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    assert not wrong, "\n".join(wrong)
    assert things(place) == before, "something was written"


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_texts_that_the_rules_leave_out_are_taken(case, attempt, place):
    """Else a rule could hide a refusal; without weights the newest run's are taken, where there is one."""
    try:
        outcome = attempt(case.script, *case.arguments)
    except WorkBegan:
        return
    finally:
        shutil.rmtree(place / "runs")
        (place / "runs").mkdir()
    outcome.assert_refused("no --weights given and none trained yet")


@pytest.mark.parametrize("script", SOUND, ids=lambda script: script.__name__)
def test_numbers_that_the_rule_leaves_out_are_taken(script):
    taken = 0
    for action in actions_of(script):
        bounds = bounds_of(action) if action.type else None
        edges = bounds and [str(edge) for edge in (bounds.minimum, bounds.maximum) if edge is not None]
        for text in sorted({*number_texts(bounds), *edges}) if bounds else ():
            if is_legal(text, bounds):
                options = script.build_parser().parse_args([*typed(action.option_strings[0], text)])
                value = getattr(options, action.dest)
                number = value[0] if isinstance(value, list) else value
                assert isinstance(number, bounds.kind)
                assert number == pytest.approx(float(unicodedata.normalize("NFKC", text)))
                taken += 1
    assert taken > 10


@pytest.mark.parametrize("script", SOUND, ids=lambda script: script.__name__)
def test_the_commands_are_sound_but_for_the_value(script, attempt, place):
    """What is not spoilt begins its work: no refusal above is of the rest of the line."""
    with pytest.raises(WorkBegan):
        attempt(script)
    shutil.rmtree(place / "runs")
    (place / "runs").mkdir()


def test_every_option_of_every_command_is_covered():
    assert all(CASES.values()), [name for name, cases in CASES.items() if not cases]
    assert sum(map(len, CASES.values())) >= FEWEST_CASES and len(TAKEN) < 30
