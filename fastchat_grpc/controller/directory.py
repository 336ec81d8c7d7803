"""Live workers by id, by lease and by address."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastchat_grpc.controller.fleet import Worker


class Directory:
    """Finds workers. What is not found here is not registered."""

    def __init__(self) -> None:
        self.leases: dict[str, Worker] = {}
        self._ids: dict[str, Worker] = {}
        self._addresses: dict[str, dict[Worker, None]] = {}
        self._ordered: Sequence[Worker] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def get(self, worker_id: str) -> Worker | None:
        """The worker of an id."""
        return self._ids.get(worker_id)

    def at(self, address: str) -> Collection[Worker]:
        """The workers that advertise an address."""
        return tuple(self._addresses.get(address, ()))

    def ordered(self) -> Sequence[Worker]:
        """All, by id. Sorted anew only when some have come or gone. Not to be changed."""
        if self._ordered is None:
            self._ordered = sorted(self._ids.values(), key=by_id)
        return self._ordered

    def add(self, worker: Worker) -> None:
        """Put a worker in, under its id, its lease and its address."""
        self._ids[worker.spec.worker_id] = worker
        self.leases[worker.lease_id] = worker
        self._addresses.setdefault(worker.spec.address, {})[worker] = None
        self._ordered = None

    def remove(self, worker: Worker) -> None:
        """Take a worker out; id, lease and address are those that it was put in with."""
        del self._ids[worker.spec.worker_id]
        del self.leases[worker.lease_id]
        there = self._addresses[worker.spec.address]
        del there[worker]
        if not there:
            del self._addresses[worker.spec.address]
        self._ordered = None


def by_id(worker: Worker) -> str:
    """Key to sort workers by."""
    return worker.spec.worker_id
