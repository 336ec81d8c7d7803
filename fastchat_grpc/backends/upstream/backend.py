"""Any server of the OpenAI API as a worker's engine: vLLM, SGLang, TGI, llama.cpp, Ollama, or a hosted one.

Text goes out and text comes back: the server tokenizes, applies its chat template, samples and stops. Tool
calls that the server has found come back as the text of most models: `<tool_call>{...}</tool_call>`. Two
dialects: `openai` is what every such server understands; `vllm` adds what vLLM, SGLang and this product's
own bridge take beside it. What the chosen dialect has no field for is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.capabilities import (
    TRAITS,
    VLLM_DIALECT,
    Feature,
    Traits,
    adapter_not_found,
    refuse_unsupported,
)
from fastchat_grpc.backends.driver import Seeds, as_domain_error
from fastchat_grpc.backends.upstream.answer import Answer
from fastchat_grpc.backends.upstream.http import GivenUp, UpstreamHttp
from fastchat_grpc.backends.upstream.options import Habits, Options
from fastchat_grpc.backends.upstream.request import embedding_body, generation_body, tokenize_body
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import (
    ChatPrompt,
    EmbedRequest,
    EmbedResult,
    Event,
    GenerateRequest,
    ModelInfo,
    Prompt,
    PromptEcho,
    TextPrompt,
    TokenPrompt,
)
from fastchat_grpc.errors import (
    BackendFailed,
    InvalidArgument,
    ModelLoadError,
    NotSupported,
    PromptTooLong,
    UnsupportedField,
    WorkerUnavailable,
)
from fastchat_grpc.text.events import EventQueue

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING = 256


def create(config: BackendConfig) -> UpstreamBackend:
    """Make an upstream backend. Raises ConfigError; ModuleNotFoundError where httpx2 is not installed."""
    import httpx2  # noqa: F401 - so that a missing library is said now

    return UpstreamBackend(config, Options.parse(config))


class UpstreamBackend:
    """See the module's documentation."""

    def __init__(self, config: BackendConfig, options: Options) -> None:
        self._config = config
        self._options = options
        self.traits: Traits = TRAITS["upstream"]
        if options.vllm:
            self.traits = self.traits.with_features(*VLLM_DIALECT)
        if options.embeddings:
            self.traits = self.traits.with_features(Feature.EMBED)
        self._habits = Habits()
        self._http: UpstreamHttp | None = None
        self._seeds = Seeds(config.model.seed)
        self._models: dict[str, str] = {}  # our name -> the server's
        self._context_length = 0
        self._processed_tokens = 0

    async def start(self) -> Sequence[ModelInfo]:
        """Ask the server for its models. Raises ModelLoadError where it does not answer, or lacks the model."""
        http = UpstreamHttp(self._options.url, self._options.api_key, self._options.timeout_s)
        try:
            listed = await http.models()
            wanted = self._map_models(listed)
            await self._find_context(http, listed[wanted])
        except BaseException:
            await http.close()
            raise
        self._http = http
        return [self._info(name) for name in self._models]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See Backend. The prompt, where it is to be shown, is shown once the server has accepted the request."""
        call = await self._begin(request)
        groups = [tuple(range(request.output.n))] if self._one_request(request) else _apart(range(request.output.n))
        readers = [asyncio.create_task(self._read(call, indices)) for indices in groups]
        ender = asyncio.create_task(_end(readers, call.queue))
        try:
            async with aclosing(call.queue.__aiter__()) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        finally:
            for task in (*readers, ender):
                task.cancel()
            await asyncio.gather(*readers, ender, return_exceptions=True)

    async def _begin(self, request: GenerateRequest) -> _Call:
        """Check a request, in its server's words. Raises what refuses it."""
        arrival = monotonic()
        http = self._running
        request = _without_what_servers_do(request)
        refuse_unsupported(request, self.traits)
        if request.lora_adapter and request.lora_adapter not in self._config.model.lora_adapters:
            raise adapter_not_found(request.lora_adapter, self._config.model.lora_adapters)
        self._check_length(request)
        seed = None if request.sampling.seed is None else self._seeds.request_seed(request)
        echo = await self._echo(request) if request.output.echo else None
        return _Call(http=http, request=request, seed=seed, arrival=arrival, echo=echo)

    def _one_request(self, request: GenerateRequest) -> bool:
        """Whether all choices come of one request. Servers of vLLM's kind keep the prompt: there each is one of its
        own, with a usage and a seed of its own."""
        return request.output.n > 1 and self._habits.n and not self._options.vllm

    async def _read(self, call: _Call, indices: Sequence[int]) -> None:
        """Put the events of some choices, which are one request at the server, into the queue."""
        request = call.request
        answer = Answer(
            indices,
            cumulative=request.output.cumulative_text,
            arrival=call.arrival,
            logprobs=request.output.logprobs is not None,
        )
        async with aclosing(self._chunks(call, indices)) as chunks:
            async for chunk in chunks:
                call.accepted()
                before = answer.pieces
                if deltas := list(answer.take(chunk)):
                    call.queue.put(deltas)
                self._processed_tokens += max(0, answer.pieces - before)
        call.queue.put(answer.completions())
        missing = answer.unanswered()
        if missing and len(indices) > 1:  # it makes one choice, whatever it is asked for
            self._habits.n = False
            await self._read_apart(call, missing)

    async def _read_apart(self, call: _Call, indices: Sequence[int]) -> None:
        async with asyncio.TaskGroup() as group:
            for single in _apart(indices):
                group.create_task(self._read(call, single))

    async def _chunks(self, call: _Call, indices: Sequence[int]) -> AsyncGenerator[dict[str, Any], None]:
        """The server's chunks. A request that it wants in another way is sent again, before the first of them."""
        while True:
            path, body = generation_body(
                call.request,
                self._server_model(call.request),
                vllm=self._options.vllm,
                seed=None if call.seed is None else Seeds.choice_seed(call.seed, indices[0]),
                context_length=self._context_length,
                habits=self._habits,
                n=len(indices) if self._habits.n else 1,
            )
            begun = False
            try:
                async with aclosing(call.http.stream(path, body)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except GivenUp as error:
                grammar = call.request.grammar
                if grammar is None or not self._options.vllm:
                    raise
                # vLLM compiles in its engine, after its check, where some fail that the check has passed.
                raise InvalidArgument(
                    f"structured_output.{grammar.kind.value}",
                    "the upstream server cannot compile it, or no output can follow it",
                ) from error
            except InvalidArgument as error:
                if begun or not self._habits.learn(error, body):
                    raise

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """See Backend. Raises NotSupported unless started with `embeddings=on`."""
        if not self.traits.supports(Feature.EMBED):
            raise NotSupported("no embeddings are served here; start with --backend-option embeddings=on")
        answer = await self._running.post("/embeddings", embedding_body(request, self._models[request.model]))
        try:
            vectors = [entry["embedding"] for entry in sorted(answer["data"], key=lambda entry: entry["index"])]
            tokens = int(answer["usage"]["prompt_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise BackendFailed("the upstream server's embeddings are not in the OpenAI schema") from error
        return EmbedResult(embeddings=vectors, prompt_tokens=tokens)

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        """See Backend. Raises NotSupported in the openai dialect, which has no such call."""
        self._need_vllm("counting tokens")
        answer = await self._running.post_root("/tokenize", tokenize_body(prompt, self._models[model]))
        return [int(token_id) for token_id in answer.get("tokens") or ()]

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """See Backend. Raises NotSupported in the openai dialect."""
        self._need_vllm("detokenizing")
        body = {"model": self._models[model], "tokens": list(token_ids)}
        return str((await self._running.post_root("/detokenize", body)).get("prompt", ""))

    def chat_template(self, model: str) -> str:
        """The server keeps it to itself."""
        return ""

    def load(self) -> BackendLoad:
        """See Backend. Progress is in output tokens as the server counts them, or pieces of text where it does not."""
        return BackendLoad(
            max_running=self._config.model.max_running or DEFAULT_MAX_RUNNING, processed_tokens=self._processed_tokens
        )

    async def close(self) -> None:
        """See Backend."""
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    @property
    def _running(self) -> UpstreamHttp:
        if self._http is None:
            raise WorkerUnavailable("the connection to the upstream server is closed")
        return self._http

    async def _find_context(self, http: UpstreamHttp, listed: int) -> None:
        """The context length: the server's, where it says one anywhere, or the configured. Raises ModelLoadError."""
        own = listed or await http.context_length()
        limit = self._config.model.context_length
        if limit is not None and own and limit > own:
            raise ModelLoadError(f"--context-length {limit} exceeds the model's {own}")
        self._context_length = limit or own
        if not self._context_length:
            logger.warning(
                "the server at %s does not say its context length: a chat without a limit ends where the server "
                "ends it; set --context-length to let the fleet know it",
                self._options.url,
            )

    def _map_models(self, listed: Mapping[str, int]) -> str:
        """Choose the server's model and return the server's name of it. Raises ModelLoadError."""
        wanted = self._options.model or (self._config.model.path if self._config.model.path in listed else "")
        if not wanted and len(listed) == 1:
            (wanted,) = listed
        if wanted not in listed:
            known = ", ".join(list(listed)[:8]) or "none"
            raise ModelLoadError(
                f"the server at {self._options.url} has no model {wanted or self._config.model.path}; it has {known}; "
                "name one with --backend-option model=NAME"
            )
        names = self._config.model.names or (wanted.rstrip("/").rsplit("/", 1)[-1],)
        self._models = dict.fromkeys(names, wanted) | dict(self._config.model.lora_adapters)
        return wanted

    def _info(self, name: str) -> ModelInfo:
        adapter = name in self._config.model.lora_adapters
        return ModelInfo(
            name=name,
            base_model=next(iter(self._models)) if adapter else "",
            context_length=self._context_length,
            capabilities=self.traits.capabilities(),
            backend="upstream",
        )

    def _server_model(self, request: GenerateRequest) -> str:
        if request.lora_adapter:
            return self._config.model.lora_adapters[request.lora_adapter]
        return self._models.get(request.model) or next(iter(self._models.values()))

    async def _echo(self, request: GenerateRequest) -> PromptEcho:
        match request.prompt:
            case TextPrompt(text) if self._options.vllm:
                return PromptEcho(text=text, token_ids=tuple(await self.tokenize(request.model, request.prompt)))
            case TextPrompt(text):
                return PromptEcho(text=text, token_ids=())
            case _:
                raise UnsupportedField("output.echo", "only a text prompt can be echoed by the upstream backend")

    def _check_length(self, request: GenerateRequest) -> None:
        """Refuse tokens that leave no room; servers say it in many ways. How long a text is, only they know."""
        if not isinstance(request.prompt, TokenPrompt) or not self._context_length:
            return
        count = len(request.prompt.token_ids)
        if request.truncate_prompt_tokens is None and count >= self._context_length:
            raise PromptTooLong("input", count, self._context_length)

    def _need_vllm(self, what: str) -> None:
        if not self._options.vllm:
            raise NotSupported(f"{what} needs an upstream server with vLLM's calls: --backend-option dialect=vllm")


@dataclass(slots=True, kw_only=True)
class _Call:
    """One request on its way."""

    http: UpstreamHttp
    request: GenerateRequest
    seed: int | None
    arrival: float
    echo: PromptEcho | None
    queue: EventQueue = field(default_factory=EventQueue)

    def accepted(self) -> None:
        """The server has begun to answer: what comes before any output may go out."""
        if self.echo is not None:
            self.queue.put([self.echo])
            self.echo = None


def _apart(indices: Iterable[int]) -> list[tuple[int, ...]]:
    return [(index,) for index in indices]


def _without_what_servers_do(request: GenerateRequest) -> GenerateRequest:
    """The request without a wish that only serves to find tool calls in text: the server finds them itself."""
    chat = request.prompt
    if isinstance(chat, ChatPrompt) and chat.tools and request.output.keep_special_tokens:
        return replace(request, output=replace(request.output, keep_special_tokens=False))
    return request


async def _end(readers: Sequence[asyncio.Task[None]], queue: EventQueue) -> None:
    """Close the queue when all readers are done, or when one has failed."""
    try:
        await asyncio.gather(*readers)
    except Exception as error:
        cause = error
        while isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        queue.close(as_domain_error(cause))
    else:
        queue.close()
