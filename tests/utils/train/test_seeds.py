"""Runs that differ in their seed: the table, what an interruption leaves, that each is the run of its seed."""

import statistics

import pytest

import train
from utils.callbacks import Callbacks
from utils.checkpoint import load_checkpoint
from utils.loggers.base import METRICS
from utils.train.fingerprint import weights_part
from utils.train.seeds import read_table


@pytest.fixture
def options(tiny_shapes, tiny_cfg, tmp_path):
    given = {"data": str(tiny_shapes), "cfg": str(tiny_cfg), "imgsz": 64, "batch_size": 8, "epochs": 2, "workers": 0}
    return {**given, "amp": "off", "device": "cpu", "noplots": True, "project": str(tmp_path)}


def digest(run) -> str:
    return weights_part("best", load_checkpoint(run / "weights" / "best.pt")).digest


def test_an_interrupted_series_goes_on_and_each_run_is_that_of_its_seed(command, options, tmp_path, caplog):
    def interrupt(epoch, trainer):
        if trainer.options.seed == 5 and epoch == 1:
            raise KeyboardInterrupt

    callbacks = Callbacks()
    callbacks.register_action("on_train_epoch_end", callback=interrupt)
    with pytest.raises(
        KeyboardInterrupt, match="Finished runs are kept. Go on with the same command and --resume"
    ) as told:
        train.run(callbacks, **options, seed=4, seeds=2)
    assert "start again" not in str(told.value)
    folder = tmp_path / "exp"
    assert read_table(folder).keys() == {4}
    line = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "noplots"]
    series = [*line, "--noplots", "--seed", "4", "--seeds"]
    command(train, *series, "2", "--resume", "--epochs", "3").assert_refused(
        "--epochs 3 differs from the 2 of the runs"
    )
    resumed = command(train, *series, "3", "--resume")  # and one more
    assert resumed.status == 0 and "Resuming training from" in resumed.said
    table = read_table(folder)
    assert list(table) == [4, 5, 6]
    lines = [line.split(",") for line in (folder / "seeds.csv").read_text().splitlines()]
    assert lines[0] == ["seed", *METRICS, "fitness"]
    recalls = [row[1] for row in table.values()]
    spread = {name: float(cells[1]) for name, *cells in lines[4:]}
    expected = {"mean": statistics.mean, "std": statistics.stdev, "min": min, "max": max}
    assert spread == pytest.approx({name: of(recalls) for name, of in expected.items()}, abs=2e-5)
    assert [row.split()[0] for row in resumed.said.splitlines()[-10:] if row.startswith("  ")][-8:-7] == ["seed"]
    assert all(f"{values[0]:.4f}" in resumed.said for values in table.values())
    alone = train.run(**options, name="alone", seed=5)
    assert digest(folder / "seed5") == digest(tmp_path / "alone") != digest(folder / "seed4")
    assert table[5][:4] == pytest.approx(alone.result.as_tuple()[:4], abs=1e-5)


def test_what_does_not_go_with_a_series_is_refused(command, tmp_path):
    options = "--cfg", "yolov5n.yaml", "--data", "nowhere.yaml", "--project", tmp_path, "--seeds", "2"
    for more, words in (
        (["--evolve"], ["neither --evolve"]),
        (["--resume", "last.pt"], ["nor a file to --resume"]),
        (["--resume"], ["no runs in", str(tmp_path / "exp")]),
    ):
        command(train, *options, *more).assert_refused(*words)


def test_a_callback_stops_a_series(options, tmp_path):
    callbacks = Callbacks()

    def stop(trainer):
        callbacks.stop_training = True

    callbacks.register_action("on_train_batch_start", callback=stop)
    assert train.run(callbacks, **options, seeds=3).result is None
    assert [path.name for path in (tmp_path / "exp").glob("seed*")] == ["seed0"]
