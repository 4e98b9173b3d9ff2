"""The fuzzing campaign of `fuzz.py` in short: every target with a fixed seed, and the judge itself."""

import itertools
import logging
import mmap
import subprocess
import sys
import warnings

import pytest

from tests.campaigns import fuzz
from tests.campaigns.fuzz_targets import REFUSALS, TARGETS
from utils.errors import UserError

COUNTS = {
    "labels": 3000,
    "options": 5000,
    "image": 3000,
    "yaml": 2000,
    "checkpoint": 600,
    "archive": 600,
    "hyp": 600,
    "voc": 500,
}
USUAL_COUNT = 1000


@pytest.fixture(autouse=True)
def _silence():
    """Keeps what readers say about every damaged file out of the report."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name, tmp_path):
    """No changed file ends in another exception, a broken promise, a second of work or 500 MB."""
    target = TARGETS[name]
    judge = fuzz.Judge(target.probe, REFUSALS, tmp_path)
    inputs = itertools.islice(fuzz.changed_inputs(target, seed=1), COUNTS.get(name, USUAL_COUNT))
    findings = [finding for data in inputs if (finding := judge.try_one(data))]
    assert not findings, "\n".join(f"{found.place}: {found.text}: {found.data!r}" for found in findings[:3])
    assert judge.accepted and judge.refused  # else the changes are too tame or too wild to try anything


@pytest.mark.parametrize("name", TARGETS)
def test_some_seed_of_every_target_is_accepted(name, tmp_path):
    target, accepted = TARGETS[name], 0
    for data in target.seeds():
        try:
            accepted += target.probe(data, tmp_path)
        except REFUSALS:
            pass  # some seeds are valid files of another kind
    assert accepted


def test_campaign_names_every_target():
    assert set(fuzz.TARGET_NAMES) == set(TARGETS)


def _probe_with_defects(data, folder):
    """Breaks its promise in one way for each first letter."""
    if data.startswith(b"r"):
        raise UserError("refused")
    if data.startswith(b"l"):
        with mmap.mmap(-1, 600 << 20) as block:  # goes back to the system at once, whatever malloc would keep
            block[:: mmap.PAGESIZE] = b"x" * (len(block) // mmap.PAGESIZE)
            return True
    return bool(1 // (data[0] - ord("z")))


def test_judge_tells_findings_from_refusals(tmp_path):
    judge = fuzz.Judge(_probe_with_defects, REFUSALS, tmp_path)
    assert judge.try_one(b"ok") is None and judge.try_one(b"r") is None
    crash = judge.try_one(b"z")
    assert crash.kind == "ZeroDivisionError" and crash.data == b"z"
    assert (judge.tried, judge.accepted, judge.refused) == (3, 1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is only told on Linux")
def test_judge_finds_large_inputs(tmp_path):
    judge = fuzz.Judge(_probe_with_defects, REFUSALS, tmp_path)
    assert judge.try_one(b"l").kind == "large"
    assert judge.try_one(b"a") is None  # the former peak is forgotten


def test_changes_are_the_same_for_the_same_seed():
    target = TARGETS["labels"]
    first, again, other = (list(itertools.islice(fuzz.changed_inputs(target, seed), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_command_prints_the_table(tmp_path):
    command = [sys.executable, "-m", "tests.campaigns.fuzz", "--target", "options", "--count", "200"]
    command += ["--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=fuzz.ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    name, tried, accepted, refused, findings = run.stdout.splitlines()[-1].split()[:5]
    assert (name, tried, findings) == ("options", "200", "0")
    assert int(accepted) + int(refused) == 200
    assert not (tmp_path / "out").exists()
