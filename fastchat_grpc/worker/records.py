"""What may be noted of requests: nothing, unless metrics are asked for."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from fastchat_grpc.core import EmbedRequest, EmbedResult, Event, GenerateRequest


class Record(Protocol):
    """Notes of one request, from its arrival to its end, which is where its context is left."""

    def __enter__(self) -> Record: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def admitted(self) -> None:
        """It has its slot."""

    def event(self, event: Event) -> None:
        """An event is there, and about to be sent."""

    def embedded(self, result: EmbedResult) -> None:
        """Its inputs are embedded."""


class Records(Protocol):
    """Makes the notes."""

    def begin(self, request: GenerateRequest | EmbedRequest, client: str) -> Record:
        """A request has arrived; its model is one of those served. `client`: the name of its key; empty: none."""
        ...


class Nothing:
    """Notes nothing. Implements Records and Record."""

    def begin(self, request: GenerateRequest | EmbedRequest, client: str) -> Record:
        return self

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def admitted(self) -> None:
        pass

    def event(self, event: Event) -> None:
        pass

    def embedded(self, result: EmbedResult) -> None:
        pass


NOTHING = Nothing()
