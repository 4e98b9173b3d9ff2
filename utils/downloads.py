"""Downloads: files over http(s), archives unpacked only after every member was checked, the released weights.

Nothing here is called unless a user asked for a download. URLs of other kinds than http and https are refused, a
hash is checked where one is known, and an interrupted or bad download leaves no file behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.archives import is_archive_name, unpack
from utils.errors import UserError, did_you_mean
from utils.files import atomic_write
from utils.log import LOGGER, progress

TIMEOUT_SECONDS = 10  # for connecting and for every read
ATTEMPTS = 4  # an interrupted transfer goes on where it stopped
BLOCK_BYTES = 1 << 20
HANDLERS = (
    *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
    *(urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler),
    *(urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler),
)


class Release(NamedTuple):
    """A file that YOLOv5 has published; `sha256` is of the whole file."""

    url: str
    sha256: str


RELEASE_REPOSITORY = "ultralytics/yolov5"
MIN_WEIGHTS_BYTES = 100_000  # less is a page about an error
_V7 = "https://github.com/ultralytics/yolov5/releases/download/v7.0/"
RELEASES = {  # COCO weights of the original project, release 7.0 (the architectures of 6.0 to 7.0 are the same)
    name: Release(_V7 + name, sha256)
    for name, sha256 in {
        "yolov5n.pt": "4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3",
        "yolov5s.pt": "8b3b748c1e592ddd8868022e8732fde20025197328490623cc16c6f24d0782ee",
        "yolov5m.pt": "61d933360ba5a7733a36764996c800287d973889d875227f5beedd2473a97a56",
        "yolov5l.pt": "2f603b7354c25454d1270663a14d8ddc1eea98e5eebc1d84ce0c6e3150fa155f",
        "yolov5x.pt": "9f27a794fa0308e2606f90565164571d6f0a0ba18a3ce2e5e5d323b71c157859",
        "yolov5n6.pt": "496c05a2b991da15acc6c4408c63da287f2513a46c6756618776d4dd71170781",
        "yolov5s6.pt": "95bda9019ada63f37338308d0c81a66047a6fbaba061abaff271ba9334cf2a6f",
        "yolov5m6.pt": "7afe7fa0f29a8351467200a2a5a33c7996d1155ed6636c7edd8ca70b14951c64",
        "yolov5l6.pt": "b357b77f646b0190912985937c44e2923441369d5fda69ba86da2aa919212618",
        "yolov5x6.pt": "257c991b216d625427dc4d9c7c76d6c6d93cf3732797538da34bdc02f97bfef0",
    }.items()
}


def attempt_download(file: str | Path, repo: str = RELEASE_REPOSITORY) -> str:
    """Returns the path of weights: a file as it is; a URL or a released name (`some/folder/yolov5s.pt`) is downloaded.

    Raises:
        UserError: no such file and no released one (the nearest names are shown), offline, the hash does not agree, or
            another repository than YOLOv5's, whose files are not known here.
    """
    target = Path(str(file).strip())
    if target.exists():
        return str(target)
    if str(file).startswith(("http://", "https://")):
        target = Path(file_name_of(str(file)))
        if not target.is_file():
            safe_download(target, str(file), min_bytes=MIN_WEIGHTS_BYTES)
        return str(target)
    if repo != RELEASE_REPOSITORY:
        raise UserError(f"{file}: releases of {repo} are not known here; give the file's URL instead.")
    release = RELEASES.get(target.name)
    if release is None:
        raise UserError(
            f"Weights '{file}': no such file, and not one of the released weights ({', '.join(RELEASES)})."
            f"{did_you_mean(target.name, RELEASES)}"
        )
    return str(download_file(release.url, target, release.sha256))


def safe_download(
    file: str | Path, url: str, url2: str | None = None, min_bytes: float = 1, error_msg: str = ""
) -> None:
    """Downloads a file from one URL, or from a second when the first fails or gives less than `min_bytes`.

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


def download_file(url: str, target: Path, sha256: str | None = None) -> Path:
    """Fetches one file over http(s) to `target`, whose folder is made; the file appears only once it is whole.

    Raises:
        UserError: offline or not found; cut short; not enough disk; the hash does not agree.
    """
    check_url(url)
    LOGGER.info(f"Downloading {url} to {target}...")
    with _folder(target.parent), atomic_write(target) as temporary:
        with open(temporary, "wb") as file:
            _transfer(url, file, target)
        if sha256 is not None:
            digest = hashlib.sha256()
            with open(temporary, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
            if digest.hexdigest() != sha256.lower():
                raise UserError(
                    f"{url}: what came ({os.path.getsize(temporary)} bytes, SHA-256 {digest.hexdigest()}) is not the "
                    f"known file (SHA-256 {sha256.lower()}); it was thrown away."
                )
    return target


def fetch(
    url: str,
    folder: Path,
    sha256: str | None = None,
    name: str | None = None,
    wanted: Callable[[str], bool] = bool,
    overwrite: bool = True,
) -> None:
    """Fetches a file into `folder`; an archive is unpacked there and then removed.

    Args:
        url: http or https.
        folder: made if need be.
        sha256: of the file or archive, when known.
        name: the file's name where the URL does not end in it.
        wanted: told a file's name, or that of each in an archive, says whether it may be put there.
        overwrite: take the place of files of the same names.

    Raises:
        UserError: a file that is not wanted or in the way; see `download_file` and `utils.archives.unpack`.
    """
    name = name or file_name_of(url)
    if not is_archive_name(name):
        if not wanted(name):
            raise UserError(f"{url}: is neither an archive nor a file of data.")
        if not overwrite and os.path.lexists(folder / name):
            raise UserError(f"{url}: {folder / name} is there already. Move it away.")
        download_file(url, folder / name, sha256)
        return
    with _folder(folder), tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        unpack(download_file(url, Path(temporary) / name, sha256), folder, wanted, overwrite)


def check_url(url: str) -> None:
    """Refuses everything but a plain http or https URL.

    Raises:
        UserError: naming the URL.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise UserError(f"'{url}' is not a URL: {error}.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or any(character.isspace() for character in url):
        raise UserError(f"'{url}' is not a URL to download from: it must begin with http:// or https://.")


def file_name_of(url: str) -> str:
    """Returns the file name that a URL ends in, its query left out.

    Raises:
        UserError: it ends in none.
    """
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    if not name or name.startswith(".") or set(name) & set('\\:*?"<>|\0'):
        raise UserError(f"'{url}' ends in no file name: give one with 'file:'.")
    return name


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; removes them again if what is done in it fails and leaves them empty."""
    folder = folder.absolute()
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be made ({error.strerror}).") from error
    try:
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # not empty, or gone
                path.rmdir()
        raise


def _transfer(url: str, file: BinaryIO, target: Path) -> None:
    """Copies what `url` gives into `file`, going on after interruptions where it is still the same file.

    Raises:
        UserError: offline, refused, cut short, or larger than the free disk.
    """
    opener = urllib.request.OpenerDirector()  # knows http and https alone: a redirection to anything else is an error
    for handler in HANDLERS:
        opener.add_handler(handler())
    reason = version = ""
    for _ in range(ATTEMPTS):
        if not version:  # nobody could tell whether the rest belongs to what is there
            file.seek(0)
            file.truncate()
        headers = {"User-Agent": "yolov5-slim"}
        if file.tell():
            headers |= {"Range": f"bytes={file.tell()}-", "If-Range": version}
        with _open(opener, urllib.request.Request(url, headers=headers)) as response:
            start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
            if response.status != http.client.PARTIAL_CONTENT:
                file.seek(0)
                file.truncate()
                version = _version(response)
            elif _version(response) not in ("", version) or start != str(file.tell()):  # some overlook what was asked
                reason, version = "the file was replaced meanwhile", ""
                continue
            length = response.headers.get("Content-Length")
            total = file.tell() + int(length) if length and length.isdigit() else None
            needed, free = (total or 0) - file.tell(), shutil.disk_usage(target.parent).free
            if needed > free:
                raise UserError(f"{target}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free.")
            reason = _copy(response, file, total, target.name)
        if not reason:
            return
    raise UserError(f"{url}: the download was cut short {ATTEMPTS} times ({reason}). Try again later.")


def _version(response: http.client.HTTPResponse) -> str:
    """Returns what tells a file from its successor of the same URL; empty where the server does not say."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")  # W/"..." need not be the same


def _open(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> http.client.HTTPResponse:
    url = request.full_url
    try:
        return opener.open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(f"{url}: the server answered {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url}: {urllib.parse.urlsplit(url).hostname} cannot be reached ({reason}). Offline? Fetch the file "
            "elsewhere and put it in place."
        ) from error


def _copy(response: http.client.HTTPResponse, file: BinaryIO, total: int | None, name: str) -> str:
    """Copies one response to the end of `file`; returns why it is not whole, or an empty string."""
    with progress(total=total, desc=name, unit="B") as bar:
        bar.update(file.tell())
        while True:
            try:
                block = response.read(BLOCK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                return str(error) or type(error).__name__
            if not block:
                break
            file.write(block)
            bar.update(len(block))
    if total is not None and file.tell() != total:
        return f"{file.tell()} of {total} bytes"
    return ""
