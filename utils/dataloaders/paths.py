"""Which files belong to a data set: images in folders and list files, the label beside each, automatic splits.

Only names are dealt with here; nothing is opened but list files.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write
from utils.images import IMG_FORMATS
from utils.log import LOGGER

# Images of other programs and cameras; those that IMG_FORMATS has are read all the same
UNREAD_FORMATS = frozenset(
    "arw avif bpg cr2 cr3 exr gif hdr heic heif ico j2k jfif jp2 jpe jpx jxl jxr nef orf pbm pcx pfm pgm pnm ppm psd "
    "raf raw rw2 sr2 svg tga".split()
)
AUTOSPLIT_NAMES = ("train", "val", "test")


def list_images(sources: Sequence[Path]) -> list[str]:
    """Lists the images of folders (recursively) and of text files with one path per line, sorted; none that is hidden.

    An image that is listed twice stays twice. In a text file `./` stands for its own folder; another relative path is
    looked for from the text file's folder, then from the working folder.

    Raises:
        UserError: a source does not exist, cannot be read, or none of them names an image.
    """
    found = [image for source in sources for image in _images_of(Path(source))]
    if not found:
        raise UserError(
            f"No images found in {', '.join(map(str, sources)) or 'an empty list of sources'}. "
            f"Image files end in {', '.join(sorted(IMG_FORMATS))}."
        )
    return sorted(found)


def _images_of(source: Path) -> list[str]:
    """Lists one source's images as absolute paths."""
    try:
        if source.is_dir():
            return _images_below(source.absolute())
        content = source.read_bytes()
    except OSError as error:
        raise UserError(f"Error loading data from {source}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"Error loading data from {source}: {error}.") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"Error loading data from {source}: it is text in UTF-16. Save it in UTF-8.")
    lines = content.decode("utf-8-sig", errors="surrogateescape").splitlines()
    listed = [line.strip() for line in lines if line.strip()]
    others = [line for line in listed if not is_image(line)]
    if others:
        LOGGER.warning(
            f"WARNING: {source}: {len(others)} lines name no image and are left out, such as {others[0]!r:.80}"
        )
    images, twice = [], []
    for places in (_listed_places(path, source.absolute().parent) for path in listed if is_image(path)):
        there = [place for place in places if os.path.exists(place)] if len(places) > 1 else places
        images.append((there or places)[0])
        twice += [there] if len(there) > 1 else []
    if twice:
        LOGGER.warning(
            f"WARNING: {source}: {len(twice)} of its images are there twice, from its own folder and from the working "
            f"folder: {twice[0][0]} is taken, not {twice[0][1]}"
        )
    return images


def _images_below(top: Path) -> list[str]:
    """Lists the images of a folder and of those in it, and says what is passed over.

    A link to a folder that it lies in is not followed.
    """
    images, hidden, unread = [], [], []
    for folder, folders, names in os.walk(top, followlinks=True):
        here = Path(os.path.realpath(folder))
        hidden += [os.path.join(folder, name) for name in folders if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in links:
            if here.is_relative_to(os.path.realpath(os.path.join(folder, name))):
                folders.remove(name)
        for name in names:
            path, suffix = os.path.join(folder, name), suffix_of(name)
            if is_image(name):
                images.append(path)
            elif suffix in IMG_FORMATS:
                hidden.append(path)
            elif suffix in UNREAD_FORMATS - IMG_FORMATS and not is_hidden(name):
                unread.append(path)
    if hidden:
        LOGGER.info(f"{top}: {len(hidden)} hidden files and folders are passed over, such as {min(hidden)}")
    if unread:
        LOGGER.warning(
            f"WARNING: {top}: {len(unread)} images are left out, such as {min(unread)}: files of these kinds "
            f"({', '.join(sorted({suffix_of(path) for path in unread}))}) are not read. Convert them to JPEG or PNG."
        )
    return images


def _listed_places(text: str, folder: Path) -> list[str]:
    """Returns which absolute paths a list file's line may mean, the first one first; see `list_images`."""
    text = native_separators(text)
    if text.startswith((f".{os.sep}", "./")):
        return [os.path.join(folder, text[2:])]
    if os.path.isabs(text):
        return [os.path.abspath(text)]
    return list(dict.fromkeys((os.path.normpath(os.path.join(folder, text)), os.path.abspath(text))))


def native_separators(text: str) -> str:
    """Lets paths written on Windows be read elsewhere: backslashes become slashes unless such a file exists."""
    if "\\" in text and os.sep == "/" and not os.path.exists(text):
        return text.replace("\\", "/")
    return text


def suffix_of(path: str | Path) -> str:
    """Returns a path's suffix in lower case without the dot."""
    return os.path.splitext(path)[1][1:].lower()


def is_hidden(name: str) -> bool:
    """Says whether a file's or folder's name hides it: .ipynb_checkpoints, .Trash-1000, macOS's ._a.jpg."""
    return name.startswith(".") and name not in (".", "..")


def is_image(path: str) -> bool:
    """Says whether a file is an image by its name: it ends like one and is not hidden."""
    return suffix_of(path) in IMG_FORMATS and not is_hidden(re.split(r"[/\\]", path)[-1])


def image_to_label_path(path: str | Path, sep: str = os.sep) -> str:
    """Returns where an image's labels are: the last `/images/` becomes `/labels/`, the suffix `.txt`.

    Without `/images/` in its path the label file stands beside the image.

    Args:
        path: the image.
        sep: the separator between folders.
    """
    stem = os.path.splitext(str(path))[0]
    head, marker, tail = stem.rpartition(f"{sep}images{sep}")
    return f"{head}{sep}labels{sep}{tail}.txt" if marker else f"{stem}.txt"


def img2label_paths(img_paths: Sequence[str]) -> list[str]:
    """Returns the label file of each image."""
    return [image_to_label_path(path) for path in img_paths]


def autosplit(
    path: str | Path,
    weights: Sequence[float] = (0.9, 0.1, 0.0),
    annotated_only: bool = False,
    generator: np.random.Generator | None = None,
) -> dict[str, Path]:
    """Splits a folder of images at random into `autosplit_{train,val,test}.txt` beside it.

    Args:
        path: the image folder, searched recursively.
        weights: the chances of train, val and test.
        annotated_only: leave out images without a label file.
        generator: where the chances come from; by default the same split every time.

    Returns:
        The list files written, by split; a split without images gets none, and a former one is removed.

    Raises:
        UserError: no images, or weights that are no chances.
    """
    if len(weights) != len(AUTOSPLIT_NAMES) or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"autosplit: weights {tuple(weights)} must be three numbers of at least 0, not all 0.")
    images = list_images([Path(path)])
    if annotated_only:
        images = [image for image in images if os.path.isfile(image_to_label_path(image))]
    generator = generator or np.random.Generator(np.random.Philox(0))
    chances = np.asarray(weights, float) / sum(weights)
    choices = generator.choice(len(AUTOSPLIT_NAMES), size=len(images), p=chances)
    parent = Path(path).absolute().parent
    written = {}
    for number, split in enumerate(AUTOSPLIT_NAMES):
        target = parent / f"autosplit_{split}.txt"
        members = [Path(image) for image, choice in zip(images, choices, strict=True) if choice == number]
        if not members:
            target.unlink(missing_ok=True)
            continue
        text = "".join(f"./{image.relative_to(parent).as_posix()}\n" for image in members)
        with atomic_write(target) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        written[split] = target
    return written
