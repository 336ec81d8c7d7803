"""What this machine lets one process have: cores, memory, ports, and a folder for a Unix socket."""

from __future__ import annotations

import errno
import math
import os
import socket
import tempfile
from pathlib import Path

from fastchat_grpc.config import join_address
from fastchat_grpc.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")
SOCKET_PATH_BYTES = 100
"""Longest path of a Unix socket that all systems take (macOS: 103, Linux: 107)."""
GIB = 1024**3


def cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use: by its affinity, and no more than its cgroup's quota pays for."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(count, math.ceil(quota))) if quota is not None else count


def heap_bytes(cgroup: Path = CGROUP) -> int:
    """Most memory that a gateway should take: a quarter of what there is, from 512 MiB to 4 GiB."""
    limits = [_memory_limit(cgroup), _memory_of_machine()]
    return min(max(min(limit for limit in limits if limit) // 4, GIB // 2), 4 * GIB) if any(limits) else GIB


def short_folder(socket_name: str) -> Path:
    """A new folder in which a Unix socket of that name can be: under TMPDIR, or under /tmp where that is too long.

    Raises ConfigError where none can be made.
    """
    trouble = ""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        if len(os.fsencode(os.path.join(parent, "fastchat-grpc-12345678", socket_name))) > SOCKET_PATH_BYTES:
            trouble = f"{parent}: the path is too long for a Unix socket"
            continue
        try:
            return Path(tempfile.mkdtemp(prefix="fastchat-grpc-", dir=parent))
        except OSError as error:
            trouble = f"{parent}: {error.strerror or error}"
    raise ConfigError(f"no temporary folder for Envoy's files: set TMPDIR to a short path ({trouble})")


def refuse_taken(host: str, port: int) -> None:
    """Raise ConfigError where somebody listens on a port already: Envoy would share it with another Envoy."""
    if is_taken(host, port):
        raise ConfigError(f"Envoy cannot listen on {join_address(host, port)}: the port is in use")


def is_taken(host: str, port: int) -> bool:
    """Whether somebody listens on a port. Nobody does on 0, nor on a host that is none: who listens says that."""
    if port == 0:
        return False
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # As Envoy does it, but for SO_REUSEPORT: connections of before that are being closed are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nobody listens on now, all different. Raises ConfigError for a host that is none of this machine."""
    probes: list[socket.socket] = []
    try:
        for _ in range(count):
            family, kind, protocol, _, address = socket.getaddrinfo(
                host.strip("[]"), 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            probe = socket.socket(family, kind, protocol)
            probes.append(probe)
            probe.bind(address)
        return [probe.getsockname()[1] for probe in probes]
    except OSError as error:
        raise ConfigError(f"{host} is no address of this machine to listen on: {error.strerror or error}") from error
    finally:
        for probe in probes:
            probe.close()


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the cgroup has; None for no limit. Version 2, then version 1."""
    if (words := _words(cgroup / "cpu.max")) is not None:
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota, period = _words(cgroup / "cpu/cpu.cfs_quota_us"), _words(cgroup / "cpu/cpu.cfs_period_us")
    if quota is None or period is None or int(quota[0]) <= 0:
        return None
    return int(quota[0]) / int(period[0])


def _memory_limit(cgroup: Path) -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        words = _words(cgroup / name)
        if words is not None and words[0] != "max":
            return int(words[0])
    return None


def _memory_of_machine() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _words(path: Path) -> list[str] | None:
    try:
        return path.read_text().split() or None
    except OSError:
        return None
