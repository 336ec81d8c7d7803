"""Work on texts beside the event loop: what takes milliseconds is done at once, what takes longer waits its turn.

Tokenizing takes about half a second for a megabyte. Done on the event loop it would stop every stream; in the loop's
own pool of threads a few huge texts would keep every other request from being prepared. So long texts have two
threads and huge ones a thread to themselves, first come first served, and grammars have theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from fastchat_grpc.core import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from fastchat_grpc.errors import QueueFull

LONG_CHARACTERS = 20_000
"""From here on a text takes longer than a stream should wait between two tokens."""
HUGE_CHARACTERS = 400_000
CHARACTERS_PER_TOKEN = 4
"""What a token id counts for: it is text already, or becomes text."""
MAX_WAITING = 64
"""Texts in one lane; more are refused, since each holds megabytes."""

P = ParamSpec("P")
T = TypeVar("T")


class Lane:
    """Some threads, made at first use, and a queue before them. Used on one event loop at a time."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting = 0

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in one of the threads. Raises QueueFull."""
        if self._waiting >= MAX_WAITING:
            raise QueueFull(f"{self._waiting} {self._name} are being read already; try again later")
        self._waiting += 1
        call = asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **kwargs))
        call.add_done_callback(self._leave)
        return await call

    def _leave(self, call: object) -> None:
        self._waiting -= 1


# One set for a process: what they share is its processors. A pool without work has no threads.
_LONG = Lane("long texts", 2)
_HUGE = Lane("huge texts", 1)
GRAMMARS = Lane("grammars", 2)


async def run(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that reads or makes `size` characters, at once where they are few. Raises QueueFull."""
    if size < LONG_CHARACTERS:
        return function(*args, **kwargs)
    return await (_LONG if size < HUGE_CHARACTERS else _HUGE).run(function, *args, **kwargs)


def characters(prompt: Prompt) -> int:
    """How much there is to read of a prompt, roughly."""
    match prompt:
        case TextPrompt(text):
            return len(text)
        case TokenPrompt(token_ids):
            return len(token_ids) * CHARACTERS_PER_TOKEN
        case ChatPrompt() as chat:
            tools = sum(len(tool.description) + len(tool.parameters_json) for tool in chat.tools)
            return sum(map(_length, chat.messages)) + tools + len(chat.template_arguments_json)


def _length(message: ChatMessage) -> int:
    content = message.content
    parts = (content,) if isinstance(content, str) else content
    said = sum(len(part) if isinstance(part, str) else 1000 for part in parts)
    return said + len(message.reasoning) + sum(len(call.arguments_json) for call in message.tool_calls)
