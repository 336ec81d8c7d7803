"""`fastchat-grpc controller`, `worker` and `gateway`."""

from __future__ import annotations

from typing import Any

import click

from fastchat_grpc.cli import options
from fastchat_grpc.cli.process import run_until_signalled
from fastchat_grpc.cli.settings import FROM_ENVIRONMENT, located, settings_option
from fastchat_grpc.config import CONTROLLER_PORT, WORKER_PORT


@click.command(context_settings=FROM_ENVIRONMENT)
@settings_option("controller")
@options.listen_options(CONTROLLER_PORT)
@options.controller_options
@click.pass_context
def controller(ctx: click.Context, /, **flags: Any) -> None:
    """Run a controller: it knows the workers and dispatches requests to them."""
    with located(ctx):
        config = options.controller_config(flags)
    from fastchat_grpc.controller import app

    run_until_signalled(lambda stop: app.run(config, stop), flags["log_level"])


@click.command(context_settings=FROM_ENVIRONMENT)
@settings_option("worker")
@options.listen_options(WORKER_PORT)
@options.worker_options
@click.pass_context
def worker(ctx: click.Context, /, **flags: Any) -> None:
    """Run a worker: it loads a model, registers with the controllers, and generates."""
    with located(ctx):
        config = options.worker_config(flags)
    from fastchat_grpc.worker import app

    run_until_signalled(lambda stop: app.run(config, stop), flags["log_level"])


@click.command(context_settings=FROM_ENVIRONMENT)
@settings_option("gateway")
@options.gateway_options
@click.option("--print-config", is_flag=True, help="Print Envoy's configuration, for an Envoy of your own, and exit.")
@options.log_level_option
@click.pass_context
def gateway(ctx: click.Context, /, **flags: Any) -> None:
    """Run the HTTP bridge: an Envoy with the OpenAI API, grpc-web and gRPC on one port."""
    with located(ctx):
        config = options.gateway_config(flags)
    from fastchat_grpc.gateway import app, render

    if flags["print_config"]:
        click.echo(render.render_config(config))
        return
    run_until_signalled(lambda stop: app.run(config, stop), flags["log_level"])
