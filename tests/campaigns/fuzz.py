"""Feeds changed files to every reader and shows which of them end in anything but a value or a refusal.

Each target (see `fuzz_targets.py`) runs in a process of its own, driven by atheris towards inputs that reach new code,
or, where atheris cannot be imported, by blind changes to valid files. A finding is another exception than `UserError`
or `ImageError`, a broken promise, more than a second or 500 MB for one input, or the end of the process. Findings of
the same kind and place count as one; the first input of each is kept in --out.

    python -m tests.campaigns.fuzz --target labels --count 200000 --seed 0
    python -m tests.campaigns.fuzz --target all
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import mmap
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import resource
except ImportError:  # Windows: memory is not watched there
    resource = None
try:
    import atheris
except ImportError:
    atheris = None

ROOT = Path(__file__).resolve().parents[2]
TARGET_NAMES = ("labels", "yaml", "data", "model", "hyp", "checkpoint", "cache", "image", "archive", "coco", "voc")
TARGET_NAMES += ("visdrone", "options", "lists")
SLOW_S, LARGE_BYTES = 1.0, 500 << 20  # of processor time and of memory, for one input
HUNG_S = 60  # of a process that has made no progress
PEAK_EVERY = 500  # inputs after which the peak of memory is forgotten
MOST_RESTARTS = 50
RAM_FOLDER = Path("/dev/shm")
_STATE = struct.Struct("<4Q")  # tried, accepted, refused, bytes of the input that follows
_STATE_BYTES = 1 << 17
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


class Finding(NamedTuple):
    """What went wrong with one input; `place` is the innermost line of ours."""

    kind: str
    place: str
    text: str
    data: bytes


class State:
    """How far a process has come, in a file that outlives it: counts, and the input that is being tried."""

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(bytes(_STATE_BYTES))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _STATE_BYTES)

    def begin(self, counts: tuple[int, int, int], data: bytes) -> None:
        self._map[: _STATE.size + len(data)] = _STATE.pack(*counts, len(data)) + data

    def counts(self) -> tuple[int, int, int]:
        return _STATE.unpack_from(self._map)[:3]

    def last_input(self) -> bytes:
        return self._map[_STATE.size : _STATE.size + _STATE.unpack_from(self._map)[3]]


class Judge:
    """Tries inputs on a target's probe and tells findings from what is allowed."""

    def __init__(self, probe: Any, refusals: tuple[type[Exception], ...], folder: Path):
        self.probe, self.refusals, self.folder = probe, refusals, folder
        self.tried = self.accepted = self.refused = 0
        self._accepted, self._usual_bytes = False, _forget_peak()

    def try_one(self, data: bytes) -> Finding | None:
        """Tries one input; one that is slow or large must be so twice, since first uses import libraries."""
        self.tried += 1
        finding = self._measured(data)
        if finding and finding.kind in ("slow", "large"):
            finding = self._measured(data)
        self._usual_bytes = _forget_peak() if finding or self.tried % PEAK_EVERY == 0 else self._usual_bytes
        if finding is None:
            self.accepted += self._accepted
            self.refused += not self._accepted
        return finding

    def _measured(self, data: bytes) -> Finding | None:
        start = time.process_time()
        try:
            self._accepted = self.probe(data, self.folder)
        except self.refusals:
            self._accepted = False
        except Exception as error:
            return Finding(type(error).__name__, _place(error), f"{type(error).__name__}: {error}", data)
        seconds, grown = time.process_time() - start, _peak_bytes() - self._usual_bytes
        if seconds > SLOW_S:
            return Finding("slow", "", f"{seconds:.1f} s of processor time", data)
        if grown > LARGE_BYTES:
            self._usual_bytes = _forget_peak()
            return Finding("large", "", f"{grown >> 20} MB of memory", data)
        return None


def _peak_bytes() -> int:
    """Returns the most memory that the process has had since `_forget_peak`; 0 where that cannot be told."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _forget_peak() -> int:
    """Sets the peak back to what is in use now, where the system can (Linux), and returns it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _place(error: BaseException) -> str:
    """Returns file and line of the innermost frame of this repository or, where there is none, of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith((f"{ROOT}/utils", f"{ROOT}/models"))]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).relative_to(ROOT) if ours else Path(frame.filename).name}:{frame.lineno}"


def changed_inputs(target: Any, seed: int) -> Iterator[bytes]:
    """Yields the target's seeds, then without end changed ones, some of them changed several times over."""
    rng = random.Random(seed)
    seeds = target.seeds()
    yield from seeds
    while True:
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
            data = target.mutate(data, rng, target.tokens)[: target.longest]
            yield data


# The process of one target --------------------------------------------------------------------------------------------


def run_child(name: str, count: int, seed: int, folder: Path) -> None:
    """Runs one target until `count` inputs have been tried; the parent reads what it leaves in `folder`."""
    with atheris.instrument_imports(include=["utils", "models", "PIL"]) if atheris else contextlib.nullcontext():
        from tests.campaigns.fuzz_targets import REFUSALS, TARGETS

        for module in TARGETS[name].modules:
            importlib.import_module(module)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    target, corpus = TARGETS[name], folder / "corpus"
    (folder / "files").mkdir(exist_ok=True)
    judge, state = Judge(target.probe, REFUSALS, folder / "files"), State(folder / "state")
    log = open(folder / "findings.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - open as long as the process

    def try_one(data: bytes) -> None:
        state.begin((judge.tried, judge.accepted, judge.refused), data)
        finding = judge.try_one(data)
        if finding:
            print(json.dumps(finding._replace(data=data.hex())), file=log, flush=True)
        if judge.tried >= count:
            state.begin((judge.tried, judge.accepted, judge.refused), b"")
            os._exit(0)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return target.mutate(data, random.Random(seed), target.tokens)[:max_size]

    if atheris is None:
        for data in changed_inputs(target, seed):
            try_one(data)
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(data)
    flags = ["-len_control=0", "-mutate_depth=2", "-rss_limit_mb=0", "-timeout=300"]
    flags += [f"-max_len={target.longest}", f"-artifact_prefix={folder}/", f"-seed={seed + 1}"]
    atheris.Setup(["fuzz", *flags, str(corpus)], try_one, custom_mutator=mutate)
    atheris.Fuzz()


# The campaign ---------------------------------------------------------------------------------------------------------


def run_target(name: str, count: int, seed: int, out: Path) -> dict[str, int]:
    """Runs one target in processes of its own; one that ends early is a finding, and another goes on.

    Prints a line of the table; returns how many inputs led to each kind of finding.
    """
    totals, findings, start, coverage = [0, 0, 0], {}, time.monotonic(), "-"
    base = RAM_FOLDER if RAM_FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=base) as folder:
        folder, command = Path(folder), [sys.executable, "-m", "tests.campaigns.fuzz", "--target", name]
        for restart in range(MOST_RESTARTS):
            (folder / "state").unlink(missing_ok=True)
            state, left = State(folder / "state"), count - totals[0]
            line = [*command, "--count", str(left), "--seed", str(seed + restart), "--child", str(folder)]
            with open(folder / "log", "wb") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
                end = _watch(subprocess.Popen(line, stdout=log, stderr=log, env=environment), state)
            said = (folder / "log").read_text(errors="replace")
            totals = [total + part for total, part in zip(totals, state.counts(), strict=True)]
            coverage = "/".join((_COVERAGE.findall(said) or [[coverage]])[-1])
            if end:
                totals[0] += 1
                last_words = "\n".join(said.splitlines()[-12:])
                _keep(Finding(end, "", last_words, state.last_input()), name, out, findings)
            if totals[0] >= count:
                break
        with contextlib.suppress(FileNotFoundError):
            for line in (folder / "findings.jsonl").read_text(encoding="utf-8").splitlines():
                finding = Finding(*json.loads(line))
                _keep(finding._replace(data=bytes.fromhex(finding.data)), name, out, findings)
    figures = "".join(f"{value:>9.0f}" for value in (*totals, len(findings), time.monotonic() - start))
    print(f"{name:<12}{figures}  {coverage}", flush=True)
    for key, times in findings.items():
        print(f"    {key}: {times} inputs", flush=True)
    return findings


def _watch(process: subprocess.Popen, state: State) -> str:
    """Waits for a process; returns what it ended of, an empty string where it ended well."""
    last, since = None, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(1)
            return "" if status == 0 else f"exit status {status}"
        if state.counts() != last:
            last, since = state.counts(), time.monotonic()
        elif time.monotonic() - since > HUNG_S * (1 if last and last[0] else 5):  # it starts slowly
            process.kill()
            process.wait()
            return "hung"


def _keep(finding: Finding, target: str, out: Path, findings: dict[str, int]) -> None:
    """Counts a finding, and writes the first of its kind and place to `out`."""
    key = f"{finding.kind} {finding.place}".strip()
    findings[key] = findings.get(key, 0) + 1
    if findings[key] == 1:
        name = f"{target}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.bin").write_bytes(finding.data)
        (out / f"{name}.txt").write_text(f"{key}\n{finding.text}\n", encoding="utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=(*TARGET_NAMES, "all"), default=["all"])
    parser.add_argument("--count", type=int, default=200_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-findings", help="kept inputs")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.target[0], options.count, options.seed, options.child)
    engine = "atheris, guided by coverage" if atheris else "blind changes (atheris cannot be imported here)"
    print(f"{options.count} inputs for each target, seed {options.seed}, {engine}, Python {sys.version.split()[0]}")
    heads = ("inputs", "accepted", "refused", "findings", "seconds")
    print(f"{'target':<12}{''.join(f'{head:>9}' for head in heads)}  edges/features/corpus")
    names = TARGET_NAMES if "all" in options.target else options.target
    kinds = sum(len(run_target(name, options.count, options.seed, options.out)) for name in names)
    if kinds:
        sys.exit(f"{kinds} kinds of findings; their inputs are in {options.out}")


if __name__ == "__main__":
    main()
