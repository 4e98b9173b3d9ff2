"""What the logger prints on which process, and that colours and bars stay out of files."""

import logging

import pytest

from utils.log import LOGGER, colorstr, progress, setup_logging


@pytest.mark.parametrize(
    ("rank", "verbose", "level"),
    [(-1, "true", logging.INFO), (0, "true", logging.INFO), (1, "true", logging.WARNING), (0, "no", logging.WARNING)],
)
def test_only_a_verbose_main_process_prints_information(monkeypatch, rank, verbose, level):
    monkeypatch.setenv("YOLOv5_VERBOSE", verbose)
    setup_logging(rank)
    assert LOGGER.getEffectiveLevel() == level


def test_messages_go_to_stderr_once_however_often_logging_is_set_up(monkeypatch, capsys):
    monkeypatch.setattr(LOGGER, "handlers", [])
    for _ in range(3):
        setup_logging()
    LOGGER.info("one line")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "one line\n")


def test_colours_appear_on_a_terminal_only(monkeypatch):
    assert colorstr("train: ") == "train: "
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert colorstr("train: ") == "\033[34m\033[1mtrain: \033[0m"
    assert colorstr("red", "bad") == "\033[31mbad\033[0m"


def test_a_bar_is_silent_where_information_is(capsys):
    setup_logging(rank=1)
    assert list(progress(range(3), desc="epoch")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    setup_logging()
    assert list(progress(range(3), desc="epoch")) == [0, 1, 2]
    assert "epoch 100%" in capsys.readouterr().err


def test_without_a_stderr_there_are_no_colours_and_bars_and_messages_go_nowhere(monkeypatch):
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr("sys.stderr", None)  # as under pythonw, in windowed programs and services
    setup_logging(rank=-1)
    LOGGER.warning("nobody reads this")
    assert colorstr("train: ") == "train: "
    assert list(progress(range(3), desc="epoch")) == [0, 1, 2]


def test_names_in_messages_cannot_steer_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr("utils.log.on_terminal", lambda: True)
    setup_logging(rank=-1)
    name = "cat\x1b[2J\x1b]0;owned\x07\x9b8m\x1b[8m \udcd5\r"
    LOGGER.info(f"{colorstr('green', 'bus.jpg')}: 2 {name}s\n\tnext line")
    shown = "cat\ufffd[2J\ufffd]0;owned\ufffd\ufffd8m\ufffd[8m \ufffd\ufffd"
    assert capsys.readouterr().err == f"\x1b[32mbus.jpg\x1b[0m: 2 {shown}s\n\tnext line\n"
