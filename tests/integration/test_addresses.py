"""The ways to write where a server is: names, IPv4, IPv6 with its brackets."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import ControllerConfig, ListenConfig, join_address
from fastchat_grpc.controller.app import ControllerApp
from tests.conftest import echo_config, eventually, running_worker
from tests.integration.controllers import QUICK


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_a_fleet_meets_whatever_form_its_host_has(host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    controller = ControllerApp(ControllerConfig(listen=ListenConfig(host=host), lease=QUICK, drain_timeout_s=0))
    await controller.start()
    try:
        address = join_address(host, controller.port)
        assert controller.address == address
        config = replace(echo_config("m", controllers=(address,), drain_timeout_s=0), listen=ListenConfig(host=host))
        async with running_worker(config) as worker, AsyncClient(address) as client:
            await eventually(lambda: worker.registered)
            assert worker.address.startswith(join_address(host, 0)[:-1])
            assert (await client.complete("abc", model="m")).text == "abc"
    finally:
        await controller.stop()
