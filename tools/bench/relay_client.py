"""The client of the relay benchmark: raw sockets, one connection per stream, a time for every token."""

from __future__ import annotations

import asyncio
import json
import statistics
from dataclasses import dataclass

from tools.bench.relay_mock import MODEL, PACE_S, WORD

MARK = WORD.strip().encode()


@dataclass(frozen=True, slots=True)
class Timing:
    """One stream: when it was asked for, and when each token came (seconds of one clock)."""

    asked: float
    tokens: list[float]

    @property
    def first_s(self) -> float:
        return self.tokens[0] - self.asked

    def lags(self) -> list[float]:
        """How much later than its pace allows each token came, against the stream's most timely one."""
        slack = [arrival - number * PACE_S for number, arrival in enumerate(self.tokens)]
        return [value - min(slack) for value in slack]


async def ask(port: int, tokens: int, flat_out: bool) -> Timing:
    """One streamed chat completion. Raises RuntimeError if tokens are missing."""
    loop = asyncio.get_running_loop()
    body = json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Say hi to everybody, please."}],
            "max_tokens": tokens,
            "temperature": 0 if flat_out else 1.0,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    arrivals: list[float] = []
    rest = b""
    try:
        asked = loop.time()
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        while b"[DONE]" not in rest:
            data = await asyncio.wait_for(reader.read(65536), 60)
            now = loop.time()
            if not data:
                raise RuntimeError(f"the stream ended early: {rest[-300:]!r}")
            rest += data
            arrivals += [now] * rest.count(MARK)
            rest = rest.rpartition(MARK)[2]  # what may hold the beginning of the next mark
    finally:
        writer.close()
    if len(arrivals) != tokens:
        raise RuntimeError(f"{len(arrivals)} tokens came of {tokens}: {rest[-300:]!r}")
    return Timing(asked, arrivals)


async def crowd(port: int, streams: int, tokens: int, flat_out: bool) -> list[Timing]:
    """Many streams at once, started over one pace so that their tokens do not all come at one time."""

    async def one(number: int) -> Timing:
        await asyncio.sleep(0 if flat_out else PACE_S * number / streams)
        return await ask(port, tokens, flat_out)

    return await asyncio.gather(*(one(number) for number in range(streams)))


async def idle(port: int, count: int) -> float:
    """Median time to the first token of requests made one at a time, in seconds."""
    return statistics.median([(await ask(port, 1, True)).first_s for _ in range(count)])


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
