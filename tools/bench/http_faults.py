"""How fast the HTTP bridge gets over a fault: a killed worker, a full one, a caller that leaves, a dead controller.

Each fault is made several times on a whole site of echo workers behind a real Envoy (that of the end-to-end
tests); a time is from the fault to what should follow it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any

from fastchat_grpc.config import DispatchMethod
from tests.e2e.echo_worker import worker_process
from tests.e2e.gateway_site import Site, content, running_site
from tools.bench.processes import table

NAME = "http-faults"
HELP = "milliseconds from a fault to the answer of another worker, the freed slot, or the 503"
FAVOURED = {"weight": 1e6}
"""With lottery dispatch, practically always picked first."""
LOTTERY = {"dispatch": DispatchMethod.LOTTERY}


def run(args: list[str]) -> dict[str, object]:
    """Make each fault `--times` times and print median and worst."""
    parser = argparse.ArgumentParser(prog="bench http-faults", description=HELP)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args(args)
    faults: dict[str, Callable[[], Awaitable[float]]] = {
        "worker killed before its first token, to the answer of another": killed,
        "worker killed under 100 streams, longest silence of one (direct)": lambda: broken("direct"),
        "worker killed under 100 streams, longest silence of one (relay)": lambda: broken("relay"),
        "full worker, to the answer of another": full,
        "request that meets no fault": plain,
        "caller gone, to the freed slot": gone,
        "controller dead, to the 503 of a new request": dead,
    }
    result: dict[str, dict[str, float]] = {}
    for name, fault in faults.items():
        found = [asyncio.run(_measured(fault)) * 1e3 for _ in range(options.times)]
        result[name] = {"median_ms": statistics.median(found), "worst_ms": max(found)}
    table(
        ["", "median ms", "worst ms"],
        [[name, f"{row['median_ms']:.0f}", f"{row['worst_ms']:.0f}"] for name, row in result.items()],
    )
    return dict(result)


async def _measured(fault: Callable[[], Awaitable[float]]) -> float:
    return await fault()


async def killed() -> float:
    """SIGKILL while the worker works on a prompt."""
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(running_site(controller=LOTTERY))
        slow = await stack.enter_async_context(
            worker_process(site.controller.address, first_delay_ms=30_000, **FAVOURED)
        )
        await _until(lambda: slow.address in _known(site))
        asked = asyncio.create_task(site.chat("hello"))
        await _until(lambda: any(worker.reserved_count for worker in site.controller.registry.at(slow.address)))
        await asyncio.sleep(0.2)
        began = perf_counter()
        slow.kill()
        _check((await asked).json()["choices"][0]["message"]["content"] == "hello")
        return perf_counter() - began


async def broken(mode: str) -> float:
    """SIGKILL of the worker of a hundred streams; all must be whole. The longest silence of one of them, in seconds."""
    text = "0123456789" * 12
    async with AsyncExitStack() as stack:
        slow = {"options": {"delay_ms": "30"}, "max_running": 200}
        site = await stack.enter_async_context(running_site(mode, workers=[slow], controller=LOTTERY))
        first = await stack.enter_async_context(
            worker_process(site.controller.address, delay_ms=30, max_running=200, **FAVOURED)
        )
        await _until(lambda: any(w.spec.address == first.address for w in site.controller.registry.workers()))
        if mode == "direct":
            await _until(lambda: first.address in _known(site))
        begun = asyncio.Semaphore(0)

        async def one() -> float:
            events: list[Any] = []
            longest = last = 0.0
            async for event in site.stream(text):
                now = perf_counter()
                longest = max(longest, now - last) if events else 0.0
                last = now
                events.append(event)
                if len(events) == 3:
                    begun.release()
            _check(content(events) == text)
            return longest

        streams = [asyncio.create_task(one()) for _ in range(100)]
        for _ in streams:
            await begun.acquire()
        first.kill()
        return max(await asyncio.gather(*streams))


async def full() -> float:
    """The first choice has no free slot and no queue."""
    crowded = {"max_running": 1, "max_waiting": 0, "options": {"delay_ms": "10"}, **FAVOURED}
    async with running_site(workers=[crowded, {}], controller=LOTTERY) as site:
        busy = site.stream("x" * 300)
        await anext(busy)
        began = perf_counter()
        _check((await site.chat("hello")).json()["choices"][0]["message"]["content"] == "hello")
        spent = perf_counter() - began
        await busy.aclose()
        return spent


async def plain() -> float:
    """No fault, for comparison."""
    async with running_site() as site:
        await site.chat("hello")
        began = perf_counter()
        await site.chat("hello")
        return perf_counter() - began


async def gone() -> float:
    """The caller closes its connection in the middle of a stream."""
    async with running_site(workers=[{"options": {"delay_ms": "20"}}]) as site:
        stream: Any = site.stream("x" * 2000, max_tokens=2000)
        await anext(stream)
        began = perf_counter()
        await stream.aclose()
        await _until(lambda: site.running == 0)
        return perf_counter() - began


async def dead() -> float:
    """The only controller ends; a stream that runs must end well."""
    async with running_site(workers=[{"options": {"delay_ms": "20"}}]) as site:
        stream: Any = site.stream("x" * 100)
        events = [await anext(stream)]
        await site.controller.stop()
        began = perf_counter()
        reply = await site.chat()
        spent = perf_counter() - began
        _check(reply.status_code == 503)
        events += [event async for event in stream]
        _check(content(events) == "x" * 100)
        return spent


def _known(site: Site) -> set[str]:
    """Addresses that every gateway has taken up."""
    bridge = site.controller.bridge
    gateways = bridge.endpoints._gateways.values() if bridge is not None else ()
    return set.intersection(*(set(gateway.acked or ()) for gateway in gateways)) if gateways else set()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def _check(right: bool) -> None:
    if not right:
        raise RuntimeError("the answer is not what it should be")
