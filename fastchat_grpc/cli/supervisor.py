"""`fastchat-grpc serve`: a controller, workers and the HTTP bridge on one machine, supervised."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import click

from fastchat_grpc.cli import USAGE_ERROR, options
from fastchat_grpc.cli.process import SUPERVISED, run_until_signalled
from fastchat_grpc.cli.serving import controller, gateway, worker
from fastchat_grpc.config import CONTROLLER_PORT, GATEWAY_PORT, WORKER_PORT, dial_host, join_address, split_address
from fastchat_grpc.errors import ConfigError

logger = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0
"""A part that ran this long starts over with the shortest backoff."""
STOP_GRACE_S = 5.0
"""Time to stop beyond a part's own drain timeout."""
COMMANDS: Mapping[str, click.Command] = {"controller": controller, "worker": worker, "gateway": gateway}
SET_HERE: Mapping[str, frozenset[str]] = {
    "controller": frozenset({"port", "worker_address", "worker_id", "metrics_port"}),
    "worker": frozenset({"port", "controller_address", "worker_address", "worker_id", "metrics_port"}),
    "gateway": frozenset({"port", "host", "controller_address", "worker_address", "metrics_port"}),
}
"""Flags of a part that `serve` sets by itself: parts find each other, and each has a port of its own."""
NOT_OFFERED: Mapping[str, str] = {
    "parent_address": "a controller of a larger fleet is run by itself, with the address that its parents are told",
    "parent_ca": "as parent_address",
    "parent_join_token": "as parent_address",
    "parent_join_token_file": "as parent_address",
    "mode": "a sidecar has no controller; for relay mode run a gateway by itself, with --no-gateway here",
    "print_config": "prints and ends",
}
"""Flags of a part that `serve` does not have, and why. It has all others, and passes them on."""
SECRETS = ("join_token", "api_keys")
"""Flags whose values reach the parts by the environment: command lines can be read by everybody on the machine."""
AUTHORITIES: Mapping[str, str] = {
    "controller": "worker_ca",
    "worker": "controller_ca",
    "gateway": "upstream_ca",
}
"""Which flag of a part says whose certificates it trusts."""


@click.command()
@options.listen_options(WORKER_PORT)
@options.worker_options
@click.option("--controller-port", type=int, default=CONTROLLER_PORT, show_default=True, help="Port of the controller.")
@click.option("--num-workers", type=int, default=1, show_default=True, help="Workers, on successive ports from --port.")
@click.option("--gateway-port", type=int, default=GATEWAY_PORT, show_default=True, help="Port of the HTTP bridge.")
@click.option("--gateway/--no-gateway", default=None, help="Run the HTTP bridge.  [default: where Envoy is installed]")
@click.pass_context
def serve(ctx: click.Context, /, **flags: Any) -> None:
    """Run a controller and workers together; parts that crash are restarted, Ctrl-C stops all.

    Flags of the controller and of the gateway are passed on to them, those of TLS to every part.
    """
    flags["host"] = flags["host"].strip("[]")
    flags["gateway"] = _wants_gateway(flags["gateway"])
    workers = _worker_places(flags)
    _check(flags, workers)
    _refuse_taken(flags)
    grace_s = flags["drain_timeout"] + STOP_GRACE_S
    at_controller = ["--controller-address", flags["controller_address"][0]]
    own = ["--port", str(flags["controller_port"])]
    if not flags["expect_workers"]:
        own += ["--expect-workers", _expected(flags["host"], workers)]
    names = ["controller", *(f"worker-{i}" for i in range(len(workers))), *(["gateway"] if flags["gateway"] else [])]
    metrics = _metrics(flags, names)
    passed = {name: [name, *_passed(ctx, name), *_trust(flags, name)] for name in COMMANDS}
    parts = [
        Part("controller", [*passed["controller"], *own, *metrics["controller"]], grace_s, stop_order=2),
        *(
            Part(name, [*passed["worker"], *at_controller, *place, *metrics[name]], grace_s, stop_order=1)
            for name, place in zip(names[1:], workers, strict=False)
        ),
    ]
    if flags["gateway"]:
        own = ["--host", flags["host"], "--port", str(flags["gateway_port"]), *at_controller]
        own += metrics["gateway"]
        parts.append(Part("gateway", [*passed["gateway"], *own], grace_s, stop_order=0))
    run_until_signalled(Supervisor(parts, _secrets(ctx)).run, flags["log_level"])


def _offer_all() -> None:
    """Give `serve` the flags of the parts that it does not have yet."""
    has = {param.name for param in serve.params}
    for command in COMMANDS.values():
        for param in command.params:
            if param.name not in has and param.name not in NOT_OFFERED:
                has.add(param.name)
                serve.params.append(param)


_offer_all()


def _check(flags: dict[str, Any], workers: Sequence[Sequence[str]]) -> None:
    """Say a wrong flag here, once, rather than by a child. Raises ConfigError."""
    flags["controller_address"] = (join_address(dial_host(flags["host"]), flags["controller_port"]),)
    nothing = {name: () if name == "parent_address" else None for name in NOT_OFFERED}
    options.worker_config({**flags, "worker_address": "", "worker_id": ""})
    options.controller_config({**flags, **nothing, "worker_address": "", "worker_id": ""})
    if flags["gateway"]:
        gateway_flags = {"mode": "direct", "port": flags["gateway_port"], "worker_address": ""}
        options.gateway_config({**flags, **gateway_flags})


def _refuse_taken(flags: dict[str, Any]) -> None:
    """Raise ConfigError for a port that is in use, before a model is loaded, by its flag here: parts name theirs."""
    from fastchat_grpc.gateway.machine import is_taken

    last = flags["port"] + flags["num_workers"] if flags["port"] else 0
    ports = [
        ("--controller-port", flags["controller_port"]),
        *(("--port", port) for port in range(flags["port"], last)),
    ]
    if flags["gateway"]:
        ports.append(("--gateway-port", flags["gateway_port"]))
    places = [(flag, flags["host"], port) for flag, port in ports]
    places.append(("--metrics-port", flags["metrics_host"].strip("[]"), flags["metrics_port"] or 0))
    for flag, host, port in places:
        if is_taken(host, port):
            raise ConfigError(
                f"cannot listen on {join_address(host, port)}: the port is in use, by another fleet perhaps; "
                f"choose another {flag}"
            )


def _worker_places(flags: dict[str, Any]) -> list[list[str]]:
    """Port, address and id of each worker: no two are told the same. Raises ConfigError."""
    count, port, advertised, name = (flags[key] for key in ("num_workers", "port", "worker_address", "worker_id"))
    if count < 1:
        raise ConfigError(f"--num-workers must be at least 1, got {count}")
    if advertised and count > 1 and not port:
        raise ConfigError("several workers with one --worker-address need a --port, from which theirs are counted")
    places = []
    for i in range(count):
        place = ["--port", str(port + i if port else 0)]
        if advertised:
            host, first = split_address(options.bare_address(advertised))
            place += ["--worker-address", join_address(host, first + i)]
        if name:
            place += ["--worker-id", name if count == 1 else f"{name}-{i}"]
        places.append(place)
    return places


def _metrics(flags: dict[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """The flags of each part's metrics: the gateway, or else the controller, has the port that was asked for, and the
    others have free ones, which they keep when they are started again."""
    from fastchat_grpc.gateway.machine import free_ports

    if flags["metrics_port"] is None:
        return {name: [] for name in names}
    first = "gateway" if "gateway" in names else "controller"
    others = [name for name in names if name != first]
    ports = dict(zip(others, free_ports(flags["metrics_host"], len(others)), strict=True))
    ports[first] = flags["metrics_port"]
    return {name: ["--metrics-port", str(port)] for name, port in ports.items()}


def _expected(host: str, places: Sequence[Sequence[str]]) -> str:
    """With whom the fleet is whole: its own workers by their ids, since others may join; where those are not known
    before the workers listen, how many."""
    ids = []
    for place in places:
        told = dict(zip(place[::2], place[1::2], strict=True))
        here = join_address(dial_host(host), int(told["--port"]))
        ids.append(told.get("--worker-id") or told.get("--worker-address") or (here if told["--port"] != "0" else ""))
    return ",".join(ids) if all(ids) else str(len(places))


def _trust(flags: dict[str, Any], part: str) -> list[str]:
    """Where the parts speak TLS: whose certificates a part trusts, unless that is said.

    That is the authority that callers need, or else the certificate itself, which may be its own authority.
    """
    flag = AUTHORITIES[part]
    if flags["tls_cert"] is None or flags[flag] is not None:
        return []
    return [f"--{flag}".replace("_", "-"), str(flags["tls_ca"] or flags["tls_cert"])]


def _secrets(ctx: click.Context) -> dict[str, str]:
    """Environment of the parts: the secrets that stand on this command line."""
    return {
        str(param.envvar): ctx.params[param.name]
        for param in ctx.command.params
        if param.name in SECRETS and ctx.params[param.name]
    }


def _passed(ctx: click.Context, part: str) -> list[str]:
    """The flags of the command line that a part has, too, but those that are set for it."""
    theirs: set[str | None] = {param.name for param in COMMANDS[part].params}
    return _given_flags(ctx, theirs - SET_HERE[part] - set(SECRETS))


def _wants_gateway(asked: bool | None) -> bool:
    from fastchat_grpc.gateway.binary import find_envoy

    if asked is not None:
        return asked
    try:
        find_envoy()
    except ConfigError as error:
        click.echo(f"no HTTP bridge: {error} (--no-gateway says that none is wanted)", err=True)
        return False
    return True


def _given_flags(ctx: click.Context, names: set[str | None]) -> list[str]:
    """Those of the flags that stand on the command line, again. What the environment says the parts read there."""
    arguments: list[str] = []
    for param in ctx.command.params:
        name = param.name or ""
        if name not in names or ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
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

    def __init__(self, parts: Sequence[Part], environment: Mapping[str, str]) -> None:
        self._parts = parts
        self._environment = {**os.environ, **environment, SUPERVISED: "1"}

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
            env=self._environment,
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
