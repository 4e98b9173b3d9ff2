"""Getting a data set that is not there yet: rendering, downloading, converting, in the way its YAML names.

`download:` is an address, a list of them, or mappings with `url` and, optionally, `sha256`, `dir` (relative to the
data set's folder) and `file` (the file's name where the address does not end in it). Nothing in a YAML is run.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.checks import UserError
from utils.download import check_url, fetch, file_name_of
from utils.files import ROOT
from utils.images import IMG_FORMATS
from utils.log import LOGGER

# name -> module and function, imported when used; a generator is called with the folder to fill,
# a converter with the folder and the class names (it returns how many images it converted)
GENERATORS = {"shapes": "utils.data.shapes:render"}
CONVERTERS = {
    "voc": "utils.data.convert:convert_voc",
    "coco": "utils.data.convert:convert_coco",
    "visdrone": "utils.data.convert:convert_visdrone",
}
RUNS_NOTHING = (
    "Its 'download:' is a script, and a data set YAML runs nothing here: fetch the data yourself and put it in place, "
    "or use the YAML of that data set in data/."
)
DATA_SUFFIXES = {*(f".{form}" for form in IMG_FORMATS), ".csv", ".json", ".md", ".txt", ".xml", ".yaml", ".yml"}
DATA_NAMES = {"LICENCE", "LICENSE", "README"}
_KEYS = {"url", "sha256", "dir", "file"}


class Source(NamedTuple):
    """A file to fetch; `folder` is relative to the data set's."""

    url: str
    sha256: str | None = None
    folder: str = ".."
    file: str | None = None


def parse_download(value: Any) -> tuple[list[Source], str]:
    """Reads the value of `download:`.

    Returns:
        The files to fetch, and an empty string; or nothing, and why this value cannot be used.

    Raises:
        UserError: a mapping that does not make sense.
    """
    items = value if isinstance(value, list) else [value]
    sources = []
    for item in items:
        if isinstance(item, str) and re.fullmatch(r"https?://\S+", item.strip()):
            sources.append(Source(item.strip()))
        elif isinstance(item, Mapping):
            sources.append(_source_of(item))
        else:
            return [], RUNS_NOTHING
    for source in sources:
        check_url(source.url)
        if source.file is None:
            file_name_of(source.url)
    return sources, ""


def _source_of(item: Mapping[Any, Any]) -> Source:
    """Reads one mapping under `download:`."""
    unknown = [str(key) for key in item if key not in _KEYS]
    if unknown or not all(isinstance(value, str) for value in item.values()) or "url" not in item:
        raise UserError(f"'download:' takes text under {', '.join(sorted(_KEYS))} ('url' at least), not {dict(item)}.")
    folder, file, sha256 = item.get("dir", ".."), item.get("file"), item.get("sha256")
    if Path(folder).is_absolute() or Path(folder).parts.count("..") > (folder == "..") or ":" in folder:
        raise UserError(f"'download:' 'dir: {folder}' must lie within the data set's folder.")
    if file is not None and not re.fullmatch(r"[\w-][\w.-]*", file):
        raise UserError(f"'download:' 'file: {file}' must be a plain file name.")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"'download:' 'sha256: {sha256}' must be 64 hexadecimal digits.")
    return Source(item["url"], sha256, folder, file)


def obtain(
    root: Path,
    names: Mapping[int, str],
    sources: list[Source],
    convert: str | None,
    generate: str | None,
    is_complete: Callable[[], bool],
    folders: Sequence[Path] = (),
) -> bool:
    """Renders, converts what lies there already, or downloads and converts, until the data set is complete.

    Args:
        root: the data set's folder, for what is rendered or downloaded.
        names: its classes.
        sources: what may be downloaded.
        convert: a key of CONVERTERS, or None.
        generate: a key of GENERATORS, or None.
        is_complete: says whether the splits needed are there.
        folders: where data to be converted may lie; the first that makes the set complete ends the search.

    Returns:
        Whether they are there now.

    Raises:
        UserError: from a download, an archive or a converter.
    """
    if generate is not None:
        load_function(GENERATORS[generate])(root)
    for folder in folders if convert is not None else ():
        if folder.is_dir() and folder != ROOT and not is_complete():
            _convert(convert, folder, names)
    if is_complete() or not sources:
        return is_complete()
    LOGGER.info(f"Dataset not found in {root}: downloading {len(sources)} file(s)")
    _fetch_all(root, sources)
    if convert is not None:
        _convert(convert, root, names)
    LOGGER.info(f"Dataset autodownload {'success, saved to' if is_complete() else 'failure in'} {root}")
    return is_complete()


def _fetch_all(root: Path, sources: Sequence[Source]) -> None:
    """Fetches all files; when one fails, the next start does not fetch those before it again."""
    markers = [root / f".fetched-{hashlib.sha256(source.url.encode()).hexdigest()[:16]}" for source in sources]
    for source, marker in zip(sources, markers, strict=True):
        if marker.exists():
            LOGGER.info(f"{source.url} was fetched before (remove {marker} to fetch it again)")
            continue
        folder = Path(os.path.normpath(root / source.folder))  # `..` of a folder that is not there yet leads nowhere
        _check_place(folder)
        fetch(source.url, folder, source.sha256, source.file, wanted=is_data, overwrite=False)
        root.mkdir(parents=True, exist_ok=True)
        marker.touch()
    for marker in markers:
        marker.unlink(missing_ok=True)


def is_data(name: str) -> bool:
    """Says whether a file's name is that of an image, a label, a list or a text, and not hidden.

    What a data set YAML fetches must not become a program, wherever the YAML wants it to be put.
    """
    parts = name.split("/")
    plain = Path(name).suffix.lower() in DATA_SUFFIXES or parts[-1] in DATA_NAMES
    return plain and not any(part.startswith(".") and part != "." or part == "__MACOSX" for part in parts)


def _check_place(folder: Path) -> None:
    """Refuses to fetch data into hidden folders, where programs keep what they do.

    Raises:
        UserError: naming the folder.
    """
    place = folder.resolve()
    if place.is_relative_to(ROOT.parent):
        place = place.relative_to(ROOT.parent)
    if any(part.startswith(".") for part in place.parts):
        raise UserError(f"{folder}: data is not fetched into hidden folders. Give another 'path:'.")


def _convert(convert: str, folder: Path, names: Mapping[int, str]) -> None:
    """Runs a converter on a folder; errors of the disk in words."""
    try:
        load_function(CONVERTERS[convert])(folder, names)
    except OSError as error:
        raise UserError(f"{folder}: its annotations cannot be converted ({error}).") from error


def load_function(address: str) -> Callable:
    """Imports `package.module:function`."""
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)
