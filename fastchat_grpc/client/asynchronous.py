"""The client, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from time import monotonic
from typing import Any, Self, Unpack

import grpc

from fastchat_grpc.client.requests import GenerateOptions, PromptLike, Result, build_request, collect
from fastchat_grpc.config import CONTROLLER_PORT, MAX_SECONDS, FailoverConfig, TlsConfig
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    Completion,
    Delta,
    EmbedRequest,
    EmbedResult,
    Event,
    GenerateRequest,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.addresses import AddressBook, Addresses
from fastchat_grpc.rpc.events import event_from_pb
from fastchat_grpc.rpc.failover import Call, Failover
from fastchat_grpc.rpc.resume import PARSED, fallback_seed, resume_request
from fastchat_grpc.rpc.security import bearer
from fastchat_grpc.v1 import generation_pb2, registry_pb2
from fastchat_grpc.v1.generation_pb2_grpc import GenerationServiceStub as GenerationStub
from fastchat_grpc.v1.registry_pb2_grpc import ControllerServiceStub as ControllerStub

DEFAULT_ADDRESS = f"127.0.0.1:{CONTROLLER_PORT}"


PAGE_SIZE = 1000


class AsyncClient:
    """A connection to a controller or a worker. Open it with `async with`, or `close` it.

    With several addresses, any of which can do the work (controllers of one fleet), a generation goes on
    at the next one if its server is lost, from where it was, without a seam.

    Args:
        address: host:port, or several, also as one string with commas.
        tls: how to verify the server, and what to show it; None: plain text.
        api_key: sent as `authorization: Bearer`.
        timeout_s: deadline of a whole call, generation included; None: none.
        failover: how far a call is carried past failing servers.
    """

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        tls: TlsConfig | None = None,
        api_key: str | None = None,
        timeout_s: float | None = None,
        failover: FailoverConfig | None = None,
    ) -> None:
        addresses = address.split(",") if isinstance(address, str) else list(address)
        self._addresses = AddressBook([item.strip() for item in addresses], tls)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._timeout_s = timeout_s
        self._failover = Failover(failover or FailoverConfig())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; running calls end with ClientClosed."""
        await self._addresses.close()

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Events of a generation. Closing the iterator, or breaking out of it, cancels the generation."""
        message = convert.generate_request_to_pb(request)
        seed = fallback_seed(message, self._failover.rng)
        if seed is not None:
            message.sampling.fallback_seed = seed

        def start(channel: grpc.aio.Channel, call: Call[Any], timeout_s: float | None) -> Any:
            state = call.state
            attempt = resume_request(message, state.snapshot()) if state is not None and state.started else message
            return GenerationStub(channel).Generate(attempt, timeout=timeout_s, metadata=self._metadata)

        servers: Addresses[generation_pb2.GenerateResponse] = Addresses(self._addresses, start)
        generation = self._failover.generate(message, servers, PARSED, self._deadline())
        async with aclosing(generation) as events:
            async for event in events:
                yield await event_from_pb(event)

    def generate(
        self, prompt: PromptLike, *, model: str = "", **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """Events of a generation, from flat options."""
        return self.stream(build_request(prompt, model, **options))

    async def complete(self, prompt: PromptLike, *, model: str = "", **options: Unpack[GenerateOptions]) -> Result:
        """A whole generation."""
        texts: dict[int, list[Delta]] = {}
        completions: dict[int, Completion] = {}
        async with aclosing(self.generate(prompt, model=model, **options)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    texts.setdefault(event.index, []).append(event)
                elif isinstance(event, Completion):
                    completions[event.index] = event
        return Result(tuple(collect(texts.get(i, []), completions[i]) for i in sorted(completions)))

    async def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        model: str = "",
        truncate: bool | None = None,
        normalize: bool = True,
    ) -> EmbedResult:
        """One vector per input."""
        items = tuple(item if isinstance(item, str) else tuple(item) for item in inputs)
        request = EmbedRequest(inputs=items, model=model, truncate=truncate, normalize=normalize)
        response = await self._call(GenerationStub, "Embed", convert.embed_request_to_pb(request))
        return convert.embed_result_from_pb(response)

    async def count_tokens(self, prompt: str | Sequence[ChatMessage], *, model: str = "") -> int:
        """Tokens of a text or of messages, as a generation would see them."""
        message = generation_pb2.CountTokensRequest(model=model)
        if isinstance(prompt, str):
            message.prompt = prompt
        else:
            message.chat.CopyFrom(convert.chat_to_pb(ChatPrompt(messages=tuple(prompt))))
        return int((await self._call(GenerationStub, "CountTokens", message)).token_count)

    async def model_info(self, model: str = "") -> generation_pb2.GetModelInfoResponse:
        """Description of one model."""
        request = generation_pb2.GetModelInfoRequest(model=model)
        response: generation_pb2.GetModelInfoResponse = await self._call(GenerationStub, "GetModelInfo", request)
        return response

    async def status(self) -> generation_pb2.GetStatusResponse:
        """Who answers, what it serves, and its load."""
        request = generation_pb2.GetStatusRequest()
        response: generation_pb2.GetStatusResponse = await self._call(GenerationStub, "GetStatus", request)
        return response

    async def models(self) -> Sequence[registry_pb2.FleetModel]:
        """Models of the fleet. Asks a controller."""
        found: list[registry_pb2.FleetModel] = []
        token = ""
        while True:
            request = registry_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._call(ControllerStub, "ListModels", request)
            found += page.models
            token = page.next_page_token
            if not token:
                return found

    async def workers(self, model: str = "") -> Sequence[registry_pb2.Worker]:
        """Live workers. Asks a controller."""
        found: list[registry_pb2.Worker] = []
        token = ""
        while True:
            request = registry_pb2.ListWorkersRequest(model=model, page_size=PAGE_SIZE, page_token=token)
            page = await self._call(ControllerStub, "ListWorkers", request)
            found += page.workers
            token = page.next_page_token
            if not token:
                return found

    async def drain_worker(
        self, worker_id: str, *, drain_timeout_s: float | None = None, join_token: str | None = None
    ) -> int:
        """Ask a worker to finish and leave; returns how many requests still run there. Asks a controller.

        Args:
            drain_timeout_s: time for what runs there; None: the worker's own.
            join_token: what the controller asks of its fleet's members; shown in place of the API key.
        """
        request = registry_pb2.DrainWorkerRequest(worker_id=worker_id)
        if drain_timeout_s is not None:
            if not 0 <= drain_timeout_s <= MAX_SECONDS:
                raise InvalidArgument("timeout", f"must be from 0 to {MAX_SECONDS:g} s, got {drain_timeout_s:g}")
            request.timeout.CopyFrom(convert.duration(drain_timeout_s))
        response = await self._call(ControllerStub, "DrainWorker", request, bearer(join_token) or self._metadata)
        return int(response.running_count)

    async def undrain_worker(self, worker_id: str, *, join_token: str | None = None) -> None:
        """Take a drain back: the worker takes new requests again, if its process still runs. Asks a controller."""
        request = registry_pb2.UndrainWorkerRequest(worker_id=worker_id)
        await self._call(ControllerStub, "UndrainWorker", request, bearer(join_token) or self._metadata)

    def _deadline(self) -> float | None:
        return None if self._timeout_s is None else monotonic() + self._timeout_s

    async def _call(
        self,
        stub: Callable[[grpc.aio.Channel], Any],
        method: str,
        request: Any,
        metadata: Sequence[tuple[str, str]] | None = None,
    ) -> Any:
        shown = self._metadata if metadata is None else metadata

        def start(channel: grpc.aio.Channel, call: Call[Any], timeout_s: float | None) -> Any:
            return getattr(stub(channel), method)(request, timeout=timeout_s, metadata=shown)

        servers: Addresses[Any] = Addresses(self._addresses, start)
        return await self._failover.call(servers, self._deadline())
