"""Flags of secrets and certificates: from files or the environment, so that they need not stand on a command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastchat_grpc.config import CONTROLLER_PORT, FailoverConfig, TlsConfig
from fastchat_grpc.errors import ConfigError

if TYPE_CHECKING:
    from fastchat_grpc.client import AsyncClient

FILE = click.Path(path_type=Path)
PATIENCE_S = 3.0
"""A command waits this long for a server that is not there: people who mistyped its address wait, too."""
Option = Callable[[Any], Any]


def group(*options: Option) -> Option:
    """Several options as one decorator, shown in the order given."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


join_token_options = group(
    click.option(
        "--join-token",
        envvar="FASTCHAT_GRPC_JOIN_TOKEN",
        help="Secret of the fleet's members. Others on this machine see command lines: rather use the file or the "
        "environment.",
    ),
    click.option(
        "--join-token-file",
        type=FILE,
        envvar="FASTCHAT_GRPC_JOIN_TOKEN_FILE",
        help="File of that secret, which wins over --join-token. A controller accepts each line of it, others show the "
        "first.",
    ),
)

identity_options = group(
    click.option("--client-cert", type=FILE, help="PEM certificate shown to others.  [default: that of --tls-cert]"),
    click.option("--client-key", type=FILE, help="PEM private key of it."),
)


def secret_lines(path: Path, flag: str) -> tuple[str, ...]:
    """The secrets of a file, one on each line; empty lines and those that begin with # do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}") from error
    found = tuple(line for raw in lines if (line := raw.strip()) and not line.startswith("#"))
    if not found:
        raise ConfigError(f"{flag} {path} holds no secret")
    return found


def join_tokens(flags: dict[str, Any], prefix: str = "") -> tuple[str, ...]:
    """The join tokens of the flags: the one to show first."""
    file: Path | None = flags[f"{prefix}join_token_file"]
    token: str | None = flags[f"{prefix}join_token"]
    if file is not None:
        return secret_lines(file, f"--{prefix}join-token-file".replace("_", "-"))
    # Empty is what a variable that is not set makes of --join-token "$TOKEN": to run open is not what was meant.
    if token is not None and not token.strip():
        raise ConfigError("--join-token must not be empty")
    return (token,) if token is not None else ()


def join_token(flags: dict[str, Any], prefix: str = "") -> str | None:
    """The join token that is shown to others."""
    return next(iter(join_tokens(flags, prefix)), None)


def tls_config(cert: Path | None, key: Path | None, ca: Path | None, server_name: str = "") -> TlsConfig:
    """A TlsConfig of files that have been tried. Raises ConfigError that names a wrong one."""
    tls = TlsConfig(cert=cert, key=key, ca=ca, server_name=server_name)
    tls.check()
    return tls


def client_tls(flags: dict[str, Any], ca: Path | None, server_name: str = "") -> TlsConfig | None:
    """TLS towards others, where an authority for them is given: shows --client-cert, or else this server's own."""
    if ca is None:
        return None
    cert, key = flags["client_cert"], flags["client_key"]
    if cert is None and key is None:
        cert, key = flags["tls_cert"], flags["tls_key"]
    return tls_config(cert, key, ca, server_name)


call_options = group(
    click.option(
        "--controller-address",
        "--address",
        "address",
        default=f"127.0.0.1:{CONTROLLER_PORT}",
        show_default=True,
        envvar="FASTCHAT_GRPC_CONTROLLER_ADDRESS",
        help="Controller or worker to ask; several with commas.",
    ),
    click.option("--api-key", envvar="FASTCHAT_GRPC_API_KEY", help="Key, where the server asks for one."),
    click.option("--api-key-file", type=FILE, envvar="FASTCHAT_GRPC_API_KEY_FILE", help="File that holds the key."),
    click.option("--tls", is_flag=True, help="Speak TLS, and trust the system's authorities."),
    click.option("--tls-ca", type=FILE, help="Speak TLS, and trust this PEM authority."),
    click.option("--tls-cert", type=FILE, help="PEM certificate to show (mTLS)."),
    click.option("--tls-key", type=FILE, help="PEM private key of it."),
    click.option("--tls-server-name", default="", help="Name in the server's certificate.  [default: its address]"),
)
member_options = group(call_options, join_token_options)


def connect(flags: dict[str, Any], *, timeout_s: float | None = None) -> AsyncClient:
    """A client as `call_options` or `member_options` describe it. Takes their flags out of `flags`."""
    from fastchat_grpc.client import AsyncClient

    flag = {name: flags.pop(name) for name in ("address", "api_key", "api_key_file")}
    tls = {name: flags.pop(f"tls_{name}") for name in ("ca", "cert", "key", "server_name")}
    tls_asked = flags.pop("tls") or any(tls.values())
    tokens: tuple[str, ...] = ()
    if "join_token" in flags:
        tokens = join_tokens(flags)
        del flags["join_token"], flags["join_token_file"]
    key = flag["api_key"]
    if flag["api_key_file"] is not None:
        key = secret_lines(flag["api_key_file"], "--api-key-file")[0]
    return AsyncClient(
        flag["address"],
        failover=FailoverConfig(wait_s=PATIENCE_S),
        tls=tls_config(**tls) if tls_asked else None,
        # A method of admins takes either, and a member's token is what it is asked for first.
        api_key=next(iter(tokens), None) or key,
        timeout_s=timeout_s,
    )
