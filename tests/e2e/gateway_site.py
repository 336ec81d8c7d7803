"""A whole site in this process: a controller, echo workers, and a real Envoy before them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

from fastchat_grpc.config import (
    ApiKeyConfig,
    ControllerConfig,
    GatewayConfig,
    GatewayMode,
    LeaseConfig,
    ListenConfig,
    TlsConfig,
)
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.gateway.app import GatewayApp
from fastchat_grpc.worker.app import WorkerApp
from tests.conftest import echo_config, eventually
from tests.e2e.processes import free_port

KEY = "sk-a-secret-of-alice"
ADMIN_KEY = "sk-a-secret-of-root"
KEYS = ApiKeyConfig(keys=(("alice", KEY), ("root", ADMIN_KEY)), admins=frozenset({"root"}))
LEASE = LeaseConfig(time_to_live_s=4.0, heartbeat_interval_s=0.5)


@dataclass
class Site:
    """What runs, and an HTTP client for it."""

    controllers: list[ControllerApp]
    workers: list[WorkerApp]
    gateway: GatewayApp
    http: httpx2.AsyncClient
    stack: AsyncExitStack = field(repr=False)
    hop_tls: TlsConfig | None = None

    @property
    def controller(self) -> ControllerApp:
        return self.controllers[0]

    @property
    def url(self) -> str:
        return f"http://{self.gateway.address}"

    @property
    def running(self) -> int:
        """Requests that the workers of this process generate for."""
        return sum(worker._generation.admission.running for worker in self.workers)

    async def add_worker(self, model: str = "echo", **settings: Any) -> WorkerApp:
        """Start one more worker and wait until the controllers know it."""
        settings.setdefault("drain_timeout_s", 0.0)
        addresses = tuple(controller.address for controller in self.controllers)
        host = settings.pop("advertised_host", "")
        if host:
            settings["port"] = free_port()
            settings["advertised_address"] = f"{host}:{settings['port']}"
        config = echo_config(model, controllers=addresses, **settings)
        if self.hop_tls is not None:
            config = replace(config, listen=replace(config.listen, tls=self.hop_tls), controller_tls=self.hop_tls)
        worker = WorkerApp(config)
        await worker.start()
        self.stack.push_async_callback(worker.stop)
        self.workers.append(worker)
        await eventually(lambda: worker.registered)
        return worker

    async def chat(self, text: str = "hello", **values: Any) -> httpx2.Response:
        """A chat completion."""
        body = {"model": "echo", "messages": [{"role": "user", "content": text}], **values}
        return await self.http.post("/v1/chat/completions", json=body)

    async def stream(self, text: str, **values: Any) -> AsyncIterator[Any]:
        """Events of a streamed chat completion; "[DONE]" as text."""
        body = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": text}], **values}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, (await response.aread()).decode()
            async for event in sse(response):
                yield event


async def sse(response: httpx2.Response) -> AsyncIterator[Any]:
    """The events of a response."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            text = line.removeprefix("data: ")
            yield text if text == "[DONE]" else json.loads(text)


def content(events: Sequence[Any]) -> str:
    """The text that events of a chat add up to."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if isinstance(event, dict)
        for choice in event.get("choices", [])
    )


@asynccontextmanager
async def running_controller(
    port: int = 0, tls: TlsConfig | None = None, **settings: Any
) -> AsyncIterator[ControllerApp]:
    """A controller with short leases."""
    settings.setdefault("lease", LEASE)
    settings.setdefault("drain_timeout_s", 0.0)
    settings.setdefault("insecure_join", True)
    app = ControllerApp(ControllerConfig(listen=ListenConfig(port=port, tls=tls), worker_tls=tls, **settings))
    app.registry.settle()
    await app.start()
    try:
        yield app
    finally:
        await app.stop()


@asynccontextmanager
async def running_site(
    mode: str = "direct",
    workers: Sequence[dict[str, Any]] = ({},),
    *,
    controllers: int = 1,
    controller: dict[str, Any] | None = None,
    key: str | None = None,
    hop_tls: TlsConfig | None = None,
    **gateway: Any,
) -> AsyncIterator[Site]:
    """Start a site; each entry of `workers` is the settings of one."""
    async with AsyncExitStack() as stack:
        found = [
            await stack.enter_async_context(running_controller(tls=hop_tls, **(controller or {})))
            for _ in range(controllers)
        ]
        site = Site(found, [], None, None, stack, hop_tls)  # type: ignore[arg-type]
        for settings in workers:
            await site.add_worker(**settings)
        site.gateway = await stack.enter_async_context(running_gateway(site, mode, **gateway))
        headers = {"authorization": f"Bearer {key}"} if key else {}
        site.http = await stack.enter_async_context(
            httpx2.AsyncClient(base_url=site.url, headers=headers, timeout=30, trust_env=False, limits=LIMITS)
        )
        yield site


LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=20)


@asynccontextmanager
async def running_gateway(
    site: Site, mode: str = "direct", *, probe: bool = True, **settings: Any
) -> AsyncIterator[GatewayApp]:
    """An Envoy for a site. `probe`: wait until it is healthy."""
    settings.setdefault("drain_timeout_s", 0.0)
    settings.setdefault("concurrency", 1)
    settings.setdefault("port", 0)
    settings.setdefault("upstream_tls", site.hop_tls)
    settings.setdefault("plaintext", True)
    settings.setdefault("controller_addresses", tuple(controller.address for controller in site.controllers))
    app = GatewayApp(
        GatewayConfig(
            mode=GatewayMode(mode),
            worker_address=site.workers[0].address if mode == "sidecar" else "",
            **settings,
        )
    )
    try:
        await app.start()
        if probe and settings["upstream_tls"] == site.hop_tls:
            await _until_healthy(app)
        yield app
    finally:
        await app.stop()


async def _until_healthy(app: GatewayApp) -> None:
    async with httpx2.AsyncClient(base_url=f"http://{app.address}", trust_env=False) as http, asyncio.timeout(10):
        while (await http.get("/health")).status_code != 200:
            await asyncio.sleep(0.02)
