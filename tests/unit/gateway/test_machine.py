"""What a gateway takes of its machine: cores, memory, and a folder for Envoy's socket."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from fastchat_grpc.errors import ConfigError
from fastchat_grpc.gateway import machine


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_threads_follow_quota_and_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.cores(tmp_path) == (quota or 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert machine.cores(tmp_path) == 1


def test_without_affinity_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert machine.cores(tmp_path) == 5


def test_memory_follows_the_cgroup(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("4294967296\n")
    assert machine.heap_bytes(tmp_path) == machine.GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.GIB // 2 <= machine.heap_bytes(tmp_path) <= 4 * machine.GIB


def test_the_folder_is_where_tmpdir_says_unless_a_socket_cannot_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    assert machine.short_folder("admin.sock").parent == short
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert machine.short_folder("admin.sock").parent == Path("/tmp")


def test_no_folder_at_all_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError, match="TMPDIR"):
        machine.short_folder("admin.sock")
