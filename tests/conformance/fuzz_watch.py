"""What the fuzz watches while requests run: that all of them go on, at any speed of the machine, and their memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from time import monotonic
from typing import TypeVar

from fastchat_grpc.core import GenerateRequest, StopConditions

QUIET_S = 60.0
ANSWERS = 1000
"""A request that gets nothing for `QUIET_S`, in which the one beside it was answered so often, is stuck.

More than the longest one needs that wants nothing before its end, with all choices and a place in the queue."""
STILL_S = 300.0
"""Where nobody gets anything for so long the backend stands still, however busy the machine is."""
POLL_S = 0.5
MOST_MEMORY = 1 << 30
"""Bytes that a batch of requests to a tiny model may add to those of the processes at its start."""

GROUPS = ("sampling", "stopping", "output")
"""Fields of a request that are groups of fields."""

T = TypeVar("T")


class StuckError(Exception):
    """A request gets nothing any more, and that is not for want of time."""


@dataclass(slots=True)
class Mark:
    """When a request got something last, by the clock and by the answers of the one beside it."""

    at: float
    answers: int


class Progress:
    """Of all requests that run at once. A slow machine slows the plain request beside them too, so it is the clock."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._moved_at = clock()
        self._answers = 0

    def mark(self) -> Mark:
        """For a request that begins."""
        self._moved_at = self._clock()
        return Mark(self._moved_at, self._answers)

    def moved(self, mark: Mark) -> None:
        """A request has got something."""
        mark.at, mark.answers = self._clock(), self._answers
        self._moved_at = mark.at

    def answered(self) -> None:
        """The request beside the others has been answered."""
        self._answers += 1

    def problem(self, mark: Mark) -> str:
        """Why a request is stuck, or nothing."""
        now = self._clock()
        answers = self._answers - mark.answers
        if now - mark.at > QUIET_S and answers >= ANSWERS:
            return f"it got nothing for {now - mark.at:.0f} s, while the request beside it was answered {answers} times"
        if now - self._moved_at > STILL_S:
            return f"no request got anything for {now - self._moved_at:.0f} s"
        return ""


async def watched(progress: Progress, work: Callable[[Mark], Awaitable[T]]) -> T:
    """Do some work as long as it goes on. Raises StuckError, and what the work raises."""
    mark = progress.mark()
    task = asyncio.ensure_future(work(mark))
    while not task.done():
        await asyncio.wait({task}, timeout=POLL_S)
        problem = progress.problem(mark)
        if problem and not task.done():
            task.cancel()
            ended, _ = await asyncio.wait({task}, timeout=QUIET_S)
            raise StuckError(problem if ended else f"{problem}; it does not end when its caller leaves, either")
    return task.result()


class Memory:
    """Of this process and those below it, in bytes. Elsewhere than on Linux it is unknown, and 0."""

    def __init__(self) -> None:
        self._before = 0

    def begin(self) -> None:
        """Measure from here on."""
        self._before = resident()
        for folder in _processes():
            with suppress(OSError):
                (folder / "clear_refs").write_text("5")  # the peak begins anew

    def grown(self) -> int:
        """Bytes by which the highest use since `begin` exceeds that of then."""
        return _sum("VmHWM:") - self._before


def resident() -> int:
    """Bytes in use now."""
    return _sum("VmRSS:")


def _sum(line: str) -> int:
    found = 0
    for folder in _processes():
        with suppress(OSError):
            for text in (folder / "status").read_text().splitlines():
                if text.startswith(line):
                    found += int(text.split()[1]) * 1024
    return found


def _processes(folder: Path = Path("/proc/self")) -> Iterator[Path]:
    yield folder
    for thread in _listed(folder / "task"):
        with suppress(OSError):
            for child in (thread / "children").read_text().split():
                yield from _processes(Path("/proc") / child)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def brief(asked: GenerateRequest) -> str:
    """A request by what distinguishes it from a plain one."""
    plain = GenerateRequest(prompt=asked.prompt, model=asked.model, stopping=StopConditions(max_new_tokens=1))
    said = [str(asked.prompt)]
    for group in GROUPS:
        said += _differing(getattr(asked, group), getattr(plain, group), f"{group}.")
    said += _differing(asked, plain, "")
    return ", ".join(text if len(text) <= 400 else f"{text[:400]}... ({len(text)} characters)" for text in said)


def _differing(own: object, plain: object, prefix: str) -> list[str]:
    return [
        f"{prefix}{field.name}={getattr(own, field.name)!r}"
        for field in fields(own)  # type: ignore[arg-type]
        if field.name not in GROUPS and getattr(own, field.name) != getattr(plain, field.name)
    ]
