"""Real processes of the command line, for tests."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.errors import FastChatError

TIMEOUT_S = 60.0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def run_cli(
    *arguments: str, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Run a command to its end: exit status, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fastchat_grpc",
        *arguments,
        stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )
    out, err = await asyncio.wait_for(process.communicate(stdin.encode() if stdin is not None else None), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def running_cli(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command in the background; ended with SIGTERM, or by force after a while."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fastchat_grpc",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.communicate(), 20)
            except TimeoutError:
                process.kill()
                await process.communicate()


async def wait_for_workers(controller: str, count: int = 1, timeout_s: float = TIMEOUT_S) -> None:
    """Return when the controller lists so many workers."""
    async with asyncio.timeout(timeout_s), AsyncClient(controller, timeout_s=2) as client:
        while True:
            try:
                if len(await client.workers()) == count:
                    return
            except FastChatError:
                pass
            await asyncio.sleep(0.05)


async def wait_for_answer(address: str, timeout_s: float = TIMEOUT_S) -> None:
    """Return when a worker or controller at the address answers with a model."""
    async with asyncio.timeout(timeout_s), AsyncClient(address, timeout_s=2) as client:
        while True:
            try:
                if (await client.status()).models:
                    return
            except FastChatError:
                pass
            await asyncio.sleep(0.05)
