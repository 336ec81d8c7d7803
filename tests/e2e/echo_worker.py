"""An echo worker, or a controller, in a process of its own, for tests that kill it or load it.

    python -m tests.e2e.echo_worker controller [PORT]
    python -m tests.e2e.echo_worker CONTROLLER[,CONTROLLER] [MODEL] [SETTING=VALUE ...]

Settings are weight, max_running, port, worker_id, and the options of the backend.

Prints its address once it serves.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastchat_grpc.config import ControllerConfig, ListenConfig
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import echo_config


async def main(first: str, *rest: str) -> None:
    app = _controller(*rest) if first == "controller" else _worker(first, *rest)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await app.start()
    print(app.address, flush=True)
    await stop.wait()
    await app.stop()


def _controller(port: str = "0") -> ControllerApp:
    return ControllerApp(ControllerConfig(listen=ListenConfig(port=int(port)), drain_timeout_s=0.0))


def _worker(controllers: str, model: str = "echo", *settings: str) -> WorkerApp:
    options = dict(setting.split("=", 1) for setting in settings)
    return WorkerApp(
        echo_config(
            model,
            controllers=tuple(controllers.split(",")),
            weight=float(options.pop("weight", "1")),
            max_running=int(options.pop("max_running", "0")) or None,
            port=int(options.pop("port", "0")),
            worker_id=options.pop("worker_id", ""),
            options=options,
            drain_timeout_s=5.0,
        )
    )


class ServerProcess:
    """A running server."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    def kill(self) -> None:
        """End it without a goodbye."""
        self.process.kill()


def worker_process(
    controllers: str, model: str = "echo", **settings: object
) -> AbstractAsyncContextManager[ServerProcess]:
    """Start an echo worker, and end it by force at the end."""
    return _process(controllers, model, *(f"{key}={value}" for key, value in settings.items()))


def controller_process(port: int = 0) -> AbstractAsyncContextManager[ServerProcess]:
    """Start a controller, and end it by force at the end."""
    return _process("controller", str(port))


@asynccontextmanager
async def _process(*arguments: str) -> AsyncIterator[ServerProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.e2e.echo_worker", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        assert line, "the server ended before it served"
        yield ServerProcess(process, line.decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
