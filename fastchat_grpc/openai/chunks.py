"""The chunks of a streamed reply, and what is collected of a choice that is not streamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastchat_grpc.core import Completion, TokenLogprob
from fastchat_grpc.openai import sse
from fastchat_grpc.openai.call import Reply
from fastchat_grpc.openai.jsonio import dumps, dumps_scalar, quote
from fastchat_grpc.openai.tally import Tally


class ChunkWriter:
    """Writes the chunks of one reply: `head(index)`, the JSON of what a choice says, and a tail.

    The bytes around a text are rendered once, since a chunk is written for every token.

    Args:
        base: the members that say nothing about choices.
        opens: what comes between the index of a choice and what it says.
        closes: what comes after it.
    """

    def __init__(self, reply: Reply, base: Mapping[str, Any], tally: Tally, opens: bytes, closes: bytes = b"") -> None:
        self._start = sse.START + dumps(base)[:-1]
        self._tally = tally
        self._opens = opens
        self._closes = closes
        self._include_usage = reply.include_usage
        self._continuous_usage = reply.continuous_usage
        self.plain = not (reply.logprobs or reply.continuous_usage)
        """Whether all tails but the last of a choice are `plain_tail`."""
        self.plain_tail = self._tail(b"null", b"null", b',"usage":null' if reply.include_usage else b"")

    def head(self, index: int) -> bytes:
        """How the chunks of a choice begin."""
        return self._start + b',"choices":[{"index":%d,' % index + self._opens

    def tail(self, logprobs: bytes = b"null") -> bytes:
        """How a chunk ends whose choice goes on. `logprobs` is JSON."""
        return self._tail(logprobs, b"null", self._usage())

    def last_tail(self, logprobs: bytes, reason: str, matched: str | int | None) -> bytes:
        """How the last chunk of a choice ends: why, and what ended it."""
        return self._tail(logprobs, quote(reason) + b',"stop_reason":' + dumps_scalar(matched), self._usage())

    def end(self) -> bytes:
        """What follows the last choice: the usage of all, where it is asked for, and [DONE]."""
        if not self._include_usage:
            return sse.DONE
        return self._start + b',"choices":[],"usage":' + dumps(self._tally.render()) + b"}" + sse.END + sse.DONE

    def _tail(self, logprobs: bytes, finish: bytes, usage: bytes) -> bytes:
        return b"".join(
            (self._closes, b',"logprobs":', logprobs, b',"finish_reason":', finish, b"}]", usage, b"}", sse.END)
        )

    def _usage(self) -> bytes:
        if self._continuous_usage:
            return b',"usage":' + dumps(self._tally.render())
        return b',"usage":null' if self._include_usage else b""


@dataclass(slots=True)
class Collected:
    """A choice of a body."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Completion | None = None

    @property
    def matched(self) -> str | int | None:
        """What ended it."""
        return self.end.matched if self.end is not None else None


def write_body(base: Mapping[str, Any], choices: list[dict[str, Any]], tally: Tally) -> bytes:
    """A whole reply."""
    return dumps({**base, "choices": choices, "usage": tally.render()})
