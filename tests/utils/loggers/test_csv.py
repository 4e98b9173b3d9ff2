"""results.csv byte for byte, and its repair after an interruption."""

import errno
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.loggers.base import epoch_figures
from utils.loggers.csv import ResultsCsv

HEADER = (
    "               epoch,      train/box_loss,      train/obj_loss,      train/cls_loss,   metrics/precision,"
    "      metrics/recall,     metrics/mAP_0.5,metrics/mAP_0.5:0.95,        val/box_loss,        val/obj_loss,"
    "        val/cls_loss,               x/lr0,               x/lr1,               x/lr2"
)


def figures(epoch, numbers=None):
    numbers = numbers or [epoch + column / 100 for column in range(13)]
    return epoch_figures(("box", "obj", "cls"), numbers[:3], numbers[3:10], numbers[10:])


def written(path, epochs, start=0):
    table = ResultsCsv(path.parent, start)
    for epoch in epochs:
        table.log_epoch(epoch, figures(epoch))
    return path.read_text()


def test_header_and_row_byte_for_byte(tmp_path):
    table = ResultsCsv(tmp_path)
    table.log_epoch(12, figures(12, [0.123456789, 1e-7, 1234567.0, *[0.5] * 10]))
    row = "                  12,             0.12346,               1e-07,          1.2346e+06"
    row += ",                 0.5" * 10
    assert (tmp_path / "results.csv").read_bytes() == f"{HEADER}\n{row}\n".encode()


def test_figures_bear_the_names_of_what_they_are():
    row = epoch_figures(("box", "dfl"), [1, 2], range(4, 10), (11, 12))
    assert list(row.items())[:3] == [("train/box_loss", 1), ("train/dfl_loss", 2), ("metrics/precision", 4)]
    assert list(row.items())[6:] == [("val/box_loss", 8), ("val/dfl_loss", 9), ("x/lr0", 11), ("x/lr1", 12)]
    with pytest.raises(ValueError, match="zip"):
        epoch_figures(("box",), [1, 2], range(5), range(3))


@pytest.mark.parametrize("cut", [*range(0, 1500, 37), 1489])
def test_file_cut_anywhere_and_resumed_equals_one_never_cut(tmp_path, cut):
    """The checkpoint says which epoch comes next; the file may hold less of it, or more."""
    path = tmp_path / "results.csv"
    text = written(path, range(5))
    whole_rows = max(text[:cut].count("\n") - 1, 0)
    path.write_text(text[:cut])
    assert written(path, range(whole_rows, 5), start=whole_rows) == text


def test_rows_of_the_interrupted_epoch_and_repetitions_are_dropped(tmp_path):
    path = tmp_path / "results.csv"
    text = written(path, range(5))
    lines = text.splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1], "garbage, 1, 2\n", lines[3]]))
    assert written(path, [3, 4], start=3) == text


@pytest.mark.parametrize(("start", "rows"), [(0, [0]), (3, [0, 1, 2, 3])])
def test_rows_go_only_when_the_first_new_one_comes(tmp_path, start, rows):
    """A new run in an old folder starts over, a resumed one goes on; one that is stopped before has cost nothing."""
    path = tmp_path / "results.csv"
    text = written(path, range(5))
    table = ResultsCsv(tmp_path, start)
    assert path.read_text() == text
    table.log_epoch(start, figures(start))
    assert [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:]] == rows


def test_a_disk_that_fills_up_while_a_run_is_resumed_keeps_all_rows(tmp_path, monkeypatch):
    """The first row rewrites the file; what it held must not be lost before the new one is whole."""
    path = tmp_path / "results.csv"
    text = written(path, range(5))
    write_text = Path.write_text

    def half(self, content, *arguments, **keywords):
        write_text(self, content[: len(content) // 2], *arguments, **keywords)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(UserError, match=r"results\.csv: cannot be written \(No space left on device\)"):
        ResultsCsv(tmp_path, 3).log_epoch(3, figures(3))
    assert path.read_text() == text and [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_unwritable_file_is_named(tmp_path):
    table = ResultsCsv(tmp_path)
    table.log_epoch(0, figures(0))
    table.path.unlink()
    table.path.mkdir()
    with pytest.raises(UserError, match=r"results\.csv: cannot be written"):
        table.log_epoch(1, figures(1))
    with pytest.raises(UserError, match=r"results\.csv: cannot be"):
        ResultsCsv(tmp_path / "missing").log_epoch(0, figures(0))
