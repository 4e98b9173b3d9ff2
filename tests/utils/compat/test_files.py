"""Files, run folders, data sets and downloads by YOLOv5's signatures; downloads from a server of the test's own."""

import functools
import http.server
import threading
import zipfile
from pathlib import Path

import pytest

from utils import downloads, general
from utils.checkpoint import load_checkpoint
from utils.errors import UserError


@pytest.fixture
def server(tmp_path_factory):
    """Serves a folder; gives the folder and its address."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments):
        """Says nothing."""


def test_increment_path_numbers_runs(tmp_path):
    names = [general.increment_path(tmp_path / "exp", mkdir=True).name for _ in range(3)]
    assert names == ["exp", "exp2", "exp3"]
    assert general.increment_path(str(tmp_path / "exp"), exist_ok=True) == tmp_path / "exp"
    assert general.increment_path(tmp_path / "exp", sep="_") == tmp_path / "exp_2"


def test_check_file_looks_where_the_program_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.txt").touch()
    assert general.check_file("own.txt") == "own.txt" and general.check_file("") == ""
    assert Path(general.check_file("hyp.scratch-low.yaml")) == general.ROOT / "data/hyps/hyp.scratch-low.yaml"
    assert general.check_yaml("yolov5n.yaml").endswith("yolov5n.yaml")
    with pytest.raises(UserError, match=r"yolov5n.pt.*\.yaml or \.yml"):
        general.check_yaml("yolov5n.pt")
    with pytest.raises(UserError, match="nothing.yaml"):
        general.check_file("nothing.yaml")


def test_check_suffix_takes_several_files():
    general.check_suffix(["a.pt", "b.PT", "c"], ".pt")
    with pytest.raises(UserError, match="weights: b.onnx"):
        general.check_suffix(["a.pt", "b.onnx"], (".pt",), msg="weights: ")


def test_check_dataset_returns_a_dict(tiny_shapes):
    data = general.check_dataset(tiny_shapes)
    assert data["nc"] == 4 and data["names"] == ["circle", "square", "triangle", "star"]
    assert data["train"] == str(tiny_shapes.parent / "images" / "train") and data["test"] is None
    both = {"train": [data["train"], data["val"]], "val": data["val"], "names": {0: "a"}, "extra": 7}
    again = general.check_dataset(both)
    assert again["train"] == [data["train"], data["val"]] and again["extra"] == 7 and again["names"] == ["a"]


def test_sizes_and_newest_run(tmp_path):
    assert general.get_latest_run(tmp_path) == ""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").write_bytes(bytes(1 << 19))
    assert Path(general.get_latest_run(tmp_path)).name == "last.pt"
    assert general.file_size(tmp_path) == 1.0 and general.file_size(tmp_path / "a" / "last.pt") == 0.5
    assert general.file_size(tmp_path / "none") == 0


def test_working_directory_comes_back(tmp_path):
    before = Path.cwd()
    with general.WorkingDirectory(tmp_path):
        assert Path.cwd() == tmp_path.resolve()
    assert Path.cwd() == before


def test_strip_optimizer_writes_beside(weights, tmp_path):
    target = tmp_path / "small.pt"
    before = weights.read_bytes()
    general.strip_optimizer(weights, target)
    assert weights.read_bytes() == before
    assert load_checkpoint(target)["epoch"] == -1 and target.stat().st_size < 0.6 * len(before)
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(UserError, match="text file"):
        general.strip_optimizer(tmp_path / "text.pt", tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()


def test_downloads(server, tmp_path, monkeypatch):
    folder, address = server
    monkeypatch.chdir(tmp_path)
    (folder / "weights.pt").write_bytes(bytes(200_000))
    (folder / "small.pt").write_bytes(b"error")
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("images/a.txt", "a")
    assert downloads.attempt_download(f"{address}/weights.pt?auth=1") == "weights.pt"
    assert downloads.attempt_download("weights.pt") == "weights.pt"
    downloads.safe_download("copy.pt", f"{address}/none.pt", f"{address}/weights.pt", min_bytes=1e5)
    assert Path("copy.pt").stat().st_size == 200_000
    with pytest.raises(UserError, match="only 5 bytes came.*Fetch it by hand"):
        downloads.safe_download("bad.pt", f"{address}/small.pt", min_bytes=1e5, error_msg="Fetch it by hand.")
    assert not Path("bad.pt").exists()
    general.download([f"{address}/data.zip", f"{address}/small.pt"], dir="there", threads=2)
    assert Path("there/images/a.txt").read_text() == "a" and not Path("there/data.zip").exists()
    general.download(f"{address}/data.zip", unzip=False)
    assert zipfile.is_zipfile("data.zip")
    assert general.check_file(f"{address}/small.pt") == "small.pt"


def test_unknown_weights_are_told():
    with pytest.raises(UserError, match="releases of other/repo are not known"):
        downloads.attempt_download("model.pt", repo="other/repo")
    with pytest.raises(UserError, match="yolov5s.pt"):
        downloads.attempt_download("yolo5s.pt")
    assert general.url2file("https://example.com/a%20b.zip?auth=1") == "a b.zip"
