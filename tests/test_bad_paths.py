"""Texts that the commands must refuse: files, folders, devices, sources and other values with a language of their own.

Every text option of every command has a row in `TEXTS`; a new one fails a test until it has one, too. All commands are
otherwise sound, and what they would do next raises `WorkBegan`: so nothing runs, hangs or listens where a value is
taken that should not be. Numbers, choices and switches are in `test_bad_options.py`.
"""

import _socket
import argparse
import functools
import os
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Iterator
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

SCRIPTS = (train, val, detect, export, serve)
FEWEST_CASES = 350  # a generator that goes empty shall be noticed
SMALL = ("--imgsz", "64", "--device", "cpu")
DATASET = ("--data", "data/tiny.yaml", "--workers", "0", "--noplots")
SOUND = {
    train: ("--cfg", "small.yaml", *DATASET, *SMALL, "--epochs", "1"),
    val: ("--weights", "good.pt", *DATASET, *SMALL),
    detect: ("--weights", "good.pt", "--source", "good.jpg", *SMALL),
    export: ("--weights", "good.pt", "--include", "torchscript", *SMALL),
    serve: ("--weights", "good.pt", "--port", "0", *SMALL),
}
PROJECT = ("--project", "runs")
WORK = (
    "utils.train.engine.Trainer",
    "models.inference.evaluation.evaluate",
    "models.inference.pipeline.Pipeline.results",
    "models.export.run._export_one",
    "serve.serve_forever",
)
PATIENCE_S = 60
TOO_LONG, NUMBER_TOO_LONG = "n" * 5000, "9" * 5000
NO_UTF8 = os.fsdecode(b"\xff\xfe")


def as_they_are(texts: str) -> dict[str, str]:
    """Values that need no words, and two that every option with a language of its own meets."""
    return {repr(text): text for text in texts.split("|")} | {"5,000 characters": TOO_LONG, "no UTF-8": NO_UTF8}


FILES = {"weights": ".pt", "cfg": ".yaml", "data": ".yaml", "hyp": ".yaml", "resume": ".pt", "source": ".jpg"}
PATHS = {  # {} is the suffix of the files that the option takes
    "missing": "gone{}",
    "missing, in quotes": "'gone{}'",
    "without a suffix": "gone",
    "in a missing folder": "no/gone{}",
    "below a file": "text.md/gone{}",
    "home of nobody": "~nobody-here/gone{}",
    "a folder": "folder{}",
    "the parent folder": "..",
    "of another kind": "text.md",
    "blank": " ",
    "empty": "",
    "a null byte": "a\0b{}",
    "an escape sequence": "\x1b[2Jgone{}",
    "300 characters": "n" * 300 + "{}",
    "5,000 characters": TOO_LONG + "{}",
    "5,000 folders": "n/" * 5000 + "gone{}",
    "no UTF-8": NO_UTF8 + "{}",
    "a broken link": "broken{}",
    "a link to itself": "circle{}",
    "a device": "/dev/null",
    "a link to a device": "device{}",
    "a pipe": "pipe{}",
    "an address of another kind": "ftp://host.invalid/gone{}",
    "a file's address": "file:///gone{}",
    "holding rubbish": "rubbish{}",
    "holding nothing": "nothing{}",
    "holding text": "text{}",
}
OF_BACKENDS = {f"missing {end}": f"gone{end}" for end in BACKENDS}
OF_BACKENDS |= {f"a pipe {end}": f"pipe{end}" for end in BACKENDS}
DEVICES = as_they_are("gpu|97|cuda:97|９７|0,97|0,,1|,|cpu,0|cpu:1|cuda:|cuda:a|-1|0.5|0-3|0 1|0x0|1e0|cpu\0") | {
    "5,000 digits": NUMBER_TOO_LONG
}
COUNTS = as_they_are("line|1,2|1,2,3|1,2,3,4,5|a,b,c,d|,,,|1;2;3;4|1 2 3 4|1px,2px,3px,4px|0x1,0,10,10|0,0,10,10\0| ")
COUNTS |= as_they_are("5,5,5,5|0,0,1,1,2,2|nan,0,10,10|inf,0,10,10|-1,0,10,10|1e99,0,10,10|0,0,10,-10|screen")
COUNTS |= {"5,000 digits": f"{NUMBER_TOO_LONG},0,10,10", "all of one place": ",".join("5" * 5000)}
INCLUDES = as_they_are("onxn|.onnx|onnx,openvino|onnx openvino|1|onnx\0|| ")
NAMES = {
    "the parent": "..",
    "beside the project": "../other",
    "out by a detour": "a/../../other",
    "with backslashes": "..\\other",
    "absolute": "/tmp/other",
    "a drive": "C:other",
    "a null byte": "a\0b",
    "300 characters": "n" * 300,
    "5,000 characters": TOO_LONG,
}
PROJECTS = {
    "a file": "text.md",
    "below a file": "text.md/runs",
    "a broken link": "broken",
    "a link to itself": "circle",
    "a device": "/dev/null",
    "below a device": "/dev/null/runs",
    "of the kernel": "/proc/runs",
    "a null byte": "a\0b",
    "300 characters": "n" * 300,
    "5,000 characters": TOO_LONG,
}
HOSTS = as_they_are("host.invalid|127.0.0.1:80|http://127.0.0.1|127.0.0.1.1|127.0.0.256|::1::1|..|localhost\0|| |[::1]")
HOSTS |= {"of another machine": "203.0.113.7", "a long label": "n" * 64}
TRUSTED = as_they_are("http://cam|cam/x|two names|a,b|| |cam\0|кам") | {"a name too long": "n" * 254}
SOURCES = {
    "no camera": "997",
    "a camera of 5,000 digits": NUMBER_TOO_LONG,
    "a camera beyond integers": "9" * 20,
    "a camera in full width": "９９７",
    "no camera's number": "-1",
    "a glob of nothing": "*.nothing",
    "an open bracket": "[gone.jpg",
    "a stream without a host": "rtsp://",
    "a host in brackets": "http://[::1/a.jpg",
    "two numbers of the screen": "screen 0 1",
    "a screen without area": "screen 0 0 0 0 0",
    "a screen of words": "screen left",
    "no screen": "screen 5,5",
    "an empty list": "nothing.txt",
    "a list of rubbish": "rubbish.txt",
    "a list of missing files": "missing.txt",
    "a list of all kinds": "mixed.txt",
    "a list that is a folder": "folder.txt",
    "an empty folder": "empty",
}
DATA = {"a zip of rubbish": "rubbish.zip", "a missing zip": "gone.zip", "a folder of that name": "folder.zip"}
TEXTS = {name: {label: text.replace("{}", suffix) for label, text in PATHS.items()} for name, suffix in FILES.items()}
TEXTS["source"] |= SOURCES
TEXTS["data"] |= DATA
TEXTS |= {"device": DEVICES, "count": COUNTS, "include": INCLUDES, "name": NAMES, "project": PROJECTS, "host": HOSTS}
TEXTS["trusted_hosts"] = TRUSTED
EMPTY_IS_NONE = {
    *(("train", "weights"), ("train", "device"), ("val", "device")),
    *(("detect", name) for name in ("weights", "data", "device", "count")),
    *(("export", "data"), ("serve", "weights"), ("serve", "device")),
}
FOUND_OUT_AT_WORK = ("holding rubbish", "holding nothing", "holding text", "a list of missing files")
NEEDED = {"count": ("--track",)}  # options without which this one means nothing


class WorkBegan(BaseException):
    """A command was about to do what it is for."""


class Hangs(BaseException):
    """A command waits for something that never comes."""


class Case(NamedTuple):
    """A value to be refused; `taken` says why it is none, where it is not."""

    script: ModuleType
    option: str
    label: str
    arguments: tuple[str, ...]
    text: str
    taken: str

    def __str__(self) -> str:
        return f"{self.script.__name__} {self.option} {self.label}"


def texts_of(script: ModuleType) -> list[argparse.Action]:
    """The options whose values the parser takes as they are."""
    actions = script.build_parser()._actions
    return [action for action in actions if action.nargs != 0 and not action.type and not action.choices]


def why_taken(script: ModuleType, action: argparse.Action, label: str, text: str) -> str:
    """The rules by which values are left out; empty where none holds."""
    rules = {
        "empty is the default: none given": text == "" and (script.__name__, action.dest) in EMPTY_IS_NONE,
        "what a picture holds is found out at work": action.dest == "source" and label in FOUND_OUT_AT_WORK,
    }
    return next((reason for reason, holds in rules.items() if holds), "")


def cases() -> Iterator[Case]:
    for script in SCRIPTS:
        for action in texts_of(script):
            option, values = action.option_strings[0], TEXTS.get(action.dest, {})
            if action.dest == "weights" and script not in (train, export):
                values = values | OF_BACKENDS
            for label, text in values.items():
                line = (*NEEDED.get(action.dest, ()), *((f"{option}={text}",) if text[:1] == "-" else (option, text)))
                yield Case(script, option, label, line, text, why_taken(script, action, label, text))


ALL = list(cases())
REFUSED = [case for case in ALL if not case.taken]
TAKEN = [case for case in ALL if case.taken]
# What is a number or a combination like any other, until a model, a data set or this machine is asked.
LATER = {
    "three sides, val": (val, ("--imgsz", "64", "64", "64"), ["--imgsz 64 64 64"]),
    "three sides, detect": (detect, ("--imgsz", "64", "64", "64"), ["--img-size 64 64 64"]),
    "three sides, export": (export, ("--imgsz", "64", "64", "64"), ["--imgsz 64 64 64"]),
    "three sides, serve": (serve, ("--imgsz", "64", "64", "64"), ["--img", "64 64 64"]),
    **{
        f"a huge side, {script.__name__}": (script, ("--imgsz", "2147483647"), ["--img", "2147483647", "16384"])
        for script in (val, detect, export, serve)
    },
    "layers beyond the model's": (train, ("--freeze", "99"), ["--freeze 99", "nothing to train"]),
    "a class beyond the model's": (detect, ("--classes", "4"), ["--classes 4", "0 to 3"]),
    "a batch that fits, on a CPU": (train, ("--batch-size", "-1"), ["--batch-size -1", "CUDA"]),
    "a batch of five, by fours": (train, ("--quad", "--batch-size", "5"), ["--quad", "--batch-size 5"]),
    "two precisions": (val, ("--half", "--bf16"), ["--half and --bf16"]),
    "float16 on a CPU": (val, ("--half",), ["--half", "CUDA"]),
    "fp16 on a CPU": (train, ("--amp", "fp16"), ["--amp fp16", "CUDA"]),
    "float16 and int8": (export, ("--half", "--int8"), ["--half with --int8"]),
    "int8 without data": (export, ("--int8", "--include", "onnx"), ["--int8", "--data"]),
    "limits of no NMS": (export, ("--topk-all", "5"), ["--topk-all", "--nms"]),
    "what no mobile phone runs": (export, ("--optimize",), ["--optimize"]),
    "counting without tracks": (detect, ("--count", "0,0,9,9"), ["--count", "--track"]),
    "tracks through pictures": (detect, ("--track",), ["--track"]),
    "maps of tiles": (detect, ("--visualize", "--tile", "64"), ["--visualize", "--tile"]),
    "OpenCV for a checkpoint": (detect, ("--dnn",), ["--dnn", "good.pt"]),
    "an ensemble with what is none": (val, ("--weights", "good.pt", "rubbish.onnx"), ["--weights", "rubbish.onnx"]),
    "a finished run": (train, ("--resume", "good.pt"), ["good.pt", "nothing to resume"]),
    "nothing to resume": (train, ("--resume",), ["--resume", "last*.pt"]),
}


@pytest.fixture(scope="module")
def place(tiny_shapes, more_weights, tmp_path_factory) -> Path:
    """A working folder with a sound model, picture and data set, and with everything that `PATHS` and others name."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_shapes.parent, place / "data", ignore=shutil.ignore_patterns("*.cache.npz"))
    more_weights(place / "good.pt", dict(enumerate(("circle", "square", "triangle", "star"))))
    cv2.imwrite(str(place / "good.jpg"), np.zeros((64, 64, 3), np.uint8))
    rubbish = np.random.default_rng(0).bytes(2000)
    suffixes = {*FILES.values(), ".onnx", ".txt", ".zip"}
    for suffix in suffixes:
        (place / f"rubbish{suffix}").write_bytes(rubbish)
        (place / f"nothing{suffix}").write_bytes(b"")
        (place / f"text{suffix}").write_text("no such thing")
        (place / f"folder{suffix}").mkdir()
        (place / f"device{suffix}").symlink_to("/dev/null")
    for end in suffixes | set(BACKENDS):
        os.mkfifo(place / f"pipe{end}")
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
        patch.setattr("models.inference.evaluation.read_weights", functools.cache(load.read_weights))
        yield


def clear(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


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
    former = signal.signal(signal.SIGALRM, give_up)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for name in WORK:
        monkeypatch.setattr(name, begin)

    def attempt(script: ModuleType, *arguments: str):
        project = PROJECT if script in (train, val, detect) else ()
        signal.alarm(PATIENCE_S)
        try:
            return command(script, *SOUND[script], *project, *arguments)
        finally:
            signal.alarm(0)

    yield attempt
    signal.signal(signal.SIGALRM, former)


def assert_refused(outcome, before: set[str], place: Path, *words: str) -> None:
    assert outcome.status == 1, outcome.said
    outcome.assert_refused(*words)
    assert "WARNING" not in outcome.said.partition(": error: ")[2]
    assert things(place) == before


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_it_is_refused_in_words_before_any_work(case, attempt, place):
    before = things(place)
    outcome = attempt(case.script, *case.arguments)
    assert_refused(outcome, before, place)
    message = outcome.said.partition(": error: ")[2]
    named = case.option in message or (case.option[2:] in FILES and case.text.strip() and case.text in message)
    assert named, message[:500]


@pytest.mark.parametrize(("script", "arguments", "words"), LATER.values(), ids=LATER)
def test_what_only_a_model_or_the_machine_can_refuse(script, arguments, words, attempt, place):
    before = things(place)
    assert_refused(attempt(script, *arguments), before, place, *words)


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_what_the_rules_leave_out_is_taken(case, attempt, place):
    """Else a rule could hide a refusal; without weights the newest run's are taken, where there is one."""
    try:
        outcome = attempt(case.script, *case.arguments)
    except WorkBegan:
        return
    finally:
        clear(place / "runs")
    outcome.assert_refused("no --weights given and none trained yet")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_commands_are_sound_but_for_the_value(script, attempt, place):
    """What is not spoilt begins its work: no refusal above is of the rest of the line."""
    with pytest.raises(WorkBegan):
        attempt(script)
    clear(place / "runs")


def test_every_text_option_is_covered():
    assert len(ALL) >= FEWEST_CASES and len(TAKEN) < len(ALL) / 10, Counter(case.option for case in ALL)
    unknown = {action.dest for script in SCRIPTS for action in texts_of(script)} - set(TEXTS)
    assert not unknown, f"write rows of bad values into TEXTS for {unknown}"
