"""The command line: flags to config, config to apps. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from typing import ClassVar

import click

from fastchat_grpc import __version__
from fastchat_grpc.errors import ConfigError, FastChatError

USAGE_ERROR = 2
"""Exit status where trying again unchanged cannot help: a wrong flag, a missing model, a port in use."""


NOBODY_THERE = (
    " (nobody listens there: start a controller with workers by fastchat-grpc serve, or one alone by fastchat-grpc "
    "controller; --controller-address says where to ask)"
)


class LazyGroup(click.Group):
    """Imports a command's module when the command is asked for."""

    commands_at: ClassVar = {
        "serve": "serve:serve",
        "controller": "serving:controller",
        "worker": "serving:worker",
        "gateway": "serving:gateway",
        "generate": "calls:generate",
        "models": "calls:models",
        "workers": "calls:workers",
        "drain": "calls:drain",
        "undrain": "calls:undrain",
        "backends": "backends:backends",
        "config": "config_command:config",
        "new-key": "keys:new_key_command",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_at)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        from importlib import import_module

        if name not in self.commands_at:
            return None
        module, _, attribute = self.commands_at[name].partition(":")
        command = getattr(import_module(f"fastchat_grpc.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastchat-grpc")
def cli() -> None:
    """Serve language models from a fleet of workers over gRPC."""


def main() -> None:
    """Run a command. Errors that a user can cause are one line on stderr."""
    forget_services()
    # What the C core would print about a failed bind or connection, our errors say in one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        cli.main(prog_name="fastchat-grpc", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
    except click.ClickException as error:
        _fail(error.format_message(), error)
    except ConfigError as error:
        _fail(str(error))
    except FastChatError as error:
        hint = NOBODY_THERE if "Connection refused" in error.message else ""
        print(f"error: {error.message}{hint}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)


def forget_services() -> None:
    """Kubernetes tells pods of its services by variables, and those of services such as fastchat-grpc or
    fastchat-grpc-controller look like our flags'."""
    for name, value in list(os.environ.items()):
        if name.startswith("FASTCHAT_GRPC_") and value.startswith(("tcp://", "udp://", "sctp://")):
            del os.environ[name]


def _fail(message: str, error: click.ClickException | None = None) -> None:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    print(f"error: {message}{hint}", file=sys.stderr)
    sys.exit(USAGE_ERROR)
