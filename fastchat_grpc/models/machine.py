"""Memory and processors that this process may use: what the machine has, or its container's share of that.

Free memory counts what the kernel gives back when asked (MemAvailable), not what lies idle (MemFree): after the
weights have been read the rest of memory is their page cache. Limits are those of control groups, of version 2 and
1, from the process's own group up to the root. On systems without them the functions say what the system says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as a number near 2**63."""


def available_memory(root: Path = ROOT) -> int:
    """Bytes that this process may still take. `root` is where /proc and /sys are."""
    free = _machine_memory(root)
    for group in _groups(root, "memory"):
        free = min(free, _left(group))
    return max(free, 0)


def total_memory(root: Path = ROOT) -> int:
    """Bytes that this process could have at most: the machine's, or its container's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        total = 8 * 1024**3
    for group in _groups(root, "memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        total = min(total, limit or _UNLIMITED)
    return total


def cpu_count(root: Path = ROOT) -> int:
    """Processors that this process may keep busy, at least 1; a share of one counts as a whole one."""
    count: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        count = min(count, _quota(group))
    return max(math.ceil(count), 1)


def _machine_memory(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return _memory_by_psutil()


def _memory_by_psutil() -> int:
    """macOS and others. psutil comes with accelerate; without it half of what there is."""
    try:
        import psutil  # type: ignore[import-untyped]

        return int(psutil.virtual_memory().available)
    except ImportError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 * 1024**3


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups that may limit `controller`, from its own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = (root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified")
        elif controller in controllers.split(","):
            mounts = (root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller)
        else:
            continue
        for mount in dict.fromkeys(mounts):
            group = mount / path.lstrip("/")
            # In a container with its own view of the groups the path may name nothing: its mount is its group.
            while group != mount and not group.is_dir():
                group = group.parent
            while True:
                yield group
                if group == mount:
                    break
                group = group.parent


def _left(group: Path) -> int:
    """Bytes that a group may still take: its limit, less what it holds and cannot give back."""
    limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _UNLIMITED:
        return _UNLIMITED
    return limit - used + _page_cache(group)


def _page_cache(group: Path) -> int:
    """Pages of files that were not used lately, which count as used and are given back when memory is short."""
    try:
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)
    except (OSError, ValueError):
        return 0


def _quota(group: Path) -> float:
    """Processors that a group may keep busy."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else math.inf


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
