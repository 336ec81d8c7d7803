"""`fastchat-grpc new-key`: a key for a caller, and the line that a controller's key file needs for it."""

from __future__ import annotations

import click

from fastchat_grpc.rpc.api_keys import key_line, new_key


@click.command("new-key")
@click.argument("name")
@click.option("--admin", is_flag=True, help="A key that also lists, picks and drains workers.")
def new_key_command(name: str, admin: bool) -> None:
    """Make an API key for the caller NAME.

    The key goes to standard output, once; the line for --api-key-file, which holds only its hash, to standard error.
    """
    key = new_key()
    click.echo(key)
    click.echo(key_line(name, key, admin=admin), err=True)
