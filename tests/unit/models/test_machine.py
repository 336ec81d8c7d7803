"""Memory and processors from the numbers that count: what is available, and the container's limits."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.models.machine import available_memory, cpu_count, total_memory

GIB = 1024**3
MEMINFO = "MemTotal:       25276512 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nBuffers: 1 kB\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_page_cache_counts_as_available(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, {})) == 8 * GIB


V2 = {
    "proc/self/cgroup": "0::/kubepods/pod1/c1\n",
    "sys/fs/cgroup/kubepods/pod1/c1/memory.max": "max\n",
    "sys/fs/cgroup/kubepods/pod1/c1/memory.current": str(2 * GIB),
    "sys/fs/cgroup/kubepods/pod1/memory.max": str(4 * GIB),
    "sys/fs/cgroup/kubepods/pod1/memory.current": str(2 * GIB),
    "sys/fs/cgroup/kubepods/pod1/memory.stat": f"anon 5\nfile 7\ninactive_file {GIB}\n",
    "sys/fs/cgroup/kubepods/pod1/c1/cpu.max": "max 100000\n",
    "sys/fs/cgroup/kubepods/pod1/cpu.max": "150000 100000\n",
}
V2_IN_ITS_OWN_VIEW = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": str(4 * GIB),
    "sys/fs/cgroup/memory.current": str(2 * GIB),
    "sys/fs/cgroup/memory.stat": f"inactive_file {GIB}\n",
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/c1\n4:memory:/docker/c1\n1:name=systemd:/docker/c1\n",
    "sys/fs/cgroup/memory/docker/c1/memory.limit_in_bytes": str(4 * GIB),
    "sys/fs/cgroup/memory/docker/c1/memory.usage_in_bytes": str(2 * GIB),
    "sys/fs/cgroup/memory/docker/c1/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
    "sys/fs/cgroup/cpu,cpuacct/docker/c1/cpu.cfs_quota_us": "150000",
    "sys/fs/cgroup/cpu,cpuacct/docker/c1/cpu.cfs_period_us": "100000",
}
V1_MOUNTED_ALONE = {
    # A container sees its group's files at the mount, and the path of the host in /proc/self/cgroup.
    "proc/self/cgroup": "5:cpu:/docker/c1\n4:memory:/docker/c1\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(2 * GIB),
    "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
}


@pytest.mark.parametrize(
    "files", [V2, V2_IN_ITS_OWN_VIEW, V1, V1_MOUNTED_ALONE], ids=["v2", "v2 alone", "v1", "v1 alone"]
)
def test_a_containers_limits_count(files: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    root = machine(tmp_path, files)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**24}.__getitem__)  # 64 GiB
    assert available_memory(root) == 3 * GIB
    assert total_memory(root) == 4 * GIB
    assert cpu_count(root) == 2


def test_without_limits_the_machine_and_the_affinity_count(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    files = {
        "proc/self/cgroup": "5:cpu:/\n4:memory:/\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(30 * GIB),
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu.max": "max 100000",
    }
    root = machine(tmp_path, files)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**24}.__getitem__)
    assert available_memory(root) == 8 * GIB
    assert total_memory(root) == 64 * GIB
    assert cpu_count(root) == 3


def test_a_share_of_a_processor_is_one(tmp_path: Path) -> None:
    assert cpu_count(machine(tmp_path, {**V2, "sys/fs/cgroup/kubepods/pod1/cpu.max": "20000 100000"})) == 1


def test_a_container_that_is_full_has_nothing_left(tmp_path: Path) -> None:
    full = {**V2_IN_ITS_OWN_VIEW, "sys/fs/cgroup/memory.current": str(6 * GIB)}
    assert available_memory(machine(tmp_path, full)) == 0


@pytest.mark.parametrize("with_psutil", [True, False])
def test_a_system_without_proc_and_linuxs_calls_has_memory_and_processors(
    with_psutil: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    """macOS: no /proc, no control groups, no affinity, and a sysconf without SC_AVPHYS_PAGES."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    known, sysconf = {"SC_PHYS_PAGES": 1 << 22, "SC_PAGE_SIZE": 4096}, os.sysconf

    def of_macos(name: str) -> int:
        if name == "SC_AVPHYS_PAGES":
            raise ValueError(f"unrecognized configuration name {name}")
        return known.get(name) or sysconf(name)

    monkeypatch.setattr(os, "sysconf", of_macos)
    if not with_psutil:
        real = builtins.__import__

        def without(name: str, *rest: Any) -> Any:
            if name == "psutil":
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)
    assert available_memory(tmp_path) >= GIB if with_psutil else available_memory(tmp_path) == 8 * GIB
    assert cpu_count(tmp_path) == os.cpu_count()


def test_this_machine_has_some_of_both() -> None:
    assert available_memory() > 64 * 1024**2
    assert 1 <= cpu_count() <= (os.cpu_count() or 1)
