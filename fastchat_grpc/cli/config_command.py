"""`fastchat-grpc config`: what the settings come to, and where each comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from fastchat_grpc.cli.fleet import SECRETS, Planned
from fastchat_grpc.cli.serve import planned, serve
from fastchat_grpc.cli.settings import source

MASK = "********"
_PASSED_ON: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


@click.group()
def config() -> None:
    """Show or check the settings of serve: its flags, the environment and a file together."""


@config.command(context_settings=_PASSED_ON)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def show(flags: tuple[str, ...], as_json: bool) -> None:
    """Print what each part of a fleet would be started with. FLAGS are those of serve, such as -f fleet.yaml.

    Behind each setting stands where it comes from. Secrets are masked.
    """
    parts = {part.name: list(_settings(part)) for part in _planned(flags)}
    if as_json:
        found = {
            name: {key: {"value": value, "source": origin} for key, value, origin in settings}
            for name, settings in parts.items()
        }
        click.echo(json.dumps(found, indent=2))
        return
    for name, settings in parts.items():
        click.echo(f"{name}:")
        width = max(len(f"{key}: {json.dumps(value)}") for key, value, _ in settings)
        for key, value, origin in settings:
            told = f"{key}: {json.dumps(value)}"
            click.echo(f"  {told:{min(width, 60)}}  # {origin}")


@config.command(context_settings=_PASSED_ON)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def check(flags: tuple[str, ...]) -> None:
    """Check a file of settings, and the flags with it; start nothing. FLAGS are those of serve, such as -f fleet.yaml.

    Ends with status 2 where something is wrong, and says what and where.
    """
    parts = _planned(flags)
    count = sum(part.kind == "worker" for part in parts)
    gateway = ", a gateway" if any(part.kind == "gateway" for part in parts) else ""
    click.echo(f"ok: a controller, {count} worker{'s' if count > 1 else ''}{gateway}")


def _planned(flags: tuple[str, ...]) -> list[Planned]:
    return planned(serve.make_context("serve", list(flags)))


def _settings(part: Planned) -> Iterator[tuple[str, Any, str]]:
    """Name, value and source of each setting of a part, as a file would have them."""
    for param in part.ctx.command.params:
        name = param.name or ""
        if name in ("config", "print_config"):
            continue
        value = part.flags[name]
        if name in SECRETS:
            value = MASK if value else value
        elif isinstance(value, tuple) and value and isinstance(value[0], tuple):
            value = dict(value)
        key = param.opts[-1].lstrip("-").replace("-", "_")
        yield (
            key,
            value if value is None or isinstance(value, bool | int | float | str | tuple | dict) else str(value),
            _origin(part, param),
        )


def _origin(part: Planned, param: click.Parameter) -> str:
    told = source(part.ctx, param)
    return "set by serve" if told == param.opts[0] and param.name in _BY_SERVE else told


_BY_SERVE = frozenset({"port", "host", "controller_address", "worker_address", "worker_id", "expect_workers", "mode"})
