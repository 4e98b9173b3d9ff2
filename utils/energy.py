"""How long something takes, and how much energy, where the machine tells.

The CPU's packages through RAPL (Linux shows its counters in /sys/class/powercap, on most systems to root alone), a
CUDA GPU through nvidia-smi, by its power every few seconds. What cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

RAPL = Path("/sys/class/powercap")
INTERVAL_S = 5.0  # RAPL's counters wrap, at the earliest, after minutes


class EnergyMeter:
    """Measures while it is open: `with EnergyMeter() as meter: ...; meter.watt_hours()`."""

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        """Takes the GPUs to measure, by what `nvidia-smi -i` takes: a UUID or a number."""
        self._gpus = list(gpus) if shutil.which("nvidia-smi") else []
        self._packages = sorted(RAPL.glob("intel-rapl:[0-9]*"))
        self._packages = [package for package in self._packages if package.name.count(":") == 1]
        self._joules: dict[str, float] = {}
        self._counters: dict[Path, int] = {}
        self._power: tuple[float, float] | None = None  # of the GPUs: when, watts
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.began = time.monotonic()

    def __enter__(self) -> EnergyMeter:
        """Begins; a thread reads where there is something to read."""
        self._read()
        if self._counters or self._power:
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends."""
        self._ended.set()

    @property
    def seconds(self) -> float:
        """Since it was made, and before."""
        return time.monotonic() - self.began

    def watt_hours(self) -> dict[str, float]:
        """Returns what was used until now by "cpu" and "gpu", as far as they tell."""
        self._read()
        return {name: joules / 3600 for name, joules in self._joules.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns what was spent until now, as plain data."""
        return {"seconds": self.seconds, "watt_hours": self.watt_hours()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what was spent before, as `state_dict` told it; to be called before it is opened."""
        self.began -= state["seconds"]
        self._joules = {name: 3600 * used for name, used in state["watt_hours"].items()}

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._read()

    def _read(self) -> None:
        with self._lock:
            for package in self._packages:
                with contextlib.suppress(OSError, ValueError):
                    now = int((package / "energy_uj").read_text())
                    used = now - self._counters.get(package, now)
                    if used < 0:  # it has begun anew
                        used += int((package / "max_energy_range_uj").read_text())
                    self._counters[package] = now
                    self._joules["cpu"] = self._joules.get("cpu", 0.0) + used / 1e6
            watts = self._gpu_watts()
            if watts is not None:
                when, before = time.monotonic(), self._power
                self._power = when, watts
                used = (when - before[0]) * (watts + before[1]) / 2 if before else 0.0
                self._joules["gpu"] = self._joules.get("gpu", 0.0) + used

    def _gpu_watts(self) -> float | None:
        if not self._gpus:
            return None
        command = ["nvidia-smi", "-i", ",".join(self._gpus), "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=INTERVAL_S, check=True).stdout
            return sum(float(line) for line in told.split())
        except (OSError, ValueError, subprocess.SubprocessError):
            self._gpus = []  # it does not tell ("[N/A]"), and would not later
            return None
