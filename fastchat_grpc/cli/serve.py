"""`fastchat-grpc serve`: a controller, workers and the HTTP bridge on one machine, supervised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from fastchat_grpc.cli import options
from fastchat_grpc.cli.fleet import COMMANDS, NOT_OFFERED, Plan, Planned
from fastchat_grpc.cli.process import run_until_signalled
from fastchat_grpc.cli.settings import FROM_ENVIRONMENT, PREFIX, located, read, settings_option
from fastchat_grpc.cli.settings_file import SettingsFile
from fastchat_grpc.cli.supervisor import Part, Supervisor
from fastchat_grpc.config import CONTROLLER_PORT, GATEWAY_PORT, WORKER_PORT, join_address
from fastchat_grpc.errors import ConfigError

STOP_GRACE_S = 5.0
"""Time to stop beyond a part's own drain timeout."""
STOP_ORDER = {"gateway": 0, "worker": 1, "controller": 2}


@click.command(context_settings=FROM_ENVIRONMENT)
@settings_option("serve")
@options.listen_options(WORKER_PORT, whose="Port of the worker, of several the first one's")
@options.worker_options
@click.option("--controller-port", type=int, default=CONTROLLER_PORT, show_default=True, help="Port of the controller.")
@click.option("--num-workers", type=int, default=1, show_default=True, help="Workers, on successive ports from --port.")
@click.option("--gateway-port", type=int, default=GATEWAY_PORT, show_default=True, help="Port of the HTTP bridge.")
@click.option("--gateway/--no-gateway", default=None, help="Run the HTTP bridge.  [default: where Envoy is installed]")
@click.pass_context
def serve(ctx: click.Context, /, **flags: Any) -> None:
    """Run a controller and workers together; parts that crash are restarted, Ctrl-C stops all.

    Flags of the controller and of the gateway are passed on to them, those of TLS to every part. A file (-f) can
    also say what one part has alone, and name several workers with a model each.
    """
    parts = planned(ctx)
    _refuse_taken(flags, parts)
    grace_s = flags["drain_timeout"] + STOP_GRACE_S
    children = [Part(part.name, part.arguments, part.secrets, grace_s, STOP_ORDER[part.kind]) for part in parts]
    run_until_signalled(Supervisor(children).run, flags["log_level"])


def planned(ctx: click.Context) -> list[Planned]:
    """The processes that `serve` would start, with all that each of them reads. Raises ConfigError."""
    for name in ("config", "print_config"):  # what parts read of the file they are told from here
        os.environ.pop(f"{PREFIX}_{name.upper()}", None)
    file: SettingsFile | None = read(ctx.params["config"]) if ctx.params["config"] is not None else None
    asked: bool | None = ctx.params["gateway"]
    if asked is None and file is not None:
        asked = file.gateway_wanted
    with located(ctx):
        plan = Plan(ctx, file)
    return plan.parts(with_gateway=_wants_gateway(asked))


def _offer_all() -> None:
    """Give `serve` the flags of the parts that it does not have yet."""
    has = {param.name for param in serve.params}
    for command in COMMANDS.values():
        for param in command.params:
            if param.name not in has and param.name not in NOT_OFFERED:
                has.add(param.name)
                serve.params.append(param)


_offer_all()

_PORT_FLAGS = {"controller": "--controller-port", "worker": "--port", "gateway": "--gateway-port"}


def _refuse_taken(flags: dict[str, Any], parts: Sequence[Planned]) -> None:
    """Raise ConfigError for a port that is in use, before a model is loaded, by its flag here: parts name theirs."""
    from fastchat_grpc.gateway.machine import is_taken

    places = [(_PORT_FLAGS[part.kind], part.flags["host"].strip("[]"), part.flags["port"]) for part in parts]
    places.append(("--metrics-port", flags["metrics_host"].strip("[]"), flags["metrics_port"] or 0))
    for flag, host, port in places:
        if is_taken(host, port):
            raise ConfigError(
                f"cannot listen on {join_address(host, port)}: the port is in use, by another fleet perhaps; "
                f"choose another {flag}"
            )


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
