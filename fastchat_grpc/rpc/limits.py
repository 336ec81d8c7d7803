"""How many calls a server has open at once: in all, and from one peer.

Requests that wait for the engine are bounded by admission, with a queue. This bounds what admission does not see:
calls that are open and ask for nothing, streams that nobody reads, watches that never end.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from fastchat_grpc.errors import TooManyCalls

MAX_STREAMS_PER_CONNECTION = 16_384
"""HTTP/2 streams. Above what a peer may have open as calls: a call beyond this would wait without a word."""

_MEMBER_SERVICE = "/fastchat_grpc.v1.ControllerService/"
UNBOUNDED = frozenset(_MEMBER_SERVICE + name for name in ("Register", "Heartbeat", "Deregister"))
"""Short calls that keep a fleet together: no crowd of callers may keep them out."""
WATCHES = frozenset(
    {
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    }
)
"""Calls without a key and without an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallBounds:
    """Calls open at once. A peer is a host, or a gateway with all its callers."""

    calls: int = 16_384
    calls_per_peer: int = 8_192
    watches: int = 4_096
    watches_per_peer: int = 256
    first_message_s: float = 60.0
    """Time in which a call's first message must have arrived, whole; a large one comes slowly over a thin line."""


class CallLimits:
    """Calls under way against their bounds. One per server, on one event loop."""

    def __init__(self, bounds: CallBounds | None = None) -> None:
        bounds = bounds or CallBounds()
        self.first_message_s = bounds.first_message_s
        self._calls = Limit(bounds.calls, bounds.calls_per_peer)
        self._watches = Limit(bounds.watches, bounds.watches_per_peer)

    @property
    def open(self) -> int:
        """Calls that are counted now."""
        return self._calls.open + self._watches.open

    def of(self, method: str) -> Limit | None:
        """The limit that a method counts against; None: it is not counted."""
        if method in UNBOUNDED:
            return None
        return self._watches if method in WATCHES else self._calls


class Limit:
    """One bound in all and one for each peer."""

    def __init__(self, total: int, per_peer: int) -> None:
        self._total = total
        self._per_peer = per_peer
        self.open = 0
        self.by_peer: dict[str, int] = {}

    def call(self, peer: str) -> _Call:
        """A call from a peer, as grpc names it ("ipv4:10.0.0.1:5000"); counted while the context lasts.

        Raises TooManyCalls on entering.
        """
        return _Call(self, peer.rpartition(":")[0] or peer)

    def enter(self, host: str) -> None:
        if self.open >= self._total:
            raise TooManyCalls(f"this server has {self.open} calls open, as many as it takes", retry_after_s=1.0)
        of_peer = self.by_peer.get(host, 0)
        if of_peer >= self._per_peer:
            raise TooManyCalls(f"this peer has {self._per_peer} calls open here, as many as it may", retry_after_s=1.0)
        self.open += 1
        self.by_peer[host] = of_peer + 1

    def leave(self, host: str) -> None:
        self.open -= 1
        of_peer = self.by_peer[host] - 1
        if of_peer:
            self.by_peer[host] = of_peer
        else:
            del self.by_peer[host]


class _Call:
    __slots__ = ("_host", "_limit", "sent")

    def __init__(self, limit: Limit, host: str) -> None:
        self._limit = limit
        self._host = host
        self.sent = 0
        """Bytes of its answers."""

    def __enter__(self) -> _Call:
        self._limit.enter(self._host)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._limit.leave(self._host)
