"""What a process holds, from Linux' /proc, and whether it holds ever more.

Private memory is what the process alone has written: pages shared with a parent or with other workers do not count, nor
do those of libraries, which are shared or not as other programs come and go. Whether a series grows is told by medians,
since allocators take memory in steps and Python frees cycles in batches: after the warm-up the rest is cut in halves,
and the second half's median is compared with the first's. A leak moves it by half of all that leaks, a peak by little
or nothing. The largest step between two samples is left out and told: an allocator that finds no hole large enough
takes more once, a leak goes on.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

WARM_UP = 0.2  # share of the items that passes before the series counts
LEAST_SAMPLES = 8  # that the series needs after the warm-up
TOLERANCE_MB = 2.0  # that one half's median may lie above the other's ...
TOLERANCE_SHARE = 0.02  # ... or this share of the level, where that is more
TOLERANCE_DESCRIPTORS = 0.5  # half of an open file: a median is whole, or lies between two
HEADING = (
    f"{'part':26} {'items':>7} {'s':>6} {'after warm-up':>14} {'at the end':>11} {'slope':>14} {'files':>11}  verdict"
)
UNITS = f"{'':26} {'':7} {'':6} {'MB':>14} {'MB':>11} {'KB/1000 items':>14} {'then, now':>11}"


class Usage(NamedTuple):
    """What processes hold at a moment, summed up."""

    private_mb: float
    resident_mb: float
    descriptors: int  # open files, sockets, pipes


class Sample(NamedTuple):
    """A moment of a run."""

    items: int  # done so far
    usage: Usage


class Growth(NamedTuple):
    """How a number moved from the first half of a series to the second."""

    first: float  # median
    second: float
    items: float  # between the halves' middles

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def per_thousand(self) -> float:
        return 1000 * self.difference / self.items


def require_linux() -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError(f"memory is read from Linux' /proc (4.14 or later), which {sys.platform} here does not have.")


def usage_of(pid: int | str = "self") -> Usage:
    """Reads what one process holds."""
    sizes_kb = dict.fromkeys(("Rss", "Private_Dirty", "Swap"), 0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if name in sizes_kb:
            sizes_kb[name] = int(value.split()[0])
    private_kb = sizes_kb["Private_Dirty"] + sizes_kb["Swap"]
    return Usage(private_kb / 1024, sizes_kb["Rss"] / 1024, len(os.listdir(f"/proc/{pid}/fd")))


def peak_resident_mb() -> float:
    """Returns the most memory that this process has had at once."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))


class Watch:
    """Takes samples while items pass, evenly over the run; of this process, of children, or of another process."""

    def __init__(self, total: int, pid: int | str = "self", samples: int = 200) -> None:
        """Begins a run of `total` items of which `samples` times a sample is taken."""
        self.samples: list[Sample] = []
        self._pid, self._every = pid, max(total // samples, 1)
        self._items = 0
        self._start_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start_s

    def passed(self, items: int = 1, children: Sequence[int] = ()) -> None:
        """Notes that more items are done; `children` are process ids whose memory counts too."""
        before, self._items = self._items, self._items + items
        if before // self._every == self._items // self._every:
            return
        parts = [usage_of(pid) for pid in (self._pid, *children)]
        self.samples.append(Sample(self._items, Usage(*(sum(column) for column in zip(*parts, strict=True)))))


def after_warm_up(samples: Sequence[Sample], warm_up: float = WARM_UP) -> list[Sample]:
    return [sample for sample in samples if sample.items > warm_up * samples[-1].items]


def growth_of(samples: Sequence[Sample], field: str, warm_up: float = WARM_UP) -> Growth:
    """Compares the halves of a series of a field of `Usage`, after its warm-up."""
    kept = after_warm_up(samples, warm_up)
    if len(kept) < LEAST_SAMPLES:
        raise UserError(
            f"{len(kept)} samples after the warm-up tell nothing, {LEAST_SAMPLES} are needed: --scale more."
        )
    halves = kept[: len(kept) // 2], kept[len(kept) // 2 :]
    first, second = (statistics.median(getattr(sample.usage, field) for sample in half) for half in halves)
    middles = [statistics.mean(sample.items for sample in half) for half in halves]
    return Growth(first, second, middles[1] - middles[0])


def largest_step_mb(samples: Sequence[Sample]) -> tuple[int, float]:
    """Returns before which sample private memory rises most, and by how much; (0, 0.0) where it never does."""
    memory = [sample.usage.private_mb for sample in samples]
    rises = [(after - before, number) for number, (before, after) in enumerate(pairwise(memory), start=1)]
    rise, number = max(rises, default=(0.0, 0))
    return (number, rise) if rise > 0 else (0, 0.0)


def memory_growth(samples: Sequence[Sample], warm_up: float = WARM_UP) -> Growth:
    """Compares private memory after the warm-up, in MB, its largest step left out."""
    kept = after_warm_up(samples, warm_up)
    number, rise = largest_step_mb(kept)
    lowered = [
        sample._replace(usage=sample.usage._replace(private_mb=sample.usage.private_mb - rise * (place >= number)))
        for place, sample in enumerate(kept)
    ]
    return growth_of(lowered, "private_mb", warm_up=0)


def complaints(samples: Sequence[Sample]) -> list[str]:
    """Says what grew beyond the tolerances; empty if all is flat."""
    memory, descriptors = memory_growth(samples), growth_of(samples, "descriptors")
    found = []
    if memory.difference > max(TOLERANCE_MB, TOLERANCE_SHARE * memory.first):
        found.append(f"memory +{memory.difference:.1f} MB")
    if descriptors.difference > TOLERANCE_DESCRIPTORS:
        found.append(f"open files +{descriptors.difference:g}")
    return found


def row(part: str, watch: Watch) -> str:
    memory, descriptors = memory_growth(watch.samples), growth_of(watch.samples, "descriptors")
    verdict = f"GROWS: {', '.join(complaints(watch.samples))}" if complaints(watch.samples) else "flat"
    _, step_mb = largest_step_mb(after_warm_up(watch.samples))
    if step_mb > TOLERANCE_MB:
        verdict += f", but for one step of {step_mb:.0f} MB"
    files = f"{descriptors.first:g}, {descriptors.second:g}"
    return (
        f"{part:26} {watch.samples[-1].items:7} {watch.seconds:6.0f} {memory.first:14.1f} {memory.second:11.1f} "
        f"{1024 * memory.per_thousand:14.0f} {files:>11}  {verdict}"
    )
