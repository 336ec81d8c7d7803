"""Tokens, networks and TLS on the hop between workers and controllers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastchat_grpc import errors
from fastchat_grpc.cli.fleet import COMMANDS
from fastchat_grpc.cli.options import controller_config
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import ControllerConfig, FailoverConfig, ListenConfig, TlsConfig, join_address
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.rpc.channels import CLIENT_OPTIONS, SERVER_OPTIONS, open_channel
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.rpc.security import bearer
from fastchat_grpc.rpc.status import error_from_rpc
from fastchat_grpc.v1 import generation_pb2, registry_pb2_grpc
from fastchat_grpc.v1 import registry_pb2 as pb
from tests.conftest import StartWorker, echo_config, eventually, running_worker
from tests.integration.controllers import QUICK, running_controller

TOKEN = "let-me-in"
HASTY = FailoverConfig(wait_s=0.0)
"""Of a client that takes no for an answer: who does not trust a server is not waited for."""


def registration(address: str = "127.0.0.1:9") -> pb.RegisterRequest:
    return pb.RegisterRequest(
        worker_id="w", instance_id="i", address=address, models=[generation_pb2.ModelInfo(name="m")]
    )


async def outcome(call: object) -> errors.FastChatError | None:
    """The domain error of a call; None if it succeeds."""
    try:
        await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    return None


class TestJoinToken:
    @pytest.mark.parametrize(
        ("metadata", "ok"),
        [
            (bearer(TOKEN), True),
            ((("authorization", f"bearer {TOKEN}"),), True),
            ((), False),
            (bearer("wrong"), False),
            ((("authorization", TOKEN),), False),
            ((("authorization", f"Basic {TOKEN}"),), False),
            (bearer("l\u00e9t"), False),
        ],
    )
    async def test_it_opens_register_and_what_moves_workers(
        self, metadata: tuple[tuple[str, str], ...], ok: bool
    ) -> None:
        metadata = tuple((key, value.encode("ascii", "replace").decode()) for key, value in metadata)
        async with running_controller(join_token=TOKEN) as controller, open_channel(controller.address) as channel:
            stub = registry_pb2_grpc.ControllerServiceStub(channel)
            results = [
                await outcome(stub.Register(registration(), metadata=metadata)),
                await outcome(stub.DrainWorker(pb.DrainWorkerRequest(worker_id="w"), metadata=metadata)),
                await outcome(stub.UndrainWorker(pb.UndrainWorkerRequest(worker_id="w"), metadata=metadata)),
                await outcome(stub.ListWorkers(pb.ListWorkersRequest(), metadata=metadata)),
                await outcome(stub.GetWorker(pb.GetWorkerRequest(worker_id="w"), metadata=metadata)),
                await outcome(stub.PickWorker(pb.PickWorkerRequest(model="m"), metadata=metadata)),
                await outcome(stub.RefreshWorkers(pb.RefreshWorkersRequest(), metadata=metadata)),
            ]
            if ok:
                assert results == [None] * 7
            else:
                assert all(isinstance(result, errors.Unauthenticated) for result in results)
            assert await outcome(stub.ListModels(pb.ListModelsRequest())) is None

    async def test_each_line_of_its_file_is_accepted(self, tmp_path: Path) -> None:
        path = tmp_path / "tokens"
        path.write_text("# since spring\nnew-token\n\nold-token\n")
        arguments = ["--join-token-file", str(path), "--port", "0"]
        config = controller_config(dict(COMMANDS["controller"].make_context("controller", arguments).params))
        assert config.join_token == "new-token", "what it shows to others"
        app = ControllerApp(config)
        await app.start()
        try:
            async with open_channel(app.address) as channel:
                stub = registry_pb2_grpc.ControllerServiceStub(channel)
                for token, ok in (("new-token", True), ("old-token", True), ("# since spring", False), ("", False)):
                    result = await outcome(stub.Register(registration(), metadata=bearer(token)))
                    assert type(result) is (type(None) if ok else errors.Unauthenticated), token
        finally:
            await app.stop()

    async def test_a_worker_that_has_it_joins(self, start_worker: StartWorker) -> None:
        async with running_controller(join_token=TOKEN) as controller:
            await start_worker(controllers=(controller.address,), join_token=TOKEN)
            await eventually(lambda: len(controller.registry) == 1)

    async def test_the_client_shows_it_to_drain_a_worker(self) -> None:
        async with running_controller(join_token=TOKEN) as controller, AsyncClient(controller.address) as client:
            config = echo_config("m", controllers=(controller.address,), join_token=TOKEN)
            async with running_worker(config) as worker:
                await eventually(lambda: worker.registered)
                with pytest.raises(errors.Unauthenticated):
                    await client.drain_worker(worker.worker_id)
                assert await client.drain_worker(worker.worker_id, drain_timeout_s=5, join_token=TOKEN) == 0
                await eventually(worker._ordered.is_set)
                assert worker._drain_timeout_s == 5

    async def test_it_is_in_no_log_and_no_repr(
        self, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        async with running_controller(join_token=TOKEN) as controller:
            await start_worker(controllers=(controller.address,), join_token="also-secret")
            await eventually(lambda: "join token" in caplog.text)
        assert TOKEN not in caplog.text
        assert "also-secret" not in caplog.text
        assert TOKEN not in repr(ControllerConfig(join_token=TOKEN))

    @pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
    async def test_a_controller_that_is_open_to_the_network_says_so(
        self, host: str, warned: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with running_controller(listen=ListenConfig(host=host, port=0)) as controller:
            assert ("no join token" in caplog.text) is warned
            # By its own name: loopback is not what is open.
            assert (f"whoever reaches {join_address(host, controller.port)} " in caplog.text) is warned

    async def test_an_id_forges_no_line_of_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        request = registration()
        request.worker_id = "w\n2026-01-01 ERROR forged\x1b[2J"
        async with running_controller() as controller, open_channel(controller.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registry_pb2_grpc.ControllerServiceStub(channel).Register(request)
            assert len(controller.registry) == 0
        error = error_from_rpc(caught.value)
        assert isinstance(error, errors.InvalidArgument)
        assert error.message.isprintable()
        assert all(record.getMessage().isprintable() for record in caplog.records)


class TestAllowedNetworks:
    @pytest.mark.parametrize(
        ("address", "error"),
        [
            ("10.1.2.3:5", None),
            ("[fd00::1]:5", None),
            ("10.2.0.1:5", errors.PermissionDenied),
            ("[::ffff:10.1.2.3]:5", None),
            ("[::ffff:8.8.8.8]:5", errors.PermissionDenied),
            ("127.0.0.1:5", errors.PermissionDenied),
            ("localhost:5", errors.PermissionDenied),
            ("name.invalid:5", errors.InvalidArgument),
        ],
    )
    async def test_only_addresses_inside_may_be_advertised(
        self, address: str, error: type[errors.FastChatError] | None
    ) -> None:
        async with (
            running_controller(allowed_networks=("10.1.0.0/16", "fd00::/8")) as controller,
            open_channel(controller.address) as channel,
        ):
            stub = registry_pb2_grpc.ControllerServiceStub(channel)
            result = await outcome(stub.Register(registration(address)))
            assert type(result) is (error or type(None))


class Certificates:
    """An authority, and files with certificates of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *names: str) -> TlsConfig:
        """A server or client of 127.0.0.1, or of other names, with the authority to verify the other side."""
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        issued = self.authority.issue_cert(*(names or ("127.0.0.1", "localhost")))
        key.write_bytes(issued.private_key_pem.bytes())
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return TlsConfig(cert=cert, key=key, ca=self.ca)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def secure_controller(tls: TlsConfig, **config: object) -> ControllerApp:
    app = ControllerApp(
        ControllerConfig(
            listen=ListenConfig(port=0, tls=tls),
            lease=QUICK,
            drain_timeout_s=0.0,
            **config,  # type: ignore[arg-type]
        )
    )
    app.registry.settle()
    await app.start()
    return app


class TestTls:
    async def test_a_fleet_speaks_mutual_tls_on_every_hop(
        self, certificates: Certificates, start_worker: StartWorker
    ) -> None:
        mine = certificates.issue("fleet")
        controller = await secure_controller(mine, worker_tls=mine)
        try:
            config = echo_config(controllers=(controller.address,), controller_tls=mine, drain_timeout_s=0.0)
            config = replace(config, listen=ListenConfig(port=0, tls=mine))
            async with running_worker(config):
                await eventually(lambda: len(controller.registry) == 1)
                async with AsyncClient(controller.address, tls=mine) as client:
                    assert (await client.complete("hello")).text == "hello"
                async with AsyncClient(
                    controller.address, tls=TlsConfig(ca=certificates.ca), failover=HASTY
                ) as stranger:
                    with pytest.raises(errors.FastChatError):
                        await stranger.status()
                async with AsyncClient(controller.address, failover=HASTY) as plain:
                    with pytest.raises(errors.FastChatError):
                        await plain.status()
        finally:
            await controller.stop()

    async def test_only_certificates_of_some_names_may_call(self, certificates: Certificates) -> None:
        mine = certificates.issue("server")
        listen = ListenConfig(port=0, tls=mine, peer_sans=("worker-*.fleet", "10.1.2.3"))
        async with running_controller(listen=listen) as controller:
            others = ("other.fleet", "worker-7", "worker-7.fleet.example", "a.worker-7.fleet", "worker-7xfleet")
            for name, ok in (("worker-7.fleet", True), ("10.1.2.3", True), *((other, False) for other in others)):
                shown = certificates.issue("caller", name)
                async with open_channel(controller.address, shown) as channel:
                    result = await outcome(registry_pb2_grpc.ControllerServiceStub(channel).Register(registration()))
                    assert type(result) is (type(None) if ok else errors.PermissionDenied), name
                    health = health_pb2_grpc.HealthStub(channel)
                    assert await outcome(health.Check(health_pb2.HealthCheckRequest())) is None

    async def test_a_server_must_have_the_name_that_is_asked_for(self, certificates: Certificates) -> None:
        named = certificates.issue("server", "controller.fleet")
        async with running_controller(listen=ListenConfig(port=0, tls=named)) as controller:
            for name, ok in (("controller.fleet", True), ("other.fleet", False), ("", False)):
                tls = replace(named, server_name=name)
                async with AsyncClient(controller.address, tls=tls, failover=HASTY) as client:
                    if ok:
                        await client.status()
                    else:
                        with pytest.raises(errors.FastChatError):
                            await client.status()

    async def test_a_server_takes_up_new_certificates_without_a_restart(self, certificates: Certificates) -> None:
        first = certificates.issue("server")
        controller = await secure_controller(TlsConfig(cert=first.cert, key=first.key))

        async def trusts(ca: Path) -> bool:
            async with AsyncClient(controller.address, tls=TlsConfig(ca=ca), failover=HASTY) as client:
                try:
                    await client.status()
                except errors.FastChatError:
                    return False
                return True

        try:
            assert await trusts(certificates.ca)
            folder = certificates.folder / "second"
            folder.mkdir()
            second = Certificates(folder)
            renewed = second.issue("server")
            assert first.cert is not None
            assert first.key is not None
            assert renewed.cert is not None
            assert renewed.key is not None
            first.key.write_bytes(renewed.key.read_bytes())
            first.cert.write_bytes(renewed.cert.read_bytes())
            assert await trusts(second.ca)
            assert not await trusts(certificates.ca)
            first.cert.unlink()
            assert await trusts(second.ca), "files that are gone leave those of before in use"
        finally:
            await controller.stop()

    async def test_a_pool_opens_new_channels_when_its_certificates_change(self, certificates: Certificates) -> None:
        tls = certificates.issue("client")
        pool = ChannelPool(tls)
        try:
            before = pool.get("127.0.0.1:1")
            await pool.look()
            assert pool.get("127.0.0.1:1") is before
            certificates.issue("client")
            await pool.look()
            assert pool.get("127.0.0.1:1") is not before
        finally:
            await pool.close()


class TestLimits:
    async def test_metadata_beyond_the_limit_is_refused(self) -> None:
        async with running_controller() as controller, open_channel(controller.address) as channel:
            stub = registry_pb2_grpc.ControllerServiceStub(channel)
            small = (("x-note", "a" * 15 * 1024),)
            large = (("x-note", "a" * 17 * 1024),)
            assert await outcome(stub.ListModels(pb.ListModelsRequest(), metadata=small)) is None
            refused = await outcome(stub.ListModels(pb.ListModelsRequest(), metadata=large))
            assert refused is not None
            assert refused.code is errors.Code.RESOURCE_EXHAUSTED
            assert await outcome(stub.ListModels(pb.ListModelsRequest())) is None, "the connection stands"

    def test_clients_ping_no_faster_than_servers_allow(self) -> None:
        client, server = dict(CLIENT_OPTIONS), dict(SERVER_OPTIONS)
        allowed = server["grpc.http2.min_recv_ping_interval_without_data_ms"]
        assert client["grpc.keepalive_time_ms"] > allowed
        assert server["grpc.keepalive_permit_without_calls"] == 1
        assert client["grpc.http2.max_pings_without_data"] == 0

    async def test_a_long_silent_call_ends_in_no_goaway(self) -> None:
        """The settings of both ends, with all times divided by a hundred, over what would be two minutes."""

        def quick(options: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
            return [
                (name, value // 100 if "keepalive_time" in name or "ping_interval" in name else value)
                for name, value in options
            ]

        async def silent(request: bytes, context: object) -> bytes:
            await asyncio.sleep(1.2)
            return b"done"

        server = grpc.aio.server(options=quick(SERVER_OPTIONS))
        handlers = {"Call": grpc.unary_unary_rpc_method_handler(silent)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("silent.Silent", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=quick(CLIENT_OPTIONS)) as channel:
                call = channel.unary_unary("/silent.Silent/Call")
                assert await call(b"") == b"done"
                assert await call(b"") == b"done"
        finally:
            await server.stop(0)
