"""The storm: callers on one side, faults on the other, and a count of what was lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from tests.chaos.callers import Broken, Caller, GrpcCaller, HttpCaller, Lost, OutOfPatience, patiently
from tests.chaos.disturbance import Disturbances, Excuses
from tests.chaos.faults import Drawn, Faults
from tests.chaos.fleet import ChaosFleet, Member
from tests.chaos.workload import Answer, Ask, Workload, wrong
from tests.integration.blackhole import TASK_NAME

FILES_PER_PEER = 4
"""Descriptors that a process may hold more than at the start, for each other member of the fleet."""
SETTLE_S = 1.0
PAUSE_S = 0.5
"""Before the next request of a caller who has lost one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of what.

    Attributes:
        relay: callers that know all controllers.
        client: callers that know the workers of one model, and no controller.
        http: callers of the gateway, in direct mode; every second one streams.
        pause_s: mean time between two faults.
        patience_s: how long a caller asks again after refusals that nothing excuses.
    """

    seed: int
    seconds: float
    pause_s: float
    relay: int
    client: int = 0
    http: int = 0
    patience_s: float = 60.0


@dataclass
class Report:
    """What happened. A run is good if `lost`, `differing` and `left` (what nobody gave back) are empty."""

    requests: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    out_of_patience: int = 0
    resumed_by_client: int = 0
    left: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0
    durations: list[float] = field(default_factory=list)
    journal: list[str] = field(default_factory=list)
    """What was done to whom and when, in seconds since the storm began."""

    @property
    def good(self) -> bool:
        return not (self.lost or self.differing or self.left)

    def lines(self) -> list[str]:
        """The figures, for people."""
        ordered = sorted(self.durations) or [0.0]
        return [
            f"faults: {sum(self.faults.values())} ({_counts(self.faults)})",
            f"requests: {sum(self.requests.values())} ({_counts(self.requests)}), "
            f"lost {len(self.lost)}, differing texts {len(self.differing)}",
            f"refused for the moment, and asked again: {_counts(self.refused) or 'none'}",
            f"streams of the direct gateway that nobody was left to go on with: {sum(self.broken.values())}",
            f"given up in outages longer than callers and relays are to wait: {self.out_of_patience}",
            f"seconds per request: p50 {ordered[len(ordered) // 2]:.1f}, p99 {ordered[len(ordered) * 99 // 100]:.1f}",
            f"longest silence in a stream: {self.longest_gap_s:.1f} s",
            f"streams that the client itself took to another server: {self.resumed_by_client}",
            f"slots, reservations, tasks and descriptors left: {', '.join(self.left) or 'none'}",
        ]


def _own_tasks() -> int:
    return sum(task.get_name() != TASK_NAME for task in asyncio.all_tasks())


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


class Storm:
    """One run over a started fleet.

    Args:
        main: the model that callers of workers ask, without a controller.
    """

    def __init__(self, fleet: ChaosFleet, plan: Plan, workload: Workload, main: str) -> None:
        self._fleet = fleet
        self._plan = plan
        self._workload = workload
        self._main = main
        self._rng = Random(plan.seed)
        self._disturbances = Disturbances()
        self._faults = Faults(fleet, self._disturbances)
        self._expected: dict[tuple[str, str, str], Answer] = {}
        self.report = Report()

    async def run(self) -> Report:
        """Learn the undisturbed texts, let the storm blow, wait until all is whole again."""
        await self._learn()
        tasks, files = _own_tasks(), {member: member.open_files() for member in self._fleet.members}
        over = asyncio.Event()
        watch = asyncio.create_task(self._disturbances.watch(self._fleet.members))
        streams = [asyncio.create_task(self._keep_asking(kind, i, over)) for kind, i in self._callers()]
        try:
            await self._blow()
        finally:
            over.set()
            await asyncio.gather(*streams)
            watch.cancel()
        self.report.journal = self._disturbances.journal()
        await self._fleet.whole()
        await self._look_for_leaks(tasks, files)
        return self.report

    def _callers(self) -> list[tuple[str, int]]:
        plan = self._plan
        counts = {"relay": plan.relay, "client": plan.client, "http": plan.http}
        return [(kind, number) for kind, count in counts.items() for number in range(count)]

    async def _look_for_leaks(self, tasks: int, files: dict[Member, int]) -> None:
        """Slots and reservations are gone when the fleet is whole; tasks and descriptors are counted here."""
        await asyncio.sleep(SETTLE_S)  # connections that were aborted are gone from the processes a moment later
        if (now := _own_tasks()) > tasks:
            self.report.left.append(f"{now - tasks} tasks of the clients")
        for member, before in files.items():
            allowed = before + FILES_PER_PEER * len(files)
            if (now := member.open_files()) > allowed:
                self.report.left.append(f"{member.name}: {now} file descriptors, {before} at the start")

    # ------------------------------------------------------------------------------ callers

    def _caller(self, kind: str, number: int) -> Caller:
        if kind == "http":
            assert self._fleet.gateway is not None
            return HttpCaller(self._fleet.gateway.address, number)
        workers = [worker.address for worker in self._fleet.workers[self._main]]
        addresses = list(self._fleet.controller_addresses if kind == "relay" else workers)
        Random(f"{self._plan.seed}-{number}").shuffle(addresses)
        return GrpcCaller(addresses)

    def _asks(self, kind: str) -> Sequence[Ask]:
        if kind == "client":
            return [ask for ask in self._workload.grpc if ask.model == self._main]
        return self._workload.http if kind == "http" else self._workload.grpc

    def _excuses(self, ask: Ask) -> Excuses:
        return Excuses(self._disturbances, self._fleet.controllers, self._fleet.workers[ask.model])

    async def _learn(self) -> None:
        """The undisturbed answers; they must be the same whoever asks, and come in every way that is used."""
        for kind in {kind for kind, _ in self._callers()}:
            for number in range(2 if kind == "http" else 1):
                caller = self._caller(kind, number)
                asks = self._asks(kind)
                answers = await asyncio.gather(
                    *(patiently(caller, ask, self._plan.patience_s, self._excuses(ask)) for ask in asks)
                )
                for ask, (answer, _) in zip(asks, answers, strict=True):
                    known = self._expected.setdefault((kind, ask.name, ask.prompt), answer)
                    assert wrong(ask, answer, known) is None, f"undisturbed, over {kind}: {wrong(ask, answer, known)}"
                await caller.close()

    async def _keep_asking(self, kind: str, number: int, over: asyncio.Event) -> None:
        """One request after another, each with a client that begins at another server."""
        rng = Random(f"{self._plan.seed}-{kind}-{number}")
        caller = self._caller(kind, number)
        await asyncio.sleep(rng.random())
        while not over.is_set():
            await self._request(kind, caller, rng.choice(self._asks(kind)), f"{kind} {number}")
        self.report.longest_gap_s = max(self.report.longest_gap_s, caller.longest_gap_s)
        if isinstance(caller, GrpcCaller):
            self.report.resumed_by_client += caller.client._failover.resumed
        await caller.close()

    async def _request(self, kind: str, caller: Caller, ask: Ask, name: str) -> None:
        report = self.report
        report.requests[kind] += 1
        started = time.monotonic()
        try:
            answer, refusals = await patiently(caller, ask, self._plan.patience_s, self._excuses(ask))
        except Lost as lost:
            at_s = started - self._disturbances.began
            report.lost.append(f"{name}, asked at {at_s:.1f} s, after {time.monotonic() - started:.1f} s: {lost}")
            await asyncio.sleep(PAUSE_S)
            return
        except Broken:
            report.broken[ask.name] += 1
            return
        except OutOfPatience:
            report.out_of_patience += 1
            return
        if refusals:
            report.refused[f"{kind} {ask.name}"] += refusals
        report.durations.append(time.monotonic() - started)
        fault = wrong(ask, answer, self._expected.get((kind, ask.name, ask.prompt)))
        if fault is not None:
            report.differing.append(f"{name}: {fault}")

    # ------------------------------------------------------------------------------- faults

    async def _blow(self) -> None:
        end = time.monotonic() + self._plan.seconds
        healing: set[asyncio.Task[None]] = set()
        while time.monotonic() < end:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * self._plan.pause_s)
            drawn = self._faults.draw(self._rng)
            if drawn is not None:
                self.report.faults[drawn.kind] += 1
                for member in drawn.victims:
                    member.busy = True
                # Drawn here, in order, so that the seed decides it whatever runs at the same time.
                healing.add(asyncio.create_task(self._do(drawn, self._rng.random())))
        await asyncio.gather(*healing)

    async def _do(self, drawn: Drawn, luck: float) -> None:
        await self._faults.do(drawn, luck)
        for member in drawn.victims:
            member.busy = False
