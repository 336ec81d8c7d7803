"""A bridge that takes a broken answer to another worker, as a gateway does: it knows the numbers of two fields, and no
more of what it passes on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

Method = Callable[[bytes], AsyncGenerator[bytes, None]]
"""A streaming method of a worker that is asked for state: serialized request in, serialized responses out."""


@dataclass(frozen=True)
class Rule:
    """Which field of a response is kept, and which of the request it is sent as."""

    kept: int
    sent: int
    emptied: Callable[[bytes], bool]
    """Whether the content of a field that is kept says that nobody can go on."""


OPENAI = Rule(3, 3, lambda entry: all(number != 2 for number, _ in fields(entry)))
GENERATE = Rule(15, 14, lambda piece: not piece)


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a message, those with a length: number and content. Others are not in what is taken apart here."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 != 2:
            assert tag & 7 == 0, "no fixed numbers"
            value, at = _varint(message, at)
            yield tag >> 3, _write(value)
            continue
        length, at = _varint(message, at)
        yield tag >> 3, message[at : at + length]
        at += length
        assert at <= len(message)


def field_bytes(number: int, content: bytes) -> bytes:
    """A field with a length."""
    return _write(number << 3 | 2) + _write(len(content)) + content


@dataclass
class Kept:
    """What a bridge has of one answer."""

    rule: Rule
    pieces: bytes = b""
    resumable: bool = True
    frames: int = 0
    sizes: list[int] = field(default_factory=list)

    def take(self, frame: bytes) -> bytes:
        """What of a response is passed on."""
        found = list(fields(frame))
        own = [content for number, content in found if number == self.rule.kept]
        assert own or self.frames, "the first response of each worker has a piece"
        self.resumable = self.resumable and not any(map(self.rule.emptied, own))
        self.frames += 1
        for content in own:
            self.pieces += field_bytes(self.rule.sent, content)
            self.sizes.append(len(content))
        return b"".join(field_bytes(number, content) for number, content in found if number != self.rule.kept)


async def carry(workers: Sequence[Method], rule: Rule, request: bytes, breaks: Sequence[int] = ()) -> list[bytes]:
    """What a caller is sent of an answer that breaks at one worker after the other, after so many responses of each."""
    kept, passed = Kept(rule), []
    for attempt, limit in enumerate([*breaks, None]):
        assert kept.resumable
        count = kept.frames = 0
        worker = workers[attempt % len(workers)]
        if limit == 0:
            continue
        async with aclosing(worker(request + kept.pieces)) as frames:
            async for frame in frames:
                if rest := kept.take(frame):
                    passed.append(rest)
                count += 1
                if count == limit:
                    break
            else:
                return passed
    raise AssertionError("unreachable")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _write(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
