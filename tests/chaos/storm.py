"""The storm: streams on one side, faults on the other, and a count of what was lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.core import Delta
from fastchat_grpc.errors import FastChatError
from tests.chaos.fleet import ChaosFleet, Member

PATIENCE = FailoverConfig(max_attempts=100, max_resumes=100, wait_s=30.0)
"""Of the client: its addresses come and go, and it is to find out whether any request cannot be saved."""
REQUEST_TIMEOUT_S = 120.0
FILES_PER_PEER = 4
"""Descriptors that a process may hold more than at the start, for each other member of the fleet."""

Fault = Callable[[Member, float], Awaitable[None]]
"""Does something to a member; the number from 0 to 1 says how badly."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of what. `pause_s` is the mean time between two faults."""

    seed: int
    streams: int
    seconds: float
    pause_s: float
    prompts: tuple[str, ...]
    max_new_tokens: int
    min_live_workers: int = 2


@dataclass
class Report:
    """What happened. A run is good if `lost`, `differing` and `left` (what nobody gave back) are empty."""

    requests: int = 0
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    resumed_by_client: int = 0
    left: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0
    durations: list[float] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The figures, for people."""
        ordered = sorted(self.durations) or [0.0]
        done = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        return [
            f"faults: {sum(self.faults.values())} ({done})",
            f"requests: {self.requests}, lost {len(self.lost)}, differing texts {len(self.differing)}",
            f"seconds per request: p50 {ordered[len(ordered) // 2]:.1f}, p99 {ordered[len(ordered) * 99 // 100]:.1f}",
            f"longest silence in a stream: {self.longest_gap_s:.1f} s",
            f"streams that the client itself took to another controller: {self.resumed_by_client}",
            f"slots, reservations, tasks and descriptors left: {', '.join(self.left) or 'none'}",
        ]


class Storm:
    """One run over a started fleet."""

    def __init__(self, fleet: ChaosFleet, plan: Plan) -> None:
        self._fleet = fleet
        self._plan = plan
        self._rng = Random(plan.seed)
        self._expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.report = Report()

    async def run(self) -> Report:
        """Learn the undisturbed texts, let the storm blow, wait until all is whole again."""
        await self._learn()
        tasks, files = len(asyncio.all_tasks()), {member: member.open_files() for member in self._fleet.members}
        over = asyncio.Event()
        streams = [asyncio.create_task(self._stream(i, over)) for i in range(self._plan.streams)]
        try:
            await self._blow()
        finally:
            over.set()
            await asyncio.gather(*streams)
        await self._fleet.whole()
        self._look_for_leaks(tasks, files)
        return self.report

    def _look_for_leaks(self, tasks: int, files: dict[Member, int]) -> None:
        """Slots and reservations are gone when the fleet is whole; tasks and descriptors are counted here."""
        if len(asyncio.all_tasks()) > tasks:
            self.report.left.append(f"{len(asyncio.all_tasks()) - tasks} tasks of the clients")
        for member, before in files.items():
            allowed = before + FILES_PER_PEER * len(files)
            if (now := member.open_files()) > allowed:
                self.report.left.append(f"{member.name}: {now} file descriptors, {before} at the start")

    # ------------------------------------------------------------------------------ streams

    async def _learn(self) -> None:
        async with AsyncClient([member.address for member in self._fleet.controllers]) as client:
            results = await asyncio.gather(*(client.complete(p, **self._options()) for p in self._plan.prompts))  # type: ignore[arg-type]
            for prompt, result in zip(self._plan.prompts, results, strict=True):
                self._expected[prompt] = (result.text, result.choices[0].token_ids)

    def _options(self) -> dict[str, object]:
        return {"temperature": 0.0, "max_new_tokens": self._plan.max_new_tokens, "ignore_eos": True}

    async def _stream(self, number: int, over: asyncio.Event) -> None:
        """One request after another, each with a client that begins at another controller."""
        rng = Random(f"{self._plan.seed}-{number}")
        addresses = [member.address for member in self._fleet.controllers]
        rng.shuffle(addresses)
        async with AsyncClient(addresses, failover=PATIENCE, timeout_s=REQUEST_TIMEOUT_S) as client:
            await asyncio.sleep(rng.random())
            while not over.is_set():
                await self._request(client, rng.choice(self._plan.prompts), f"stream {number}")
            self.report.resumed_by_client += client._failover.resumed

    async def _request(self, client: AsyncClient, prompt: str, name: str) -> None:
        report = self.report
        report.requests += 1
        started = last = time.monotonic()
        text: list[str] = []
        token_ids: list[int] = []
        try:
            async for event in client.generate(prompt, **self._options()):  # type: ignore[arg-type]
                now = time.monotonic()
                report.longest_gap_s = max(report.longest_gap_s, now - last)
                last = now
                if isinstance(event, Delta):
                    text.append(event.text)
                    token_ids += event.token_ids
        except FastChatError as error:
            report.lost.append(f"{name}: {error.reason}: {error.message}")
            return
        report.durations.append(time.monotonic() - started)
        if ("".join(text), tuple(token_ids)) != self._expected[prompt]:
            report.differing.append(f"{name}: {len(token_ids)} tokens of {len(self._expected[prompt][1])}")

    # ------------------------------------------------------------------------------- faults

    async def _blow(self) -> None:
        end = time.monotonic() + self._plan.seconds
        faults: set[asyncio.Task[None]] = set()
        while time.monotonic() < end:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * self._plan.pause_s)
            chosen = self._choose()
            if chosen is not None:
                kind, member, fault = chosen
                self.report.faults[kind] += 1
                member.busy = True
                # Drawn here, in order, so that the seed decides it whatever runs at the same time.
                faults.add(asyncio.create_task(self._do(member, fault, self._rng.random())))
        await asyncio.gather(*faults)

    def _choose(self) -> tuple[str, Member, Fault] | None:
        """A fault and its victim, so that enough workers and one controller stay live."""
        workers = [worker for worker in self._fleet.workers if not worker.busy]
        controllers = [controller for controller in self._fleet.controllers if not controller.busy]
        kinds: list[tuple[str, list[Member], Fault]] = []
        if len(workers) > self._plan.min_live_workers:
            kinds += [
                ("kill", workers, self._kill),
                ("freeze", workers, self._freeze),
                ("restart", workers, self._restart),
                ("drain", workers, self._drain),
            ]
        if len(controllers) > 1:
            kinds.append(("controller kill", controllers, self._kill))
        if not kinds:
            return None
        kind, victims, fault = self._rng.choice(kinds)
        return kind, self._rng.choice(victims), fault

    async def _do(self, member: Member, fault: Fault, luck: float) -> None:
        await fault(member, luck)
        await member.answers()
        member.busy = False

    async def _kill(self, member: Member, luck: float) -> None:
        member.signal(signal.SIGKILL)
        await member.ended()
        await asyncio.sleep(3.0 * luck)
        await member.start()

    async def _freeze(self, member: Member, luck: float) -> None:
        member.signal(signal.SIGSTOP)
        await asyncio.sleep(1.0 + 11.0 * luck)
        member.signal(signal.SIGCONT)

    async def _restart(self, member: Member, luck: float) -> None:
        member.signal(signal.SIGTERM)
        await member.ended()
        await member.start()

    async def _drain(self, member: Member, luck: float) -> None:
        """By the controllers' order; the worker leaves by itself."""
        for controller in self._fleet.controllers:
            async with AsyncClient(controller.address, timeout_s=2.0) as client:
                with suppress(FastChatError):
                    await client.drain_worker(member.address)
                    break
        try:
            async with asyncio.timeout(20):
                await member.ended()
        except TimeoutError:  # the order was lost with the controller that took it
            member.signal(signal.SIGTERM)
            await member.ended()
        await member.start()
