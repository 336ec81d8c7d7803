"""What a controller tells of its fleet: read when somebody asks, in that one's thread, so that heartbeats cost nothing.

The lines of single workers are written without a metrics library, which would take ten times as long for ten
thousand workers; everything else is a collector.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastchat_grpc.controller.breaker import BreakerState
from fastchat_grpc.controller.evidence import Evidence
from fastchat_grpc.controller.fleet import Change, ChangeKind, Removal, Worker, WorkerSpec
from fastchat_grpc.controller.registry import Registry
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.core import WorkerState
from fastchat_grpc.metrics.labels import Names, escaped
from fastchat_grpc.rpc.api_keys import ApiKeys

if TYPE_CHECKING:
    from fastchat_grpc.controller.envoy.services import EnvoyServices

STATES = ("ready", "degraded", "starting", "draining", "suspect", "unreachable", "breaker_open")
_BREAKERS = {BreakerState.CLOSED: 0, BreakerState.OPEN: 1, BreakerState.HALF_OPEN: 2}


def state_of(worker: Worker) -> str:
    """One word of STATES: why a worker is not picked, or how."""
    health = worker.health
    if health.drain is not None or health.state is WorkerState.DRAINING:
        return "draining"
    if health.state is WorkerState.STARTING:
        return "starting"
    if health.unreachable:
        return "unreachable"
    if health.suspect:
        return "suspect"
    if health.breaker is BreakerState.OPEN:
        return "breaker_open"
    return "degraded" if health.state is WorkerState.DEGRADED else "ready"


class Arrivals:
    """Counts who comes and goes. Subscribe it to the registry."""

    def __init__(self) -> None:
        self.registered = 0
        self.removed: Counter[Removal] = Counter()

    def on_change(self, change: Change) -> None:
        """A change of the registry."""
        if change.kind is ChangeKind.ADDED:
            self.registered += 1
        elif change.removal is not None:
            self.removed[change.removal] += 1


class FleetCollector(Collector):
    """The fleet by model, and what has happened in it."""

    def __init__(
        self,
        relay: Relay,
        keys: ApiKeys,
        bridge: EnvoyServices | None,
        names: Names,
        serving: Callable[[], bool],
    ) -> None:
        self._registry = relay.dispatcher.registry
        self._relay = relay
        self._keys = keys
        self._bridge = bridge
        self._names = names
        self._serving = serving
        self._arrivals = Arrivals()
        self._registry.subscribe(self._arrivals.on_change)

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        yield self._workers()
        yield from self._lives()
        yield from self._requests()
        if self._bridge is not None:
            yield from _gateways(self._bridge)
        yield _gauge("fastchat_grpc_controller_serving", "Whether requests had better come here.", self._serving())

    def _workers(self) -> Metric:
        family = GaugeMetricFamily(
            "fastchat_grpc_workers", "Workers that serve a model, by their state.", labels=("model_name", "state")
        )
        found: Counter[tuple[str, str]] = Counter()
        for group in self._registry.groups():
            states = Counter(map(state_of, list(group.members)))
            for model in group.models:
                name = self._names.of(model)
                for state in STATES:
                    found[name, state] += states[state]
        for labels, count in found.items():
            family.add_metric(labels, count)
        return family

    def _lives(self) -> Iterable[Metric]:
        counts, arrivals = self._registry.counts, self._arrivals
        yield _counter("fastchat_grpc_heartbeats", "Heartbeats of workers.", counts.heartbeats)
        yield _counter("fastchat_grpc_workers_registered", "Workers that came.", arrivals.registered)
        removed = {removal.value: arrivals.removed[removal] for removal in Removal}
        yield _counters("fastchat_grpc_workers_removed", "Workers that left, by why.", "reason", removed)
        breakers = {state.value: counts.breakers[state] for state in BreakerState}
        yield _counters("fastchat_grpc_breaker_transitions", "Breakers that came into a state.", "state", breakers)

    def _requests(self) -> Iterable[Metric]:
        failover, attempts = self._relay.failover, self._registry.counts.attempts
        ends = {kind.value: attempts[kind.value] for kind in Evidence}
        yield _counters(
            "fastchat_grpc_attempts", "Attempts at workers, by what their ends say of the worker.", "evidence", ends
        )
        yield _counter("fastchat_grpc_retries", "Attempts made again before the first event.", failover.retried)
        yield _counter("fastchat_grpc_resumes", "Generations continued by another worker.", failover.resumed)
        yield _gauge("fastchat_grpc_relayed_requests", "Requests that are relayed now.", failover.running)
        waiting = GaugeMetricFamily(
            "fastchat_grpc_unserved_requests", "Requests that wait for a worker here.", labels=("model_name",)
        )
        known = {model: 0 for group in self._registry.groups() for model in group.models}
        for model, queue in list(self._registry.room.queues.items()):
            known[model] = len(queue)
        sums: Counter[str] = Counter()
        for model, count in known.items():
            sums[self._names.of(model)] += count
        for name, count in sums.items():
            waiting.add_metric((name,), count)
        yield waiting
        uses = dict(self._keys.uses)
        yield _counters("fastchat_grpc_api_key_uses", "Requests that showed a key, by its name.", "client", uses)


class WorkerLines:
    """A few lines of each worker, in the text format. Asked by one thread at a time."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._labels: dict[Worker, _Labels] = {}
        """Of the workers that were there when somebody asked last: they seldom change, and take half of the time."""

    def __call__(self) -> bytes:
        """All of them. Called in any thread."""
        workers = [worker for group in self._registry.groups() for worker in list(group.members)]
        workers = [worker for worker in workers if worker.removed is None]
        before = self._labels
        labels = [
            known if (known := before.get(worker)) is not None and known.spec is worker.spec else _labels(worker.spec)
            for worker in workers
        ]
        self._labels = dict(zip(workers, labels, strict=True))
        ids, places = [each.worker for each in labels], [each.place for each in labels]
        now = self._registry.now()
        ages = [max(0.0, now - worker.heartbeat_at) for worker in workers]
        breakers = [_BREAKERS[worker.health.breaker] for worker in workers]
        loads = [worker.ledger.load for worker in workers]
        lines = [
            _lines("tier", "2: picked, 1: where there is no better, 0: not.", ids, [w.tier.value for w in workers]),
            _lines("running_requests", "As last reported.", ids, [load.running for load in loads]),
            _lines("waiting_requests", "As last reported.", ids, [load.waiting for load in loads]),
            _lines("kv_cache_usage_ratio", "As last reported.", ids, [load.kv_cache_usage for load in loads]),
            _lines("reserved_requests", "Sent there by this controller.", ids, [w.reserved_count for w in workers]),
            _lines("breaker_state", "0 closed, 1 open, 2 half open.", ids, breakers),
            _lines("heartbeat_age_seconds", "Since it was last heard.", ids, ages),
            _lines("info", "Where it is.", places, [1] * len(workers)),
        ]
        return "".join(lines).encode()


def _lines(name: str, text: str, labels: Iterable[str], values: Iterable[float]) -> str:
    time.sleep(0)  # whoever waits for the interpreter gets it between two families
    full = f"fastchat_grpc_fleet_worker_{name}"
    body = "".join([f"{full}{label}{value}\n" for label, value in zip(labels, values, strict=True)])
    return f"# HELP {full} {text}\n# TYPE {full} gauge\n{body}"


class _Labels(NamedTuple):
    """A worker's labels as they stand in its lines: its id alone, and where it is, too."""

    spec: WorkerSpec
    worker: str
    place: str


def _labels(spec: WorkerSpec) -> _Labels:
    name = f'worker_id="{escaped(spec.worker_id)}"'
    place = f'address="{escaped(spec.address)}",version="{escaped(spec.version)}"'
    return _Labels(spec, f"{{{name}}} ", f"{{{name},{place}}} ")


def _gateways(bridge: EnvoyServices) -> Iterable[Metric]:
    yield _counter("fastchat_grpc_endpoints_pushed", "Sets of endpoints sent to gateways.", bridge.endpoints.pushed)
    yield _gauge("fastchat_grpc_endpoints", "Endpoints that gateways are told of.", bridge.endpoints.endpoint_count)
    yield _gauge("fastchat_grpc_gateways", "Gateways that are connected.", bridge.endpoints.gateway_count)
    yield _gauge("fastchat_grpc_gateway_requests", "Requests of gateways, picked and not ended.", len(bridge.tickets))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=float(value))


def _counters(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family
