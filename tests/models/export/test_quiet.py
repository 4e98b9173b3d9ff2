"""Converters' output: out of sight while all goes well, its end shown when they fail."""

import os
import sys

import pytest

from models.export.job import last_lines, quietly, run_tool
from utils.errors import UserError


def talk(text):
    print(text)
    print(text, file=sys.stderr)
    os.write(1, f"{text} from C\n".encode())
    os.write(2, f"{text} from C\n".encode())


def test_nothing_is_seen_by_any_way_out(capfd):
    with quietly():
        talk("noise")
    talk("after")
    seen = capfd.readouterr()
    assert "noise" not in seen.out + seen.err
    assert seen.out.count("after") == 2 and seen.err.count("after") == 2


def test_what_was_said_before_a_failure_is_logged(capfd, caplog):
    with pytest.raises(ValueError, match="broken"), quietly():
        talk("the reason")
        raise ValueError("broken")
    assert "the reason from C" in caplog.text and "the reason" not in capfd.readouterr().out
    talk("after")
    assert "after from C" in capfd.readouterr().err


def test_a_tool_works_in_its_folder(tmp_path):
    said = run_tool([sys.executable, "-c", "import os; print(os.getcwd())"], tmp_path)
    assert said.strip() == os.path.realpath(tmp_path)


def test_a_failing_tool_shows_its_last_lines_and_status(tmp_path):
    program = "import sys; print(*range(40), sep='\\n'); sys.exit(7)"
    with pytest.raises(UserError, match=r"(?s)failed with status 7:\n25\n.*\n39$"):
        run_tool([sys.executable, "-c", program], tmp_path)


def test_a_tool_that_is_none_is_said(tmp_path):
    with pytest.raises(UserError, match="nowhere: cannot be started"):
        run_tool([str(tmp_path / "nowhere")], tmp_path)


def test_the_end_of_a_text():
    assert last_lines("\n".join(map(str, range(20)))).split() == [str(line) for line in range(5, 20)]
