"""A fleet of real processes that can be killed, frozen, drained and brought back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.errors import FastChatError
from fastchat_grpc.v1 import generation_pb2

START_TIMEOUT_S = 120.0
"""For a process to serve, and for the fleet to be whole: workers may load a model, all at once."""


class Member:
    """One controller or worker, at a port of its own, through all its lives."""

    def __init__(self, name: str, port: int, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.is_worker = arguments[0] == "worker"
        self.address = f"127.0.0.1:{port}"
        self._arguments = [*arguments, "--port", str(port), "--log-level", "warning"]
        self._log = log / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None
        self.busy = False
        """Whether a fault is being done to it; such a member does not count as live."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start the process; it is up when `answers`."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "fastchat_grpc",
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def answers(self) -> None:
        """Return when the process serves."""
        async with asyncio.timeout(START_TIMEOUT_S), AsyncClient(self.address, timeout_s=2.0) as client:
            while True:
                with suppress(FastChatError):
                    status = await client.status()
                    # A worker answers before its model is loaded, but is of no use until then; what a
                    # controller says is the state of its workers.
                    if not self.is_worker or status.load.state == generation_pb2.WORKER_STATE_SERVING:
                        return
                assert self._process is not None
                if self._process.returncode is not None:
                    raise RuntimeError(
                        f"{self.name} ended with {self._process.returncode}: {self._log.read_text()[-2000:]}"
                    )
                await asyncio.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the end of the process; its status."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """End the process, whatever state it is in."""
        if self._process is None or self._process.returncode is not None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(15):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def open_files(self) -> int:
        """File descriptors that the process holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class ChaosFleet:
    """Controllers, and workers that register with all of them.

    Args:
        backend: arguments of each worker that choose its backend and model.
        log: folder for the processes' logs.
    """

    def __init__(self, controllers: int, workers: int, backend: Sequence[str], log: Path) -> None:
        ports = free_ports(controllers + workers)
        self.controllers = [
            Member(f"controller-{i}", ports[i], ["controller", "--drain-timeout", "3"], log) for i in range(controllers)
        ]
        addresses = ",".join(member.address for member in self.controllers)
        common = ["worker", *backend, "--controller-address", addresses, "--drain-timeout", "2"]
        self.workers = [Member(f"worker-{i}", ports[controllers + i], common, log) for i in range(workers)]

    @property
    def members(self) -> list[Member]:
        return [*self.controllers, *self.workers]

    async def start(self) -> None:
        """Start everything and wait until every controller knows every worker."""
        for group in (self.controllers, self.workers):
            await asyncio.gather(*(member.start() for member in group))
            await asyncio.gather(*(member.answers() for member in group))
        await self.whole()

    async def whole(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when every controller has every worker, serving, and nothing runs."""
        async with asyncio.timeout(timeout_s):
            for controller in self.controllers:
                async with AsyncClient(controller.address, timeout_s=5.0) as client:
                    while await self._missing(client) is not None:
                        await asyncio.sleep(0.2)

    async def _missing(self, client: AsyncClient) -> str | None:
        try:
            listed = await client.workers()
        except FastChatError as error:
            return error.message
        here = {worker.worker_id for worker in listed if not worker.suspect}
        gone = {worker.address for worker in self.workers} - here
        if gone:
            return f"{sorted(gone)} are missing"
        for worker in listed:
            left = (worker.load.running_count, worker.load.waiting_count, worker.reserved_count)
            if any(left):
                return f"{worker.worker_id} still holds (running, waiting, reserved) {left}"
        return None

    async def stop(self) -> None:
        """End everything: workers first."""
        for group in (self.workers, self.controllers):
            await asyncio.gather(*(member.stop() for member in group))


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
