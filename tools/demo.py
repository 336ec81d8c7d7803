"""Start a controller, a worker with the embedded model and the HTTP bridge, stream one answer, stop everything.

Exits with 0 if the answer came. Ports are free ones, so that a fleet that already runs is not disturbed.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.core import Completion, Delta
from fastchat_grpc.errors import FastChatError

QUESTION = "Write two short sentences about the sea."
START_TIMEOUT_S = 1800.0
"""The first start fetches the model; how long that takes is the network's affair."""


@dataclass(frozen=True)
class Ports:
    controller: int
    worker: int
    gateway: int


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def fleet(ports: Ports) -> Iterator[subprocess.Popen[bytes]]:
    """`fastchat-grpc serve`, stopped on exit. Its log on stderr tells what there is to wait for."""
    command = [sys.executable, "-m", "fastchat_grpc", "serve", "--log-level", "info"]
    command += ["--controller-port", str(ports.controller), "--port", str(ports.worker)]
    command += ["--gateway", "--gateway-port", str(ports.gateway)]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


async def wait_for_model(client: AsyncClient, process: subprocess.Popen[bytes]) -> str:
    """Name of the model, once a worker serves one."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(process.returncode or 1)
        try:
            models = await client.models()
        except FastChatError:  # the controller is not up yet
            models = []
        if models:
            return models[0].model.name
        await asyncio.sleep(0.1)
    sys.exit("error: no worker came up")


async def stream_answer(client: AsyncClient, model: str) -> str:
    """Print the answer as it comes; return its figures."""
    started = time.monotonic()
    first_s, tokens = 0.0, 0
    messages = [{"role": "user", "content": QUESTION}]
    async for event in client.generate(messages, model=model, temperature=0.0, max_new_tokens=128):
        if isinstance(event, Delta):
            first_s = first_s or time.monotonic() - started
            print(event.text, end="", flush=True)
        elif isinstance(event, Completion):
            tokens = event.usage.completion_tokens
    speed = (tokens - 1) / (time.monotonic() - started - first_s)
    return f"{tokens} tokens, {speed:.1f} tokens/s, time to first token {first_s * 1000:.0f} ms"


def show_doors(ports: Ports, model: str) -> None:
    """The same question by other ways, with the ports that `make serve` uses."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "stream": true}}'
    print(
        f"""
make serve keeps all this running. Then:
  fastchat-grpc generate "{QUESTION}"
  curl -N http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' -d '{body}'
  grpcurl -plaintext -d '{{"prompt": "The sea"}}' 127.0.0.1:21001 fastchat_grpc.v1.GenerationService/Generate
  python -c 'import openai; print(openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").models.list())'"""
    )


async def main() -> None:
    ports = Ports(*free_ports(3))
    address, started = f"127.0.0.1:{ports.controller}", time.monotonic()
    print("starting a controller, a worker and the HTTP bridge", flush=True)
    with fleet(ports) as process:
        async with AsyncClient(address) as client:
            model = await wait_for_model(client, process)
            print(f"controller {address} and a worker with {model} are up after {time.monotonic() - started:.1f} s\n")
            print(f"> {QUESTION}\n", flush=True)
            figures = await stream_answer(client, model)
        print(f"\n\n{figures}")
    show_doors(ports, model)


if __name__ == "__main__":
    asyncio.run(main())
