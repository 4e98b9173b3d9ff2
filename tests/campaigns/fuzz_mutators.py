"""Changes to valid files for `fuzz.py`: text, bytes, and the parts inside containers.

Blind changes rarely get past a checksum or an archive's directory, so zip members, PNG chunks and tar headers are
changed inside and closed again with right checksums; one change in four is blind all the same. Every function takes
(data, generator, tokens): tokens are words of the format, put in as a whole.
"""

from __future__ import annotations

import contextlib
import io
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence

Mutator = Callable[[bytes, random.Random, Sequence[bytes]], bytes]

MAX_BYTES = 1 << 15  # changed inputs are cut here
BLIND_SHARE = 0.25
CHANGES = (1, 1, 1, 2, 3, 4)  # made at once
NUMBERS = (
    *(b"0", b"-1", b"1", b"2", b"1e308", b"-1e308", b"1e999", b"nan", b"inf", b"-inf", b".nan", b".inf", b"1e-320"),
    *(b"99999999999999999999", b"2147483648", b"9223372036854775808", b"0.5", b"1_0", b"0x10", b"1e7", b"1000000000"),
)
PNG_START = b"\x89PNG\r\n\x1a\n"
TAR_BLOCK, TAR_CHECKSUM = 512, slice(148, 156)


def mutate_text(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Makes one or a few changes: words, numbers, lines and single bytes."""
    return _changed(_TEXT_CHANGES, data, rng, tokens)


def mutate_bytes(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Makes one or a few changes, most of them near the beginning, where headers are."""
    return _changed(_BYTE_CHANGES, data, rng, tokens)


def _changed(changes: Sequence[Callable], data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    content = bytearray(data)
    for _ in range(rng.choice(CHANGES)):
        rng.choice(changes)(content, rng, tokens or NUMBERS)
    return bytes(content[:MAX_BYTES])


def _span(content: bytearray, rng: random.Random, longest: int = 16) -> slice:
    """Picks a short run of bytes, in half of the cases among the first 64."""
    end = min(len(content), 64) if rng.random() < 0.5 else len(content)
    start = rng.randint(0, end)
    return slice(start, start + rng.randint(1, longest))


def _delete(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    del content[_span(content, rng)]


def _repeat(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    run = _span(content, rng, 64)
    content[run.start : run.start] = content[run] * rng.choice((1, 1, 2, 8, 64))


def _truncate(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    del content[rng.randint(0, len(content)) :]


def _insert_token(content: bytearray, rng: random.Random, tokens: Sequence[bytes]) -> None:
    start = _span(content, rng).start
    content[start:start] = rng.choice(tokens)


def _overwrite_with_token(content: bytearray, rng: random.Random, tokens: Sequence[bytes]) -> None:
    start, token = _span(content, rng).start, rng.choice(tokens)
    content[start : start + len(token)] = token


def _replace_token(content: bytearray, rng: random.Random, tokens: Sequence[bytes]) -> None:
    """Puts one word of the format in another's place."""
    present = [token for token in tokens if token in content]
    if present:
        old = rng.choice(present)
        start = content.find(old, rng.randint(0, content.rfind(old)))
        content[start : start + len(old)] = rng.choice(tokens)


def _change_byte(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """Flips a bit, or sets a byte to an extreme or any value."""
    if content:
        at = min(_span(content, rng).start, len(content) - 1)
        flipped = content[at] ^ 1 << rng.randrange(8)
        content[at] = flipped if rng.random() < 0.5 else rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _set_number(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """Overwrites 2, 4 or 8 bytes with an extreme number, in either byte order."""
    width = rng.choice((2, 4, 8))
    value = rng.choice((0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), rng.randrange(1 << 16)))
    start = _span(content, rng).start
    content[start : start + width] = value.to_bytes(width, rng.choice(("little", "big")))


def _replace_word(content: bytearray, rng: random.Random, tokens: Sequence[bytes]) -> None:
    """Puts a number, a word of the format or nothing in the place of a word."""
    words = bytes(content).translate(_SEPARATORS).split()
    if words:
        old = rng.choice(words)
        start = content.find(old)
        content[start : start + len(old)] = rng.choice(rng.choice((NUMBERS, NUMBERS, tokens, (b"",))))


def _move_line(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """Moves, doubles or drops a line."""
    lines = bytes(content).split(b"\n")
    line = lines.pop(rng.randrange(len(lines)))
    for _ in range(rng.randint(0, 2)):
        lines.insert(rng.randint(0, len(lines)), line)
    content[:] = b"\n".join(lines)


_SEPARATORS = bytes(32 if chr(code) in "\n\r\t,:;[]{}()<>\"'=" else code for code in range(256))
_SHARED = (_delete, _repeat, _insert_token, _replace_token, _truncate, _change_byte, _change_byte)
_TEXT_CHANGES = (*_SHARED, *(_replace_word,) * 4, _insert_token, _move_line)
_BYTE_CHANGES = (*_SHARED, *(_change_byte, _set_number) * 2, _overwrite_with_token)


def mutate_image(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Changes the chunks of a PNG, with right checksums, or the bytes of another image."""
    if not data.startswith(PNG_START) or rng.random() < BLIND_SHARE:
        return mutate_bytes(data, rng, tokens)
    chunks, position = [], len(PNG_START)
    while position + 8 <= len(data) and len(chunks) < 64:
        length, kind = struct.unpack_from(">I4s", data, position)
        chunks.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    change, index = rng.random(), rng.randrange(max(len(chunks), 1))
    if chunks and change < 0.7:
        kind, content = chunks[index]
        chunks[index] = (kind, mutate_bytes(content, rng, tokens))
    elif chunks and change < 0.8:
        chunks.insert(index, rng.choice(chunks))
    elif chunks and change < 0.9:
        del chunks[index]
    else:
        chunks.insert(index, (rng.choice((b"eXIf", b"iCCP", b"tRNS", b"PLTE", b"zTXt", b"acTL", b"fdAT")), b"\0" * 8))
    return PNG_START + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def read_zip(data: bytes) -> list[tuple[str, bytes]]:
    """Returns a zip's members; those before the first that cannot be read, of a damaged one."""
    members = []
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist()[:64]:
            if info.file_size <= MAX_BYTES:
                members.append((info.filename, archive.read(info)))
    return members


def write_zip(members: Sequence[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", compression) as archive:
        warnings.simplefilter("ignore")  # names that stand twice are wanted
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name) if isinstance(name, str) else name, content, compression)
    return target.getvalue()


def mutate_zip(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Changes, drops or doubles members of a zip, or its bytes; pickles and text inside it get the tokens."""
    members = read_zip(data) if rng.random() > BLIND_SHARE else []
    if not members:
        return mutate_bytes(data, rng, tokens)
    # the pickle of a checkpoint is worth more tries than the numbers beside it
    pickles = [at for at, (name, _) in enumerate(members) if name.endswith("data.pkl")]
    index = rng.choice(pickles) if pickles and rng.random() < 0.5 else rng.randrange(len(members))
    name, content = members[index]
    change = rng.random()
    if change < 0.8:
        change_content = mutate_npy if content.startswith(b"\x93NUMPY") else mutate_bytes
        members[index] = (name, change_content(content, rng, tokens))
    elif change < 0.87:
        del members[index]
    elif change < 0.94:
        members[index] = (name, rng.choice(members)[1])
    else:
        members.insert(rng.randrange(len(members) + 1), (rng.choice(members)[0] + rng.choice(("", "x", "/")), content))
    return write_zip(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


_NPY_TYPES = (b"<f4", b"<f8", b"|u1", b"<i8", b"<i4", b"<U64", b"|O", b"|S4", b"<f2", b"<c8", b"<M8[s]", b"|V8", b"|b1")


def mutate_npy(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Changes a `.npy` file's numbers, or writes another kind and shape into its header."""
    end = 10 + int.from_bytes(data[8:10], "little")
    if rng.random() < 0.5:
        return data[:end] + mutate_bytes(data[end:], rng, NUMBERS)
    sides = [rng.choice((b"0", b"1", b"2", b"3", b"5", b"9" * rng.randint(1, 20))) for _ in range(rng.randint(0, 3))]
    order = rng.choice((b"False", b"True", b"None"))
    parts = (rng.choice(_NPY_TYPES), order, b", ".join(sides))
    header = b"{'descr': '%s', 'fortran_order': %s, 'shape': (%s,), }" % parts
    header = mutate_text(header, rng, tokens) if rng.random() < 0.3 else header
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + data[end:]


def mutate_archive(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Changes a zip or tar file, with right tar checksums, or makes a new one of the tokens as names."""
    if rng.random() < 0.3:
        names = [b"/".join(rng.choices(tokens, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4))]
        make = _new_zip if rng.random() < 0.5 else _new_tar
        return make([name.decode(errors="replace") for name in names], rng)
    if data.startswith(b"PK"):
        return mutate_zip(data, rng, tokens)
    content = bytearray(mutate_bytes(data, rng, tokens))
    if len(content) >= TAR_BLOCK and rng.random() > BLIND_SHARE:
        content[TAR_CHECKSUM] = b" " * 8
        content[TAR_CHECKSUM] = b"%06o\0 " % sum(content[:TAR_BLOCK])
    return bytes(content)


def _new_zip(names: Sequence[str], rng: random.Random) -> bytes:
    members = []
    for name in names:
        info = zipfile.ZipInfo(name)
        info.external_attr = rng.choice((0, 0o100644, 0o120777, 0o040755, 0o020666, rng.randrange(1 << 16))) << 16
        members.append((info, b"x" * rng.randrange(64)))
    return write_zip(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def _new_tar(names: Sequence[str], rng: random.Random) -> bytes:
    target = io.BytesIO()
    mode = rng.choice(("w", "w", "w", "w:gz", "w:bz2", "w:xz"))
    style = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with contextlib.suppress(ValueError), tarfile.open(fileobj=target, mode=mode, format=style) as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.type = rng.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, b"1", b"2", b"3", b"6", b"S"))
            entry.linkname = rng.choice(("", "/etc/passwd", "../out", "\0"))
            content = b"x" * rng.randrange(64) if entry.isfile() else b""
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
            if rng.random() < 0.1:  # a size that no content stands behind
                entry.size = rng.choice((1 << 20, 1 << 36, 1 << 62))
                archive.addfile(entry)
    return target.getvalue()
