"""Those who ask: with the Python client, of controllers or of workers, and over HTTP as an SDK does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from time import monotonic
from typing import Any, Protocol

import httpx2

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.core import Completion, Delta, PromptEcho
from fastchat_grpc.errors import Code, FastChatError, NoLiveWorker, QueueFull
from tests.chaos.disturbance import LOOK_S, PATIENCE, Excuses
from tests.chaos.workload import Answer, Ask

REQUEST_TIMEOUT_S = 120.0
RETRY_S = 1.0
"""Most time between two tries over HTTP, whatever the server says: the storm is short."""


class Lost(Exception):
    """A request that nobody answered, or an answer that ended without a word."""

    def __init__(self, what: str, *, away: bool = False) -> None:
        super().__init__(what)
        self.away = away
        """Whether the caller has given up to wait for those who were away."""


class OutOfPatience(Exception):
    """A request whose caller, or relay, has waited in vain, in an outage longer than they are to wait."""


class Broken(Exception):
    """A stream that ended with an error after its beginning."""


class Refused(Exception):
    """A refusal that is to be asked again, and says so. `full`: for want of room, not of workers."""

    def __init__(self, what: str, *, full: bool) -> None:
        super().__init__(what)
        self.full = full


class Caller(Protocol):
    """One who asks. `longest_gap_s` is the longest silence within a stream that came to its end."""

    longest_gap_s: float

    async def ask(self, ask: Ask) -> Answer:
        """The answer. Raises Lost, Broken, or Refused."""
        ...

    async def close(self) -> None:
        """End connections."""
        ...


class GrpcCaller:
    """Asks with the Python client, which knows several servers."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.client = AsyncClient(addresses, failover=PATIENCE, timeout_s=REQUEST_TIMEOUT_S)
        self.longest_gap_s = 0.0

    async def ask(self, ask: Ask) -> Answer:
        last, gap = monotonic(), 0.0
        texts: dict[int, list[str]] = {}
        token_ids: dict[int, list[int]] = {}
        ended: set[int] = set()
        logprobs = 0
        try:
            prompt = ask.messages if ask.chat else ask.prompt
            async for event in self.client.generate(prompt, model=ask.model, **ask.options):
                now = monotonic()
                gap, last = max(gap, now - last), now
                if isinstance(event, PromptEcho):
                    continue
                if event.index in ended:
                    raise Lost(f"{ask.name}: an event after the end of choice {event.index}")
                if isinstance(event, Completion):
                    ended.add(event.index)
                    found = len(token_ids.get(event.index, ()))
                    if event.usage.completion_tokens != found:
                        raise Lost(f"{ask.name}: usage of {event.usage.completion_tokens} tokens, {found} were sent")
                elif isinstance(event, Delta):
                    texts.setdefault(event.index, []).append(event.text)
                    token_ids.setdefault(event.index, []).extend(event.token_ids)
                    logprobs += len(event.logprobs)
        except FastChatError as error:
            refused = isinstance(error, QueueFull) or (ask.away and isinstance(error, NoLiveWorker))
            if refused and not texts:
                raise Refused(error.message, full=isinstance(error, QueueFull)) from None
            begun = f" after {len(texts)} choices had begun" if texts else ""
            away = error.code is Code.UNAVAILABLE
            raise Lost(f"{ask.name}: {error.reason}{begun}: {error.message}", away=away) from None
        if len(ended) != ask.options.get("n", 1):
            raise Lost(f"{ask.name}: ended without a completion of each choice")
        if "logprobs" in ask.options and logprobs != sum(map(len, token_ids.values())):
            raise Lost(f"{ask.name}: {logprobs} logprobs of {sum(map(len, token_ids.values()))} tokens")
        self.longest_gap_s = max(self.longest_gap_s, gap)
        return Answer(tuple(("".join(texts.get(i, ())), tuple(token_ids.get(i, ()))) for i in sorted(ended)))

    async def close(self) -> None:
        await self.client.close()


class HttpCaller:
    """Asks a gateway in direct mode, where a stream that has begun breaks if nobody can go on with it."""

    def __init__(self, address: str, number: int) -> None:
        self.client = httpx2.AsyncClient(base_url=f"http://{address}", timeout=REQUEST_TIMEOUT_S, trust_env=False)
        self.longest_gap_s = 0.0
        self._stream = number % 2 == 0

    async def ask(self, ask: Ask) -> Answer:
        path, body = ask.body(stream=self._stream)
        try:
            if self._stream:
                return await self._streamed(ask, path, body)
            response = await self.client.post(path, json=body)
        except httpx2.HTTPError as error:
            raise Lost(f"{ask.name}: {type(error).__name__} {error}") from None
        self._judge(ask, response)
        choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
        return Answer(tuple((_text(choice), ()) for choice in choices))

    async def _streamed(self, ask: Ask, path: str, body: dict[str, Any]) -> Answer:
        texts: dict[int, str] = {}
        ended: set[int] = set()
        async with self.client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
            self._judge(ask, response)
            try:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        break
                    if not line.startswith("data: "):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Broken(f"{ask.name}: {event['error']}")
                    for choice in event["choices"]:
                        texts[choice["index"]] = texts.get(choice["index"], "") + _text(choice)
                        if choice["finish_reason"]:
                            ended.add(choice["index"])
            except httpx2.HTTPError as error:
                raise Broken(f"{ask.name}: {type(error).__name__} {error}") from None
        if len(ended) != ask.options.get("n", 1):
            raise Lost(f"{ask.name}: a stream ended in good order without its finish reason")
        return Answer(tuple((texts[i], ()) for i in sorted(ended)))

    def _judge(self, ask: Ask, response: httpx2.Response) -> None:
        if response.status_code == 200:
            return
        what = f"{ask.name}: {response.status_code} {response.text[:300]}"
        if response.status_code not in (429, 503):
            raise Lost(what)
        if "retry-after" not in response.headers:
            raise Lost(f"{what} without Retry-After")
        raise Refused(what, full=response.status_code == 429)

    async def close(self) -> None:
        await self.client.aclose()


def _text(choice: dict[str, Any]) -> str:
    """Text of a choice of any kind of answer."""
    if "text" in choice:
        return str(choice["text"])
    return str(choice.get("delta", choice.get("message")).get("content") or "")


async def patiently(caller: Caller, ask: Ask, patience_s: float, excuses: Excuses) -> tuple[Answer, int]:
    """The answer, asked for again after each refusal, and how many there were. Raises Lost, Broken or OutOfPatience.

    Lost has the whole story: when it asked, how long it had to wait for each refusal, and what it heard.

    Args:
        patience_s: most time of refusals for want of room, when nothing excuses them.
    """
    began = monotonic()
    story: list[str] = []
    while True:
        asked = monotonic()
        try:
            return await caller.ask(ask), len(story)
        except Refused as refusal:
            now = monotonic()
            await asyncio.sleep(min(RETRY_S, LOOK_S * (len(story) + 1)))  # what excuses it may be noted a moment later
            excused = excuses.refusal(asked, now)
            patience_s -= 0 if excused else now - asked
            story.append(f"{asked - began:.1f}+{now - asked:.1f} s{' (excused)' if excused else ''}: {refusal}")
            if patience_s < 0 or not (excused or refusal.full):
                raise Lost(f"{ask.name}: refused {len(story)} times\n    " + "\n    ".join(story)) from None
        except Broken as broken:
            now = monotonic()
            await asyncio.sleep(LOOK_S)
            if not excuses.refusal(asked, now):
                raise Lost(f"a stream broke, and nothing excuses it: {broken}") from None
            raise
        except Lost as lost:
            if lost.away and excuses.patience_ended(asked, monotonic()):
                raise OutOfPatience from None
            raise
