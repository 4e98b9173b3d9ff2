"""The neck for a number of milliseconds: what may stand where, the choice, the errors, the command and its table."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import choose_neck, latency
from models.choose_neck import Option, candidates, fronts, graph_name, neck_rows, row_errors, with_rows
from models.transplant import HEADS, raw_maps
from models.yolo import Model
from tests.models.test_transplant import coarse_images, drawn
from utils.errors import UserError

YAML = {
    **{"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0},
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]],
    "backbone": [[-1, 1, "Conv", [8, 6, 2, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [
        *([-1, 1, "Conv", [16, 1, 1]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]]),
        *([[-1, 3], 1, "Concat", [1]], [-1, 1, "C3", [32, False]], [[7, 4], 1, "Detect", ["nc", "anchors"]]),
    ],
}
NECK = {
    3: ["GSConv 5x5", "GSConv 3x3"],
    4: ["GSConv 5x5", "GSConv 3x3"],
    7: ["VoVGSCSP", "VoVGSCSPC", "C3GS", "C3 half"],
}


def test_candidates_are_those_of_the_neck_and_build():
    necks = neck_rows(YAML)
    assert {row: list(forms) for row, forms in necks.items()} == NECK
    for row, forms in necks.items():
        dense = Model(YAML).model[row]
        for name, changed in forms.items():
            model = Model(with_rows(YAML, {row: changed}))
            assert type(model.model[row]).__name__ == name.split()[0]
            x = torch.rand(1, next(dense.parameters()).shape[1], 8, 8)
            assert model.model[row](x).shape == dense(x).shape
            if name == "C3 half":
                assert 2 * model.model[row].cv1.conv.out_channels == dense.cv1.conv.out_channels
            if "x" in name:
                assert f"{model.model[row].cv2.conv.kernel_size[0]}" == name[-1]
                assert model.model[row].cv1.conv.kernel_size == dense.conv.kernel_size


@pytest.mark.parametrize("row", [[-1, 1, "Conv", [16, 3, 1, None, 2]], [-1, 2, "Conv", [16]], [-1, 1, "SPPF", [16, 5]]])
def test_other_rows_stay(row):
    assert not candidates(row)
    assert candidates([-1, 1, "Conv", [16]])["GSConv 3x3"] == [-1, 1, "GSConv", [16, 1, 1, 1, True, 3]]
    assert candidates([6, 3, "C3", [16]])["C3 half"] == [6, 3, "C3", [16, True, 1, 0.25]]


def test_no_neck_beats_one_of_the_front():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(4):
        costs = torch.rand(3, 2, generator=generator).tolist()
        rows.append(
            [Option("dense", 0.0, 0.0), *(Option(f"{n}", 0.2 - ms, error) for n, (ms, error) in enumerate(costs))]
        )
    necks = [
        (sum(one.ms for one in neck), sum(one.error for one in neck), tuple(one.name for one in neck))
        for neck in itertools.product(*rows)
    ]
    found = fronts(rows)
    assert found[0] == (0.0, 0.0, ("dense",) * 4) and len(found) > 5
    assert {names for *_, names in found} == {
        names
        for ms, error, names in necks
        if not any((a <= ms and b <= error) and (a, b) != (ms, error) for a, b, _ in necks)
    }
    assert [ms for ms, *_ in found] == sorted((ms for ms, *_ in found), reverse=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, write_checkpoint, tiny_shapes):
    """A checkpoint of the YAML above that names its data."""
    return write_checkpoint(YAML, sure=True, data=str(tiny_shapes), names=dict(enumerate("abc")))


def test_a_row_that_is_fitted_has_a_small_error_and_the_teacher_stays(monkeypatch):
    teacher, images = drawn({**YAML, "nc": 4}, 0, lively=True), coarse_images()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    errors = row_errors(teacher, images, 0, None)
    assert list(errors) == [graph_name(row, name) for row, names in NECK.items() for name in names]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    only = {7: neck_rows(YAML)[7]}
    monkeypatch.setattr(choose_neck, "neck_rows", lambda yaml: only)
    again = row_errors(teacher, images, 0, None)
    assert again == {name: errors[name] for name in again} and len(again) == 4
    monkeypatch.setattr(choose_neck, "FITS", {pair: lambda *_: torch.arange(32) for pair in choose_neck.FITS})
    unfitted = row_errors(teacher, images, 0, None)
    assert all(0 < 20 * errors[name] < unfitted[name] for name in unfitted)


def test_the_error_of_a_row_is_that_of_the_whole_model_with_it(monkeypatch):
    """A fit says where each channel of the dense row went: here all lie the other way round, and nothing is fitted."""
    row, teacher, images = 3, drawn({**YAML, "nc": 4}, 0, lively=True), coarse_images(8)
    changed = neck_rows(YAML)[row]["GSConv 3x3"]
    fit = lambda block, twin, *_: torch.arange(twin.conv.out_channels).flip(0)  # noqa: E731
    monkeypatch.setattr(choose_neck, "FITS", dict.fromkeys(choose_neck.FITS, fit))
    monkeypatch.setattr(choose_neck, "neck_rows", lambda yaml: {row: {"GSConv 3x3": changed}})
    errors = row_errors(teacher, images, 0, None)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(with_rows({**YAML, "nc": 4}, {row: changed})).eval()
    others = {name: value for name, value in teacher.state_dict().items() if not name.startswith(f"model.{row}.")}
    model.load_state_dict(others, strict=False)
    model.model[row].register_forward_hook(lambda module, inputs, output: output.flip(1))
    features = {}
    for one in (teacher, model):
        one.head.register_forward_pre_hook(lambda head, inputs: features.update({head: inputs[0]}))
    off, total = torch.autocast("cpu", enabled=False), 0.0
    with torch.no_grad():
        for batch in images[6:]:  # the last quarter
            for one in (teacher, model):
                one(batch.float() / 255)
            given, expected = (raw_maps(one.head, features[one.head], off) for one in (model, teacher))
            loss = HEADS[type(teacher.head)].logit_loss
            total += sum(loss(*pair, teacher.head).item() for pair in zip(given, expected, strict=True))
    assert errors == {"row 3: GSConv 3x3": pytest.approx(total / 2, rel=1e-4)}


def table_of(rows, dense_ms=10.0):
    """A table as of a device, in which every change of a row saves what is said."""
    saved = {
        graph_name(row, name): ms for row, names in NECK.items() for name, ms in zip(names, rows[row], strict=True)
    }
    graphs = [
        {"name": name, "ms": dense_ms - ms, "difference_ms": -ms, "range_ms": [-ms - 0.3, 0.2 - ms]}
        for name, ms in {"dense": 0.0, **saved}.items()
    ]
    about = {"runtime": "onnxruntime", "version": "1", "int8": True, "processor": "a board", "threads": 4}
    return {**about, "rows": YAML["backbone"] + YAML["head"], "shape_hw": [64, 64], "nc": 3, "graphs": graphs}


def run(*words):
    return choose_neck.main(choose_neck.build_parser().parse_args(list(map(str, words))))


@pytest.fixture
def given(dense, tmp_path):
    """Options of a run in whose table the 3x3s of rows 3 and 4 and C3GS alone are faster in every load."""
    (table := tmp_path / "table.json").write_text(
        json.dumps(table_of({3: [-1, 0.5], 4: [0.19, 0.25], 7: [-1, -1, 1.0, 0.1]}))
    )
    more = ["--imgsz", 64, "--workers", 0, "--images", 64, "--project", tmp_path / "runs", "--table"]
    return ["--weights", dense, *more, table]


def test_the_same_table_gives_the_same_neck_which_builds_and_is_as_fast_as_asked(given, tmp_path, monkeypatch):
    file = run(*given, "--ratio", 0.83)
    model, content = Model(file), json.loads(file.with_suffix(".json").read_text())
    assert [type(model.model[row]).__name__ for row in NECK] == ["GSConv", "GSConv", "C3GS"]
    assert model.model[3].cv2.conv.kernel_size == (3, 3)
    assert content["chosen"]["ms"] == pytest.approx(8.25) and content["graphs"][2]["difference_ms"] == -0.5
    assert model.yaml["backbone"] == YAML["backbone"] and model.yaml["anchors"] == YAML["anchors"]
    assert "0.825 of the dense neck's time at 64 x 64 px" in file.read_text()
    monkeypatch.setattr(choose_neck, "row_errors", None)  # its own table has the errors
    again = run(*given[:-1], file.with_suffix(".json"), "--ms", 8.3)
    assert again != file and again.read_text() == file.read_text()
    cheap = run(*given[:-1], file.with_suffix(".json"), "--ratio", 0.95)
    assert sum(type(Model(cheap).model[row]).__name__ not in ("Conv", "C3") for row in NECK) == 1
    monkeypatch.setattr(choose_neck, "row_errors", lambda *_: dict.fromkeys(content["errors"], 7.0))
    other = run(*given[:-1], file.with_suffix(".json"), "--ratio", 0.95, "--seed", 1).with_suffix(".json")
    assert set(json.loads(other.read_text())["errors"].values()) == {7.0}, "of another seed"


def test_a_row_may_be_what_was_faster_in_every_load():
    table = table_of({3: [-1, 0.5], 4: [0.19, 0.21], 7: [-1, -0.1, 1.0, 0.1]})
    errors = dict.fromkeys([one["name"] for one in table["graphs"]], 1.0)
    found = choose_neck.options_of(table, errors, neck_rows(YAML))
    dense = Option("dense", 0.0, 0.0)
    assert found == [
        *([dense, Option("GSConv 3x3", -0.5, 1.0)], [dense, Option("GSConv 3x3", -0.21, 1.0)]),
        [dense, Option("C3GS", -1.0, 1.0)],
    ]


def test_a_neck_that_there_is_not_is_told(given):
    with pytest.raises(UserError, match=r"no neck takes 8.00 ms: the fastest takes 8.25, the dense one 10.00"):
        run(*given, "--ratio", 0.8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.update(shape_hw=[64, 96]), "another model or image size \\(shape_hw differ\\)"),
        (lambda table: table["graphs"][1].pop("range_ms"), "is no table"),
        (lambda table: table.clear(), "is no table"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, words, given):
    table = json.loads(given[-1].read_text())
    change(table)
    given[-1].write_text(json.dumps(table))
    with pytest.raises(UserError, match=words):
        run(*given, "--ratio", 0.95)


def test_how_fast_must_be_said_once(given):
    for more in ([], ["--ms", 3, "--ratio", 0.9]):
        with pytest.raises(UserError, match="either --ms or --ratio"):
            run(*given, *more)


def test_times_are_medians_of_loads_in_which_the_dense_graph_has_copies(tmp_path, monkeypatch):
    """Graphs a to c take 10, 8 and 12 ms; in the fifth of six loads c is lucky, in each one copy of a is not."""
    now, loaded = [0.0], []

    def load(file, image, threads):
        name, number = Path(file).name, len(loaded)
        loaded.append((name, threads, image.shape))
        copies = [one for one, *_ in loaded[number // 5 * 5 :]].count("a")
        ms = {"a": 10.0 + 3 * (copies == 2), "b": 8.0, "c": 6.0 if number // 5 == 4 else 12.0}[name]
        return lambda: now.__setitem__(0, now[0] + ms / 1000)

    monkeypatch.setattr(latency, "RUNTIMES", {"numpy": load})
    monkeypatch.setattr(latency, "CLOCKS", {"cpu": lambda: now[0]})
    graphs = [{"name": name, "file": name} for name in "abc"]
    about = {"runtime": "numpy", "shape_hw": [32, 64], "channels": 3, "graphs": graphs}
    (tmp_path / latency.GRAPHS).write_text(json.dumps(about))
    found = latency.measure(tmp_path, threads=2, rounds=13, clock="cpu")
    assert [sorted(name for name, *_ in loaded[place : place + 5]) for place in range(0, 30, 5)] == [list("aaabc")] * 6
    assert len({tuple(name for name, *_ in loaded[place : place + 5]) for place in range(0, 30, 5)}) > 1
    assert {one[1:] for one in loaded} == {(2, (1, 3, 32, 64))}
    assert [[one["ms"], one["difference_ms"], one["range_ms"]] for one in found["graphs"]] == [
        *([11.0, 0.0, [0.0, 0.0]], [8.0, -3.0, [-3.0, -3.0]], [12.0, 1.0, [-5.0, 1.0]])
    ]


def test_graphs_are_measured_where_nothing_of_this_program_is(dense, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    few = {7: {"C3GS": candidates(YAML["head"][4])["C3GS"]}}
    monkeypatch.setattr(choose_neck, "neck_rows", lambda yaml: few)
    folder = tmp_path / "graphs"
    assert run("--weights", dense, "--imgsz", 64, 96, "--int8", "--graphs", folder) is None
    assert len(list(folder.glob("*int8.onnx"))) == 2
    line = [sys.executable, "-I", "latency.py", "--threads", "1", "--rounds", "7", "--clock", "cpu"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    table = json.loads((folder / latency.TABLE).read_text())
    assert [one["name"] for one in table["graphs"]] == ["dense", "row 7: C3GS"]
    assert table["graphs"][0]["difference_ms"] == 0 and all(one["ms"] > 0 for one in table["graphs"])
    assert table["int8"] and (table["threads"], table["rounds"]) == (1, 7)
    more = ["--imgsz", 64, 96, "--workers", 0, "--images", 64, "--project", tmp_path / "runs", "--ratio", 1]
    assert run("--weights", dense, *more, "--table", folder / latency.TABLE)
    content = json.loads(run("--weights", dense, *more, "--rounds", 6).with_suffix(".json").read_text())
    assert [one["file"] for one in content["graphs"]] == ["0.onnx", "1.onnx"] and content["clock"] == "wall"
    assert ("C3GS" in content["chosen"]["rows"]) == ("measured_share" in content["chosen"])
