"""What has lately changed in the registry, so that a watcher that was away hears of that alone."""

from __future__ import annotations

import secrets
from collections import deque

from fastchat_grpc.controller.fleet import Change, ChangeKind, Worker
from fastchat_grpc.controller.registry import Registry

KEPT = 10_000
"""Changes that are kept. Changes of load alone are none: the next heartbeats bring every load anew."""


class History:
    """The last changes of a registry, each with a number. Who knows a number can be told what came after it.

    Versions are for this process: the numbers of another begin elsewhere.
    """

    def __init__(self, registry: Registry, kept: int = KEPT) -> None:
        self._epoch = secrets.token_hex(4)
        self._changes: deque[tuple[int, ChangeKind, Worker]] = deque(maxlen=kept)
        self._number = 0
        registry.subscribe(self._on_change)

    @property
    def version(self) -> str:
        """Where the registry is now."""
        return f"{self._epoch}.{self._number}"

    def since(self, version: str) -> dict[Worker, ChangeKind] | None:
        """What became of the workers that changed after a version, in order of their last changes.

        A worker that came and went in between is not mentioned. None: the version is not of this process, or
        so old that not all is known.
        """
        epoch, _, digits = version.partition(".")
        if epoch != self._epoch or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
            return None
        number = int(digits)
        oldest = self._changes[0][0] if self._changes else self._number + 1
        if not oldest - 1 <= number <= self._number:
            return None
        return self._merged(number)

    def _merged(self, number: int) -> dict[Worker, ChangeKind]:
        merged: dict[Worker, ChangeKind] = {}
        for _, kind, worker in self._after(number):
            before = merged.pop(worker, None)
            if before is ChangeKind.ADDED:
                if kind is ChangeKind.REMOVED:
                    continue
                kind = ChangeKind.ADDED
            merged[worker] = kind
        return merged

    def _after(self, number: int) -> list[tuple[int, ChangeKind, Worker]]:
        found = []
        for change in reversed(self._changes):
            if change[0] <= number:
                break
            found.append(change)
        return found[::-1]

    def _on_change(self, change: Change) -> None:
        if change.kind is not ChangeKind.LOAD:
            self._number += 1
            self._changes.append((self._number, change.kind, change.worker))
