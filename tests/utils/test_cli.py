"""Exit statuses, options from Python, the bounds of numbers, and a start that imports nothing heavy."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.cli import echo_options, find_weights, number, options_from
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import argparse, sys
from utils.errors import UserError
from utils.cli import ReportedError, run_command
def main(options):
    print("begun")
    {body}
parser = argparse.ArgumentParser(prog="train.py")
parser.add_argument("--epochs", type=int, default=3)
sys.exit(run_command(main, parser))
"""


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("assert options.epochs == 7", 0, ""),
        ("raise UserError('data.yaml: no such file.')", 1, "train.py: error: data.yaml: no such file.\n"),
        ("raise ReportedError()", 1, ""),
        ("raise KeyboardInterrupt('Resume with --resume.')", 130, "\ntrain.py: interrupted. Resume with --resume.\n"),
        ("raise KeyboardInterrupt", 130, "\ntrain.py: interrupted.\n"),
        (
            "import no_such",
            1,
            "train.py: error: needs no_such, which is not installed: pip install -r requirements.txt\n",
        ),
        ("import utils.no_such", 1, None),  # defects of ours keep their traceback
        ("raise ValueError('a defect')", 1, None),
    ],
)
def test_a_mistake_prints_its_message_alone_and_sets_the_status(body, status, message):
    result = run_python(SCRIPT.format(body=body), "--epochs", "7")
    assert (result.returncode, result.stdout) == (status, "begun\n")
    assert result.stderr == message if message is not None else result.stderr.startswith("Traceback")


def test_closed_streams_are_opened_to_nowhere_and_their_numbers_are_no_files(tmp_path):
    """What native code prints to descriptor 2 must not land in the file that was opened first."""
    body = "import os; file = open('f', 'wb', 0); os.write(2, b'native'); sys.stderr.write('a'); file.write(b'own')"
    line = f'exec "{sys.executable}" -c "$0" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line, SCRIPT.format(body=body)], cwd=tmp_path, timeout=60, env=environment)
    assert (done.returncode, (tmp_path / "f").read_bytes()) == (0, b"own")


def test_what_the_scripts_import_first_is_light():
    code = (
        "import sys, utils.cli, utils.log, utils.errors, utils.files\n"
        "print(sorted({'torch', 'cv2', 'matplotlib', 'pandas', 'numpy', 'PIL', 'tqdm', 'yaml'} & set(sys.modules)))"
    )
    assert run_python(code).stdout == "[]\n"


def make_parser():
    parser = argparse.ArgumentParser(prog="val.py")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--conf-thres", type=float, default=0.001)
    return parser


def test_keywords_replace_the_defaults_of_the_parser():
    options = options_from(make_parser(), {"batch_size": 4})
    assert vars(options) == {"batch_size": 4, "conf_thres": 0.001}


@pytest.mark.parametrize(
    ("given", "expected"), [(64, [64]), ((48, 64), [48, 64]), (["64"], [64]), (np.int64(64), [64]), (None, [640])]
)
def test_one_value_will_do_where_the_command_line_takes_several(given, expected):
    parser = make_parser()
    parser.add_argument("--imgsz", nargs="+", type=number(int, 1), default=[640])
    assert options_from(parser, {"imgsz": given}).imgsz == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"weights": Path("best.pt"), "resume": True}, {"weights": ["best.pt"], "resume": True}),
        ({"weights": ("a.pt", Path("b.pt")), "resume": Path("last.pt")}, {"weights": ["a.pt", "b.pt"]}),
        ({"weights": None, "resume": None, "device": None}, {"weights": [], "resume": False, "device": ""}),
        ({"device": 0}, {"device": "0"}),
        ({"device": torch.device("cuda", 1)}, {"device": "cuda:1"}),
        ({"device": {"a": 1}}, {"device": {"a": 1}}),
        ({"half": 1}, {"half": True}),
    ],
)
def test_values_are_what_the_command_line_would_have_brought(given, expected):
    parser = make_parser()
    parser.add_argument("--weights", nargs="+", default=[])
    parser.add_argument("--resume", nargs="?", const=True, default=False)
    parser.add_argument("--device", default="")
    parser.add_argument("--half", action="store_true")
    options = vars(options_from(parser, given))
    assert {name: options[name] for name in expected} == expected
    assert [type(options[name]) for name in expected] == [type(value) for value in expected.values()]
    with pytest.raises(UserError, match=r"--device \[0, 1\]: text or a path is expected"):
        options_from(parser, {"device": [0, 1]})


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"imgsz": 0}, "--imgsz: 0 is below 1."),
        ({"imgsz": (64, "x")}, r"--imgsz x: a number \(int\) is expected."),
        ({"imgsz": 64.5}, r"--imgsz 64.5: a number \(int\) is expected."),
        ({"conf_thres": "high"}, r"--conf-thres high: a number \(float\) is expected."),
        ({"task": "vall"}, "--task 'vall': one of train, val is expected. Did you mean 'val'?"),
    ],
)
def test_values_are_refused_as_on_the_command_line(keyword, message):
    parser = make_parser()
    parser.add_argument("--imgsz", nargs="+", type=number(int, 1), default=[640])
    parser.add_argument("--task", choices=["train", "val"], default="val")
    with pytest.raises(UserError, match=message):
        options_from(parser, keyword)


@pytest.mark.parametrize(
    ("name", "hint"), [("batchsize", ". Did you mean 'batch_size'"), ("_get_kwargs", ""), ("__class__", "")]
)
def test_an_unknown_keyword_is_refused_with_the_nearest_name(name, hint):
    with pytest.raises(UserError, match=f"val.py: unknown option '{name}'{hint}"):
        options_from(make_parser(), {name: 4})


def test_options_are_echoed_in_their_order(caplog):
    with caplog.at_level("INFO", "yolov5"):
        echo_options("val", make_parser().parse_args(["--batch-size", "2"]))
    assert caplog.messages == ["val: batch_size=2, conf_thres=0.001"]


@pytest.mark.parametrize(
    ("kind", "bounds", "text", "expected"),
    [
        (int, (1, None), "1", 1),
        (int, (None, 8), "-8", -8),
        (float, (0, 1), "0", 0.0),
        (float, (0, 1), "1.0", 1.0),
        (float, (), "1e-3", 0.001),
    ],
)
def test_numbers_within_bounds_are_taken(kind, bounds, text, expected):
    value = number(kind, *bounds)(text)
    assert value == expected and type(value) is kind


@pytest.mark.parametrize(
    ("kind", "bounds", "text", "reason"),
    [
        (int, (1, None), "0", "0 is below 1"),
        (float, (0, 1), "1.01", "1.01 is above 1"),
        (float, (0, 1), "nan", "nan is not a finite number"),
        (float, (), "-inf", "-inf is not a finite number"),
        (int, (), "2.5", "invalid int value: '2.5'"),
        (int, (), "many", "invalid int value: 'many'"),
        (float, (), "many", "invalid float value: 'many'"),
    ],
)
def test_other_numbers_are_refused_with_the_reason(capsys, kind, bounds, text, reason):
    parser = argparse.ArgumentParser()
    parser.add_argument("--value", type=number(kind, *bounds))
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([f"--value={text}"])
    assert stopped.value.code == 2 and f"argument --value: {reason}" in capsys.readouterr().err


def test_without_weights_the_newest_best_ones_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.cli.ROOT", tmp_path)
    for none in (None, "", [], [""]):
        with pytest.raises(UserError, match="no --weights given and none trained yet.*run train.py first"):
            find_weights(none)
    for age, name in enumerate(("exp3", "exp", "exp2")):
        weights = tmp_path / "runs" / "train" / name / "weights"
        weights.mkdir(parents=True)
        for file in ("best.pt", "last.pt"):
            (weights / file).touch()
            os.utime(weights / file, (1000 - age, 1000 - age))
    assert find_weights() == [tmp_path / "runs" / "train" / "exp3" / "weights" / "best.pt"]


def test_files_and_folders_are_weights_as_they_are(tmp_path):
    (tmp_path / "a.pt").touch()
    (tmp_path / "b_openvino_model").mkdir()
    files = [tmp_path / "a.pt", tmp_path / "b_openvino_model"]
    assert find_weights([str(files[0]), files[1]]) == files and find_weights(files[0]) == files[:1]


def test_a_missing_weights_file_is_answered_with_the_names_that_are_there(tmp_path):
    for name in ("bccd-best.pt", "best.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"bccd-bets.pt: no such .*Did you mean 'bccd-best.pt'.*There are: .*bccd-best"):
        find_weights(tmp_path / "bccd-bets.pt")
    with pytest.raises(UserError, match=r"bset.onnx: no such file or folder\. Did you mean 'best.onnx'"):
        find_weights([tmp_path / "best.onnx", tmp_path / "bset.onnx"])


def test_weights_that_yolov5_publishes_are_fetched_where_they_are_missing(tmp_path, monkeypatch):
    def offline(name):
        raise UserError(f"{name}: offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.downloads.attempt_download", offline)
    with pytest.raises(UserError, match="yolov5s.pt: offline"):
        find_weights("yolov5s.pt")
    Path("yolov5s.pt").touch()
    assert find_weights("yolov5s.pt") == [Path("yolov5s.pt")]
