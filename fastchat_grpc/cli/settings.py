"""Where settings come from: flags before environment variables before a file before defaults."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from fastchat_grpc.cli.credentials import FILE, Option
from fastchat_grpc.cli.settings_file import Section, SettingsFile, line_of, merged
from fastchat_grpc.errors import ConfigError

PREFIX = "FASTCHAT_GRPC"
"""Of the environment variable that a flag has: --model-path is FASTCHAT_GRPC_MODEL_PATH."""
FROM_ENVIRONMENT: dict[str, Any] = {"auto_envvar_prefix": PREFIX}
"""Context settings of a command whose flags may stand in the environment."""
SET_HERE: Mapping[str, frozenset[str]] = {
    "controller": frozenset({"port", "worker_address", "worker_id", "metrics_port", "config"}),
    "worker": frozenset({"port", "controller_address", "worker_address", "worker_id", "metrics_port", "config"}),
    "gateway": frozenset(
        {"port", "host", "controller_address", "worker_address", "metrics_port", "metrics_target", "config"}
    ),
}
"""Flags of a part that `serve` sets by itself: parts find each other, and each has a port of its own."""
REFUSED: Mapping[str, str] = {"config": "a file names no other file", "print_config": "it prints and ends"}
"""Flags that no file sets."""
_FILE = f"{__name__}.file"
_SECTIONS = f"{__name__}.sections"


def settings_option(part: str) -> Option:
    """`--config FILE` of a command: `part` says which of the file's sections it takes."""

    def callback(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
        if value is not None and not ctx.resilient_parsing:
            file = read(value)
            use(ctx, file, file.of(part), part)
        return value

    return click.option(
        "--config",
        "-f",
        type=FILE,
        is_eager=True,
        callback=callback,
        help=f"YAML file of settings, named as the flags are. Flags and {PREFIX}_* variables go before it.",
    )


def read(path: Path) -> SettingsFile:
    """Read a file of settings. Raises ConfigError."""
    from fastchat_grpc.cli import cli
    from fastchat_grpc.cli.settings_file import read_settings

    ctx = click.Context(cli)
    found = {name: cli.get_command(ctx, name) for name in ("serve", *SET_HERE)}
    commands = {name: command for name, command in found.items() if command is not None}
    return read_settings(path, commands.pop("serve"), commands, REFUSED)


def use(ctx: click.Context, file: SettingsFile, sections: Sequence[Section], part: str) -> None:
    """Take sections of a file as a command's defaults; of those that all parts share, what a part may share."""
    names = {param.name for param in ctx.command.params}
    own = merged([section for section in sections if section is not file.shared], names)
    shared = merged([file.shared], names - SET_HERE.get(part, frozenset())) if file.shared in sections else {}
    ctx.default_map = {**shared, **own}
    ctx.meta[_FILE] = file.path
    ctx.meta[_SECTIONS] = tuple(sections)


@contextlib.contextmanager
def located(ctx: click.Context) -> Iterator[None]:
    """Say of a value that is refused where in the file it stands, if it comes from one."""
    try:
        yield
    except ConfigError as error:
        place = _place(ctx, str(error))
        if not place:
            raise
        raise ConfigError(f"{place}: {error}") from None


def _place(ctx: click.Context, message: str) -> str:
    for flag in re.findall(r"--[a-z0-9-]+", message):
        for param in ctx.command.params:
            if flag in param.opts and ctx.get_parameter_source(param.name or "") is ParameterSource.DEFAULT_MAP:
                return source(ctx, param)
    return ""


def source(ctx: click.Context, param: click.Parameter) -> str:
    """Where the value of a parameter comes from, in words."""
    name = param.name or ""
    match ctx.get_parameter_source(name):
        case ParameterSource.COMMANDLINE:
            return param.opts[0]
        case ParameterSource.ENVIRONMENT:
            return _variable(param)
        case ParameterSource.DEFAULT_MAP:
            line = line_of(ctx.meta[_SECTIONS], name)
            return f"{ctx.meta[_FILE]}:{line}" if line else str(ctx.meta[_FILE])
        case _:
            return "default"


def _variable(param: click.Parameter) -> str:
    return str(param.envvar) if param.envvar else f"{PREFIX}_{str(param.name).upper()}"
