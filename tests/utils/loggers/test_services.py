"""Experiment trackers: what they share, and each with its real client, offline, in a training of two epochs.

Clients that are not installed (requirements-loggers.txt) are skipped.
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import train
from utils.errors import UserError
from utils.files import ROOT, read_yaml
from utils.loggers import SERVICES, open_loggers
from utils.loggers.base import Service

# Trains in a process of its own, since clients patch what they find there, and refuses to leave the machine.
GUARDED_TRAINING = """
import json, socket, sys
from tests import conftest
attempts = []
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, conftest._local_only(getattr(socket.socket, name), attempts))
socket.getaddrinfo = conftest._local_names_only(socket.getaddrinfo, attempts)
import train
from utils.log import setup_logging
setup_logging()
train.run(**json.loads(sys.argv[1]))
sys.exit(f"reached for the network: {attempts}" if attempts else 0)
"""


class Remembering(Service):
    """A tracker that keeps what it is given."""

    name, package = "remembering", "os"

    def open(self, entry):
        self.sent = []
        return entry or "new", f"entry {entry}"

    def send_figures(self, epoch, figures):
        self.sent.append((epoch, figures))
        raise ConnectionError(f"no line\nat {epoch}")

    def send_image(self, file, epoch):
        self.sent.append((epoch, file.name))

    def send_weights(self, file):
        self.sent.append(file.name)

    def end(self):
        self.sent.append("end")


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setitem(SERVICES, "remembering", Remembering)
    return {"opt": {"project": "runs/mine", "logger": ["remembering", "remembering"]}, "hyp": {"lr0": 0.1}}


def test_a_tracker_is_opened_once_named_by_the_project_and_goes_on_where_it_was(settings, tmp_path):
    *_, first = open_loggers(tmp_path, 0, settings)
    assert (first.project, first.settings["hyp/lr0"]) == ("mine", 0.1) and read_yaml(tmp_path / "loggers.yaml")
    default = {**settings, "opt": {**settings["opt"], "project": str(ROOT / "runs" / "train")}}
    assert Remembering(tmp_path, 0, default).project == "YOLOv5"
    entries = []
    Remembering.open = lambda self, entry, opened=Remembering.open: entries.append(entry) or opened(self, entry)
    for start_epoch in (3, 0):  # resumed, and another run in the folder
        open_loggers(tmp_path, start_epoch, settings)
    assert entries == ["new", None]


def test_what_a_client_raises_in_a_run_is_one_warning(settings, tmp_path, caplog):
    tracker = Remembering(tmp_path, 0, settings)
    for epoch in (0, 1):
        tracker.log_epoch(epoch, {"a": 1.0})
    tracker.log_images([tmp_path / "a.png"], 1)
    tracker.log_weights(tmp_path / "best.pt")
    tracker.close()
    assert tracker.sent == [(0, {"a": 1.0}), (1, {"a": 1.0}), (1, "a.png"), "best.pt", "end"]
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"WARNING: remembering: no line; what it lacks is in {tmp_path}"
    ]


def test_a_client_that_cannot_start_is_refused_and_those_before_it_are_ended(settings, tmp_path, monkeypatch):
    class Broken(Remembering):
        name = "broken"

        def open(self, entry):
            raise PermissionError("no API key.\nSee the manual")

    ended = []
    monkeypatch.setattr(Remembering, "end", lambda self: ended.append(self.name))
    monkeypatch.setitem(SERVICES, "broken", Broken)
    settings["opt"]["logger"].append("broken")
    with pytest.raises(UserError, match="--logger broken: no API key. Leave it out"):
        open_loggers(tmp_path, 0, settings)
    assert ended == ["remembering"]


def test_a_client_that_is_not_installed_is_refused_before_anything_is_read(command, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "comet_ml" else find_spec(name))
    options = "--cfg", "yolov5n.yaml", "--data", "nowhere.yaml", "--project", tmp_path
    told = command(train, *options, "--logger", "comet")
    told.assert_refused("--logger comet needs comet_ml", "pip install comet_ml")
    command(train, *options, "--logger", "wanbd").assert_refused("--logger 'wanbd'", "mlflow", "Did you mean 'wandb'")


def read_mlflow(run: Path) -> tuple[list[float], set[str], dict]:
    """The mAP of each epoch, names of the files, and settings that a client finds."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    entry = read_yaml(run / "loggers.yaml")["mlflow"]
    found = client.get_run(entry)
    assert found.info.status == "FINISHED" and found.info.run_name == run.name
    files = {Path(item.path).name for kind in ("images", "weights") for item in client.list_artifacts(entry, kind)}
    history = client.get_metric_history(entry, "metrics/mAP_0.5:0.95")
    return [metric.value for metric in sorted(history, key=lambda metric: metric.step)], files, found.data.params


def read_wandb(run: Path) -> tuple[list[float], set[str], dict]:
    """The same of the file that an offline run leaves: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # all of a record, or its end
            records.append(Record.FromString(whole))
            whole = b""
        at += 7 + length
        at += 32768 - at % 32768 if 32768 - at % 32768 < 7 else 0
    values, files, config = [], set(), {}
    for record in records:
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        files |= {"best.pt"} if "best.pt" in str(record.artifact) else set()
        for item in record.history.item:
            files.add(item.nested_key[0] if item.nested_key else item.key)
            values += [json.loads(item.value_json)] if item.nested_key[:1] == ["metrics/mAP_0.5:0.95"] else []
    return values, files, config


def read_clearml(run: Path) -> tuple[list[float], set[str], dict]:
    """The same of the archive that an offline session leaves."""
    values, files, settings = [], set(), {}
    for archive in sorted(run.glob("clearml/offline/*.zip"), key=os.path.getmtime):
        with zipfile.ZipFile(archive) as opened:
            events = [event for line in opened.read("metrics.jsonl").splitlines() for event in json.loads(line)]
            files |= {Path(name).name for name in opened.namelist()} | {event.get("variant") for event in events}
            task = json.loads(opened.read("task.json"))
        settings |= {item["name"]: item["value"] for item in task["hyperparams"]["settings"].values()}
        scalars = [event for event in events if event.get("variant") == "mAP_0.5:0.95"]
        values += [event["value"] for event in sorted(scalars, key=lambda event: event["iter"])]
    return values, files, settings


def read_comet(run: Path) -> tuple[list[float], set[str], dict]:
    """The same of the archive that an offline experiment leaves."""
    values, files, settings = [], set(), {}
    for archive in sorted(run.glob("comet/*.zip"), key=os.path.getmtime):
        with zipfile.ZipFile(archive) as opened:
            lines = [json.loads(line)["payload"] for line in opened.read("messages.json").splitlines()]
        for payload in lines:
            metric, parameter = payload.get("metric") or {}, payload.get("param") or {}
            values += [metric["metricValue"]] if metric.get("metricName") == "metrics/mAP_0.5:0.95" else []
            settings |= {parameter["paramName"]: parameter["paramValue"]} if parameter else {}
            about = payload.get("additional_params") or {}
            files |= {about.get("figName"), Path(about.get("fileName") or "").name}
    return values, files, settings


READERS = {"mlflow": read_mlflow, "wandb": read_wandb, "clearml": read_clearml, "comet": read_comet}


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVICES)
def test_a_real_client_holds_a_training_and_stays_off_the_network(name, tiny_shapes, tiny_cfg, tmp_path):
    if importlib.util.find_spec(SERVICES[name].package) is None:
        pytest.skip(f"{SERVICES[name].package} is not installed (requirements-loggers.txt)")
    options = {"cfg": str(tiny_cfg), "data": str(tiny_shapes), "imgsz": 64, "batch_size": 8, "epochs": 2, "workers": 1}
    options |= {"device": "cpu", "amp": "off", "project": str(tmp_path), "logger": [name]}
    own = ("MLFLOW", "WANDB", "CLEARML", "COMET")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    trained = subprocess.run(
        [sys.executable, "-c", GUARDED_TRAINING, json.dumps(options)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert f"{name}: " in trained.stderr + trained.stdout
    run = tmp_path / "exp"
    header, *rows = (line.split(",") for line in (run / "results.csv").read_text().splitlines())
    column = [cell.strip() for cell in header].index("metrics/mAP_0.5:0.95")
    values, files, settings = READERS[name](run)
    assert values == pytest.approx([float(row[column]) for row in rows], rel=1e-3) and len(values) == 2
    assert {"results.png", "best.pt"} <= files
    assert str(settings["opt/epochs"]) == "2" and float(settings["hyp/lr0"]) > 0
