"""The registry against a model of it that is too simple to be wrong: hypothesis looks for a difference."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastchat_grpc.config import BreakerConfig, DispatchMethod
from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
from fastchat_grpc.controller.fleet import ChangeKind, Reservation, Worker
from fastchat_grpc.controller.health import Tier
from fastchat_grpc.controller.watch import Watch
from fastchat_grpc.core import Load, WorkerState
from fastchat_grpc.errors import FastChatError, InstanceReplaced, LeaseNotFound, ModelNotFound, NoLiveWorker
from tests.unit.controller.fleet import Fleet

TTL_S = 6.0
WORKERS = ("a", "b", "c")
MODELS = ("m", "n", "m,n")
STATES = (WorkerState.SERVING, WorkerState.DEGRADED, WorkerState.DRAINING, WorkerState.STARTING)


@dataclass
class Known:
    """What the model knows of one live worker."""

    instance: str
    models: tuple[str, ...]
    deadline: float
    worker: Worker
    beats: bool
    state: WorkerState = WorkerState.SERVING
    suspect_until: float | None = None  # infinity: until the next heartbeat
    drained: bool = False
    others: int = 0
    reserved: list[Reservation] = field(default_factory=list)

    def pickable(self) -> Tier:
        if self.drained or self.suspect_until is not None:
            return Tier.NONE
        return {WorkerState.SERVING: Tier.READY, WorkerState.DEGRADED: Tier.DEGRADED}.get(self.state, Tier.NONE)


class RegistryMachine(RuleBasedStateMachine):
    """Workers come, beat, go, fail and are picked, in any order and at any time."""

    def __init__(self) -> None:
        super().__init__()
        # The breaker has tests of its own; here it stays closed.
        self.fleet = Fleet(breaker=BreakerConfig(min_failures=10_000))
        self.registry = self.fleet.registry
        self.known: dict[str, Known] = {}
        self.replaced: set[str] = set()
        self.seen_models: set[str] = set()
        self.old_leases: list[str] = []
        self.departed: list[Reservation] = []
        self.dispatcher = Dispatcher(self.registry, DispatchMethod.SHORTEST_QUEUE, random.Random(1))
        self.heard: dict[str, Worker] = {}
        self.registry.subscribe(self._hear)
        self.watch = Watch(self.registry)

    def _hear(self, change: object) -> None:
        worker = change.worker  # type: ignore[attr-defined]
        if change.kind is ChangeKind.REMOVED:  # type: ignore[attr-defined]
            assert self.heard.pop(worker.spec.worker_id) is worker
        else:
            self.heard[worker.spec.worker_id] = worker

    def _forget(self, worker_id: str) -> None:
        known = self.known.pop(worker_id)
        self.old_leases.append(known.worker.lease_id)
        self.departed += known.reserved

    # ------------------------------------------------------------------------------- workers

    @rule(
        worker_id=st.sampled_from(WORKERS),
        instance=st.integers(1, 3),
        models=st.sampled_from(MODELS),
        beats=st.booleans(),
    )
    def register(self, worker_id: str, instance: int, models: str, beats: bool) -> None:
        name = f"{worker_id}-{instance}"
        before = self.known.get(worker_id)
        if before is not None and before.instance != name and name in self.replaced:
            try:
                self.fleet.join(worker_id, models, instance=name)
            except InstanceReplaced:
                return
            raise AssertionError("a replaced instance came back over its successor")
        same = before is not None and before.instance == name
        if before is not None and same:
            beats = before.beats  # what a process says of its heartbeats does not change
            self.old_leases.append(before.worker.lease_id)
        elif before is not None:
            self.replaced.add(before.instance)
            self._forget(worker_id)
        worker = self.fleet.join(worker_id, models, instance=name, check_heartbeat=beats)
        self.seen_models |= set(models.split(","))
        known = before if before is not None and same else Known(name, (), 0.0, worker, beats)
        known.models = tuple(models.split(","))
        known.state, known.suspect_until = WorkerState.SERVING, None
        known.deadline = self.fleet.clock.now + TTL_S
        known.others = 0
        self.known[worker_id] = known

    @precondition(lambda self: self.known)
    @rule(data=st.data(), state=st.sampled_from(STATES), running=st.integers(0, 5))
    def heartbeat(self, data: st.DataObject, state: WorkerState, running: int) -> None:
        known = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        self.registry.heartbeat(known.worker.lease_id, Load(state=state, running=running))
        known.state, known.suspect_until = state, None
        known.deadline = self.fleet.clock.now + TTL_S
        known.others = max(0, running - len(known.reserved))

    @precondition(lambda self: self.old_leases)
    @rule(data=st.data())
    def late_heartbeat(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.old_leases))
        try:
            self.registry.heartbeat(lease, Load())
        except LeaseNotFound:
            return
        raise AssertionError("a heartbeat on a past lease was taken")

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def deregister(self, data: st.DataObject) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.known)))
        self.registry.deregister(self.known[worker_id].worker.lease_id)
        self._forget(worker_id)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.known)))
        self.registry.drain(worker_id, None)
        self.known[worker_id].drained = True

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def suspect(self, data: st.DataObject) -> None:
        known = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        self.registry.suspect(known.worker)
        known.suspect_until = float("inf") if known.beats else self.fleet.clock.now + TTL_S

    @rule(seconds=st.sampled_from((0.1, 0.5, 1.9, 2.0, 6.5)))
    def wait(self, seconds: float) -> None:
        self.fleet.wait(seconds)
        now = self.fleet.clock.now
        for worker_id, known in list(self.known.items()):
            if known.beats and known.deadline <= now:
                self._forget(worker_id)
            elif known.suspect_until is not None and known.suspect_until <= now:
                known.suspect_until = None

    # -------------------------------------------------------------------------------- picks

    @rule(model=st.sampled_from(("m", "n", "never")), excluded=st.sets(st.sampled_from(WORKERS)))
    def pick(self, model: str, excluded: set[str]) -> None:
        serving = {i: k for i, k in self.known.items() if model in k.models}
        tiers = {
            tier: {i for i, k in serving.items() if k.pickable() is tier and i not in excluded}
            for tier in (Tier.READY, Tier.DEGRADED)
        }
        allowed = tiers[Tier.READY] or tiers[Tier.DEGRADED]
        try:
            reservation = self.dispatcher.pick(PickRequest(model=model, excluded=excluded), lambda: None)
        except ModelNotFound:
            assert model not in self.seen_models
            return
        except NoLiveWorker:
            assert model in self.seen_models or not self.known
            assert not allowed
            return
        picked = reservation.worker.spec.worker_id
        assert picked in allowed
        shortest = min(self.known[i].others + len(self.known[i].reserved) for i in allowed)
        assert self.known[picked].others + len(self.known[picked].reserved) == shortest
        self.known[picked].reserved.append(reservation)

    @precondition(lambda self: any(known.reserved for known in self.known.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from([known for known in self.known.values() if known.reserved]))
        reservation = known.reserved.pop()
        reservation.release()
        reservation.release()

    @precondition(lambda self: self.departed)
    @rule()
    def release_after_the_worker_left(self) -> None:
        self.departed.pop().release()

    # --------------------------------------------------------------------------- invariants

    @invariant()
    def the_live_workers_are_the_known_ones(self) -> None:
        assert {w.spec.worker_id: w.spec.instance_id for w in self.registry.workers()} == {
            worker_id: known.instance for worker_id, known in self.known.items()
        }
        assert set(self.registry.models()) == {name for known in self.known.values() for name in known.models}

    @invariant()
    def pools_hold_who_can_be_picked(self) -> None:
        for model in MODELS[:2]:
            try:
                _, pool = self.registry.pool(model)
            except FastChatError:
                continue
            assert {w.spec.worker_id for w in pool.members} == {i for i, k in self.known.items() if model in k.models}
            assert pool.count == len(pool.members)
            for tier in (Tier.READY, Tier.DEGRADED):
                expected = {i for i, k in self.known.items() if model in k.models and k.pickable() is tier}
                assert {worker.spec.worker_id for worker in pool.tier(tier)} == expected
                for index in pool.indexes(tier):
                    assert all(index.items[worker.place] is worker for worker in index.items)
                    scores = [worker.score for bucket in index.ascending() for worker in bucket]
                    assert scores == sorted(worker.ledger.score for worker in index.items)

    @invariant()
    def loads_add_up(self) -> None:
        for known in self.known.values():
            assert known.worker.reserved_count == len(known.reserved)
            assert known.worker.score == known.others + len(known.reserved)

    @invariant()
    def listeners_have_heard_it_all(self) -> None:
        assert self.heard == {worker_id: known.worker for worker_id, known in self.known.items()}
        told = {worker for worker in self.watch._told if worker.removed is None}
        assert told == set(self.heard.values())

    @invariant()
    def timers_are_bounded(self) -> None:
        # One per lease, and those of suspects and past leases that have not come due.
        due = sum(1 for when, _, _ in self.registry._timers if when <= self.fleet.clock.now - 1)
        assert due == 0


RegistryMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestRegistryAgainstItsModel = RegistryMachine.TestCase
