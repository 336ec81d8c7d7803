"""A fleet of real processes, and the network between them, that can be killed, frozen, cut and brought back."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.errors import FastChatError
from fastchat_grpc.v1 import generation_pb2
from tests.e2e.processes import free_port
from tests.integration.blackhole import Blackhole

START_TIMEOUT_S = 120.0
"""For a process to serve, and for the fleet to be whole: workers may load a model, all at once."""


class Member:
    """One process, at a port of its own, through all its lives.

    Args:
        address: where others reach it; leads through `proxy`, if it has one.
    """

    def __init__(
        self, name: str, port: int, arguments: Sequence[str], log: Path, proxy: Blackhole | None = None
    ) -> None:
        self.name = name
        self.kind = arguments[0]
        self.address = f"127.0.0.1:{proxy.port if proxy else port}"
        self.own_address = f"127.0.0.1:{port}"
        self.proxy = proxy
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
        async with asyncio.timeout(START_TIMEOUT_S), AsyncClient(self.own_address, timeout_s=2.0) as client:
            while not await self._serves(client):
                assert self._process is not None
                if self._process.returncode is not None:
                    raise RuntimeError(
                        f"{self.name} ended with {self._process.returncode}: {self._log.read_text()[-2000:]}"
                    )
                await asyncio.sleep(0.1)

    async def _serves(self, client: AsyncClient) -> bool:
        try:
            if self.kind == "gateway":
                await client.models()
                return True
            # A worker answers before its model is loaded, but is of no use until then; what a controller
            # says is the state of its workers.
            state = (await client.status()).load.state
            return self.kind != "worker" or state == generation_pb2.WORKER_STATE_SERVING
        except FastChatError:
            return False

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


@dataclass(frozen=True, kw_only=True)
class Group:
    """Workers of one model.

    Attributes:
        live: so many of them are left alone by faults at any time; 0: all may be away at once.
    """

    model: str
    workers: int
    backend: Sequence[str]
    live: int = 1


class ChaosFleet:
    """Controllers, workers that register with all of them, and a gateway before them.

    Workers advertise the address of a proxy, and reach each controller through one: the network of the storm.

    Args:
        log: folder for the processes' logs.
        gateway: whether there is an Envoy, in direct mode.
    """

    def __init__(self, controllers: int, groups: Sequence[Group], log: Path, *, gateway: bool = False) -> None:
        self.groups = {group.model: group for group in groups}
        count = sum(group.workers for group in groups)
        ports = iter(free_ports(2 * (controllers + count) + 1))
        self.controllers = [self._controller(i, next(ports), next(ports), log) for i in range(controllers)]
        self.workers = {
            group.model: [self._worker(group, i, next(ports), next(ports), log) for i in range(group.workers)]
            for group in groups
        }
        self.gateway = self._gateway(next(ports), log) if gateway else None

    def _controller(self, number: int, port: int, proxy: int, log: Path) -> Member:
        arguments = ["controller", "--drain-timeout", "3"]
        return Member(f"controller-{number}", port, arguments, log, Blackhole(f"127.0.0.1:{port}", proxy))

    def _worker(self, group: Group, number: int, port: int, proxy: int, log: Path) -> Member:
        through = ",".join(f"127.0.0.1:{member.proxy.port}" for member in self.controllers if member.proxy)
        arguments = ["worker", *group.backend, "--model-names", group.model, "--drain-timeout", "2"]
        arguments += ["--controller-address", through, "--worker-address", f"127.0.0.1:{proxy}"]
        return Member(f"{group.model}-{number}", port, arguments, log, Blackhole(f"127.0.0.1:{port}", proxy))

    def _gateway(self, port: int, log: Path) -> Member:
        addresses = ",".join(member.own_address for member in self.controllers)
        return Member("gateway", port, ["gateway", "--controller-address", addresses, "--concurrency", "1"], log)

    @property
    def all_workers(self) -> list[Member]:
        return [worker for group in self.workers.values() for worker in group]

    @property
    def members(self) -> list[Member]:
        return [*self.controllers, *self.all_workers, *([self.gateway] if self.gateway else [])]

    @property
    def controller_addresses(self) -> list[str]:
        """Where callers reach the controllers: no proxy is between."""
        return [controller.own_address for controller in self.controllers]

    async def start(self) -> None:
        """Start everything and wait until every controller knows every worker."""
        for member in self.members:
            if member.proxy is not None:
                await member.proxy.start()
        for group in (self.controllers, self.all_workers, [self.gateway] if self.gateway else []):
            await asyncio.gather(*(member.start() for member in group))
            await asyncio.gather(*(member.answers() for member in group))
        await self.whole()

    async def whole(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when every controller has every worker, serving, and nothing runs. Says what is missing, else."""
        missing: str | None = None
        try:
            async with asyncio.timeout(timeout_s):
                for controller in self.controllers:
                    async with AsyncClient(controller.own_address, timeout_s=5.0) as client:
                        while (missing := await self._missing(client)) is not None:
                            await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"{controller.name} after {timeout_s:g} s: {missing}") from None

    async def _missing(self, client: AsyncClient) -> str | None:
        try:
            listed = await client.workers()
        except FastChatError as error:
            return error.message
        here = {worker.worker_id for worker in listed if not worker.suspect}
        gone = {worker.address for worker in self.all_workers} - here
        if gone:
            return f"{sorted(gone)} are missing"
        for worker in listed:
            left = (worker.load.running_count, worker.load.waiting_count, worker.reserved_count)
            if any(left):
                return f"{worker.worker_id} still holds (running, waiting, reserved) {left}"
        return None

    async def stop(self) -> None:
        """End everything: the gateway and the workers first."""
        gateway = [self.gateway] if self.gateway else []
        for group in (gateway, self.all_workers, self.controllers):
            await asyncio.gather(*(member.stop() for member in group))
        for member in self.members:
            if member.proxy is not None:
                with suppress(OSError):
                    await member.proxy.stop()


def free_ports(count: int) -> list[int]:
    """Free ports, all different."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return list(found)
