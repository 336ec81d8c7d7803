"""Serves what the fuzz draws, many requests at once with a plain one beside them, and finds the one that does harm.

Nothing is raised: what went wrong is kept, with the smallest request found that does it, and the run goes on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from time import monotonic
from typing import Any

from fastchat_grpc.core import (
    ChatPrompt,
    Completion,
    GenerateRequest,
    OutputOptions,
    SamplingParams,
    StopConditions,
    TextPrompt,
    TokenPrompt,
)
from fastchat_grpc.errors import AdapterNotFound, FastChatError, InvalidArgument, NotSupported, OutOfMemory
from tests.conformance.fuzz_watch import MOST_MEMORY, Mark, Memory, Progress, brief, watched
from tests.conformance.harness import Harness, Result, empty, request, take

WIDTH = 16
"""Requests that run at once."""
MOST_EVENTS = 40
"""After so many the caller leaves, as callers do: long outputs are cut, and so are engines' sequences."""
NEIGHBOUR = "1 2 3 4 5 6 7 8 9 10 11"
"""A text whose continuation no rounding changes."""
REFUSALS = (InvalidArgument, AdapterNotFound, NotSupported, OutOfMemory)
MOST_REDUCED = 5
"""Failures after which no more are made smaller."""
REDUCTION_S = 240.0
"""Most time to make one failure smaller."""
PLAIN: dict[str, Any] = {
    "grammar": None,
    "lora_adapter": "",
    "truncate_prompt_tokens": None,
    "resume": None,
    "priority": 0,
    "session_key": "",
}

Fails = Callable[[GenerateRequest], Awaitable[bool]]


class Fuzz:
    """Runs batches on a started backend.

    Attributes:
        seen: requests by how they ended: served, left by the caller in the middle, refused.
        failures: what nobody but the backend is to blame for.
    """

    def __init__(self, harness: Harness, tell: Callable[[str], None] = lambda failure: None) -> None:
        """`tell` gets each failure as it comes."""
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []
        self._harness = harness
        self._tell = tell
        self._undisturbed: list[int] | str = ""
        self._progress = Progress()

    async def start(self) -> None:
        """Learn what the neighbour says when it is alone."""
        self._undisturbed = await self._neighbour()

    async def run(self, batch: Sequence[GenerateRequest]) -> None:
        """Serve all of them at once. Restarts the backend where they have ended it."""
        ended, faults = await self._together(batch)
        self.seen.update(ended)
        if faults:
            self._tell("; ".join(faults)[:1000])
            self.failures.append(await self._explained(batch, faults))
            self._tell(self.failures[-1])
            await self._revive()

    async def _together(self, batch: Sequence[GenerateRequest]) -> tuple[list[str], list[str]]:
        """How the requests ended, and what went wrong."""
        over = asyncio.Event()
        faults: list[str] = []
        memory = Memory()
        memory.begin()
        beside = asyncio.create_task(self._beside(over, faults))
        ended = await asyncio.gather(*(self._outcome(asked, faults) for asked in batch))
        over.set()
        await beside
        if memory.grown() > MOST_MEMORY:
            faults.append(f"they took {memory.grown() >> 20} MiB of memory")
        return ended, faults

    async def _outcome(self, asked: GenerateRequest, faults: list[str]) -> str:
        """Serve a request as far as a caller may want, and say how it ended."""
        try:
            result = await watched(self._progress, lambda mark: self._serve(asked, mark))
            return "served" if result is not None else "left"
        except REFUSALS as error:
            return f"refused: {type(error).__name__}"
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")
            return "failed"

    async def _serve(self, asked: GenerateRequest, mark: Mark) -> Result | None:
        """The whole answer, or None where there was so much of it that the caller left."""
        result, count = empty(asked), 0
        async with aclosing(self._harness.backend.generate(asked)) as events:
            async for item in events:
                self._progress.moved(mark)
                take(result, item, asked)
                count += not isinstance(item, Completion)
                if count == MOST_EVENTS:
                    return None
        assert all(choice.completion is not None for choice in result.choices.values()), "no Completion"
        return result

    async def _beside(self, over: asyncio.Event, faults: list[str]) -> None:
        """The plain request, one after the other until the rest is over; it must not notice."""
        while True:
            try:
                found = await self._neighbour()
                if found != self._undisturbed:
                    faults.append(f"the request beside says {found!r}, alone it says {self._undisturbed!r}")
            except Exception as error:
                faults.append(f"the request beside: {type(error).__name__}: {error}")
            if over.is_set() or faults:
                return

    async def _neighbour(self) -> list[int] | str:
        """Tokens of a plain greedy request, or its text where a backend has no tokens."""
        asked = request(NEIGHBOUR, max_new_tokens=6)
        result = await watched(self._progress, lambda mark: self._serve(asked, mark))
        assert result is not None
        self._progress.answered()
        return result.token_ids or result.text

    # ------------------------------------------------------------------- whose fault it was

    async def _explained(self, batch: Sequence[GenerateRequest], faults: list[str]) -> str:
        """The faults, and the smallest request that shows one again."""
        what = "; ".join(dict.fromkeys(faults))[:1000]
        if len(self.failures) >= MOST_REDUCED:
            return f"{what}; of one of:\n{_listed(batch)}"
        for asked in batch:
            if await self._fails(asked):
                smallest = await reduced(asked, self._fails, monotonic() + REDUCTION_S)
                return f"{what}; the smallest request: {brief(smallest)}"
        await self._revive()
        again = "again when" if (await self._together(batch))[1] else "not again when"
        return f"{what}; of none of these alone, {again} together:\n{_listed(batch)}"

    async def _fails(self, asked: GenerateRequest) -> bool:
        await self._revive()
        return bool((await self._together([asked]))[1])

    async def _revive(self) -> None:
        """Start the backend anew if it does not serve any more."""
        faults: list[str] = []
        over = asyncio.Event()
        over.set()
        await self._beside(over, faults)
        if faults:
            await self._harness.backend.close()
            await self._harness.start()


def _listed(batch: Sequence[GenerateRequest]) -> str:
    return "\n".join(f"    {brief(asked)}" for asked in batch)


async def reduced(asked: GenerateRequest, fails: Fails, end: float) -> GenerateRequest:
    """The simplest request found that still fails, or the one that there is when the time is over.

    Args:
        end: by `time.monotonic`.
    """
    while True:
        async for candidate in _in_time(smaller(asked), end):
            if await fails(candidate):
                asked = candidate
                break
        else:
            return asked


async def _in_time(candidates: Iterator[GenerateRequest], end: float) -> AsyncIterator[GenerateRequest]:
    for candidate in candidates:
        if monotonic() > end:
            return
        yield candidate


def smaller(asked: GenerateRequest) -> Iterator[GenerateRequest]:
    """Simpler requests than this one, the boldest first."""
    changes: list[dict[str, Any]] = []
    length = asked.stopping.max_new_tokens
    plain = {"sampling": SamplingParams(), "stopping": StopConditions(max_new_tokens=length), "output": OutputOptions()}
    changes += [{group: part} for group, part in plain.items()]
    changes += [{name: value} for name, value in PLAIN.items()]
    for group, part in plain.items():
        own = getattr(asked, group)
        changes += [{group: replace(own, **{field.name: getattr(part, field.name)})} for field in fields(own)]
    changes += [{"prompt": prompt} for prompt in _shorter(asked.prompt)]
    half = max(1, length // 2)
    least = min(asked.stopping.min_new_tokens, half)
    changes.append({"stopping": replace(asked.stopping, max_new_tokens=half, min_new_tokens=least)})
    for change in changes:
        try:
            candidate = replace(asked, **change)
        except FastChatError:  # parts that do not go together
            continue
        if candidate != asked:
            yield candidate


def _shorter(prompt: object) -> Iterator[object]:
    """A plain text instead of what is none; halves of a text or of tokens."""
    if not isinstance(prompt, TextPrompt):
        yield TextPrompt("Hello")
    if isinstance(prompt, TextPrompt) and len(prompt.text) > 1:
        half = len(prompt.text) // 2
        yield from (TextPrompt(prompt.text[:half]), TextPrompt(prompt.text[half:]))
    elif isinstance(prompt, TokenPrompt) and len(prompt.token_ids) > 1:
        half = len(prompt.token_ids) // 2
        yield from (TokenPrompt(prompt.token_ids[:half]), TokenPrompt(prompt.token_ids[half:]))
    elif isinstance(prompt, ChatPrompt):
        yield ChatPrompt(messages=prompt.messages)
        if len(prompt.messages) > 1:
            yield from (replace(prompt, messages=(message,)) for message in prompt.messages)
