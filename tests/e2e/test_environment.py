"""What the environment of a machine must not break: proxies in variables, the ways to write a host."""

from __future__ import annotations

import pytest

from tests.e2e.processes import free_port, run_cli, running_cli, wait_for_workers

NOBODY = "http://127.0.0.1:9"
"""A proxy at a port where nothing listens."""


async def test_serve_and_its_clients_work_under_proxy_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, NOBODY)
        monkeypatch.setenv(name.upper(), NOBODY)
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    controller, port = free_port(), free_port()
    serve = ("serve", "--backend", "echo", "--model-path", "echo", "--no-gateway", "--port", str(port))
    address = ("--address", f"127.0.0.1:{controller}")
    async with running_cli(*serve, "--controller-port", str(controller)):
        await wait_for_workers(f"127.0.0.1:{controller}")
        assert (await run_cli("generate", "hello", *address))[:2] == (0, "hello\n")
        for command in ("models", "workers"):
            status, out, err = await run_cli(command, *address)
            assert (status, "echo" in out) == (0, True), err
