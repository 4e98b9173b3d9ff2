"""SIGTERM ends a program as Ctrl-C does, once, and not where the exception would be swallowed."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from utils.process import SigtermAnswer, Terminated, defer_signals, leave_signals_to_parent, sigterm_raised

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import argparse, os, signal, sys, time
from utils.cli import with_hint, run_command
def main(options):
    with with_hint(lambda: "Resume with --resume."):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # again, while things are being closed
            print("closed")
sys.exit(run_command(main, argparse.ArgumentParser(prog="train.py")))
"""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows ends programs in another way")


def test_sigterm_closes_what_is_open_tells_what_is_advised_and_exits_143():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "closed\n")
    assert done.stderr == "\ntrain.py: ended by SIGTERM. Resume with --resume.\n"


def test_the_answer_is_set_for_the_body_alone_and_others_are_respected():
    with sigterm_raised():
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with sigterm_raised():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_repetitions_count_again_after_a_while(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils.process.time.monotonic", lambda: now[0])
    answer = SigtermAnswer()
    with pytest.raises(Terminated):
        answer()
    now[0] += 4.9
    answer()
    now[0] += 0.2
    with pytest.raises(Terminated):
        answer()


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_held_back_signals_come_at_the_end_even_if_another_thread_gets_them(number, raised):
    steps, stop = [], threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        with sigterm_raised(), pytest.raises(raised), defer_signals():
            os.kill(os.getpid(), number)
            steps.append("done")
    finally:
        stop.set()
        other.join()
    assert steps == ["done"]


def test_outside_the_main_thread_nothing_is_changed():
    seen = []

    def body():
        with sigterm_raised(), defer_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


@pytest.mark.parametrize("prepare", [leave_signals_to_parent, lambda: None], ids=["worker", "any forked process"])
def test_forked_processes_end_quietly_with_status_0(prepare):
    """Any other status, or dying of the signal, would raise an error in the process that started them."""
    with sigterm_raised():
        child = os.fork()
        if child == 0:
            prepare()
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
