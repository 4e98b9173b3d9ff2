"""The hyperparameter search: its space, what it tries, writes and refuses, interruptions, one study for several."""

import importlib.util
import math
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from utils.callbacks import Callbacks
from utils.cli import options_from
from utils.dataloaders import images_cache
from utils.errors import UserError
from utils.files import ROOT
from utils.train import evolve, prepare
from utils.train.engine import NotFinite
from utils.train.evolve import GENES, Gene, masked, search_space
from utils.train.hyp import Hyp
from utils.train.prepare import TrainConfig

needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="no optuna here")
HYP = Hyp.from_yaml(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")
SPACE = {name: GENES[name] for name in ("lr0", "momentum", "mixup")}


class Search:
    """A search whose trainings are a formula, in a folder; `tried` are the hyperparameters of its trainings."""

    def __init__(self, folder: Path, epochs: int = 4) -> None:
        self.folder, self.epochs, self.tried, self.callbacks = folder, epochs, [], Callbacks()
        folder.mkdir(exist_ok=True)

    def train(self, hyp: Hyp):
        """Is best at lr0 of 0.03; later epochs are better."""
        self.tried.append(hyp)
        for epoch in range(self.epochs):
            score = math.exp(-abs(math.log10(hyp.lr0 / 0.03))) * (epoch + 1) / self.epochs
            figures = {"train/box_loss": 9.0, "metrics/precision": 0.1, "metrics/recall": 0.2}
            figures |= {"metrics/mAP_0.5": score, "metrics/mAP_0.5:0.95": score, "val/box_loss": 3.0, "x/lr0": 0.5}
            self.callbacks.trainer = SimpleNamespace(figures=figures)
            self.callbacks.run("on_fit_epoch_end", [], epoch, score, score)
        return SimpleNamespace(fitness=score)

    def run(self, trials: int = 12, hyp: Hyp = HYP, space: dict[str, Gene] = SPACE, **options):
        options = {"epochs": self.epochs, "noplots": True, **options, "evolve": trials}
        config = TrainConfig(**vars(options_from(train.build_parser(), options)), save_dir=str(self.folder))
        self.callbacks = Callbacks()
        return evolve.evolve(hyp, config, space, "digest", self.train, self.callbacks)

    @property
    def rows(self) -> list[dict[str, float]]:
        header, *rows = (line.split(",") for line in (self.folder / "evolve.csv").read_text().splitlines())
        return [dict(zip(map(str.strip, header), map(float, row), strict=True)) for row in rows]


def test_what_has_no_effect_on_a_run_is_not_searched():
    dense, free = (SimpleNamespace(loss=loss, has_anchors=loss == "yolov5") for loss in ("yolov5", "tal"))
    from models.heads import Detect, DetectAF

    dense.loss, free.loss = Detect.loss, DetectAF.loss
    for head, inside, outside in ((dense, "obj anchor_t anchors box", "af_box"), (free, "af_dfl lr0", "obj anchors")):
        space = search_space(HYP, head, noautoanchor=False)
        assert set(inside.split()) <= space.keys() and not set(outside.split()) & space.keys()
    space = search_space(replace(HYP, warmup_ratio=0.1), dense, noautoanchor=True)
    assert "anchors" not in space and "warmup_epochs" not in space
    assert not {"iou_t", "perspective", "fliplr", "fl_gamma"} & GENES.keys()  # YOLOv5 gives them no gain


def test_mutations_stay_within_the_limits_and_are_those_of_the_seed():
    space = {**SPACE, "warmup_epochs": Gene(0.0, 2.0), "anchors": GENES["anchors"]}
    hyp = replace(HYP, anchors=3.0)
    made = [evolve._mutation(hyp, space, 5, number) for number in range(10)]
    assert made[0] == {"lr0": 0.01, "momentum": 0.937, "mixup": 0.0, "warmup_epochs": 2.0, "anchors": 3}
    assert len({tuple(values.values()) for values in made}) == 10
    assert all(gene.low <= values[name] <= gene.high for values in made for name, gene in space.items())
    assert made == [evolve._mutation(hyp, space, 5, number) for number in range(10)]
    assert made[1:] != [evolve._mutation(hyp, space, 6, number) for number in range(1, 10)]


@needs_optuna
def test_a_search_starts_from_what_it_is_given_gets_better_and_writes_yolov5s_files(tmp_path):
    search = Search(tmp_path)
    best = search.run(trials=18)
    assert search.tried[0] == HYP and len(search.tried) == 18
    assert all(0.003 < hyp.lr0 < 0.03 for hyp in search.tried[1:10])  # mutations
    rows = search.rows
    scores = [row["metrics/mAP_0.5"] for row in rows]
    assert (
        list(rows[0])[:6]
        == "metrics/precision metrics/recall metrics/mAP_0.5 metrics/mAP_0.5:0.95 val/box_loss lr0".split()
    )
    assert scores[0] == pytest.approx(math.exp(-math.log10(3)), rel=1e-4) and max(scores) > scores[0] + 0.1
    assert len(rows) < 18  # pruned ones have no row
    text = (tmp_path / "hyp_evolve.yaml").read_text().splitlines()
    assert text[1:3] == [f"# Best generation: {scores.index(max(scores))}", f"# Last generation: {len(rows) - 1}"]
    assert Hyp.from_yaml(tmp_path / "hyp_evolve.yaml") == best and best.lr0 != HYP.lr0


@needs_optuna
def test_the_same_seed_tries_the_same(tmp_path, monkeypatch):
    import optuna

    seeds, sampler = [], optuna.samplers.TPESampler

    def with_seed(seed: int | None = None, **options):
        seeds.append(seed)
        return sampler(seed=seed, **options)

    monkeypatch.setattr(optuna.samplers, "TPESampler", with_seed)
    searches = [Search(tmp_path / str(number), epochs=1) for number in range(3)]
    for search, seed, trials in zip(searches, (0, 0, 1), (12, 12, 2), strict=True):
        search.run(trials, seed=seed)
    assert searches[0].tried == searches[1].tried != searches[2].tried
    seeds = [seed for seed in seeds if seed is not None]  # one without comes with opening a study
    assert seeds[:12] == seeds[12:24] and len(set(seeds)) == 14  # each trial draws anew


@needs_optuna
@pytest.mark.parametrize("at", [0, 10])
def test_an_interrupted_search_repeats_the_trial_and_goes_on_as_if_it_were_not(at, tmp_path):
    whole, search = (Search(tmp_path / name, epochs=1) for name in ("whole", "search"))
    whole.run(noval=True)

    def interrupt(hook, *arguments):
        if len(search.tried) == at + 1:
            raise KeyboardInterrupt
        Callbacks.run(search.callbacks, hook, *arguments)

    train_before = search.train
    search.train = lambda hyp: setattr(search.callbacks, "run", interrupt) or train_before(hyp)
    with pytest.raises(KeyboardInterrupt):
        search.run(noval=True)
    assert len(search.rows if at else []) == at
    search.train = train_before
    search.run(noval=True, resume=True)
    tried = search.tried[:at] + search.tried[at + 1 :]
    assert search.tried[at] in tried[at:] and len(tried) == 12
    assert sorted(map(repr, tried[:10])) == sorted(map(repr, whole.tried[:10]))
    if at >= 10:  # what TPE is told is the same in the same order
        assert tried == whole.tried


@needs_optuna
def test_a_trial_that_was_killed_before_its_first_sign_of_life_is_repeated(tmp_path, monkeypatch):
    import optuna

    monkeypatch.setattr(evolve, "GRACE_S", 1)
    monkeypatch.setattr(evolve, "WAIT_S", 0.2)
    monkeypatch.setattr(evolve, "STARTUP_TRIALS", 4)
    whole, search = (Search(tmp_path / name, epochs=1) for name in ("whole", "search"))
    whole.run(trials=4)
    search.run(trials=3)
    optuna.load_study(study_name="evolve", storage=f"sqlite:///{tmp_path}/search/evolve.db").ask()
    search.run(trials=4)
    assert search.tried == whole.tried


@needs_optuna
def test_a_trial_whose_loss_is_not_finite_ends_alone_and_other_mistakes_end_the_search(tmp_path, caplog):
    search = Search(tmp_path)
    train_before, raised = search.train, [NotFinite("box is nan"), UserError("9.jpg: damaged")]
    search.train = lambda hyp: train_before(hyp) if len(search.tried) % 2 == 0 or not raised else fail()

    def fail():
        search.tried.append(None)
        raise raised.pop(0)

    with pytest.raises(UserError, match=r"9.jpg: damaged"):
        search.run()
    assert "box is nan" in caplog.text and len(search.tried) == 4 and len(search.rows) == 2
    search.run(trials=5)
    assert len(search.tried) == 6 and len(search.rows) == 4  # five trials, of which one was pruned


@needs_optuna
def test_a_callback_stops_a_search(tmp_path):
    search = Search(tmp_path)

    def stopped(hyp):
        search.tried.append(hyp)
        search.callbacks.stop_training = True

    search.train = stopped
    assert search.run() is None and len(search.tried) == 1


@needs_optuna
def test_a_search_to_resume_must_be_there(command, tmp_path):
    options = "--cfg", "yolov5n.yaml", "--data", "nowhere.yaml", "--project", tmp_path, "--device", "cpu"
    command(train, *options, "--evolve", "3", "--resume").assert_refused("no search in", str(tmp_path / "exp"))


@needs_optuna
def test_another_search_in_the_same_study_is_refused(tmp_path):
    Search(tmp_path).run(trials=1)
    with pytest.raises(UserError, match=r"begun with other hyp, imgsz \(.* Repeat its options, or begin another"):
        Search(tmp_path).run(trials=2, hyp=replace(HYP, lr0=0.02), imgsz=320)


@needs_optuna
def test_a_storage_that_cannot_be_used_is_told_without_its_password(tmp_path):
    for url, words in (
        ("nonsense", "Could not parse"),
        ("nodb://me:secret@host/name", "nodb://me:\\*\\*\\*@host/name: "),
    ):
        with pytest.raises(UserError, match=words) as caught:
            Search(tmp_path).run(storage=url)
        assert "secret" not in str(caught.value)
    assert masked("sqlite:///a:b@c.db") == "sqlite:///a:b@c.db"


def test_what_does_not_go_with_a_search_is_refused(command, tmp_path, monkeypatch):
    options = "--cfg", "yolov5n.yaml", "--data", "nowhere.yaml", "--project", tmp_path, "--device", "cpu"
    for more, words in (
        (["--storage", "sqlite:///a.db"], ["add --evolve"]),
        (["--evolve", "--resume", "last.pt"], ["--resume alone"]),
        (["--evolve", "0"], ["below 1"]),
    ):
        command(train, *options, *more).assert_refused(*words)
    monkeypatch.setitem(sys.modules, "optuna", None)
    told = command(train, "--cfg", "yolov5n.yaml", "--data", "nowhere.yaml", "--project", tmp_path, "--evolve")
    told.assert_refused("needs Optuna, which is not installed: pip install optuna")


@needs_optuna
def test_a_real_search_reads_the_data_once_and_leaves_no_checkpoints(tiny_shapes, tiny_cfg, tmp_path, monkeypatch):
    read, loaded = [], []
    read_file, load = images_cache.ImageFiles.read, prepare.load_labels
    monkeypatch.setattr(images_cache.ImageFiles, "read", lambda self, index: read.append(0) or read_file(self, index))
    monkeypatch.setattr(prepare, "load_labels", lambda *args, **named: loaded.append(0) or load(*args, **named))
    options = train.run(**tiny_options(tiny_shapes, tiny_cfg, tmp_path), epochs=2, workers=0, evolve=2)
    assert (len(read), len(loaded)) == (32, 2)
    folder = tmp_path / "exp"
    assert sorted(path.name for path in folder.iterdir()) == [
        "evolve.csv",
        "evolve.db",
        "evolve.png",
        "hyp_evolve.yaml",
    ]
    rows = Search(folder).rows
    assert len(rows) == 2 and rows[0]["warmup_ratio"] == 0.05  # --recipe auto holds
    assert options.result == Hyp.from_yaml(folder / "hyp_evolve.yaml")
    assert options.cache == "ram"


def tiny_options(data: Path, cfg: Path, project: Path) -> dict[str, object]:
    options = {"data": str(data), "cfg": str(cfg), "imgsz": 64, "batch_size": 8, "amp": "off", "device": "cpu"}
    return {**options, "project": str(project)}


def start(options: dict[str, object]) -> subprocess.Popen:
    arguments = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@needs_optuna
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_search_goes_on(tiny_shapes, tiny_cfg, tmp_path, monkeypatch):
    options = tiny_options(tiny_shapes, tiny_cfg, tmp_path)
    process = start({**options, "epochs": 1, "workers": 0, "evolve": 300})
    until = time.monotonic() + 240
    while not (tmp_path / "exp" / "evolve.csv").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = Search(tmp_path / "exp").rows
    assert before
    monkeypatch.setattr(evolve, "GRACE_S", 1)
    monkeypatch.setattr(evolve, "WAIT_S", 0.2)
    time.sleep(1)
    train.run(**options, epochs=1, workers=0, evolve=len(before) + 1, resume=True, noplots=True)
    rows = Search(tmp_path / "exp").rows
    assert rows[: len(before)] == before and len(rows) == len(before) + 1


@pytest.fixture
def postgresql():
    """The URL of a database of a PostgreSQL server of one's own."""
    found = [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    binaries = next((Path(path).resolve().parent for path in found if path), None)
    if binaries is None or importlib.util.find_spec("psycopg") is None:
        pytest.skip("no PostgreSQL server here (Debian's postgresql, and psycopg)")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    user = {}
    if os.geteuid() == 0:  # as whom it refuses to run
        shutil.chown(folder, "postgres")
        user = {"user": "postgres", "group": pwd.getpwnam("postgres").pw_gid, "extra_groups": []}
    run = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    setting = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run([binaries / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust"], **run)
    subprocess.run(
        [binaries / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", setting, "start"], **run
    )
    yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    subprocess.run([binaries / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop"], **run)
    shutil.rmtree(folder)


@needs_optuna
@pytest.mark.slow
def test_two_processes_share_a_study_on_postgresql(postgresql, tiny_shapes, tiny_cfg, tmp_path):
    options = {"epochs": 2, "workers": 0, "evolve": 8, "storage": postgresql, "name": "shared"}
    processes = [start({**tiny_options(tiny_shapes, tiny_cfg, tmp_path / name), **options}) for name in "ab"]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    trained = [sum(line.startswith("evolve: trial ") for line in text.splitlines()) for text in said]
    assert min(trained) >= 1 and 8 <= sum(trained) <= 9  # both may begin the last one
    tables = [Search(tmp_path / name / "shared").rows for name in "ab"]
    assert max(map(len, tables)) >= 4 and not (tmp_path / "a" / "shared" / "evolve.db").exists()
    shorter, longer = sorted(tables, key=len)
    assert [row for row in shorter if row not in longer] == []
