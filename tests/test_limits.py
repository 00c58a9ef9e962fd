"""Limits of control groups, as their files state them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vimfast import limits
from vimfast.limits import Memory, cpu_quota, memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_OWN", tmp_path / "own")
    monkeypatch.setattr(limits, "_MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:       8388608 kB\nMemFree: 1 kB\nMemAvailable:    6291456 kB\n")
    return tmp_path


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_control_groups_the_machine_is_the_limit(root: Path) -> None:
    assert cpu_quota() is None
    assert memory() == Memory(8 * GIB, 6 * GIB)


@pytest.mark.parametrize(("text", "quota"), [("400000 100000\n", 4), ("50000 100000\n", 0.5), ("max 100000\n", None)])
def test_the_cores_of_a_container(root: Path, text: str, quota: float | None) -> None:
    (root / "own").write_text("0::/\n")
    write(root, **{"cgroup__cpu.max": text})
    assert cpu_quota() == quota


def test_the_tightest_of_nested_groups_counts(root: Path) -> None:
    (root / "own").write_text("0::/job/step\n")
    write(root, **{"cgroup__job__cpu.max": "200000 100000", "cgroup__job__step__cpu.max": "800000 100000"})
    assert cpu_quota() == 2
    write(root, **{f"cgroup__job__memory.{name}": str(value * GIB) for name, value in (("max", 5), ("current", 4))})
    write(root, **{"cgroup__job__memory.stat": f"anon 1\ninactive_file {GIB}\n"})
    write(root, **{"cgroup__job__step__memory.max": "max\n"})
    assert memory() == Memory(5 * GIB, 2 * GIB)


def test_version_one(root: Path) -> None:
    (root / "own").write_text("4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n")
    write(root, **{"cgroup__cpu__job__cpu.cfs_quota_us": "-1", "cgroup__cpu__job__cpu.cfs_period_us": "100000"})
    assert cpu_quota() is None
    write(root, **{"cgroup__cpu__job__cpu.cfs_quota_us": "150000"})
    assert cpu_quota() == 1.5
    write(root, **{"cgroup__memory__memory.limit_in_bytes": "9223372036854771712"})
    write(root, **{"cgroup__memory__memory.usage_in_bytes": str(GIB)})
    write(root, **{"cgroup__memory__job__memory.limit_in_bytes": str(3 * GIB)})
    write(root, **{"cgroup__memory__job__memory.usage_in_bytes": str(2 * GIB)})
    assert memory() == Memory(3 * GIB, GIB)


def test_what_this_machine_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = memory()
    assert 0 < found.available <= found.total
    assert cpu_quota() is None or cpu_quota() > 0
