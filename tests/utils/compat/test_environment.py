"""What a program runs on: versions, requirements, folders, the network."""

import logging
import socket
import subprocess
import sys

import pytest

from utils import general
from utils.compat import environment
from utils.errors import UserError


def test_versions_are_compared_by_their_numbers(caplog):
    assert general.check_version("1.12.0a0+git", "1.12") and general.check_version("1.10.1", "1.9")
    assert not general.check_version("1.9", "1.10", verbose=True)
    assert "1.10 is required, 1.9 is installed" in caplog.text
    assert not general.check_version("2.1", "2.0", pinned=True) and general.check_version("2", "2.0.0", pinned=True)
    with pytest.raises(UserError, match="torch >=99"):
        general.check_version("2.6", "99", name="torch ", hard=True)
    with pytest.raises(UserError, match="'newest' is not a version"):
        general.check_version("newest", "1")
    general.check_python("3.10")
    with pytest.raises(UserError, match="Python >=99"):
        general.check_python("99.0")


def test_requirements_are_reported_not_installed(caplog, tmp_path):
    assert general.check_requirements(general.ROOT / "requirements.txt", exclude=("thop", "setuptools"))
    assert general.check_requirements("numpy>=1.26") and general.check_requirements(("pytest", "torch<99"))
    assert not caplog.messages
    file = tmp_path / "requirements.txt"
    lines = ["# first", "--extra-index-url https://example.com", "numpy>=99  # newest", "no-such-thing"]
    file.write_text("\n".join([*lines, "old; python_version<'3'"]))
    assert not general.check_requirements(file)
    assert caplog.messages[0].endswith('pip install "numpy>=99" "no-such-thing"')
    assert general.check_requirements(file, exclude=("numpy", "no-such-thing"))
    with pytest.raises(UserError, match="no such requirements file"):
        general.check_requirements(tmp_path / "none.txt")
    with pytest.raises(UserError, match="'a b c' is not a requirement"):
        general.check_requirements("a b c")


def test_logging_is_set_up_when_a_script_asks_for_the_logger():
    program = "import utils.general as g; import logging; l = logging.getLogger('yolov5'); assert not l.handlers; "
    program += "from utils.general import LOGGER; assert LOGGER is l; LOGGER.info('seen')"
    run = subprocess.run([sys.executable, "-c", program], cwd=general.ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr, run.stdout) == (0, "seen\n", "")
    assert general.LOGGER is logging.getLogger("yolov5")


def test_settings_folder_is_named_not_made(monkeypatch, tmp_path):
    monkeypatch.setenv("YOLOV5_CONFIG_DIR", str(tmp_path / "settings"))
    assert general.CONFIG_DIR == tmp_path / "settings" and not general.CONFIG_DIR.exists()
    monkeypatch.delenv("YOLOV5_CONFIG_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(environment.platform, "system", lambda: "Linux")
    assert general.user_config_dir() == tmp_path / ".config" / "Ultralytics"


def test_places(monkeypatch, tmp_path):
    monkeypatch.delenv("KAGGLE_URL_BASE", raising=False)
    assert not general.is_kaggle() and not general.is_colab() and not general.is_pip()
    monkeypatch.setenv("KAGGLE_URL_BASE", "x")
    assert general.is_kaggle()
    assert general.is_writeable(tmp_path) and not general.is_writeable(tmp_path / "none")
    assert general.is_docker() in (True, False)


def test_the_network_is_asked_only_when_wanted(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(environment, "ONLINE_PROBE", listening.getsockname())
        assert general.check_online()
    assert not general.check_online()  # nobody listens there any more


def test_windows_are_not_opened_without_a_display(monkeypatch, caplog):
    monkeypatch.setattr(environment, "display_problem", lambda: "there is no display")
    assert not general.check_imshow() and "there is no display" in caplog.text
    monkeypatch.setattr(environment, "display_problem", str)
    assert general.check_imshow()
