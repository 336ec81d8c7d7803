"""Any server of the OpenAI API as a worker's engine: vLLM, SGLang, TGI, llama.cpp, Ollama, or a hosted one.

Text goes out and text comes back: the server tokenizes, applies its chat template, samples and stops. Tool
calls that the server has found come back as the text of most models: `<tool_call>{...}</tool_call>`. Two
dialects: `openai` is what every such server understands; `vllm` adds what vLLM, SGLang and this product's
own bridge take beside it. What the chosen dialect has no field for is refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.capabilities import TRAITS, Feature, Traits, adapter_not_found, refuse_unsupported
from fastchat_grpc.backends.driver import Seeds, as_domain_error
from fastchat_grpc.backends.upstream_http import UpstreamHttp
from fastchat_grpc.backends.upstream_request import embedding_body, generation_body, tokenize_body
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import (
    Completion,
    Delta,
    EmbedRequest,
    EmbedResult,
    Event,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Prompt,
    PromptEcho,
    TextPrompt,
    Timings,
    TokenPrompt,
    Usage,
)
from fastchat_grpc.errors import (
    BackendFailed,
    ConfigError,
    ModelLoadError,
    NotSupported,
    PromptTooLong,
    UnsupportedField,
    WorkerUnavailable,
)
from fastchat_grpc.text.events import EventQueue

logger = logging.getLogger(__name__)

DIALECTS = ("openai", "vllm")
OPTIONS = frozenset({"url", "model", "dialect", "api_key_env", "timeout_s", "embeddings"})
DEFAULT_KEY_VARIABLE = "FASTCHAT_GRPC_UPSTREAM_API_KEY"
DEFAULT_MAX_RUNNING = 256
VLLM_ADDS = (
    Feature.TOKEN_PROMPT,
    Feature.TOP_K,
    Feature.MIN_P,
    Feature.REPETITION_PENALTY,
    Feature.MIN_NEW_TOKENS,
    Feature.STOP_TOKEN_IDS,
    Feature.IGNORE_EOS,
    Feature.KEEP_SPECIAL_TOKENS,
    Feature.TRUNCATE_PROMPT,
    Feature.REGEX,
)
_FINISH = {"stop": FinishReason.STOP, "tool_calls": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The backend's own options."""

    url: str
    """Address of the API, up to and with /v1."""
    model: str
    """The server's name of the model; empty: its only one."""
    dialect: str
    api_key: str | None
    timeout_s: float
    """Longest silence of the server, also before its first byte."""
    embeddings: bool

    @classmethod
    def parse(cls, config: BackendConfig) -> Options:
        """The options of `--backend-option`. Raises ConfigError."""
        config.refuse_unknown_options(OPTIONS)
        given = config.options
        url = given.get("url", "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigError("backend upstream needs --backend-option url=http://host:port/v1")
        dialect = given.get("dialect", "openai")
        if dialect not in DIALECTS:
            raise ConfigError(f"--backend-option dialect must be one of {', '.join(DIALECTS)}, got {dialect}")
        embeddings = given.get("embeddings", "off")
        if embeddings not in ("on", "off"):
            raise ConfigError(f"--backend-option embeddings must be on or off, got {embeddings}")
        return cls(
            url=url,
            model=given.get("model", ""),
            dialect=dialect,
            api_key=_api_key(given),
            timeout_s=_seconds(given.get("timeout_s", "120")),
            embeddings=embeddings == "on",
        )


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
        if options.dialect == "vllm":
            self.traits = self.traits.with_features(*VLLM_ADDS)
        if options.embeddings:
            self.traits = self.traits.with_features(Feature.EMBED)
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
            self._map_models(listed)
        except BaseException:
            await http.close()
            raise
        self._http = http
        return [self._info(name) for name in self._models]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """See Backend. Each choice is a request of its own at the server, which makes its usage exact."""
        arrival = monotonic()
        http = self._running
        refuse_unsupported(request, self.traits)
        if request.lora_adapter and request.lora_adapter not in self._config.model.lora_adapters:
            raise adapter_not_found(request.lora_adapter, self._config.model.lora_adapters)
        self._check_length(request)
        seed = None if request.sampling.seed is None else self._seeds.request_seed(request)
        if request.output.echo:
            yield await self._echo(request)
        queue = EventQueue()
        readers = [
            asyncio.create_task(self._read(http, request, index, seed, arrival, queue))
            for index in range(request.output.n)
        ]
        ender = asyncio.create_task(_end(readers, queue))
        try:
            async with aclosing(queue.__aiter__()) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        finally:
            for task in (*readers, ender):
                task.cancel()
            await asyncio.gather(*readers, ender, return_exceptions=True)

    async def _read(
        self,
        http: UpstreamHttp,
        request: GenerateRequest,
        index: int,
        seed: int | None,
        arrival: float,
        queue: EventQueue,
    ) -> None:
        """Put the events of one choice into the queue."""
        path, body = generation_body(
            request,
            self._server_model(request),
            vllm=self._options.dialect == "vllm",
            seed=None if seed is None else Seeds.choice_seed(seed, index),
            context_length=self._context_length,
        )
        choice = _Choice(index, cumulative=request.output.cumulative_text, arrival=arrival)
        async with aclosing(http.stream(path, body)) as chunks:
            async for chunk in chunks:
                before = choice.tokens
                delta = choice.take(chunk)
                self._processed_tokens += choice.tokens - before
                if delta is not None:
                    queue.put([delta])
        queue.put([choice.completion()])

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

    def _map_models(self, listed: Mapping[str, int]) -> None:
        """Choose the server's model. Raises ModelLoadError."""
        wanted = self._options.model or (self._config.model.path if self._config.model.path in listed else "")
        if not wanted and len(listed) == 1:
            (wanted,) = listed
        if wanted not in listed:
            known = ", ".join(list(listed)[:8]) or "none"
            raise ModelLoadError(
                f"the server at {self._options.url} has no model {wanted or self._config.model.path}; it has {known}; "
                "name one with --backend-option model=NAME"
            )
        own = listed[wanted]
        limit = self._config.model.context_length
        if limit is not None and own and limit > own:
            raise ModelLoadError(f"--context-length {limit} exceeds the model's {own}")
        self._context_length = limit or own
        names = self._config.model.names or (wanted.rstrip("/").rsplit("/", 1)[-1],)
        self._models = dict.fromkeys(names, wanted) | dict(self._config.model.lora_adapters)

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
            case TextPrompt(text) if self._options.dialect == "vllm":
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
        if self._options.dialect != "vllm":
            raise NotSupported(f"{what} needs an upstream server with vLLM's calls: --backend-option dialect=vllm")


class _Choice:
    """One choice as it comes in chunks of the OpenAI schema."""

    def __init__(self, index: int, *, cumulative: bool, arrival: float) -> None:
        self._index = index
        self._cumulative: list[str] | None = [] if cumulative else None
        self._arrival = arrival
        self._first_s = 0.0
        self._pieces = 0
        self._usage = Usage()
        self._finish: FinishReason | None = None
        self._matched: str | int | None = None
        self._calls = _Calls()

    @property
    def tokens(self) -> int:
        """Output tokens so far, as well as the chunks tell."""
        return max(self._pieces, self._usage.completion_tokens)

    def take(self, chunk: Mapping[str, Any]) -> Delta | None:
        """The Delta of a chunk, if it brings text."""
        usage = chunk.get("usage")
        if usage:
            details = usage.get("prompt_tokens_details") or {}
            self._usage = Usage(
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
                cached_tokens=int(details.get("cached_tokens") or 0),
            )
        for choice in chunk.get("choices") or ():
            self._ends(choice)
            delta = choice.get("delta")
            text = (delta.get("content") if delta is not None else choice.get("text")) or ""
            text += self._calls.text((delta or {}).get("tool_calls") or (), ended=self._finish is not None)
            if text:
                return self._delta(text)
        return None

    def completion(self) -> Completion:
        """The end. Raises WorkerUnavailable where the server stopped in the middle."""
        if self._finish is None:
            raise WorkerUnavailable("the upstream server ended its answer in the middle")
        timings = Timings(time_to_first_token_s=self._first_s, total_s=monotonic() - self._arrival)
        return Completion(
            index=self._index, finish_reason=self._finish, matched=self._matched, usage=self._usage, timings=timings
        )

    def _ends(self, choice: Mapping[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if reason:
            self._finish = _FINISH.get(str(reason), FinishReason.ABORT)
            matched = choice.get("stop_reason")
            self._matched = matched if isinstance(matched, str | int) else None

    def _delta(self, text: str) -> Delta:
        self._first_s = self._first_s or monotonic() - self._arrival
        self._pieces += 1
        if self._cumulative is not None:
            self._cumulative.append(text)
        return Delta(
            index=self._index,
            text=text,
            token_ids=(),
            usage=self._usage,
            cumulative_text="".join(self._cumulative or ()),
        )


class _Calls:
    """Tool calls, which come in pieces, as text: each is `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

    def __init__(self) -> None:
        self._open = False

    def text(self, pieces: Sequence[Mapping[str, Any]], *, ended: bool) -> str:
        """What these pieces add. `ended`: nothing follows."""
        parts: list[str] = []
        for piece in pieces:
            function = piece.get("function") or {}
            # A name begins a call; indices do not tell, as some servers give all calls the same.
            if function.get("name"):
                parts += [self._close(), '<tool_call>{"name": ', json.dumps(function["name"]), ', "arguments": ']
                self._open = True
            if self._open:
                parts.append(function.get("arguments") or "")
        if ended:
            parts.append(self._close())
        return "".join(parts)

    def _close(self) -> str:
        was_open, self._open = self._open, False
        return "}</tool_call>" if was_open else ""


async def _end(readers: Sequence[asyncio.Task[None]], queue: EventQueue) -> None:
    """Close the queue when all readers are done, or when one has failed."""
    try:
        await asyncio.gather(*readers)
    except Exception as error:
        queue.close(as_domain_error(error))
    else:
        queue.close()


def _api_key(options: Mapping[str, str]) -> str | None:
    """The key, from the environment alone: command lines can be read by others. Raises ConfigError."""
    name = options.get("api_key_env")
    if name is not None and name not in os.environ:
        raise ConfigError(f"--backend-option api_key_env: the environment has no variable {name}")
    return os.environ.get(name or DEFAULT_KEY_VARIABLE)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 86400:
        raise ConfigError(f"--backend-option timeout_s must be a number of seconds above 0, got {text}")
    return value
