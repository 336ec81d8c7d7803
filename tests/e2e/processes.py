"""Real processes of the command line, for tests."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.errors import FastChatError

TIMEOUT_S = 60.0


EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT = 10_000


def free_port() -> int:
    """A port that is free, and one that the system gives to nobody by itself.

    Of those that it does give, another process may have got it meanwhile, if only as its own end of a connection:
    a server that is to listen there, or to listen there again, could not.
    """
    end = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 32_768
    while True:
        port = random.randrange(LOWEST_PORT, max(end, LOWEST_PORT + 1000))
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


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
