"""Data set YAMLs: all forms that are read, where folders are looked for, what is fetched; bad: test_bad_yaml.py."""

import hashlib
import logging
import zipfile
from pathlib import Path

import pytest
import yaml

from utils.dataloaders import config
from utils.dataloaders.config import load_spec, parse_names
from utils.errors import UserError
from utils.files import ROOT

SHIPPED = ("coco.yaml", "coco128.yaml", "VOC.yaml", "VisDrone.yaml", "SODA10M.yaml", "bccd.yaml", "shapes.yaml")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Stands for the repository, so that nothing is looked for or put outside the test's folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.setattr(config, "ROOT", folder)
    monkeypatch.setattr(config, "DATASETS_DIR", tmp_path / "datasets")
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def folders(base, *names):
    for name in names:
        (base / name).mkdir(parents=True, exist_ok=True)


def test_names_may_be_a_list_or_a_mapping_and_nc_may_be_left_out():
    expected = {0: "cat", 1: "dog"}
    for names, nc in ((["cat", "dog"], None), ({0: "cat", 1: "dog"}, 2), ({"1": "dog", "0": "cat"}, 2)):
        assert parse_names(names, nc, "x") == expected
    assert parse_names(None, 2, "x") == {0: "class0", 1: "class1"}
    assert list(parse_names({1: "b", 0: "a"}, None, "x").items()) == [(0, "a"), (1, "b")]
    assert parse_names([101, "x"], None, "x") == {0: "101", 1: "x"}


NUMBERS = ["007", "010", "0x1F", "0o17", "12:30", "1_000", "1e3", "1.10", "1.1", ".5", "00123456", "-7", ".inf"]


@pytest.mark.parametrize("form", ["[{}]", "{{{}}}"])
def test_names_that_yaml_takes_for_numbers_keep_their_text(root, tmp_path, form):
    """YAML 1.1 reads 010 as 8 and 12:30 as 750 (base 60): two classes could even get one name."""
    entries = NUMBERS if form == "[{}]" else [f"{index}: {name}" for index, name in enumerate(NUMBERS)]
    path = write(tmp_path / "d.yaml", f"nc: {len(NUMBERS)}\nnames: {form.format(', '.join(entries))}\n")
    assert list(load_spec(path, need=()).names.values()) == NUMBERS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nc: '2'", r"'nc: 2' must be a whole number .* quotes, which make it text: leave them out"),
        (r'val: "images\train"', r"not 'images.*train'\. In double quotes a backslash starts an escape .*: write /"),
        (r'path: "D:\new"', r"'path: .* must be a folder\. In double quotes a backslash starts an escape .*: write /"),
        (r'path: "D:\data"', r"escape character 'd'\. In double quotes a backslash starts an escape .*: write /.*Mend"),
    ],
)
def test_quotes_that_change_a_value_are_said(root, tmp_path, line, words):
    content = {"path": ".", "train": ".", "val": ".", "nc": 2, "names": "[a, b]"} | dict([line.split(": ")])
    path = write(tmp_path / "d.yaml", "".join(f"{key}: {value}\n" for key, value in content.items()))
    with pytest.raises(UserError, match=words):
        load_spec(path)


def test_a_relative_path_is_tried_from_the_yaml_the_repository_and_the_yaml_s_parent(root, tmp_path):
    content = {"path": "data", "train": "images", "val": "images", "names": ["a"]}
    path = write(tmp_path / "outer" / "sets" / "d.yaml", content)
    for base in (path.parent.parent, root, path.parent):  # the later, the stronger
        folders(base / "data", "images")
        found = load_spec(path)
        assert found.root == base / "data" and found.train == (base / "data" / "images",)
        assert found.source == path and found.nc == 1 and found.test == ()


@pytest.fixture
def said(caplog, monkeypatch):
    """Returns what the program has logged since the last call."""
    monkeypatch.setattr(logging.getLogger("yolov5"), "propagate", True)

    def lines():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return lines


def test_the_yaml_s_own_folder_comes_first_and_what_is_there_twice_is_said(root, tmp_path, said):
    """The program's own data/images is no data set of the user's, who has a folder of that name beside the YAML."""
    path = write(tmp_path / "mine" / "d.yaml", {"train": "data/images", "val": "val", "names": ["a"]})
    folders(root, "data/images", "val")
    assert load_spec(path).train == (root / "data/images",) and not said()  # as in 6.1, where it is the only one
    folders(path.parent, "data/images")
    assert load_spec(path).train == (path.parent / "data/images",)
    where = f"{path.parent / 'data/images'} is taken, not {root / 'data/images'}."
    assert said() == [f"WARNING: {path}: 'train: data/images' is there twice: {where} An absolute 'path:' chooses."]
    write(path, {"path": str(path.parent), "train": "data/images", "val": "data/images", "names": ["a"]})
    assert load_spec(path).val == (path.parent / "data/images",) and not said()


def test_a_link_to_the_same_folder_is_not_there_twice(root, tmp_path, said):
    path = write(tmp_path / "mine" / "d.yaml", {"path": "d", "train": "images", "val": "images", "names": ["a"]})
    folders(path.parent, "d/images")
    (root / "d").symlink_to(path.parent / "d")
    assert load_spec(path).root == path.parent / "d" and not said()


def test_the_root_is_one_that_holds_every_split_needed(root, tmp_path):
    path = write(tmp_path / "d.yaml", {"path": "data", "train": "train", "val": "val", "names": ["a"]})
    folders(tmp_path / "data", "train")
    folders(root / "data", "train", "val")
    assert load_spec(path).root == root / "data"
    assert load_spec(path, need=("train",)).root == tmp_path / "data"


def test_a_missing_split_shows_all_places_that_were_tried(root, tmp_path):
    path = write(tmp_path / "sets" / "d.yaml", {"path": "data", "train": "train", "val": "val", "names": ["a"]})
    folders(path.parent / "data", "train")
    with pytest.raises(UserError) as error:
        load_spec(path)
    message = str(error.value)
    assert message.startswith(f"Dataset not found. {path}: 'val' is at none of")
    assert all(str(base / "data" / "val") in message for base in (root, path.parent, tmp_path))
    assert "'train' is at none" not in message and load_spec(path, need=("train",)).nc == 1


def test_roboflow_yaml_beside_its_folders(root, tmp_path):
    text = (
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['a', 'b']\n\n"
        "roboflow:\n  workspace: w\n  license: CC BY 4.0\n"
    )
    path = write(tmp_path / "sets" / "Hard-Hats-3" / "data.yaml", text)
    folders(path.parent, "train/images", "valid/images")
    found = load_spec(path)
    assert found.train == (path.parent / "train" / "images",) and found.val == (path.parent / "valid" / "images",)


def test_roboflow_yaml_finds_its_own_images_beside_older_ones(root, tmp_path, said):
    text = "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['a', 'b']\n"
    path = write(tmp_path / "set-2" / "data.yaml", text)
    folders(path.parent, "train/images", "valid/images")
    folders(tmp_path, "train/images", "repository", "valid/images")  # an older set, beside both
    found = load_spec(path)
    assert found.train == (path.parent / "train" / "images",) and found.val == (path.parent / "valid" / "images",)
    assert len(said()) == 2  # a line a split
    text = f"path: {path.parent}\n{text}"
    assert load_spec(write(path, text)).train == (tmp_path / "train" / "images",)  # with a path it means what it says


def test_folders_lists_absolute_and_windows_paths(root, tmp_path):
    folders(tmp_path / "d", "images/a", "images/b", "far")
    write(tmp_path / "d" / "val.txt", "./images/a/1.jpg\n")
    content = {"path": "d", "train": ["images/a", "images\\b", str(tmp_path / "d" / "far")], "val": "val.txt", "nc": 1}
    found = load_spec(write(tmp_path / "d.yaml", content))
    assert found.train == tuple(tmp_path / "d" / name for name in ("images/a", "images/b", "far"))
    assert found.val == (tmp_path / "d" / "val.txt",)


def test_a_dict_is_read_from_the_working_folder(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path, "images")
    found = load_spec({"train": "images", "val": "images", "names": {0: "a"}})
    assert found.source is None and found.val == (tmp_path / "images",)


def test_an_unknown_file_shows_near_names():
    with pytest.raises(UserError, match="Did you mean .*'coco128.yaml'"):
        load_spec("coco182.yaml")


@pytest.mark.parametrize("script", ["bash data/get.sh", "import os\nos.mkdir('ran')\n", "ftp://host/a.zip", 3])
def test_a_download_that_is_no_address_is_never_run(root, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "d.yaml", {"path": "d", "train": "a", "val": "a", "names": ["a"], "download": script})
    with pytest.raises(UserError, match="a data set YAML runs nothing"):
        load_spec(path)
    assert not (tmp_path / "ran").exists()
    folders(tmp_path / "d", "a")
    assert load_spec(path).nc == 1  # with the data in place the script does not matter


def test_data_that_is_there_is_never_downloaded_and_offline_is_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "fetch", lambda *_: pytest.fail("nothing may be fetched"))
    content = {"path": "d", "train": "a", "val": "a", "names": ["a"], "download": "https://example.invalid/d.zip"}
    path = write(tmp_path / "d.yaml", content)
    with pytest.raises(UserError, match="Downloads are off"):
        load_spec(path, download=False)
    folders(tmp_path / "d", "a")
    assert load_spec(path).train == (tmp_path / "d" / "a",)


def test_a_failed_fetch_is_told_with_the_places_that_were_tried(root, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("host cannot be reached")

    monkeypatch.setattr(config, "fetch", fail)
    content = {"path": "d", "train": "a", "val": "a", "names": ["a"], "download": "https://example.invalid/d.zip"}
    with pytest.raises(UserError, match="^Dataset not found.*'train' is at none of.*host cannot be reached"):
        load_spec(write(tmp_path / "d.yaml", content))


def test_files_are_fetched_in_order_into_their_folders_and_not_twice(root, tmp_path, monkeypatch):
    digest = hashlib.sha256(b"x").hexdigest()
    content = {"path": "../d", "train": "images", "val": "images", "names": ["a"]}
    second = {"url": "https://h/two", "file": "two.zip", "dir": ".", "sha256": digest}
    content["download"] = ["https://h/one.zip", second]
    path = write(tmp_path / "d.yaml", content)
    calls = []

    def first_fails_then_works(url, folder, sha256, name, **_):
        calls.append((url, folder.resolve(), sha256, name))
        if len(calls) == 2:
            raise UserError("cut short")
        if len(calls) == 3:
            folders(folder, "images")

    monkeypatch.setattr(config, "fetch", first_fails_then_works)
    with pytest.raises(UserError, match="cut short"):
        load_spec(path)
    assert load_spec(path).root == tmp_path / "d"
    second = ("https://h/two", tmp_path / "d", digest, "two.zip")
    assert calls == [("https://h/one.zip", tmp_path, None, None), second, second]
    assert [entry.name for entry in (tmp_path / "d").iterdir()] == ["images"]


def test_missing_data_of_a_generator_is_rendered_into_the_root(root, tmp_path, monkeypatch):
    calls = []

    def render(folder):
        calls.append(folder)
        folders(folder, "images/train", "images/val")

    monkeypatch.setattr(config, "load_function", lambda address: {"utils.tools.shapes:render": render}[address])
    path = write(
        tmp_path / "d.yaml",
        {"path": "datasets/s", "train": "images/train", "val": "images/val", "nc": 1, "generate": "shapes"},
    )
    assert load_spec(path).root == load_spec(path).root == root / "datasets" / "s"
    assert calls == [root / "datasets" / "s"]


def test_generators_and_converters_exist():
    for address in (*config.GENERATORS.values(), *config.CONVERTERS.values()):
        assert callable(config.load_function(address))


def zip_of(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("prefix", ["", "mini/"])
def test_a_zip_is_unpacked_once_and_its_yaml_used(root, tmp_path, prefix):
    text = "path: ../somewhere/else\ntrain: images\nval: images\nnames: [a]\ndownload: https://h/a.zip\n"
    archive = zip_of(tmp_path / "mini.zip", {f"{prefix}data.yaml": text, f"{prefix}images/1.jpg": "x"})
    found = load_spec(archive)
    assert found.root == tmp_path / "datasets" / "mini" and found.train == (found.root / "images",)
    before = (found.root / "data.yaml").stat().st_mtime_ns
    assert load_spec(archive).source == found.root / "data.yaml"
    assert (found.root / "data.yaml").stat().st_mtime_ns == before
    (found.root / "images" / "1.jpg").write_text("changed by the user")
    with pytest.raises(UserError, match="exists and holds other files"):
        load_spec(archive)


def test_zips_that_cannot_be_used_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_spec(tmp_path / "gone.zip")
    with pytest.raises(UserError, match="no YAML"):
        load_spec(zip_of(tmp_path / "empty.zip", {"a.txt": "x"}))
    with pytest.raises(UserError, match="leaves the folder"):
        load_spec(zip_of(tmp_path / "evil.zip", {"d.yaml": "x", "../../evil.yaml": "x"}))
    (tmp_path / "text.zip").write_text("x")
    with pytest.raises(UserError, match="neither a zip nor a tar"):
        load_spec(tmp_path / "text.zip")
    assert not (tmp_path / "datasets").exists() and not list(tmp_path.rglob("evil.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_name_a_way_to_get_their_data(root, name, monkeypatch):
    monkeypatch.chdir(root)
    content = yaml.safe_load((ROOT / "data" / name).read_text(encoding="utf-8"))
    names = parse_names(content["names"], None, name)
    sources, refusal = config.parse_download(content["download"]) if "download" in content else ([], "")
    assert not refusal and (sources or content["generate"] == "shapes")
    assert (
        len(names)
        == {"coco": 80, "coco128": 80, "VOC": 20, "VisDrone": 10, "SODA10M": 6, "bccd": 3, "shapes": 4}[Path(name).stem]
    )
    with pytest.raises(UserError, match="Dataset not found"):
        load_spec(content | {"generate": None}, download=False)


def test_real_descriptions_are_found(datasets_dir):
    for name in ("bccd", "coco128"):
        found = load_spec(datasets_dir / name / f"{name}.yaml", download=False)
        assert found.root.samefile(datasets_dir / name) and found.train[0].is_dir()
        assert found.names == load_spec_names(name)


def load_spec_names(name):
    return yaml.safe_load((ROOT / "data" / f"{name}.yaml").read_text(encoding="utf-8"))["names"]
