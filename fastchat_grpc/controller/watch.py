"""A queue of registry changes for one watcher, merged where the watcher is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from fastchat_grpc.controller.fleet import Change, ChangeKind, Worker
from fastchat_grpc.controller.registry import Registry


class Watch:
    """Collects the changes of a registry between two calls of `next`. Close it.

    However slow the watcher, it holds one entry per lease: a change of load replaces the one before, a
    worker that came and went in between is not mentioned at all.

    Args:
        model: only workers that serve it; empty: all.
        loads: whether changes of load alone count.
        resumed: what the watcher has missed since it was last here (`History.since`); it knows the rest.
            None: it knows nothing.
    """

    def __init__(
        self,
        registry: Registry,
        model: str = "",
        *,
        loads: bool = True,
        resumed: Mapping[Worker, ChangeKind] | None = None,
    ) -> None:
        self._model = model
        self._loads = loads
        self._pending: dict[Worker, ChangeKind] = {}
        self._some = asyncio.Event()
        self._closed = False
        self.initial: Sequence[Worker] = registry.workers(model)
        """The workers at the beginning; `next` tells what comes after."""
        self._told = set(self.initial)
        if resumed is not None:
            self._resume(resumed)
        self._unsubscribe = registry.subscribe(self._on_change)

    def _resume(self, missed: Mapping[Worker, ChangeKind]) -> None:
        self.initial = ()
        for worker, kind in missed.items():
            if worker in self._told:
                self._put(worker, kind)
            elif kind is not ChangeKind.ADDED:  # it has left, or serves the model no more, if it ever did
                self._put(worker, ChangeKind.REMOVED)

    def close(self) -> None:
        """Stop collecting; `next` returns what is left, then nothing."""
        self._closed = True
        self._unsubscribe()
        self._some.set()

    async def next(self) -> Sequence[tuple[ChangeKind, Worker]]:
        """The changes since the last call, in order; waits until there is one. Nothing: closed."""
        await self._some.wait()
        if not self._closed:
            self._some.clear()
        changes, self._pending = self._pending, {}
        return [(kind, worker) for worker, kind in changes.items()]

    def _on_change(self, change: Change) -> None:
        worker, kind = change.worker, change.kind
        serves = not self._model or worker.model(self._model) is not None
        if kind is ChangeKind.LOAD and not self._loads:
            return
        if kind is ChangeKind.REMOVED or not serves:
            self._leave(worker)
        elif worker not in self._told:
            self._told.add(worker)
            self._put(worker, ChangeKind.ADDED)
        elif self._pending.get(worker) is not ChangeKind.ADDED:
            self._put(worker, kind)

    def _leave(self, worker: Worker) -> None:
        if worker not in self._told:
            return
        self._told.discard(worker)
        if self._pending.pop(worker, None) is not ChangeKind.ADDED:
            self._put(worker, ChangeKind.REMOVED)

    def _put(self, worker: Worker, kind: ChangeKind) -> None:
        if not (kind is ChangeKind.LOAD and worker in self._pending):
            self._pending[worker] = kind
        self._some.set()
