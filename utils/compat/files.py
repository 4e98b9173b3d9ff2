"""Files, run folders, downloads and data set descriptions by YOLOv5 6.1's signatures.

Over `utils.files`, `utils.download` and `utils.dataloaders.config`. Paths are returned as text where 6.1 does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.checkpoint import load_checkpoint, strip_checkpoint
from utils.dataloaders.config import SPLITS, YAML_SUFFIXES, load_spec
from utils.download import download_file, download_weights, fetch, file_name_of
from utils.errors import UserError
from utils.files import find_file, read_yaml
from utils.log import LOGGER

BYTES_PER_MB = 1 << 20
RELEASE_REPOSITORY = "ultralytics/yolov5"
MIN_WEIGHTS_BYTES = 100_000


class WorkingDirectory(contextlib.ContextDecorator):
    """Works in another folder for the time of a `with` block or a function."""

    def __init__(self, new_dir: str | Path) -> None:
        """Takes the folder to go to."""
        self.dir, self.cwd = new_dir, Path.cwd()

    def __enter__(self) -> None:
        """Goes there."""
        self.cwd = Path.cwd()
        os.chdir(self.dir)

    def __exit__(self, *_exception: object) -> None:
        """Comes back."""
        os.chdir(self.cwd)


def file_size(path: str | Path) -> float:
    """Returns the size of a file, or of all files in a folder, in MB (2^20 bytes); 0 where there is none."""
    path = Path(path)
    found = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in found if file.is_file()) / BYTES_PER_MB


def get_latest_run(search_dir: str | Path = ".") -> str:
    """Returns the newest `last*.pt` below a folder; empty where there is none."""
    found = sorted(Path(search_dir).rglob("last*.pt"), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else ""


def check_suffix(
    file: str | Path | Sequence[str | Path] = "yolov5s.pt", suffix: str | Sequence[str] = (".pt",), msg: str = ""
) -> None:
    """Refuses files of other suffixes than those given; what has none passes.

    Raises:
        UserError: naming the file and the suffixes.
    """
    allowed = [suffix] if isinstance(suffix, str) else list(suffix)
    for name in [file] if isinstance(file, (str, Path)) else file:
        own = Path(name).suffix.lower()
        if any(allowed) and own and own not in allowed:
            raise UserError(f"{msg}{name}: a file ending in {' or '.join(allowed)} is expected.")


def check_file(file: str | Path, suffix: str | Sequence[str] = "") -> str:
    """Returns the path of a file: as given, downloaded from a URL into the working folder, or found by its bare name.

    Raises:
        UserError: another suffix, no such file, or several of that name.
    """
    check_suffix(file, suffix)
    text = str(file)
    if not text or Path(text).exists():
        return text
    if text.startswith(("http://", "https://")):
        target = Path(url2file(text))
        return str(target if target.is_file() else download_file(text, target))
    return str(find_file(text))


def check_yaml(file: str | Path, suffix: Sequence[str] = YAML_SUFFIXES) -> str:
    """Returns the path of a YAML file; see `check_file`."""
    return check_file(file, suffix)


def check_dataset(data: str | Path | Mapping[str, Any], autodownload: bool = True) -> dict[str, Any]:
    """Reads a data set YAML and makes sure that its images are there.

    Args:
        data: the file's path or bare name, a zip or an address of one, or its content.
        autodownload: whether missing data may be fetched from the addresses under `download`.

    Returns:
        The YAML's content, with `path`; `train`, `val` and `test` as absolute paths (text, or a list of several);
        `nc`; and `names`, a list.

    Raises:
        UserError: see `utils.dataloaders.config.load_spec`.
    """
    spec = load_spec(data, download=autodownload)
    content = dict(data) if isinstance(data, Mapping) else dict(read_yaml(spec.source))
    for split in SPLITS:
        places = [str(place) for place in getattr(spec, split)]
        content[split] = places[0] if len(places) == 1 else places or None
    return {**content, "path": spec.root, "nc": spec.nc, "names": list(spec.names.values())}


def url2file(url: str) -> str:
    """Returns the file name that an address ends in, its query left out."""
    return file_name_of(url)


def download(url: str | Iterable[str], dir: str | Path = ".", unzip: bool = True, threads: int = 1) -> None:
    """Downloads one or several files into a folder; archives are unpacked there and removed with `unzip`.

    Args:
        url: http or https addresses.
        dir: made if need be.
        unzip: whether to unpack.
        threads: how many are downloaded at once.

    Raises:
        UserError: one of them failed.
    """
    urls, folder = [url] if isinstance(url, str) else list(url), Path(dir)

    def get(address: str) -> None:
        if unzip:
            fetch(address, folder)
        else:
            download_file(address, folder / file_name_of(address))

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(get, urls):
            LOGGER.debug(f"{folder}: one more of {len(urls)} downloads done")


def safe_download(
    file: str | Path, url: str, url2: str | None = None, min_bytes: float = 1, error_msg: str = ""
) -> None:
    """Downloads a file from one address, or from a second when the first fails or gives less than `min_bytes`.

    Raises:
        UserError: both failed; ends in `error_msg`. No file is left behind.
    """
    reasons = []
    for address in (url, url2) if url2 else (url,):
        try:
            path = download_file(address, Path(file))
        except UserError as error:
            reasons.append(str(error))
            continue
        if path.stat().st_size >= min_bytes:
            return
        reasons.append(f"{address}: only {path.stat().st_size} bytes came, at least {min_bytes:g} were expected.")
        path.unlink()
    raise UserError(" ".join([*reasons, error_msg]).strip())


def attempt_download(file: str | Path, repo: str = RELEASE_REPOSITORY) -> str:
    """Returns the path of weights: a file as it is; a URL or a released name (`yolov5s.pt`) is downloaded.

    Raises:
        UserError: no such file and no released one, offline, or another repository than YOLOv5's, whose files are not
            known here.
    """
    text = str(file).strip().replace("'", "")
    if Path(text).exists():
        return text
    if text.startswith(("http://", "https://")):
        target = Path(url2file(text))
        if not target.is_file():
            safe_download(target, text, min_bytes=MIN_WEIGHTS_BYTES)
        return str(target)
    if repo != RELEASE_REPOSITORY:
        raise UserError(f"{text}: releases of {repo} are not known here; give the file's address instead.")
    return str(download_weights(text))


def strip_optimizer(f: str | Path = "best.pt", s: str | Path = "") -> None:
    """Reduces a checkpoint to what inference needs, in place or into the file `s`.

    Raises:
        UserError: not a checkpoint of this program's, or it cannot be written.
    """
    target = Path(s or f)
    if s:
        load_checkpoint(f)  # before anything is written
        shutil.copyfile(f, target)
    strip_checkpoint(target)
    saved = f" saved as {target}," if s else ""
    LOGGER.info(f"Optimizer stripped from {f},{saved} {target.stat().st_size / 1e6:.1f}MB")
