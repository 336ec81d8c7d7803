"""What grows with the fleet, and what does not: the registry's own costs at 1,000 and 10,000 workers."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from random import Random
from typing import Any

from tools.bench.processes import percentile, table
from tools.bench.restart import Simulation

SIZES = (1_000, 10_000)
PAGE = 1_000
WAITERS = 5_000
CATALOGUE_MODELS, CATALOGUE_ADAPTERS, CATALOGUE_WORKERS = 100, 100, 1_000


def run() -> dict[str, object]:
    """Print the table; milliseconds, unless a row says otherwise."""
    columns = [_column(size) for size in SIZES]
    print("\nBy size of the fleet, one model, in process; medians:")
    names = list(columns[0])
    table(["what", *(f"{size:,} workers" for size in SIZES)], [[n, *(f"{c[n]:.3g}" for c in columns)] for n in names])
    result: dict[str, object] = {str(size): column for size, column in zip(SIZES, columns, strict=True)}
    result["catalogue"] = _catalogue()
    result["waiters"] = asyncio.run(_waiters())
    result["restart"] = _restarts()
    return result


def _column(size: int) -> dict[str, float]:
    from fastchat_grpc.config import DispatchMethod

    return {
        "pick, shortest_queue, us": _picks(size, DispatchMethod.SHORTEST_QUEUE, spares=0),
        "pick and two spares, shortest_queue, us": _picks(size, DispatchMethod.SHORTEST_QUEUE, spares=2),
        "pick and two spares, power_of_two, us": _picks(size, DispatchMethod.POWER_OF_TWO, spares=2),
        "pick and two spares, prefix_affinity, us": _picks(size, DispatchMethod.PREFIX_AFFINITY, spares=2),
        f"page of {PAGE:,} of ListWorkers, ms": _page(size),
        "all connections break, longest step, ms": _disconnect(size)[0],
        "all connections break, in all, ms": _disconnect(size)[1],
    }


def _registry(size: int, models: int = 1, adapters: int = 0) -> Any:
    from fastchat_grpc.config import LeaseConfig
    from fastchat_grpc.controller.fleet import WorkerSpec
    from fastchat_grpc.controller.registry import Registry
    from fastchat_grpc.core import Load, ModelInfo

    registry, rng = Registry(LeaseConfig(time_to_live_s=3600)), Random(1)
    registry.settle()
    for i in range(size):
        model = f"model-{i % models}"
        names = [model, *(f"{model}-adapter-{j}" for j in range(adapters))]
        spec = WorkerSpec(
            worker_id=f"worker-{i}",
            instance_id=f"instance-{i}",
            address=f"10.{i // 65536}.{i // 256 % 256}.{i % 256}:21002",
            models=tuple(ModelInfo(name=name, context_length=4096, base_model=model) for name in names),
        )
        registry.register(spec, Load(running=rng.randrange(20), max_running=256))
    return registry


def _median_us(action: Callable[[], object], count: int) -> float:
    took = []
    gc.collect()
    for _ in range(count):
        started = time.perf_counter()
        action()
        took.append((time.perf_counter() - started) * 1e6)
    return percentile(took, 0.5)


def _picks(size: int, method: Any, spares: int) -> float:
    """Between picks the loads change, as they do in a fleet at work."""
    from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
    from fastchat_grpc.core import Load

    registry, rng = _registry(size), Random(1)
    workers = registry.workers()
    dispatcher = Dispatcher(registry, method, rng)
    took = []
    for i in range(1_000):
        for _ in range(10):
            registry.heartbeat(rng.choice(workers).lease_id, Load(running=rng.randrange(20), max_running=256))
        started = time.perf_counter()
        reservation = dispatcher.pick(PickRequest(model="model-0", key=str(i)))
        excluded = {reservation.instance_id}
        for _ in range(spares):
            _, worker = dispatcher.choose(PickRequest(model="model-0", key=str(i), excluded=excluded))
            excluded.add(worker.spec.instance_id)
        took.append((time.perf_counter() - started) * 1e6)
        if i % 2:
            reservation.release()
    return percentile(took, 0.5)


def _page(size: int) -> float:
    from fastchat_grpc.controller.listing import worker_to_pb

    registry = _registry(size)
    registry.workers()

    def page() -> None:
        for worker in registry.workers()[:PAGE]:
            worker_to_pb(worker, registry)

    return _median_us(page, 20) / 1e3


def _disconnect(size: int) -> tuple[float, float]:
    """Every channel breaks at once: the longest step of the event loop, and all of them."""
    registry = _registry(size)
    steps = []
    for address in [worker.spec.address for worker in registry.workers()]:
        started = time.perf_counter()
        for worker in registry.at(address):
            registry.set_reachable(worker, False)
        steps.append((time.perf_counter() - started) * 1e3)
    return max(steps), sum(steps)


def _catalogue() -> dict[str, float]:
    from fastchat_grpc.core import Load

    registry = _registry(CATALOGUE_WORKERS, CATALOGUE_MODELS, CATALOGUE_ADAPTERS)
    workers = registry.workers()

    def changed() -> float:
        worker = workers[0]
        registry.deregister(worker.lease_id)
        registry.register(worker.spec, Load())
        started = time.perf_counter()
        registry.catalogue()
        return (time.perf_counter() - started) * 1e3

    anew = percentile([changed() for _ in range(20)], 0.5)
    again = _median_us(registry.catalogue, 1_000)
    names = len(registry.catalogue())
    print(f"\nCatalogue of {names:,} names on {CATALOGUE_WORKERS:,} workers:")
    table(["what", "value"], [["after a worker came or went, ms", f"{anew:.2f}"], ["otherwise, us", f"{again:.2f}"]])
    return {"names": names, "after a change, ms": anew, "otherwise, us": again}


async def _waiters() -> dict[str, float]:
    """Heartbeats while many wait for another model."""
    from fastchat_grpc.core import Load

    registry, rng = _registry(1_000), Random(1)
    leases = [worker.lease_id for worker in registry.workers()]
    load = Load(running=3, max_running=256)

    def beat() -> float:
        return _median_us(lambda: registry.heartbeat(rng.choice(leases), load), 20_000)

    beat()
    without = beat()
    waiting = [asyncio.create_task(registry.room.wait("another", 3600.0)) for _ in range(WAITERS)]
    await asyncio.sleep(0)
    beside = beat()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    print(f"\nHeartbeat, us: {without:.2f}; while {WAITERS:,} requests wait for another model: {beside:.2f}")
    return {"without": without, "beside": beside}


def _restarts() -> dict[str, object]:
    rows, result = [], {}
    for workers, seconds in ((1_000, 20.0), (10_000, 60.0), (20_000, 90.0)):
        outcome = Simulation(workers).run(seconds)
        known = outcome.all_known_s
        settled = "never" if known is None else f"{known:.1f}"
        rows.append([f"{workers:,}", settled, f"{outcome.longest_queue_s:.1f}", str(outcome.false_expiries)])
        result[str(workers)] = vars(outcome)
    print("\nA controller restarts, and all workers come back within a second (simulated):")
    table(["workers", "all known after, s", "longest wait in the queue, s", "false expiries"], rows)
    return result
