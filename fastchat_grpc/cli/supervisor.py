"""`fastchat-grpc serve`: a controller, workers and the HTTP bridge on one machine, supervised."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import click

from fastchat_grpc.cli import USAGE_ERROR, options
from fastchat_grpc.cli.process import SUPERVISED, run_until_signalled
from fastchat_grpc.config import CONTROLLER_PORT, GATEWAY_PORT, WORKER_PORT
from fastchat_grpc.errors import ConfigError

logger = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0
"""A part that ran this long starts over with the shortest backoff."""
STOP_GRACE_S = 5.0
"""Time to stop beyond a part's own drain timeout."""
OWN_FLAGS = {"port", "controller_port", "num_workers", "controller_address", "worker_id", "gateway", "gateway_port"}
"""Flags of `serve` that are not passed on to workers as they are."""


@click.command()
@options.listen_options(WORKER_PORT)
@options.worker_options
@click.option("--controller-port", type=int, default=CONTROLLER_PORT, show_default=True, help="Port of the controller.")
@click.option("--num-workers", type=int, default=1, show_default=True, help="Workers, on successive ports from --port.")
@click.option("--gateway-port", type=int, default=GATEWAY_PORT, show_default=True, help="Port of the HTTP bridge.")
@click.option("--gateway/--no-gateway", default=None, help="Run the HTTP bridge.  [default: where Envoy is installed]")
@click.pass_context
def serve(ctx: click.Context, /, **flags: Any) -> None:
    """Run a controller and workers together; parts that crash are restarted, Ctrl-C stops all."""
    count, controller_port = flags["num_workers"], flags["controller_port"]
    if count < 1:
        raise ConfigError(f"--num-workers must be at least 1, got {count}")
    host = flags["host"]
    flags["controller_address"] = (f"{host}:{controller_port}",)
    config = options.worker_config(flags)  # a wrong flag is said here, not by a child
    passed = _given_flags(ctx, without=OWN_FLAGS)
    common = ["--host", host, "--log-level", flags["log_level"]]
    at_controller = ["--controller-address", flags["controller_address"][0]]
    grace_s = config.drain_timeout_s + STOP_GRACE_S
    parts = [Part("controller", ["controller", *common, "--port", str(controller_port)], grace_s, stop_order=2)]
    for i in range(count):
        port = config.listen.port + i if config.listen.port else 0
        arguments = ["worker", *passed, "--port", str(port), *at_controller]
        parts.append(Part(f"worker-{i}", arguments, grace_s, stop_order=1))
    if _wants_gateway(flags["gateway"]):
        arguments = ["gateway", *common, "--port", str(flags["gateway_port"]), *at_controller]
        parts.append(Part("gateway", arguments, grace_s, stop_order=0))
    run_until_signalled(Supervisor(parts).run, flags["log_level"])


def _wants_gateway(asked: bool | None) -> bool:
    from fastchat_grpc.gateway.binary import find_envoy

    if asked is not None:
        return asked
    try:
        find_envoy()
    except ConfigError:
        return False
    return True


def _given_flags(ctx: click.Context, without: set[str]) -> list[str]:
    """The flags of the command line again, for a child."""
    arguments: list[str] = []
    for param in ctx.command.params:
        name = param.name or ""
        if name in without or ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        value, flag = ctx.params[name], param.opts[0]
        if isinstance(param, click.Option) and param.is_flag:
            arguments.append(flag)
        elif param.multiple if isinstance(param, click.Option) else False:
            arguments += [
                part for item in value for part in (flag, "=".join(item) if isinstance(item, tuple) else str(item))
            ]
        elif isinstance(value, tuple):
            arguments += [flag, ",".join(map(str, value))]
        else:
            arguments += [flag, str(value)]
    return arguments


@dataclass
class Part:
    """A child process: its arguments, and how long it may take to stop."""

    name: str
    arguments: Sequence[str]
    stop_grace_s: float
    stop_order: int
    """Parts with a lower number stop first: callers' side before workers, workers before controllers."""
    process: asyncio.subprocess.Process | None = field(default=None, init=False)


class Supervisor:
    """Keeps its parts running until told to stop, or until one cannot run at all."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    async def run(self, stop: asyncio.Event) -> None:
        """Start all, restart what crashes with backoff, and on `stop` end all in order.

        Raises ConfigError when a part says that it can never start.
        """
        keepers = [asyncio.create_task(self._keep(part)) for part in self._parts]
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([*keepers, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for order in sorted({part.stop_order for part in self._parts}):
            await asyncio.gather(*(self._end(part) for part in self._parts if part.stop_order == order))
        for task in done - {stopped}:
            await task  # raises what ended it

    async def _keep(self, part: Part) -> None:
        backoff_s = MIN_BACKOFF_S
        while True:
            started = monotonic()
            part.process = await self._start(part)
            status = await part.process.wait()
            if status == USAGE_ERROR:
                raise ConfigError(f"{part.name} cannot start; its message is above")
            if monotonic() - started > HEALTHY_AFTER_S:
                backoff_s = MIN_BACKOFF_S
            logger.error("%s ended with status %s; restarting it in %.1f s", part.name, status, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _start(self, part: Part) -> asyncio.subprocess.Process:
        # In a session of its own a child does not get the terminal's Ctrl-C, so parts stop in order. The
        # pipe on its standard input closes if this process dies, and then it stops by itself.
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fastchat_grpc",
            *part.arguments,
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, SUPERVISED: "1"},
            start_new_session=True,
        )

    async def _end(self, part: Part) -> None:
        process = part.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(part.stop_grace_s):
                await process.wait()
        except TimeoutError:
            logger.error("%s did not stop in %.0f s; killing it", part.name, part.stop_grace_s)
            process.kill()
            await process.wait()
