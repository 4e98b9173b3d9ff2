"""The energy meter on stand-ins for RAPL's counters and nvidia-smi; where neither is there it tells nothing."""

import os

import pytest

from utils import energy
from utils.energy import EnergyMeter


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """Two CPU packages, one with a part of its own that must not count twice; returns a function that sets them."""
    for name in ("intel-rapl", "intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000")

    def set_to(*microjoules):
        for name, value in zip(("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"), microjoules, strict=True):
            (tmp_path / name / "energy_uj").write_text(f"{value}\n")

    monkeypatch.setattr(energy, "RAPL", tmp_path)
    set_to(0, 0, 0)
    return set_to


def test_packages_add_up_and_counters_wrap(counter):
    counter(900_000_000, 5, 100)
    with EnergyMeter() as meter:
        counter(100_000_000, 7, 160_000_100)  # 200 J and 160 J
        assert meter.watt_hours() == pytest.approx({"cpu": 0.1})
        assert meter.watt_hours() == pytest.approx({"cpu": 0.1})
        assert meter.seconds > 0


def test_what_cannot_be_read_is_left_out(counter, tmp_path, monkeypatch):
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with EnergyMeter(["GPU-1"]) as meter:
        assert meter.watt_hours() == {}


def test_what_was_spent_before_counts(counter):
    meter = EnergyMeter()
    meter.load_state_dict({"seconds": 5000.0, "watt_hours": {"cpu": 2.0, "gpu": 3.0}})
    with meter:
        counter(360_000_000, 0, 0)
        assert meter.watt_hours() == pytest.approx({"cpu": 2.1, "gpu": 3.0})
        assert 5000 < meter.seconds < meter.state_dict()["seconds"] < 5100
        assert meter.state_dict()["watt_hours"] == pytest.approx({"cpu": 2.1, "gpu": 3.0})


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
@pytest.mark.parametrize(("told", "expected"), [("100.0\\n200.0", {"gpu": 300 * 36 / 3600}), ("[N/A]", {})])
def test_the_power_of_gpus_is_added_up_over_time(tmp_path, monkeypatch, told, expected):
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\n[ "$1 $2" = "-i GPU-1,GPU-2" ] && printf "{told}\\n"\n')
    script.chmod(0o755)
    monkeypatch.setattr(energy, "RAPL", tmp_path / "none")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    now = iter(range(0, 10_000, 36))
    monkeypatch.setattr(energy.time, "monotonic", lambda: float(next(now)))
    meter = EnergyMeter(["GPU-1", "GPU-2"])
    meter._read()
    assert meter.watt_hours() == pytest.approx(expected)
