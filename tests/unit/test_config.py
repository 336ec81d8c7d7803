"""Numbers of the configuration: what is no number, endless or out of range is refused by its flag, with the value."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from contextlib import nullcontext
from typing import Any

import click
import pytest

from fastchat_grpc import config
from fastchat_grpc.cli import cli
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import BackendConfig, ModelConfig, split_address
from fastchat_grpc.errors import ConfigError, FastChatError, InvalidArgument
from fastchat_grpc.v1 import registry_pb2

NO_NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 1e300)
NEEDED: dict[str, dict[str, Any]] = {"WorkerConfig": {"backend": BackendConfig(model=ModelConfig(path="m"))}}


def float_fields() -> list[tuple[type, str]]:
    """Every number with a fraction that a configuration has."""
    found = []
    for kind in vars(config).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__.startswith(config.__name__):
            for name, hint in typing.get_type_hints(kind).items():
                if float in (hint, *typing.get_args(hint)):
                    found.append((kind, name))
    return found


@pytest.mark.parametrize(("kind", "name"), float_fields(), ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_number_out_of_range_is_refused(kind: type, name: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**NEEDED.get(kind.__name__, {}), **{name: value})
    assert f"got {value:g}" in str(caught.value)
    assert re.search(r"at most|from .* to", str(caught.value)), "the limit is said"


@pytest.mark.parametrize(("weight", "ok"), [(1e-300, False), (9e-7, False), (1e-6, True), (1e6, True), (1.1e6, False)])
def test_a_weight_is_one_that_messages_can_carry(weight: float, ok: bool) -> None:
    with nullcontext() if ok else pytest.raises(ConfigError, match=r"--weight must be from 1e-06 to 1e\+06, got"):
        config.WorkerConfig(**NEEDED["WorkerConfig"], weight=weight)
    assert not ok or registry_pb2.Worker(weight=weight).weight > 0


def float_flags() -> list[tuple[str, str]]:
    """Every flag of every command that takes such a number."""
    found = []
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for param in command.params:
            if isinstance(param, click.Option) and param.type.name == "float":
                found.append((name, param.opts[0]))
    return found


@pytest.mark.parametrize(("command", "flag"), float_flags())
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_flag_names_itself(command: str, flag: str, value: str) -> None:
    arguments = {"drain": ["w"], "generate": ["hello"], "worker": ["--backend", "echo"]}.get(command, [])
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    with pytest.raises((ConfigError, FastChatError)) as caught:
        found.main([*arguments, flag, value], standalone_mode=False)
    said = flag.removeprefix("--").replace("-", "_" if command == "generate" else "-")
    assert said in str(caught.value)
    assert f"got {value}" in str(caught.value)


def test_there_are_such_flags() -> None:
    assert {"worker", "controller", "gateway", "drain", "generate", "serve"} <= {
        command for command, _ in float_flags()
    }
    assert len(float_fields()) > 15


async def test_a_client_refuses_a_drain_without_end() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        for value in NO_NUMBERS:
            with pytest.raises(InvalidArgument):
                await client.drain_worker("w", drain_timeout_s=value)


@pytest.mark.parametrize("command", ["generate", "models", "workers", "drain", "undrain", "worker", "gateway"])
def test_one_flag_says_where_the_controller_is(command: str) -> None:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    assert any(param.opts[0] == "--controller-address" for param in found.params if isinstance(param, click.Option))


def test_the_wait_is_said_to_be_that_of_each_outage() -> None:
    found = cli.get_command(click.Context(cli), "controller")
    assert found is not None
    (wait,) = [param for param in found.params if "--failover-wait" in param.opts]
    assert isinstance(wait, click.Option)
    assert "at each outage" in (wait.help or "")


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("h:1", ("h", 1)),
        ("a-b_c.d:65535", ("a-b_c.d", 65535)),
        ("[::1]:0", ("::1", 0)),
        ("b\u00fccher.example:1", ("b\u00fccher.example", 1)),
    ],
)
def test_an_address_is_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["h", "h:", ":1", "a@b:1", "a b:1", "a/b:1", "h:65536", "h:-1", "h:1\n"])
def test_what_is_none_is_shown(address: str) -> None:
    with pytest.raises(ConfigError, match="address") as caught:
        split_address(address)
    assert repr(address) in str(caught.value)
