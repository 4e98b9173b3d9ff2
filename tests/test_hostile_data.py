"""YAMLs made to run something, to put files where they do harm or to fill the memory; run names that lead elsewhere.

Each is refused in one line; a canary file shows that nothing ran. More of them: utils/dataloaders/test_spec.py.
"""

import io
import json
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import detect
import train
import val
from utils.cli import run_command
from utils.dataloaders import config as obtain
from utils.dataloaders.config import load_spec
from utils.errors import UserError
from utils.files import read_yaml, run_folder
from utils.media.writers import folder_names
from utils.train.hyp import Hyp

CALL = "os.system [touch {canary}]"
YAMLS = {
    "apply": f"a: !!python/object/apply:{CALL}",
    "new": "a: !!python/object/new:subprocess.Popen [[touch, {canary}]]",
    "object": "!!python/object:subprocess.Popen {args: [touch, {canary}]}",
    "name": "a: !!python/name:os.system",
    "module": "a: !!python/module:os",
    "full tag": "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    "tag by a directive": "%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system ['touch {canary}']",
    "coded tag": "a: !!python%2Fobject%2Fapply:os.system ['touch {canary}']",
    "as key": "!!python/object/apply:os.system ['touch {canary}']: 1",
    "in a set": "!!set {!!python/object/apply:os.system ['touch {canary}']}",
    "state": "!!python/object/new:type {args: [z, [], {extend: !!python/name:exec}], listitems: ['open(1)']}",
    "unknown tag": "a: !evil 1",
    "local tag": "!ruby/object:Gem::Installer {}",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "alias to itself": "&a [*a]",
    "merge": "a: &a {b: 1}\nc: {<<: *a}",
    "lists": "[" * 10_000,
    "maps": "{a: " * 10_000,
    "dashes": "- " * 10_000 + "a",
    "question marks": "? " * 10_000 + "a",
    "indentation": "\n".join(f"{' ' * level}a:" for level in range(10_000)),
    "lists, closed": "[" * 10_000 + "]" * 10_000,
    "hexadecimal number": "a: 0x" + "f" * 100_000,
    "binary number": "a: 0b" + "1" * 100_000,
    "number of base 60": "a: 1" + ":1" * 20_000,
    "number": "a: " + "9" * 100_000,
    "tagged number": "a: !!int '" + "9" * 100_000 + "'",
    "large": "a: '" + "x" * (2 << 20) + "'",
    "control characters": "a: \x1b[2Jb",
    "null byte": "a: \0",
    "second document": "a: 1\n---\nb: 2",
    "doubled key": "a: 1\na: 2",
    "no number": "a: !!int open",
}


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize("name", YAMLS)
def test_yamls_are_plain_data(tmp_path, canary, name):
    path = tmp_path / "evil.yaml"
    path.write_text(YAMLS[name].replace("{canary}", str(canary)))
    for reader in (read_yaml, Hyp.from_yaml, load_spec):
        with pytest.raises(UserError, match="evil.yaml") as caught:
            reader(path)
        assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)
    assert not canary.exists()


DOWNLOADS = [
    *(
        "touch {canary}",
        "bash touch {canary}",
        "import os; os.system('touch {canary}')",
        "python -c pass",
        "|\n  sh",
        5,
    ),
    *(
        "http://a.invalid/x.zip; touch {canary}",
        "http://a.invalid/$(touch {canary}).zip",
        "-o {canary} http://a.invalid/x",
    ),
    *(
        "http://a.invalid/`touch {canary}`",
        "http://a.invalid/' && touch {canary} && '",
        'http://a.invalid/"; touch {canary}',
    ),
    *(
        "file:///etc/passwd",
        "ftp://a.invalid/x.zip",
        "gopher://a.invalid/x",
        "data:text/plain,x",
        "/etc/passwd",
        "C:\\x.zip",
    ),
    *(
        "http:///x.zip",
        "http://[/x.zip",
        "https://a.invalid/",
        "https://a.invalid/..%2f",
        "https://a.invalid/%2e%2e%2fx%00",
    ),
    *("https://a.invalid/.bashrc", "https://a.invalid/..", "https://a.invalid/x:y", "https://a.invalid\n/x.zip", True),
    *({"url": "file:///etc/passwd"}, {"url": "https://a.invalid/x", "dir": "/etc"}, {"file": "x"}, {"url": 5}, [[]]),
    *({"url": "https://a.invalid/x", "dir": "a/../../.."}, {"url": "https://a.invalid/x", "dir": "..\\..\\x:"}, [None]),
    *({"url": "https://a.invalid/x", "file": "../x"}, {"url": "https://a.invalid/x", "file": ".profile"}, {"cmd": "x"}),
    *({"url": "https://a.invalid/x", "file": "-rf"}, {"url": "https://a.invalid/x.zip", "sha256": "0"}, [{}, "sh"]),
]


@pytest.mark.parametrize("index", range(len(DOWNLOADS)))
def test_downloads_are_addresses_only(tmp_path, canary, index, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = json.loads(json.dumps(DOWNLOADS[index]).replace("{canary}", str(canary)))
    content = {"path": "absent-data-set", "train": "a", "val": "a", "names": ["a"], "download": given}
    with pytest.raises(UserError):
        load_spec(content)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a.invalid/a.yaml", "http://a.invalid/a'b\".yaml", "http://x y/a.zip"]
)
def test_addresses_of_data_set_yamls_are_http(tmp_path, url, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        load_spec(url)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def server(monkeypatch):
    """Serves the bytes in `content` by name."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            body = self.server.content[self.path.removeprefix("/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.content, running.url = {}, f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


PROGRAMS = [
    "train.py",
    "numpy.py",
    "a/sitecustomize.py",
    "x.pth",
    "x.so",
    "x.desktop",
    "x.sh",
    "x.exe",
    "authorized_keys",
]
PROGRAMS += [
    ".bashrc",
    ".ssh/keys.txt",
    "images/.hidden/x.jpg",
    "Makefile",
    "x.jpg.py",
    "x.pkl",
    "best.pt",
    "a.txt/b.bat",
]


def test_what_a_yaml_fetches_becomes_no_program_wherever_it_is_put(tmp_path, server, caplog):
    """A YAML names the folder as well as the archive: both may be a stranger's."""
    home = tmp_path / "home"
    home.mkdir()
    server.content["x.zip"] = zipped(dict.fromkeys([*PROGRAMS, "set/images/a.jpg", "set/README"], b"x"))
    content = {"path": str(home / "set"), "train": "images", "val": "images", "names": ["a"]}
    with caplog.at_level("WARNING", "yolov5"):
        load_spec({**content, "download": f"{server.url}/x.zip"})
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    assert files == ["set/README", "set/images/a.jpg"]
    assert f"left out {len(PROGRAMS)} files that are no data: 'train.py'" in caplog.text


def test_what_a_yaml_fetches_takes_no_files_place(tmp_path, server):
    (tmp_path / "requirements.txt").write_text("mine")
    (tmp_path / "same.txt").write_text("x")
    content = {"path": str(tmp_path / "set"), "train": "images", "val": "images", "names": ["a"]}
    server.content["x.zip"] = zipped({"set/images/a.jpg": b"x", "same.txt": b"x", "requirements.txt": b"x"})
    server.content["requirements.txt"] = b"x"
    for name in ("x.zip", "requirements.txt"):
        with pytest.raises(
            UserError, match=r"requirements.txt is there (and differs; nothing was unpacked|already). Move"
        ):
            load_spec({**content, "download": f"{server.url}/{name}"})
    assert (tmp_path / "requirements.txt").read_text() == "mine"
    assert not list(tmp_path.rglob("a.jpg"))


@pytest.mark.parametrize("name", ["evil.py", "evil.desktop", "evil", "evil.pt"])
def test_single_files_that_are_no_data_are_not_fetched(tmp_path, server, name):
    server.content[name] = b"x"
    content = {"path": str(tmp_path / "set"), "train": "images", "val": "images", "names": ["a"]}
    with pytest.raises(UserError, match=f"{name}: is neither an archive nor a file of data"):
        load_spec({**content, "download": f"{server.url}/{name}"})
    assert not list(tmp_path.rglob(name))


@pytest.mark.parametrize("path", [".config/set", "set/.git/hooks", ".ssh"])
def test_nothing_is_fetched_into_hidden_folders(tmp_path, server, path):
    content = {"path": str(tmp_path / path), "train": "images", "val": "images", "names": ["a"]}
    with pytest.raises(UserError, match="data is not fetched into hidden folders"):
        load_spec({**content, "download": {"url": f"{server.url}/x.zip", "dir": "."}})
    assert not list(tmp_path.iterdir())


def test_names_of_files_of_data():
    assert all(
        map(obtain.is_data, ["a.jpg", "set/images/A.JPG", "set/labels/a.txt", "./a.json", "a/LICENSE", "a/README.txt"])
    )
    assert not any(map(obtain.is_data, [*PROGRAMS, "__MACOSX/a.jpg", "set/._a.jpg"]))


@pytest.mark.parametrize(
    "name", ["../x", "../../x", "a/../../x", "/x", "\\x", "..\\x", "C:\\x", "c:x", "..", "/etc/cron.d/x"]
)
@pytest.mark.parametrize("script", [train, val, detect])
def test_run_names_stay_within_the_project(tmp_path, name, script, monkeypatch, capsys, more_weights, tiny_shapes):
    with pytest.raises(UserError, match="leads out of --project"):
        run_folder(tmp_path / "runs", name)
    if name not in ("../x", "/x"):
        return
    weights = more_weights(tmp_path / "tiny.pt", dict(enumerate("abcd")))
    line = [script.__name__, "--device", "cpu", "--project", str(tmp_path / "runs"), "--name", name, "--imgsz", "64"]
    line += ["--source", str(tmp_path)] if script is detect else ["--data", str(tiny_shapes)]
    line += (
        ["--epochs", "1", "--noplots", "--cfg", "yolov5n.yaml", "--weights", ""]
        if script is train
        else ["--weights", str(weights)]
    )
    shutil.copy(next(tiny_shapes.parent.rglob("*.jpg")), tmp_path)
    monkeypatch.setattr("sys.argv", line)
    assert run_command(script.main, script.build_parser()) == 1
    assert f"error: --name '{name}': leads out of --project" in "".join(capsys.readouterr())
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []


@pytest.mark.parametrize("name", ["exp", "a/b", "", ".", "x..y", "...", "名"])
def test_other_run_names_are_taken(name):
    assert run_folder("runs", name) == Path("runs", name)


def test_class_names_lead_nowhere():
    names = dict(
        enumerate(["../../x", "/etc/passwd", "..", "C:\\x", "a\0b", "con", "x/../../y", "$(touch x)", "", "~"])
    )
    for folder in folder_names(names).values():
        assert folder not in ("", ".", "..") and not set(folder) & set('/\\\0:<>"|?*')
