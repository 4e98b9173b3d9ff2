"""Data set YAMLs (or a dict, or a zip holding one): read strictly, their folders found, missing data fetched.

A data set YAML runs nothing. `download:` is an address, a list of them, or mappings with `url` and, optionally,
`sha256`, `dir` (relative to the data set's folder) and `file` (where the address does not end in the file's name).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.archives import list_members, unpack
from utils.dataloaders.paths import image_to_label_path, native_separators
from utils.downloads import check_url, download_file, fetch, file_name_of
from utils.errors import UNPRINTABLE, UserError, did_you_mean, shown
from utils.files import ESCAPES_IN_QUOTES, ROOT, find_file, read_yaml
from utils.images import IMG_FORMATS
from utils.log import LOGGER

SPLITS = ("train", "val", "test")
YAML_SUFFIXES = (".yaml", ".yml")
KEYS = ("path", *SPLITS, "nc", "names", "kpt_shape", "download", "convert", "generate")
MAX_CLASSES = 100_000  # as in model YAMLs; far beyond any data set, it stops a number that would fill the memory
MAX_KEYPOINTS = 10_000
MAX_PATH = 1000  # characters of a folder or file as a YAML names it
DATASETS_DIR = ROOT.parent / "datasets"
# name -> module and function, imported when used; a generator is called with the folder to fill,
# a converter with the folder and the class names (it returns how many images it converted)
GENERATORS = {"shapes": "utils.tools.shapes:render"}
CONVERTERS = {
    "voc": "utils.tools.convert:convert_voc",
    "coco": "utils.tools.convert:convert_coco",
    "visdrone": "utils.tools.convert:convert_visdrone",
}
RUNS_NOTHING = (
    "Its 'download:' is a script, and a data set YAML runs nothing here: fetch the data yourself and put it in place, "
    "or use the YAML of that data set in data/."
)
DATA_SUFFIXES = {*(f".{form}" for form in IMG_FORMATS), ".csv", ".json", ".md", ".txt", ".xml", ".yaml", ".yml"}
DATA_NAMES = {"LICENCE", "LICENSE", "README"}
_KEYS = {"url", "sha256", "dir", "file"}


@dataclass(frozen=True)
class DataSpec:
    """A data set: where its images are and what its classes are called.

    Attributes:
        source: the YAML file; None for a dict.
        root: the folder that the splits lie in.
        train: image folders and list files, absolute; empty when the data set has no such split.
        val: the same.
        test: the same.
        names: class id to name, ids 0 to nc - 1 in order.
        kpt_shape: for labels of poses, the keypoints that follow each box and their numbers (2: x, y; 3: and how
            visible), which are not used; 0 keypoints say that there are none. None where the YAML does not say.
    """

    source: Path | None
    root: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...]
    names: dict[int, str]
    kpt_shape: tuple[int, int] | None = None

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)


def load_spec(
    data: str | Path | Mapping[str, Any], need: Sequence[str] = ("train", "val"), download: bool = True
) -> DataSpec:
    """Reads a data set description and makes sure that the splits needed are there.

    A relative `path`, or without one each split, is looked for from the YAML's own folder (a dict's is the working
    folder), then from the repository as in YOLOv5 6.1, then from the folder above the YAML's.

    Args:
        data: a YAML file's path or bare name (`coco128.yaml`), a zip holding one, an http(s) address of either, or
            the YAML's content.
        need: the splits that must exist.
        download: whether missing data may be fetched from the YAML's `download` addresses.

    Raises:
        UserError: no such file; YAML syntax; names and nc that do not make sense; a split that is missing, with all
            places that were tried.
    """
    source, content = _read(data, download)
    label = str(source or "The data set")
    if not isinstance(content, Mapping):
        raise UserError(f"{label}: 'train:', 'val:' and 'names:' are expected, not {type(content).__name__}.")
    lists = {key: value for key, value in content.items() if isinstance(value, (list, Mapping))}
    if content.get("names") is None and (hint := _misspelt(lists, ("names",))):
        raise UserError(f"{label}: has no 'names:'.{hint}")  # with `nc:` alone the classes would get other names
    names = parse_names(content.get("names"), content.get("nc"), label)
    kpt_shape = _parse_kpt_shape(content.get("kpt_shape"), label)
    layout = _Layout(content, source, label, need)
    root, paths, missing = layout.find(need)
    if missing:
        _obtain(layout, names, missing, download)
        root, paths, missing = layout.find(need)
        if missing:
            raise UserError(layout.not_found(missing, "What was fetched does not hold it either."))
    layout.warn_of_doubles(paths, need)
    return DataSpec(source, root, names=names, kpt_shape=kpt_shape, **paths)


def _read(data: str | Path | Mapping[str, Any], download: bool) -> tuple[Path | None, Any]:
    """Returns the YAML file and its content; one on the web is kept in the working folder."""
    if isinstance(data, Mapping):
        return None, data
    if str(data).startswith(("http://", "https://")):
        url, data = str(data), Path(file_name_of(str(data)))
        if not data.exists():
            if not download:
                raise UserError(f"--data {url}: downloads are off. Fetch the file yourself and give its path.")
            data = download_file(url, data)
    if str(data).lower().endswith(".zip"):
        path = _unpack_description(Path(data))
        content = read_yaml(path, as_text=("names",))
        if isinstance(content, Mapping):  # the data is where the YAML is, whatever it says
            content = {key: value for key, value in content.items() if key != "download"} | {"path": str(path.parent)}
        return path, content
    path = find_file(data, YAML_SUFFIXES, "--data").absolute()
    return path, read_yaml(path, as_text=("names",))


def _unpack_description(archive: Path) -> Path:
    """Unpacks a zipped data set into its folder among the data sets, once, and returns the YAML in it."""
    if not os.path.isfile(archive):
        raise UserError(f"--data '{archive}': no such file.")
    files = {member.name: member.size for member in list_members(archive) if not member.is_folder}
    yamls = [name for name in files if name.lower().endswith(YAML_SUFFIXES) and not name.startswith("__MACOSX/")]
    if not yamls:
        raise UserError(f"--data '{archive}': holds no YAML file that describes the data set.")
    own_folder = all(name.startswith(f"{archive.stem}/") for name in files)
    folder = DATASETS_DIR if own_folder else DATASETS_DIR / archive.stem
    sizes = [(folder / name, size) for name, size in files.items()]
    if not all(path.is_file() and path.stat().st_size == size for path, size in sizes):
        if (DATASETS_DIR / archive.stem).exists():
            raise UserError(
                f"--data '{archive}': {DATASETS_DIR / archive.stem} exists and holds other files. Move it away, or "
                "rename the zip."
            )
        unpack(archive, folder)
    return folder / min(yamls, key=lambda name: (name.count("/"), name))


def parse_names(names: Any, nc: Any, label: str) -> dict[int, str]:
    """Reads `names` (a list or an id-to-name mapping) and `nc` (optional where names are given).

    Args:
        names: as in the YAML; None when absent.
        nc: as in the YAML; None when absent.
        label: what messages call the description.

    Raises:
        UserError: neither is given, they disagree, or an id is missing, doubled or no number.
    """
    if nc is not None and (not isinstance(nc, int) or isinstance(nc, bool) or not 1 <= nc <= MAX_CLASSES):
        quoted = isinstance(nc, str) and nc.strip().isdecimal()
        why = "; here it stands in quotes, which make it text: leave them out" if quoted else ""
        raise UserError(f"{label}: 'nc: {shown(nc)}' must be a whole number from 1 to {MAX_CLASSES}{why}.")
    if names is None:
        if nc is None:
            raise UserError(f"{label}: has neither 'names:' nor 'nc:'. List the class names under 'names:'.")
        return {index: f"class{index}" for index in range(nc)}
    if isinstance(names, Mapping):
        names = _ordered_names(names, label)
    if not isinstance(names, (list, tuple)) or not names:
        raise UserError(f"{label}: 'names:' must be a list of class names or a mapping from 0, 1, 2, ... to names.")
    for index, name in enumerate(names):
        if not isinstance(name, (str, int, float)) or isinstance(name, bool) or not str(name).strip():
            raise UserError(
                f"{label}: the name of class {index} is {name!r:.80}, not text. Put it into quotes below 'names:'."
            )
        if UNPRINTABLE.search(str(name)):
            raise UserError(
                f"{label}: the name of class {index} is {name!r:.80}. Leave out what cannot be printed below 'names:'."
            )
    if nc is not None and nc != len(names):
        raise UserError(
            f"{label}: 'nc: {nc}' and the {len(names)} names under 'names:' disagree. Mend one, or leave 'nc:' out."
        )
    return {index: str(name) for index, name in enumerate(names)}


def _ordered_names(names: Mapping[Any, Any], label: str) -> list[Any]:
    by_id: dict[int, Any] = {}
    for key, name in names.items():
        if isinstance(key, bool) or not str(key).strip().isdecimal():
            raise UserError(f"{label}: '{shown(key)}' under 'names:' is not a class id (0, 1, 2, ...).")
        if int(key) in by_id:
            raise UserError(f"{label}: class id {int(key)} stands twice under 'names:'.")
        by_id[int(key)] = name
    gaps = [index for index in range(len(by_id)) if index not in by_id]
    if gaps:
        raise UserError(
            f"{label}: the {len(by_id)} ids under 'names:' must be 0 to {len(by_id) - 1}; {gaps[0]} is missing."
        )
    return [by_id[index] for index in range(len(by_id))]


def _parse_kpt_shape(value: Any, label: str) -> tuple[int, int] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, (list, tuple)) and all(type(number) is int for number in value) else ()
    if len(numbers) != 2 or not 0 <= numbers[0] <= MAX_KEYPOINTS or numbers[1] not in (2, 3):
        raise UserError(
            f"{label}: 'kpt_shape: {shown(value)}' must be [keypoints, 2] (x, y) or [keypoints, 3] (x, y, visibility), "
            f"such as [17, 3], with at most {MAX_KEYPOINTS} keypoints."
        )
    return numbers[0], numbers[1]


class _Layout:
    """Where a YAML says the data is, and where it is looked for."""

    def __init__(self, content: Mapping[str, Any], source: Path | None, label: str, need: Sequence[str]) -> None:
        """Reads `path`, the splits, `download`, `convert` and `generate`."""
        self.label = label  # what messages call the description
        base = content.get("path")
        if base is not None and not _is_path(base):
            raise UserError(f"{label}: 'path: {shown(base)}' must be a folder.{_escape_hint(base)}")
        self.entries = {split: _entries(content.get(split), split, label) for split in SPLITS}
        for split in need:
            if not self.entries[split]:
                hint = _misspelt(content, (split,))
                raise UserError(
                    f"{label}: has no '{split}:' (a folder of images, a list file, or a list of these).{hint}"
                )
        for key, table in (("convert", CONVERTERS), ("generate", GENERATORS)):
            value = content.get(key)
            if value is not None and not (isinstance(value, str) and value in table):
                near = did_you_mean(shown(value), table)
                raise UserError(f"{label}: '{key}: {shown(value)}' is unknown; there are {', '.join(table)}.{near}")
        self.convert, self.generate, self.download = map(content.get, ("convert", "generate", "download"))
        folder = source.parent if source else Path.cwd()
        path = Path(os.path.expanduser(native_separators(base or ".")))  # "~no-such-user" stays as it is
        own, self.home, parent = (Path(os.path.normpath(start / path)) for start in (folder, ROOT, folder.parent))
        self.roots = list(dict.fromkeys((own, self.home, parent)))  # absolute: all the same
        self.rooted = base is not None  # one root holds for all splits
        self.hint = _misspelt(content, ("path", "download", "convert", "generate"))

    def find(self, need: Sequence[str]) -> tuple[Path, dict[str, tuple[Path, ...]], dict[str, list[Path]]]:
        """Looks for the splits: with `path:` under the first root that holds all that are needed, else one by one.

        Returns:
            The root, the splits' folders and files, and where those of `need` that are missing were looked for.
        """
        roots: dict[str, Path] = {}
        missing: dict[str, list[Path]] = {}
        for group in [tuple(need)] if self.rooted else [(split,) for split in need]:
            root = next((root for root in self.roots if all(self._ready(split, root) for split in group)), None)
            for split in group:
                roots[split] = root or self.roots[0]
                if root is None:
                    missing[split] = self._tried(split)
        nowhere = [split for split in missing if not any(self._ready(split, root) for root in self.roots)]
        main = roots[need[0]] if need else self.roots[0]
        paths = {}
        for split in SPLITS:
            root = roots.get(split, main)
            first = tuple(self._places(entry, root)[0] for entry in self.entries[split])
            paths[split] = self._ready(split, root) or first
        return main, paths, {split: missing[split] for split in nowhere or missing}

    def warn_of_doubles(self, paths: Mapping[str, tuple[Path, ...]], need: Sequence[str]) -> None:
        """Warns where a split's entry means several folders or files that are there."""
        for split in need:
            for entry, taken in zip(self.entries[split], paths[split], strict=True):
                places = [place for root in self.roots for place in self._places(entry, root)]
                other = next((p for p in places if self._is_ready(p) and not os.path.samefile(p, taken)), None)
                if other:
                    LOGGER.warning(
                        f"WARNING: {self.label}: '{split}: {entry}' is there twice: {taken} is taken, not {other}. "
                        "An absolute 'path:' chooses."
                    )
                    break

    def not_found(self, missing: Mapping[str, list[Path]], hint: str) -> str:
        """Words which splits are missing and where they were looked for."""
        splits = "; ".join(f"'{split}' is at none of {', '.join(map(str, tried))}" for split, tried in missing.items())
        advice = hint or "Put the data there, or mend 'path:' and the splits."
        return f"Dataset not found. {self.label}: {splits}. {advice}{self.hint}"

    def _places(self, entry: str, root: Path) -> list[Path]:
        """Returns where an entry may be under `root`: `../train/images` of Roboflow's YAMLs means `train/images`."""
        places = [root / os.path.expanduser(entry)]
        if entry.startswith(("../", f"..{os.sep}")):
            beside_yaml = root == self.roots[0] and not self.rooted
            places.insert(0 if beside_yaml else 1, root / entry[3:])
        return [Path(os.path.normpath(place)) for place in places]

    def _ready(self, split: str, root: Path) -> tuple[Path, ...]:
        """Returns a split's folders and list files if all of them are there under `root`, else nothing."""
        entries = self.entries[split]
        found = [next(filter(self._is_ready, self._places(entry, root)), None) for entry in entries]
        return () if None in found else tuple(found)

    def _is_ready(self, place: Path) -> bool:
        if self.convert and os.path.isdir(place):  # images that are yet to be converted lack their folder of labels
            return os.path.isdir(Path(image_to_label_path(place / "image.jpg")).parent)
        return os.path.isdir(place) or os.path.isfile(place)  # a pipe or a device would be read without end

    def _tried(self, split: str) -> list[Path]:
        """Returns every place where the first missing entry of a split was looked for."""
        tried: list[Path] = []
        for entry in self.entries[split]:
            tried = [place for root in self.roots for place in self._places(entry, root)]
            if not any(map(self._is_ready, tried)):
                break
        return list(dict.fromkeys(tried))


def _entries(value: Any, split: str, label: str) -> list[str]:
    """Returns a split's entries as a list; empty when absent."""
    values = value if isinstance(value, (list, tuple)) else [] if value in (None, "") else [value]
    for item in values:
        if not _is_path(item) or not item.strip():
            raise UserError(
                f"{label}: '{split}:' must name folders or list files, not {item!r:.80}.{_escape_hint(item)}"
            )
    return [native_separators(item.strip()) for item in values]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_PATH and not UNPRINTABLE.search(value)


def _escape_hint(value: Any) -> str:
    """Says where control characters in a path come from: "images\\train" in double quotes has a tab in it."""
    return f" {ESCAPES_IN_QUOTES}." if isinstance(value, str) and UNPRINTABLE.search(value) else ""


def _misspelt(content: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """Returns " Found 'trian:'. Did you mean 'train'?" where an unknown key resembles one that is wanted and absent."""
    absent = [key for key in wanted if content.get(key) is None]
    unknown = [key for key in content if isinstance(key, str) and key not in KEYS]
    hints = ((key, did_you_mean(key[:MAX_PATH], absent)) for key in unknown[:100])
    return next((f" Found '{shown(key)}:'.{hint}" for key, hint in hints if hint), "")


def _obtain(layout: _Layout, names: dict[int, str], missing: Mapping[str, list[Path]], download: bool) -> None:
    """Gets missing data in the way that the YAML names, or says why not."""
    refusal = ""
    archives: list[Source] = []
    try:
        if layout.download is not None:
            archives, refusal = parse_download(layout.download)
    except UserError as error:
        reason = str(error) if "download" in str(error) else f"'download:' {error}"
        raise UserError(layout.not_found(missing, shown(reason, 400))) from error
    if archives and not download:
        archives, refusal = [], "Downloads are off, so its 'download:' addresses were not used."
    try:
        if obtain(layout, names, archives, list(missing)):
            return
    except UserError as error:
        raise UserError(layout.not_found(missing, str(error))) from error
    raise UserError(layout.not_found(missing, refusal))


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


def obtain(layout: _Layout, names: Mapping[int, str], sources: Sequence[Source], need: Sequence[str]) -> bool:
    """Renders, converts what lies there already, or downloads and converts, until the splits needed are there.

    What is rendered or downloaded comes into the data set's folder below the repository. When a download fails, the
    next start does not fetch those before it again.

    Returns:
        Whether they are there now.

    Raises:
        UserError: from a download, an archive or a converter.
    """

    def complete() -> bool:
        return not layout.find(need)[2]

    def convert(folder: Path) -> None:
        try:
            load_function(CONVERTERS[layout.convert])(folder, names)
        except OSError as error:
            raise UserError(f"{folder}: its annotations cannot be converted ({error}).") from error

    root = layout.home
    if layout.generate is not None:
        load_function(GENERATORS[layout.generate])(root)
    for folder in layout.roots if layout.convert is not None else ():
        if folder.is_dir() and folder != ROOT and not complete():
            convert(folder)
    if not sources or complete():
        return complete()
    LOGGER.info(f"Dataset not found in {root}: downloading {len(sources)} file(s)")
    _fetch_all(root, sources)
    if layout.convert is not None:
        convert(root)
    LOGGER.info(f"Dataset autodownload {'success, saved to' if complete() else 'failure in'} {root}")
    return complete()


def _fetch_all(root: Path, sources: Sequence[Source]) -> None:
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
    """Refuses to fetch data into hidden folders, where programs keep what they do."""
    place = folder.resolve()
    if place.is_relative_to(ROOT.parent):
        place = place.relative_to(ROOT.parent)
    if any(part.startswith(".") for part in place.parts):
        raise UserError(f"{folder}: data is not fetched into hidden folders. Give another 'path:'.")


def load_function(address: str) -> Callable:
    """Imports `package.module:function`."""
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)
