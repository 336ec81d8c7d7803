"""What can happen to a fleet, and how it heals."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import NamedTuple

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.errors import FastChatError
from tests.chaos.disturbance import Disturbances
from tests.chaos.fleet import ChaosFleet, Member

Fault = Callable[[list[Member], float], Awaitable[None]]
"""Does something to its victims; the number from 0 to 1 says how badly."""


ROLLS = 4
"""How many other faults of a worker a rolling restart weighs: all workers of its model must be well to draw it."""


class Drawn(NamedTuple):
    """A fault, its victims, and how to do it: to one after the other, or to all at once."""

    kind: str
    victims: list[Member]
    do: Fault
    rolling: bool = False


class Faults:
    """Draws faults, so that enough workers of each model and one controller stay live, but now and then none does."""

    def __init__(self, fleet: ChaosFleet, disturbances: Disturbances) -> None:
        self._fleet = fleet
        self._disturbances = disturbances

    async def do(self, drawn: Drawn, luck: float) -> None:
        """Do it, and wait until its victims are well."""
        steps = [[victim] for victim in drawn.victims] if drawn.rolling else [drawn.victims]
        for step in steps:
            with self._disturbances.during(drawn.kind, step):
                await drawn.do(step, luck)
                for member in step:
                    await member.answers()

    def draw(self, rng: Random) -> Drawn | None:
        """A fault; None where everybody has one."""
        kinds: list[Drawn] = []
        for group in self._fleet.groups.values():
            workers = self._fleet.workers[group.model]
            idle = [worker for worker in workers if not worker.busy]
            if len(idle) == len(workers) > 1:
                kinds += [Drawn("rolling restart", workers, self._drain, rolling=True)] * ROLLS
            if len(idle) > group.live:
                one = [rng.choice(idle)]
                kinds += [
                    Drawn("kill", one, self._kill),
                    Drawn("freeze", one, self._freeze),
                    Drawn("restart", one, self._restart),
                    Drawn("drain", one, self._drain),
                    Drawn("packets dropped", one, self._drop),
                    Drawn("connections cut", one, self._cut),
                ]
        controllers = [controller for controller in self._fleet.controllers if not controller.busy]
        if len(controllers) > 1:
            one = [rng.choice(controllers)]
            kinds += [
                Drawn("controller kill", one, self._kill),
                Drawn("packets of a controller dropped", one, self._drop),
                Drawn("all controllers restart", controllers, self._restart_together),
            ]
        if len(controllers) == len(self._fleet.controllers) > 1:
            kinds.append(Drawn("rolling restart of controllers", controllers, self._restart, rolling=True))
        return rng.choice(kinds) if kinds else None

    async def _kill(self, victims: list[Member], luck: float) -> None:
        for member in victims:
            member.signal(signal.SIGKILL)
        for member in victims:
            await member.ended()
        await asyncio.sleep(3.0 * luck)
        for member in victims:
            await member.start()

    async def _restart_together(self, victims: list[Member], luck: float) -> None:
        await self._kill(victims, luck / 10)

    async def _freeze(self, victims: list[Member], luck: float) -> None:
        (member,) = victims
        member.signal(signal.SIGSTOP)
        await asyncio.sleep(1.0 + 11.0 * luck)
        member.signal(signal.SIGCONT)

    async def _restart(self, victims: list[Member], luck: float) -> None:
        (member,) = victims
        member.signal(signal.SIGTERM)
        await member.ended()
        await member.start()

    async def _drop(self, victims: list[Member], luck: float) -> None:
        """Connections stay and carry nothing."""
        (member,) = victims
        assert member.proxy is not None
        member.proxy.swallow()
        await asyncio.sleep(1.0 + 9.0 * luck)
        # What was under way is gone, as after a cut that lasted: half of the time it comes through after all.
        if luck < 0.5:
            member.proxy.cut()
        member.proxy.heal()

    async def _cut(self, victims: list[Member], luck: float) -> None:
        (member,) = victims
        assert member.proxy is not None
        member.proxy.cut()

    async def _drain(self, victims: list[Member], luck: float) -> None:
        """By a controller's order; the worker leaves by itself."""
        (member,) = victims
        for controller in self._fleet.controllers:
            async with AsyncClient(controller.own_address, timeout_s=2.0) as client:
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
