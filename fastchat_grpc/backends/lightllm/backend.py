"""A LightLLM server as a worker: its `/generate_stream`, fed with token ids and read as token ids.

LightLLM runs as a server of its own; this worker prepares the prompts and makes the text, with the tokenizer of
the same model folder. Each choice is one stream; closing the connection aborts it there.

Source: `lightllm/server/api_lightllm.py`, `api_http.py`, `core/objs/sampling_params.py` and
`router/model_infer/mode_backend/generic_post_process.py` of ModelTC/lightllm.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from time import monotonic
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from fastchat_grpc.backends import driver
from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.capabilities import TRAITS, Feature
from fastchat_grpc.backends.driver import Piece
from fastchat_grpc.backends.event_lines import lines
from fastchat_grpc.backends.served import Served, ServedBackend, find_model, refuse_settings, whole_number
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import (
    EmbedRequest,
    EmbedResult,
    Event,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    ModelInfo,
    SamplingParams,
)
from fastchat_grpc.errors import (
    BackendFailed,
    ConfigError,
    InvalidArgument,
    ModelLoadError,
    NotSupported,
    UnsupportedField,
    WorkerUnavailable,
)
from fastchat_grpc.text.job import Job
from fastchat_grpc.text.tokenizer import Tokenizer

OPTIONS = frozenset({"url", "timeout_s", "constraints"})
CONSTRAINTS: Mapping[str, tuple[Feature, ...]] = MappingProxyType(
    {"none": (), "outlines": (Feature.REGEX,), "xgrammar": (Feature.JSON_OBJECT, Feature.JSON_SCHEMA)}
)
"""Grammars by the server's --output_constraint_mode, which it does not tell; without one it ignores them."""
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_MAX_RUNNING = 64
CONNECT_TIMEOUT_S = 5.0
_REFUSED = 417
"""HTTP status of a request that LightLLM does not take (Expectation Failed, with the reason as JSON)."""
_FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


def create(config: BackendConfig) -> LightllmBackend:
    """Make a LightLLM backend.

    Options: `url` of the server, `timeout_s` without a token after which it counts as lost, `constraints` as the
    server's --output_constraint_mode (none, outlines for regular expressions, xgrammar for JSON). `--model-path` is the
    folder that the server loaded; `--context-length` its --max_req_total_len where that is less than the model's.
    """
    config.refuse_unknown_options(OPTIONS)
    where = "set it where the LightLLM server is started"
    flags = ("--max-gpu-memory", "--load-8bit", "--quantization", "--cpu-offloading", "--lora", "--dtype")
    refuse_settings(config, dict.fromkeys((*flags, "--num-gpus", "--gpus", "--device"), where))
    url = config.options.get("url", DEFAULT_URL)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--backend-option url must look like http://host:port, got {url}")
    importlib.import_module("httpx2")
    return LightllmBackend(config, url.rstrip("/"))


class LightllmBackend(ServedBackend):
    """One LightLLM server."""

    def __init__(self, config: BackendConfig, url: str) -> None:
        super().__init__(config)
        self._url = url
        mode = config.options.get("constraints", "none")
        if mode not in CONSTRAINTS:
            raise ConfigError(f"--backend-option constraints must be one of {', '.join(CONSTRAINTS)}, got {mode}")
        self.traits = TRAITS["lightllm"].with_features(*CONSTRAINTS[mode])
        self._timeout_s = whole_number(config, "timeout_s", 120)
        self._max_running = config.model.max_running or DEFAULT_MAX_RUNNING
        self._http: Any = None
        self._jobs: set[Job] = set()
        self._processed_tokens = 0

    async def start(self) -> Sequence[ModelInfo]:
        import httpx2

        settings = self._config.model
        facts = find_model(settings, "lightllm")
        tokenizer = facts.tokenizer(settings)
        self._http = httpx2.AsyncClient(
            base_url=self._url,
            timeout=httpx2.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self._max_running),
            trust_env=False,  # proxies of the environment are for other places than an engine's server
        )
        await self._check_health()
        self._served_model = Served(
            backend="lightllm",
            names=settings.served_names,
            tokenizer=tokenizer,
            context_length=facts.served_context(settings.context_length),
            capabilities=self.traits.capabilities(chat=bool(tokenizer.chat_template)),
            traits=self.traits,
            default_sampling=facts.default_sampling,
        )
        return self._served_model.infos()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        arrival = monotonic()
        served = self._served
        served.adapter(request)
        check_limits(request)
        job = await self._job(request, arrival)
        job.show_prompt()
        self._jobs.add(job)
        try:
            async with aclosing(driver.drive_streams(job, lambda index: self._stream(job, index))) as events:
                async for event in events:
                    yield event
        finally:
            self._jobs.discard(job)

    async def _stream(self, job: Job, index: int) -> AsyncGenerator[Piece, None]:
        """One choice. Leaving the response closes its connection, at which the server aborts."""
        import httpx2

        body = {"inputs": job.prefix(index), "parameters": parameters(job, index)}
        try:
            async with self._http.stream("POST", "/generate_stream", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                job.started()
                self._processed_tokens += len(job.prompt_ids)
                async for line in lines(response.aiter_bytes()):
                    if line.startswith("data:"):
                        self._processed_tokens += 1
                        yield piece(self._served.tokenizer, job.request, json.loads(line[5:]))
        except httpx2.HTTPError as error:
            raise WorkerUnavailable(f"the LightLLM server at {self._url} was lost ({type(error).__name__})") from error

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        raise NotSupported("LightLLM has no embeddings")

    def load(self) -> BackendLoad:
        usage = 0.0
        if self._served_model is not None:  # of what so many requests may grow to; the server's own is not known
            held = sum(job.held_tokens for job in self._jobs)
            usage = min(1.0, held / (self._max_running * self._served_model.context_length))
        return BackendLoad(max_running=self._max_running, kv_cache_usage=usage, processed_tokens=self._processed_tokens)

    async def close(self) -> None:
        self._served_model = None
        for job in list(self._jobs):
            job.fail(WorkerUnavailable("the worker closes"))
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    async def _check_health(self) -> None:
        import httpx2

        try:
            response = await self._http.get("/health")
        except httpx2.HTTPError as error:
            raise ModelLoadError(
                f"no LightLLM server answers at {self._url} ({type(error).__name__}); set --backend-option url"
            ) from error
        if response.status_code != 200:
            raise ModelLoadError(f"the LightLLM server at {self._url} says that it is not healthy")


def check_limits(request: GenerateRequest) -> None:
    """Refuse what LightLLM would refuse, or do otherwise, under the names of our fields."""
    sampling = request.sampling
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name) < 0:
            raise UnsupportedField(f"sampling.{name}", f"LightLLM allows at least 0, got {getattr(sampling, name):g}")
    if sampling.repetition_penalty < 1:
        raise UnsupportedField(
            "sampling.repetition_penalty", f"LightLLM allows at least 1, got {sampling.repetition_penalty:g}"
        )
    counts_output = bool(sampling.presence_penalty or sampling.frequency_penalty)
    if counts_output and sampling.repetition_penalty != 1:
        raise UnsupportedField(
            "sampling.repetition_penalty",
            "LightLLM applies all penalties to the same tokens: not together with presence or frequency penalties",
        )
    plain = sampling.greedy or sampling.temperature == 1.0
    changed = counts_output or sampling.repetition_penalty != 1 or request.stopping.min_new_tokens
    if request.output.logprobs is not None and (changed or not plain):
        raise UnsupportedField(
            "output.logprobs",
            "LightLLM gives log probabilities after temperature and penalties; ask for them without these",
        )


def parameters(job: Job, index: int) -> dict[str, Any]:
    """LightLLM's "parameters" for one choice. It ends the choice at EOS and its length; all other stops are ours."""
    stopping = job.request.stopping
    most = job.max_tokens(index)
    return {
        **_sampling(job.request.sampling),
        "max_new_tokens": most,
        # LightLLM counts the token that it is about to choose; we count those that are out.
        "min_new_tokens": min(job.min_tokens(index) + 1, most),
        "ignore_eos": stopping.ignore_eos,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        **_constraint(job.request.grammar),
    }


def _constraint(grammar: Grammar | None) -> dict[str, str]:
    if grammar is None:
        return {}
    if grammar.kind is GrammarKind.REGEX:
        return {"regular_constraint": grammar.source}
    return {"guided_json": '{"type": "object"}' if grammar.kind is GrammarKind.JSON_OBJECT else grammar.source}


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    chosen: dict[str, Any] = {"do_sample": not sampling.greedy}
    if not sampling.greedy:
        chosen |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k if sampling.top_k > 0 else -1,
        }
    repeats = sampling.repetition_penalty != 1
    chosen |= {
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        # Ours counts the prompt for the repetition penalty alone.
        "input_penalty": repeats,
    }
    return chosen


def piece(tokenizer: Tokenizer, request: GenerateRequest, event: dict[str, Any]) -> Piece:
    """One event of the stream: one token."""
    token = event["token"]
    token_id = token["id"]
    if token_id is None:
        raise BackendFailed("LightLLM sent a token without its id")
    logprobs = []
    if request.output.logprobs is not None:
        logprobs = [driver.token_logprob(tokenizer, int(token_id), float(token["logprob"]))]
    reason = _FINISH_REASONS.get(event["finish_reason"] or "", FinishReason.ABORT) if event["finished"] else None
    return Piece((int(token_id),), logprobs, reason)


def _refusal(status: int, body: bytes) -> Exception:
    """The error for a response without a stream."""
    try:
        message = str(json.loads(body)["message"]).splitlines()[0][:200]
    except (ValueError, KeyError, TypeError, IndexError):
        message = "it gave no reason"
    if status == _REFUSED:
        return InvalidArgument("", f"LightLLM refused the request: {message}")
    return WorkerUnavailable(f"LightLLM answered with status {status}")
