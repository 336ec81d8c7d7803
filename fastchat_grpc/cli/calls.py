"""`fastchat-grpc generate`, `models`, `workers`, `drain` and `undrain`: calls to a running fleet."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

import click

from fastchat_grpc.cli.credentials import call_options, connect, member_options
from fastchat_grpc.config import require_seconds
from fastchat_grpc.rpc.printable import printable

if TYPE_CHECKING:
    from fastchat_grpc.client import AsyncClient


WIDTH = 100_000
"""Columns of a table, at most."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal would obey, in the words of a model; line breaks and tabs are none of that."""


@click.command()
@click.argument("prompt")
@call_options
@click.option("--model", default="", help="Model to ask.  [default: the only one served]")
@click.option(
    "--chat/--plain", default=True, show_default=True, help="Ask as a chat message, or continue the plain text."
)
@click.option("--system", help="System message of the chat.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, help="[default: the model's own]")
@click.option("--top-p", type=float, help="[default: the model's own]")
@click.option("--top-k", type=int, help="[default: the model's own]")
@click.option("--repetition-penalty", type=float, help="[default: the model's own]")
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="Stop string; may be repeated.")
@click.option("--stats", is_flag=True, help="Print time to first token and tokens per second.")
def generate(prompt: str, **flags: Any) -> None:
    """Stream one generation to the terminal. PROMPT "-" reads standard input."""
    text = sys.stdin.read() if prompt == "-" else prompt

    async def call() -> None:
        async with connect(flags) as client:
            await _stream(client, text, flags)

    asyncio.run(call())


async def _stream(client: AsyncClient, text: str, flags: dict[str, Any]) -> None:
    from fastchat_grpc.core import Completion, Delta

    show_stats, chat, system = flags.pop("stats"), flags.pop("chat"), flags.pop("system")
    messages = [{"role": "system", "content": system}] if system else []
    prompt = [*messages, {"role": "user", "content": text}] if chat else text
    flags = {key: value for key, value in flags.items() if value is not None}
    started = time.monotonic()
    first_s = 0.0
    async for event in client.generate(prompt, **flags):
        if isinstance(event, Delta):
            first_s = first_s or time.monotonic() - started
            if event.reasoning:
                _print(event.reasoning, sys.stderr)  # what is piped on is the answer
            _print(event.text, sys.stdout)
        elif isinstance(event, Completion):
            print()
            if show_stats:
                _print_stats(
                    event.usage.completion_tokens, first_s, time.monotonic() - started, event.finish_reason.value
                )


def _print(text: str, stream: TextIO) -> None:
    print(CONTROLS.sub("", text) if stream.isatty() else text, end="", flush=True, file=stream)


def _print_stats(tokens: int, first_s: float, total_s: float, reason: str) -> None:
    speed = (tokens - 1) / (total_s - first_s) if tokens > 1 and total_s > first_s else 0.0
    print(
        f"{tokens} tokens, {speed:.1f} tokens/s, time to first token {first_s * 1000:.0f} ms, finish reason {reason}",
        file=sys.stderr,
    )


@click.command()
@call_options
def models(**flags: Any) -> None:
    """List the models of the fleet."""

    async def call(client: AsyncClient) -> list[list[str]]:
        return [
            [entry.model.name, str(entry.worker_count), str(entry.model.context_length), entry.model.backend]
            for entry in await client.models()
        ]

    _table(["model", "workers", "context", "backend"], flags, call)


@click.command()
@member_options
@click.option("--model", default="", help="Only workers of this model.")
def workers(model: str, **flags: Any) -> None:
    """List the live workers and their load."""

    async def call(client: AsyncClient) -> list[list[str]]:
        from fastchat_grpc.rpc import convert

        rows = []
        for worker in await client.workers(model):
            load = convert.load_from_pb(worker.load)
            queue = f"{load.running}+{load.waiting}/{load.max_running}"
            names = ", ".join(entry.name for entry in worker.models)
            rows.append(
                [worker.worker_id, worker.address, names, load.state.value, queue, f"{load.tokens_per_second:.1f}"]
            )
        return rows

    _table(["worker", "address", "models", "state", "running+waiting/slots", "tokens/s"], flags, call)


@click.command()
@click.argument("worker_id")
@member_options
@click.option("--drain-timeout", type=float, help="Seconds for requests to end.  [default: the worker's own]")
def drain(worker_id: str, drain_timeout: float | None, **flags: Any) -> None:
    """Let a worker finish what it runs, and leave. Ask each controller that is not to wait for its heartbeat."""
    if drain_timeout is not None:
        require_seconds("--drain-timeout", drain_timeout)

    async def run() -> int:
        async with connect(flags, timeout_s=10) as client:
            return await client.drain_worker(worker_id, drain_timeout_s=drain_timeout)

    print(f"{printable(worker_id)} drains; requests that still run there: {asyncio.run(run())}")


@click.command()
@click.argument("worker_id")
@member_options
def undrain(worker_id: str, **flags: Any) -> None:
    """Take a drain back: the worker takes new requests again. Ask the controller that was asked to drain it."""

    async def run() -> None:
        async with connect(flags, timeout_s=10) as client:
            await client.undrain_worker(worker_id)

    asyncio.run(run())
    print(f"{printable(worker_id)} is asked to take requests again")


def _table(columns: list[str], flags: dict[str, Any], call: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    async def run() -> list[list[str]]:
        async with connect(flags, timeout_s=10) as client:
            rows: list[list[str]] = await call(client)
            return rows

    table = Table(*columns, box=None, header_style="bold")
    for row in asyncio.run(run()):
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Ids and addresses are copied from here: what is too wide for a terminal is wrapped by it, and never cut short.
    Console(soft_wrap=True, width=WIDTH).print(table)
