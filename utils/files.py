"""Files: the repository's root, run folders, look-up by name, YAML in and out, writing that is all or nothing.

Not here: downloads (`utils.downloads`), checkpoints (`utils.checkpoint`), images (`utils.images`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import time
import uuid
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
SEARCHED_FOLDERS = ("data", "models", "utils")
MAX_YAML_BYTES = 1 << 20  # the names of 20,000 classes take half of it
MAX_YAML_NUMBER = 100  # characters
MAX_YAML_DEPTH = 64
ESCAPES_IN_QUOTES = r"In double quotes a backslash starts an escape (\t is a tab): write / for \, or use single quotes"
YAML_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*)[eE][-+]?[0-9]+$")  # 1e-3 too
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
ABANDONED_AFTER_S = 24 * 3600  # of no change, far above what clocks of machines that share a disk differ by


def read_yaml(path: str | Path, as_text: Sequence[str] = ()) -> Any:
    """Reads a YAML file as plain data; nothing in it can run.

    Args:
        path: the file.
        as_text: keys of the file's mapping below which numbers keep their text: names, for which 007 is no number.

    Raises:
        UserError: no such file, not UTF-8 text, too large or too deeply nested, uses aliases, or a syntax error; with
            the line and column where there is one.
    """
    import yaml

    try:
        size = os.path.getsize(path)
        if size > MAX_YAML_BYTES:
            raise UserError(f"{path}: {size} bytes is too large for a YAML file (at most {MAX_YAML_BYTES}).")
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text. Save the file in the encoding UTF-8.") from error
    try:
        _check_yaml_structure(path, text)
        loader = _yaml_loader()(text)
        document = loader.get_single_node()
        for key, value in document.value if as_text and isinstance(document, yaml.MappingNode) else ():
            for entry in value.value if key.value in as_text and isinstance(value, yaml.CollectionNode) else ():
                entry = entry[1] if isinstance(value, yaml.MappingNode) else entry  # the mapping's keys stay
                if entry.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
                    entry.tag = "tag:yaml.org,2002:str"
        return loader.construct_document(document) if document else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = error.problem or error.context
        if "escape" in problem:
            problem += f". {ESCAPES_IN_QUOTES}"
        raise UserError(f"{where}: YAML error: {problem}. Mend this line.") from error
    except (yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]  # also of a bad !!int or !!bool
        raise UserError(f"{path}: not a YAML file ({reason}).") from error


def _check_yaml_structure(path: str | Path, text: str) -> None:
    """Refuses nesting beyond MAX_YAML_DEPTH and aliases: small texts that grow without bound when built."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{path}:{line}: aliases (*{event.anchor}) are not accepted; write the value out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise UserError(f"{path}:{line}: nested more than {MAX_YAML_DEPTH} levels deep.")


def _yaml_loader() -> type:
    """Returns PyYAML's safe loader, reading 1e-3 as a number and refusing endless numbers and keys that stand twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # a scalar tagged !!map
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    continue  # PyYAML's own constructor refuses it
                if key in seen:
                    problem = f"key '{key}' stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep)

        def construct_number(self, node: Any) -> int | float:
            if len(node.value) > MAX_YAML_NUMBER:
                problem = f"a number of {len(node.value)} characters"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            integer = node.tag.endswith(":int")
            return self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+0123456789."))
    return Loader


def write_yaml(path: str | Path, data: Any) -> None:
    """Writes plain data as YAML in insertion order, all or nothing.

    Raises:
        UserError: the file cannot be written.
    """
    import yaml

    with atomic_write(path) as temporary:
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")


def temporary_beside(path: Path) -> Path:
    """Returns a hidden name of its own for what is written before it becomes `path`; makes no file."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there replaces `path` only once all of it is on disk.

    An interruption at any moment leaves the former file or the new one.

    Raises:
        UserError: the disk is full, the folder is missing or not writable, and so on; the former file is intact.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with contextlib.ExitStack() as cleaning:
            open(temporary, "xb").close()
            cleaning.callback(temporary.unlink, missing_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}). A former file of that name is intact.") from error
    with contextlib.suppress(OSError):  # makes the rename durable; Windows and some network file systems cannot
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_temporaries(folder: str | Path, name: str = "", abandoned: bool = False) -> list[Path]:
    """Removes what interrupted `atomic_write`s of files called `name` (any, when empty) left in `folder`.

    Args:
        folder: where to look; folders in it are left alone.
        name: of the file that was to be written.
        abandoned: spare what has changed within a day, which another process may be writing; without it the folder must
            be this run's own.

    Returns:
        What was removed; what cannot be removed stays.
    """
    removed = []
    for path in Path(folder).glob(".*.tmp"):
        parts = _TEMPORARY.fullmatch(path.name)
        if not parts or name not in ("", parts["name"]):
            continue
        with contextlib.suppress(OSError):  # another process was faster, or the folder is read-only
            if path.is_file() and not (abandoned and time.time() - path.stat().st_mtime < ABANDONED_AFTER_S):
                path.unlink()
                removed.append(path)
    return removed


def run_folder(project: str | Path, name: str) -> Path:
    """Returns the folder that `--project` and `--name` mean.

    Raises:
        UserError: the name is a path that leads out of the project, or there can be no folder of this path, or none
            that can be written to.
    """
    parts = re.split(r"[/\\]", str(name))
    if ".." in parts or not parts[0] and len(parts) > 1 or re.match("[A-Za-z]:", str(name)):
        raise UserError(f"--name '{name}': leads out of --project {project}. Give the folder of the runs as --project.")
    folder = Path(project) / name
    with _explain_output_errors(folder):
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)
        existing = next(path for path in folder.parents if os.path.exists(path))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))
    return folder


def increment_path(path: str | Path, exist_ok: bool = False, sep: str = "", mkdir: bool = False) -> Path:
    """Returns `path`, or the next free `path2`, `path3`, ... beside it.

    The number goes before a file's suffix and behind `sep`. With `mkdir` the folder is made by this call alone: two
    processes that start at once get different ones.

    Raises:
        UserError: the folder cannot be made, or nothing can be written into it.
    """
    path = Path(path)
    while True:
        target = path
        if not exist_ok and os.path.lexists(path):
            stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
            pattern = re.compile(re.escape(stem + sep) + r"(\d+)" + re.escape(suffix))
            numbers = [int(match[1]) for entry in path.parent.iterdir() if (match := pattern.fullmatch(entry.name))]
            target = path.with_name(f"{stem}{sep}{max([1, *numbers]) + 1}{suffix}")
        if not mkdir:
            return target
        with _explain_output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.mkdir(exist_ok=exist_ok)
            except FileExistsError:
                if exist_ok:
                    raise
                continue  # another process was faster
            with tempfile.TemporaryFile(dir=target):
                return target


@contextlib.contextmanager
def _explain_output_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else error
        raise UserError(
            f"{folder}: cannot be the output folder ({reason}). Choose another --project or --name."
        ) from error


def native_path(path: str | Path) -> str | bytes:
    """Returns a file's path as OpenCV takes it: as bytes where it is not UTF-8, which as a text would crash it."""
    text = os.fspath(path)
    return os.fsencode(text) if any("\ud800" <= character <= "\udfff" for character in text) else text


def find_file(name: str | Path, suffixes: Sequence[str] = (), what: str = "file") -> Path:
    """Finds a file by its path, or by its bare name below data/, models/ and utils/ of the repository.

    Args:
        name: a path, or a file name such as `yolov5s.yaml`.
        suffixes: the suffixes allowed, with dots; empty allows all.
        what: what the file is, for messages ("--cfg").

    Raises:
        UserError: another suffix, no such file (the nearest names are listed), or several of that name.
    """
    path = Path(name)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{what} '{name}': a file ending in {' or '.join(suffixes)} is expected here.")
    if os.path.isfile(path):  # unlike Path's it is just False for a name too long
        return path
    if os.path.isdir(path):
        raise UserError(f"{what} '{name}': is a folder, a file is expected here.")
    searched = [file for folder in SEARCHED_FOLDERS for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]
    hits = [file for file in searched if file.parts[-len(path.parts) :] == path.parts]
    if len(hits) > 1:
        raise UserError(f"{what} '{name}': several files have this name: {', '.join(map(str, hits))}. Give the path.")
    if hits:
        return hits[0]
    nearby = [*searched, *(path.parent.glob("*") if os.path.isdir(path.parent) else ())]
    names = {file.name for file in nearby if not suffixes or file.suffix.lower() in suffixes}
    where = f"not found here or below {', '.join(f'{folder}/' for folder in SEARCHED_FOLDERS)} of {ROOT}"
    raise UserError(f"{what} '{name}': {where}.{did_you_mean(path.name, names)}")
