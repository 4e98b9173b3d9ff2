"""Files: nothing half written, nothing overwritten, nothing run, and every mistake named with its place."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils import files
from utils.errors import UserError
from utils.files import atomic_write, find_file, increment_path, read_yaml, remove_temporaries, write_yaml

ROOT = Path(__file__).resolve().parents[2]


def folder_names(folder):
    return sorted(path.name for path in folder.iterdir())


# Writing, all or nothing


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "last.pt"
    target.write_bytes(b"former")
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path and target.read_bytes() == b"former"
    assert target.read_bytes() == b"new" and folder_names(tmp_path) == ["last.pt"]


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")
def test_a_new_file_has_the_mode_that_the_user_asks_for(tmp_path):
    former = os.umask(0o027)
    try:
        write_yaml(tmp_path / "opt.yaml", {})
    finally:
        os.umask(former)
    assert (tmp_path / "opt.yaml").stat().st_mode & 0o777 == 0o640


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize(
    ("step", "error", "expected"),
    [
        ("body", FULL, UserError),
        ("body", KeyboardInterrupt(), KeyboardInterrupt),
        ("fsync", FULL, UserError),
        ("replace", FULL, UserError),
    ],
)
def test_a_write_that_fails_leaves_the_former_file_and_no_other(tmp_path, monkeypatch, step, error, expected, existed):
    target = tmp_path / "last.pt"
    if existed:
        target.write_bytes(b"former")
    if step != "body":
        monkeypatch.setattr(os, step, fail_with(error))
    with pytest.raises(
        expected, match=r"last.pt: cannot be written \(No space left" if expected is UserError else None
    ):
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"new")
            if step == "body":
                raise error
    assert folder_names(tmp_path) == ["last.pt"] * existed
    assert not existed or target.read_bytes() == b"former"


def test_a_folder_that_is_missing_or_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(UserError, match=f"{folder}.opt.yaml: cannot be written"):
            write_yaml(tmp_path / folder / "opt.yaml", {})


def test_a_file_system_that_cannot_sync_folders_still_takes_files(tmp_path, monkeypatch):
    sync, synced = os.fsync, []

    def sync_files_only(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            synced.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    write_yaml(tmp_path / "opt.yaml", {"epochs": 3})
    assert read_yaml(tmp_path / "opt.yaml") == {"epochs": 3}
    assert len(synced) == os.path.isdir("/proc/self/fd")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_write_leaves_the_former_file_and_a_temporary_that_is_cleared(tmp_path):
    target = tmp_path / "last.pt"
    target.write_bytes(b"former")
    (tmp_path / ".last.pt.bak.tmp.keep").touch()
    code = (
        "import os, signal, sys\nfrom utils.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(target)], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL and target.read_bytes() == b"former"
    assert remove_temporaries(tmp_path, "best.pt") == remove_temporaries(tmp_path, "last") == []
    (removed,) = remove_temporaries(tmp_path, "last.pt")
    assert removed.name.startswith(".last.pt.") and removed.suffix == ".tmp"
    assert folder_names(tmp_path) == [".last.pt.bak.tmp.keep", "last.pt"]


def test_temporaries_of_any_name_and_of_names_with_brackets_are_cleared(tmp_path):
    for name in (".a[1].pt.0123abcd.tmp", ".b.pt.0123abcd.tmp", ".mine.tmp"):
        (tmp_path / name).touch()
    assert [path.name for path in remove_temporaries(tmp_path, "a[1].pt")] == [".a[1].pt.0123abcd.tmp"]
    assert [path.name for path in remove_temporaries(tmp_path)] == [".b.pt.0123abcd.tmp"]
    assert folder_names(tmp_path) == [".mine.tmp"]


# Run folders


@pytest.mark.parametrize(
    ("present", "asked", "given"),
    [
        ([], "exp", "exp"),
        (["exp", "exp5"], "exp", "exp6"),  # gaps are not filled
        (["exp5"], "exp", "exp"),
        (["exp", "exp9", "exp10"], "exp", "exp11"),
        (["exp", "expert7", "exp3b", "myexp8", "exp4.txt"], "exp", "exp2"),
        (["v1.0", "v1.03"], "v1.0", "v1.04"),  # a folder has no suffix
        (["a+b", "a+b2", "aab9"], "a+b", "a+b3"),
    ],
)
def test_the_number_follows_the_highest_of_that_name(tmp_path, present, asked, given):
    for name in present:
        (tmp_path / name).mkdir()
    assert increment_path(tmp_path / asked) == tmp_path / given
    assert folder_names(tmp_path) == sorted(present)
    assert increment_path(tmp_path / asked, exist_ok=True) == tmp_path / asked


def test_a_files_number_stands_before_its_suffix(tmp_path):
    for name in ("bus.jpg", "bus4.jpg", "bus7.png"):
        (tmp_path / name).touch()
    assert increment_path(tmp_path / "bus.jpg").name == "bus5.jpg"
    assert increment_path(tmp_path / "bus.jpg", sep="_").name == "bus_2.jpg"


def test_processes_that_start_at_once_get_different_folders(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom utils.files import increment_path\nsys.stdin.readline()\n"
        "for _ in range(20):\n    print(increment_path(Path(sys.argv[1]) / 'exp', mkdir=True).name)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(4)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    names = [name for process in processes for name in process.communicate(timeout=60)[0].split()]
    assert sorted(names) == folder_names(tmp_path / "runs") and len(set(names)) == 80


def test_a_file_where_the_folder_or_its_parent_should_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    for exist_ok in (False, True):
        with pytest.raises(UserError, match="cannot be the output folder .*file.* Choose another --project"):
            increment_path(tmp_path / "file" / "exp", exist_ok, mkdir=True)
    with pytest.raises(UserError, match="file: cannot be the output folder"):
        increment_path(tmp_path / "file", exist_ok=True, mkdir=True)
    assert increment_path(tmp_path / "file", mkdir=True) == tmp_path / "file2"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_dangling_link_counts_as_taken(tmp_path):
    (tmp_path / "exp").symlink_to(tmp_path / "gone")
    assert increment_path(tmp_path / "exp", mkdir=True) == tmp_path / "exp2"


def test_an_existing_folder_that_takes_no_files_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "TemporaryFile", fail_with(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(UserError, match="cannot be the output folder .Read-only file system"):
        increment_path(tmp_path, exist_ok=True, mkdir=True)


def test_a_project_that_takes_no_folders_is_refused_before_the_work(tmp_path, monkeypatch):
    """The first folder above that is there decides; a run's folder that is there already need not be this run's."""
    (tmp_path / "exp").mkdir()
    locked = [tmp_path]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in locked)
    for project in (tmp_path, tmp_path / "runs" / "train"):
        with pytest.raises(UserError, match=f"cannot be the output folder .Permission denied: {tmp_path}.. Choose"):
            files.run_folder(project, "exp")
    locked[:] = [tmp_path / "exp"]
    assert files.run_folder(tmp_path, "exp") == tmp_path / "exp" and not (tmp_path / "runs").exists()


# YAML


def yaml_file(tmp_path, content):
    path = tmp_path / "data.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_yaml_comes_back_as_it_was_written_in_its_order(tmp_path):
    data = {"zebra": 1, "names": {0: "斑马", 1: "yes"}, "lr0": 0.01, "none": None, "list": [1, 2.5, "on", True]}
    write_yaml(tmp_path / "data.yaml", data)
    again = read_yaml(tmp_path / "data.yaml")
    assert again == data and list(again) == list(data)
    assert "斑马" in (tmp_path / "data.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr0: 1e-3\n", {"lr0": 0.001}),
        ("[1E5, -2e+2, .5e1, 1.5]", [1e5, -200.0, 5.0, 1.5]),
        ("[12, 1e, e3, '1e-3']", [12, "1e", "e3", "1e-3"]),
        (b"\xef\xbb\xbfnc: 3\r\nnames: [a, b, c]\r\n", {"nc": 3, "names": ["a", "b", "c"]}),
        ("# nothing\n", None),
    ],
)
def test_yaml_is_read_as_people_write_it(tmp_path, text, expected):
    assert repr(read_yaml(yaml_file(tmp_path, text))) == repr(expected)  # with the kinds of numbers


def test_numbers_below_some_keys_keep_their_text(tmp_path):
    path = yaml_file(tmp_path, "nc: 2\nnames: [007, 1e3, x]\nmore:\n  0: 010\n")
    assert read_yaml(path, as_text=["names", "more"]) == {"nc": 2, "names": ["007", "1e3", "x"], "more": {0: "010"}}


ALIAS_BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nc: 3\nnames: [a, b\ntrain: x\n", r"data.yaml:3:\d+: YAML error: .*Mend this line"),
        ("nc: 3\n\ttrain: x\n", r"data.yaml:2:1: YAML error: .*'\\t'"),
        ("nc: 3\ntrain: a: b\n", r"data.yaml:2:\d+: YAML error"),
        ("nc: 3\nval: x\nnc: 4\n", r"data.yaml:3:1: YAML error: key 'nc' stands twice"),
        ("names:\n  0: a\n  0: b\n", r"data.yaml:3:3: YAML error: key '0' stands twice"),
        ("a: 1\n? [x, y]\n: 2\n", r"data.yaml:2:\d+: YAML error"),
        (ALIAS_BOMB, r"data.yaml:2: aliases \(\*a\) are not accepted"),
        ("[" * 10_000, r"data.yaml:1: nested more than 64 levels deep"),
        ("- " * 10_000 + "x", r"data.yaml:1: nested more than 64 levels deep"),
        (
            "nc: 1\ndownload: !!python/object/apply:os.mkdir [x]\n",
            r"data.yaml:2:11: YAML error: could not determine a con",
        ),
        ("nc: !!int ''\n", r"data.yaml: not a YAML file"),
        ("nc: !!bool maybe\n", r"data.yaml: not a YAML file"),
        ("nc: !!timestamp soon\n", r"data.yaml: not a YAML file"),
        ("nc: !!timestamp [soon]\n", r"data.yaml:1:5: YAML error|not a YAML file"),
        ("nc: !!map x\n", r"data.yaml:1:5: YAML error"),
        ("nc: !!set x\n", r"data.yaml:1:5: YAML error"),
        ("day: 2020-99-99\n", r"data.yaml: not a YAML file \(month must be in 1..12"),
        (b"nc: 2\nnames: [caf\xe9, th\xe9]\n", r"data.yaml:2: not UTF-8 text"),
        (bytes(range(256)) * 4, r"data.yaml:2: not UTF-8 text"),
        (b"PK\x03\x04" + bytes(64), r"data.yaml: not a YAML file \(unacceptable character"),
        (b"x" * ((4 << 20) + 1), r"data.yaml: 4194305 bytes is too large"),
    ],
)
def test_what_is_wrong_in_a_yaml_is_said_with_its_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_yaml(yaml_file(tmp_path, content))


@pytest.mark.parametrize(("name", "reason"), [("missing.yaml", "No such file"), ("", "directory|denied")])
def test_a_yaml_that_cannot_be_opened_is_named(tmp_path, name, reason):
    with pytest.raises(UserError, match=f"cannot be read .*({reason})"):
        read_yaml(tmp_path / name)


# Looking files up


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a few files, and another folder as the working directory."""
    for name in ("models/yolov5s.yaml", "models/hub/yolov5s6.yaml", "data/coco128.yaml", "data/hyps/hyp.yaml"):
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(files, "ROOT", tmp_path / "repo")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "repo"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("yolov5s.yaml", "models/yolov5s.yaml"),
        ("yolov5s6.yaml", "models/hub/yolov5s6.yaml"),
        ("hub/yolov5s6.yaml", "models/hub/yolov5s6.yaml"),
        ("models/yolov5s.yaml", "models/yolov5s.yaml"),
        ("./coco128.yaml", "data/coco128.yaml"),
    ],
)
def test_a_bare_name_is_found_below_the_repository(repository, name, found):
    assert find_file(name, (".yaml", ".yml"), "--cfg") == repository / found


def test_a_path_goes_before_the_repository(repository):
    Path("yolov5s.yaml").touch()
    assert find_file("yolov5s.yaml") == Path("yolov5s.yaml")
    assert find_file(repository / "data" / "coco128.yaml") == repository / "data" / "coco128.yaml"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "yolov5z.yaml",
            r"--cfg 'yolov5z.yaml': not found here or below data/, models/, utils/ .*Did you mean 'yolov5s",
        ),
        ("my-coco.yaml", r"--cfg 'my-coco.yaml': not found .* Did you mean .*'my_coco.YAML'"),
        ("data/yolov5s.yaml", r"not found .*Did you mean 'yolov5s.yaml'"),
        ("q*.yaml", r"--cfg 'q\*.yaml': not found"),
        ("yolov5s.txt", r"--cfg 'yolov5s.txt': a file ending in .yaml or .yml is expected"),
        ("", r"--cfg '': a file ending in .yaml or .yml is expected"),
    ],
)
def test_a_missing_file_is_named_with_its_neighbours(repository, name, message):
    Path("my_coco.YAML").touch()
    with pytest.raises(UserError, match=message):
        find_file(name, (".yaml", ".yml"), "--cfg")


def test_several_files_of_a_name_are_listed(repository):
    (repository / "data" / "yolov5s.yaml").touch()
    with pytest.raises(UserError, match=r"several files have this name: .*data.yolov5s.yaml, .*models.yolov5s.yaml"):
        find_file("yolov5s.yaml")
    assert find_file("models/yolov5s.yaml") == repository / "models" / "yolov5s.yaml"


@pytest.mark.parametrize("name", ["folder.yaml", "."])
def test_a_folder_is_no_file(repository, name):
    Path("folder.yaml").mkdir()
    with pytest.raises(UserError, match=f"--data '{name}': is a folder"):
        find_file(name, (), "--data")
