"""`serve` as one command: on any host, with secrets that stay secret, and TLS between its parts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import trustme

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import TlsConfig, join_address
from fastchat_grpc.errors import FastChatError, Unauthenticated
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.v1 import generation_pb2, registry_pb2_grpc
from fastchat_grpc.v1 import registry_pb2 as pb
from tests.e2e.processes import free_port, run_cli, running_cli

pytestmark = pytest.mark.slow

ECHO = ("--backend", "echo", "--model-path", "echo", "--no-gateway")
TOKEN, KEY = "a-token-of-this-test", "sk-key-of-this-test"


def ports() -> tuple[int, tuple[str, ...]]:
    """A free port for the controller, and the flags of that and of a worker."""
    controller = free_port()
    return controller, ("--controller-port", str(controller), "--port", str(free_port()))


async def served(client: AsyncClient) -> None:
    """Return when the fleet answers."""
    async with asyncio.timeout(60):
        while True:
            try:
                assert (await client.complete("hello", model="echo")).text == "hello"
                return
            except FastChatError:
                await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("host", "reached_at"),
    [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::1", "::1"), ("localhost", "localhost")],
)
async def test_one_command_starts_the_suite_on_any_host(host: str, reached_at: str) -> None:
    port, flags = ports()
    async with (
        running_cli("serve", *ECHO, *flags, "--host", host),
        AsyncClient(join_address(reached_at, port), timeout_s=5) as client,
    ):
        await served(client)


def command_lines(pid: int) -> list[bytes]:
    """The command lines of a process's children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]


async def test_the_token_and_the_keys_of_serve_guard_its_controller_and_stand_in_no_command_line_of_a_part() -> None:
    port, flags = ports()
    address = f"127.0.0.1:{port}"
    secrets = ("--join-token", TOKEN, "--api-keys", f"me={KEY}")
    async with running_cli("serve", *ECHO, *flags, *secrets) as process:
        async with AsyncClient(address, api_key=KEY, timeout_s=5) as client:
            await served(client)
        lines = command_lines(process.pid)
        assert len(lines) == 2
        assert not any(secret.encode() in line for secret in (TOKEN, KEY) for line in lines)
        async with open_channel(address) as channel:
            stranger = pb.RegisterRequest(
                worker_id="w", instance_id="i", address="127.0.0.1:9", models=[generation_pb2.ModelInfo(name="m")]
            )
            with pytest.raises(Exception, match="join token"):
                await registry_pb2_grpc.ControllerServiceStub(channel).Register(stranger)
        async with AsyncClient(address, timeout_s=5) as client:
            with pytest.raises(Unauthenticated):
                await client.complete("hello", model="echo")
        assert (await run_cli("workers", "--address", address))[0] == 1
        shown = await run_cli("workers", "--address", address, env={"FASTCHAT_GRPC_JOIN_TOKEN": TOKEN})
        assert shown[0] == 0, shown


async def test_the_parts_of_serve_speak_mutual_tls_and_the_calls_do_too(tmp_path: Path) -> None:
    authority, cert, key, ca = trustme.CA(), tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(str(key))
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    authority.cert_pem.write_to_path(str(ca))
    tls = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-ca", str(ca))
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\nan-older-token\n")
    port, flags = ports()
    address = f"127.0.0.1:{port}"
    async with running_cli("serve", *ECHO, *flags, *tls, "--tls-peer-san", "local*", "--join-token-file", str(token)):
        mine = TlsConfig(cert=cert, key=key, ca=ca)
        async with AsyncClient(address, tls=mine, timeout_s=5) as client:
            await served(client)
        called = ("--address", address, *tls)
        assert (await run_cli("generate", "hello", *called))[1] == "hello\n"
        for call in (("models",), ("workers", "--join-token", "an-older-token"), ("drain", f"127.0.0.1:{flags[3]}")):
            status, out, err = await run_cli(*call, *called, env={"FASTCHAT_GRPC_JOIN_TOKEN": TOKEN})
            assert status == 0, (call, out, err)
        status, _, _ = await run_cli("models", "--address", address, "--tls-ca", str(ca))
        assert status == 1, "without a certificate"
