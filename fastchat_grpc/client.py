"""The Python client: typed, over the generated stubs, asynchronous and synchronous.

    async with AsyncClient("127.0.0.1:21001") as client:
        async for event in client.generate("Once upon a time", max_new_tokens=64):
            if isinstance(event, Delta):
                print(event.text, end="")

    with Client("127.0.0.1:21001") as client:
        print(client.complete([{"role": "user", "content": "Hello"}]).text)

The address may be a controller's or a worker's. Breaking out of a generation cancels it. Failures are
the domain errors of `fastchat_grpc.errors`, as the server raised them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc

from fastchat_grpc.config import CONTROLLER_PORT, MAX_SECONDS, FailoverConfig, TlsConfig
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    Completion,
    Delta,
    EmbedRequest,
    EmbedResult,
    Event,
    FinishReason,
    GenerateRequest,
    Grammar,
    OutputOptions,
    Prompt,
    SamplingParams,
    StopConditions,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Tool,
    Usage,
)
from fastchat_grpc.errors import ClientClosed, InvalidArgument
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
CLOSE_S = 1.0
"""Time that calls have to end when their client is closed, before they are cancelled."""

T = TypeVar("T")
PromptLike = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, Any]] | Prompt
"""A text, token ids, messages (also as mappings with role and content), or a prompt of `core`."""


class GenerateOptions(TypedDict, total=False):
    """Options of a generation; the contract documents each."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    max_new_tokens: int
    min_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    n: int
    logprobs: int
    prompt_logprobs: int
    echo: bool
    stream_interval: int
    cumulative_text: bool
    keep_special_tokens: bool
    tools: Sequence[Tool]
    grammar: Grammar
    request_id: str
    priority: int
    lora_adapter: str
    session_key: str
    truncate_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    completion: Completion
    reasoning: str = ""

    @property
    def finish_reason(self) -> FinishReason:
        return self.completion.finish_reason

    @property
    def usage(self) -> Usage:
        return self.completion.usage


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation: its choices, by index."""

    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


def build_request(prompt: PromptLike, model: str = "", **options: Unpack[GenerateOptions]) -> GenerateRequest:
    """A GenerateRequest from flat options. Raises InvalidArgument for an unknown option or a bad value."""
    given: dict[str, Any] = dict(options)
    if isinstance(given.get("stop"), str):  # a sequence, too: of strings that nobody meant
        given["stop"] = (given["stop"],)
    for key in ("stop", "stop_token_ids"):
        if key in given:
            given[key] = tuple(given[key])
    tools = tuple(given.pop("tools", ()))
    groups: dict[str, Any] = {
        name: cls(**{f.name: given.pop(f.name) for f in fields(cls) if f.name in given})
        for name, cls in (("sampling", SamplingParams), ("stopping", StopConditions), ("output", OutputOptions))
    }
    own = {f.name for f in fields(GenerateRequest)}
    for key in given:
        if key not in own:
            raise InvalidArgument(key, "is no option of a generation")
    return GenerateRequest(prompt=_build_prompt(prompt, tools), model=model, **groups, **given)


def _build_prompt(prompt: PromptLike, tools: tuple[Tool, ...]) -> Prompt:
    if isinstance(prompt, TextPrompt | TokenPrompt | ChatPrompt):
        return prompt
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if all(isinstance(item, int) for item in prompt):
        return TokenPrompt(tuple(prompt))  # type: ignore[arg-type]
    messages = tuple(
        item if isinstance(item, ChatMessage) else ChatMessage(**item)  # type: ignore[arg-type]
        for item in prompt
    )
    return ChatPrompt(messages=messages, tools=tools)


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
        return Result(tuple(_collect(texts.get(i, []), completions[i]) for i in sorted(completions)))

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


def _collect(deltas: Sequence[Delta], completion: Completion) -> Choice:
    return Choice(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        completion=completion,
        reasoning="".join(delta.reasoning for delta in deltas),
    )


class Client:
    """The same, for code without an event loop: runs an AsyncClient on a thread of its own until `close`.

    It has the methods of AsyncClient, with the same arguments.
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
        async def connect() -> AsyncClient:
            return AsyncClient(address, tls=tls, api_key=api_key, timeout_s=timeout_s, failover=failover)

        self._closed = threading.Event()
        self._streams: set[AsyncGenerator[Event, None]] = set()
        self._lock = threading.RLock()  # taken again where the garbage collector ends a stream under it
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastchat-grpc-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(connect())
        except BaseException:
            self._end_thread()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread; calls of other threads end with ClientClosed. Safe to call twice."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        try:
            self._submit(self._close()).result()
        finally:
            self._end_thread()

    async def _close(self) -> None:
        for events in list(self._streams):
            with suppress(RuntimeError):  # another thread waits for its next event: it ends with the connection
                await events.aclose()
        await self._client.close()
        await _end_others()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stream(self, request: GenerateRequest) -> Generator[Event, None, None]:
        """As AsyncClient.stream."""
        events = self._client.stream(request)
        self._streams.add(events)
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            self._end(events)

    def generate(
        self, prompt: PromptLike, *, model: str = "", **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """As AsyncClient.generate."""
        return self.stream(build_request(prompt, model, **options))

    def complete(self, prompt: PromptLike, *, model: str = "", **options: Unpack[GenerateOptions]) -> Result:
        """As AsyncClient.complete."""
        return self._run(self._client.complete(prompt, model=model, **options))

    def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        model: str = "",
        truncate: bool | None = None,
        normalize: bool = True,
    ) -> EmbedResult:
        """As AsyncClient.embed."""
        return self._run(self._client.embed(inputs, model=model, truncate=truncate, normalize=normalize))

    def count_tokens(self, prompt: str | Sequence[ChatMessage], *, model: str = "") -> int:
        """As AsyncClient.count_tokens."""
        return self._run(self._client.count_tokens(prompt, model=model))

    def model_info(self, model: str = "") -> generation_pb2.GetModelInfoResponse:
        """As AsyncClient.model_info."""
        return self._run(self._client.model_info(model))

    def status(self) -> generation_pb2.GetStatusResponse:
        """As AsyncClient.status."""
        return self._run(self._client.status())

    def models(self) -> Sequence[registry_pb2.FleetModel]:
        """As AsyncClient.models."""
        return self._run(self._client.models())

    def workers(self, model: str = "") -> Sequence[registry_pb2.Worker]:
        """As AsyncClient.workers."""
        return self._run(self._client.workers(model))

    def drain_worker(
        self, worker_id: str, *, drain_timeout_s: float | None = None, join_token: str | None = None
    ) -> int:
        """As AsyncClient.drain_worker."""
        drained = self._client.drain_worker(worker_id, drain_timeout_s=drain_timeout_s, join_token=join_token)
        return self._run(drained)

    def undrain_worker(self, worker_id: str, *, join_token: str | None = None) -> None:
        """As AsyncClient.undrain_worker."""
        self._run(self._client.undrain_worker(worker_id, join_token=join_token))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed.is_set():
                work.close()
                raise ClientClosed("the client is closed")
            future = self._submit(work)
        try:
            return future.result()
        except BaseException as error:
            future.cancel()  # an interrupt of the caller's thread ends the call too
            if self._closed.is_set() and isinstance(error, CancelledError):
                raise ClientClosed("the client was closed during the call") from None
            raise

    def _end(self, events: AsyncGenerator[Event, None]) -> None:
        """Cancel a stream, unless its client is closed, and it with it."""
        with self._lock:
            self._streams.discard(events)
            if self._closed.is_set():
                return
            ended = self._submit(events.aclose())
        # The garbage collector may have come for it on any thread.
        if threading.current_thread() is not self._thread:
            ended.result()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


async def _end_others() -> None:
    """Wait until all other tasks of this loop have ended, since threads wait for them; cancel what does not end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, left = await asyncio.wait(others, timeout=CLOSE_S)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CLOSE_S)


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)
