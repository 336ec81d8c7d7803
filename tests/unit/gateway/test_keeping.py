"""What keeps an Envoy going does not die with a fault of its own. Envoy is played by others here."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.config import GatewayConfig
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.gateway import app as module
from fastchat_grpc.gateway.app import GatewayApp
from fastchat_grpc.gateway.process import EnvoyProcess
from fastchat_grpc.rpc.supervise import Supervisor
from tests.conftest import eventually

CONFIG = GatewayConfig(node_id="n", envoy=Path(sys.executable))
LINE = "[2026-01-01 00:00:00.000][1][warning][main] [a.cc:1] {}"


async def read_log(envoy: EnvoyProcess, *said: str) -> None:
    """Let it read what an Envoy says, to the end."""
    script = "import sys\nfor line in sys.argv[1:]: sys.stderr.write(eval(line) + chr(10))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *map(repr, said), stderr=asyncio.subprocess.PIPE
    )
    envoy._read_log(process)
    assert envoy._reader is not None
    await asyncio.wait_for(envoy._reader.ended(), 30)
    await process.wait()


async def test_a_line_that_is_too_long_does_not_end_the_reading_of_envoys_log(caplog: pytest.LogCaptureFixture) -> None:
    envoy = EnvoyProcess(CONFIG, Supervisor())
    await read_log(envoy, LINE.format("first"), "x" * 100_000, LINE.format("last"))
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "envoy: first"
    assert "too long" in told[1]
    assert told[-1] == "envoy: last"
    assert all(record.levelno == logging.WARNING for record in caplog.records)


async def test_a_fault_in_reading_is_loud_and_the_reading_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    envoy = EnvoyProcess(CONFIG, Supervisor())
    say = envoy._say

    def faulty(line: str) -> None:
        if "second" in line:
            raise RuntimeError("a bug of ours")
        say(line)

    monkeypatch.setattr(envoy, "_say", faulty)
    await read_log(envoy, *map(LINE.format, ("first", "second", "third")))
    told = [record.getMessage() for record in caplog.records]
    assert [message for message in told if message.startswith("envoy: ")] == ["envoy: first", "envoy: third"]
    assert any("reading Envoy's log failed" in message for message in told)


class Played:
    """An EnvoyProcess that ends at once, or cannot be started."""

    made: list[Played]
    faults: list[Exception | None]
    status = 1

    def __init__(self, config: GatewayConfig, supervisor: Supervisor) -> None:
        self.pid = 0
        self.ports: dict[str, int] = {}
        self.over = asyncio.Event()
        self.made.append(self)

    async def start(self, module: Path | None = None) -> None:
        self.module = module
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        self.pid = len(self.made)

    async def wait(self) -> int:
        await self.over.wait()
        return self.status

    async def kill(self) -> None:
        self.over.set()

    async def stop(self, timeout_s: float) -> None:
        await self.kill()


@pytest.mark.parametrize("fault", [ConfigError("the port is in use"), OSError("no more descriptors")], ids=str)
async def test_an_envoy_that_cannot_be_started_again_at_once_is_started_later(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Played.made, Played.faults = [], []
    monkeypatch.setattr(module, "EnvoyProcess", Played)
    monkeypatch.setattr(module, "MIN_PAUSE_S", 0.01)
    gateway: Any = GatewayApp(CONFIG)
    await gateway.start()
    Played.faults = [fault, fault]
    Played.made[0].over.set()
    await eventually(lambda: len(Played.made) == 4 and gateway.pid == 4)
    assert str(fault) in caplog.text
    await gateway.stop()
    assert Played.made[-1].over.is_set()


WITH_MODULE = GatewayConfig(node_id="n", envoy=Path(sys.executable))


async def _with_module(monkeypatch: pytest.MonkeyPatch, *faults: Exception | None) -> Any:
    async def found(config: GatewayConfig, executable: Path) -> Path:
        return Path("/a/module.so")

    Played.made, Played.faults = [], list(faults)
    monkeypatch.setattr(module, "EnvoyProcess", Played)
    monkeypatch.setattr(module, "MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "resume_module", found)
    gateway = GatewayApp(WITH_MODULE)
    await gateway.start()
    return gateway


async def test_an_envoy_that_refuses_the_module_starts_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await _with_module(monkeypatch, ConfigError("Failed to load dynamic module"))
    assert [envoy.module for envoy in Played.made] == [Path("/a/module.so"), None]
    assert not gateway.resumes
    assert "Envoy does not start with it: Failed to load" in caplog.text
    await gateway.stop()


async def test_an_envoy_that_does_not_start_without_it_either_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="bad"):
        await _with_module(monkeypatch, ConfigError("bad"), ConfigError("bad"))


@pytest.mark.parametrize(("status", "resumes"), [(1, True), (-9, True), (-11, False), (-6, False)])
async def test_an_envoy_that_crashed_starts_without_the_module(
    status: int, resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await _with_module(monkeypatch)
    monkeypatch.setattr(Played, "status", status)
    Played.made[0].over.set()
    await eventually(lambda: len(Played.made) == 2 and gateway.pid == 2)
    assert gateway.resumes is resumes
    assert (Played.made[1].module is not None) is resumes
    await gateway.stop()
