"""HTTP to a server of the OpenAI API: one connection pool, server-sent events, errors as domain errors."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any

from fastchat_grpc.backends.event_lines import lines
from fastchat_grpc.errors import (
    BackendFailed,
    FastChatError,
    InvalidArgument,
    ModelLoadError,
    ModelNotFound,
    PromptTooLong,
    QueueFull,
    WorkerUnavailable,
)

CONNECT_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 4096
MAX_MESSAGE_LENGTH = 300
_FIELDS = {
    **{
        name: f"sampling.{name}"
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
    },
    **{name: f"sampling.{name}" for name in ("frequency_penalty", "seed", "logit_bias")},
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "stopping.max_new_tokens"),
    "min_tokens": "stopping.min_new_tokens",
    "stop": "stopping.stop",
    "stop_token_ids": "stopping.stop_token_ids",
    **dict.fromkeys(("response_format", "structured_outputs"), "structured_output"),
    "messages": "chat.messages",
    "n": "output.n",
    **dict.fromkeys(("logprobs", "top_logprobs"), "output.logprobs"),
    "skip_special_tokens": "output.keep_special_tokens",
}
"""Fields of the contract by the OpenAI API's (and vLLM's) names."""
# (tokens of the prompt, context length), as servers word it: this product, vLLM, vLLM and OpenAI before, llama.cpp.
_TOO_LONG = (
    re.compile(r"has (?:at least )?(?P<prompt>\d+) tokens, but the context of (?P<context>\d+) tokens"),
    re.compile(
        r"maximum context length is (?P<context>\d+) tokens.*?\D(?P<prompt>\d+) (?:input tokens|in the messages)"
    ),
    re.compile(r"request \((?P<prompt>\d+) tokens\) exceeds the available context size \((?P<context>\d+) tokens\)"),
)


_GAVE_UP = "Internal server error"
"""vLLM's whole message for a request that its engine has ended; its other failures have others."""


class GivenUp(BackendFailed):
    """The server has ended this request alone, for no reason that it gives."""


class UpstreamHttp:
    """Calls to one server. Its key goes into a header and nowhere else."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        import httpx2

        self._httpx = httpx2
        self._url = url
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=256),
        )

    async def models(self) -> dict[str, int]:
        """The server's models, each with its context length, 0 where it says none. Raises ModelLoadError."""
        try:
            response = await self._client.get(f"{self._url}/models")
            if response.status_code != 200:
                raise ModelLoadError(f"{self._url}/models answers with HTTP {response.status_code}; check url and key")
            entries = response.json()["data"]
            return {str(entry["id"]): _context_length(entry) for entry in entries}
        except self._httpx.HTTPError as error:
            raise ModelLoadError(f"no server answers at {self._url} ({type(error).__name__})") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelLoadError(f"{self._url}/models does not answer in the OpenAI schema") from error

    async def context_length(self) -> int:
        """What servers say outside of the OpenAI API: llama.cpp in /props, TGI in /info. 0 where they say nothing."""
        for path in ("/props", "/info"):
            with suppress(self._httpx.HTTPError, ValueError, AttributeError, TypeError):
                response = await self._client.get(self._url.removesuffix("/v1") + path)
                said = response.json() if response.status_code == 200 else {}
                if length := _context_length({**said, **(said.get("default_generation_settings") or {})}):
                    return length
        return 0

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A call with a JSON answer."""
        return await self._post(self._url + path, body)

    async def post_root(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The same, for calls that lie outside /v1."""
        return await self._post(self._url.removesuffix("/v1") + path, body)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer, and an empty one where the server marks the end ([DONE]).

        Closing the generator closes the connection, which stops the server.
        """
        try:
            async with self._answer(self._url + path, body) as response:
                if response.status_code != 200:
                    raise to_error(response.status_code, await response.aread(), response.headers)
                async for data in _events(lines(response.aiter_bytes())):
                    if data == "[DONE]":
                        yield {}
                        return
                    chunk = _parse(data)
                    if chunk.get("error"):
                        raise to_error(_status(chunk["error"]), data.encode(), {})
                    if chunk:
                        yield chunk
        except self._httpx.HTTPError as error:
            raise WorkerUnavailable(f"the upstream server is not reachable ({type(error).__name__})") from error

    @asynccontextmanager
    async def _answer(self, url: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        """The response to a POST, as far as its headers. A server may close a connection that was idle just when it
        is used again: where not a byte has come back, the request is sent once more, on another."""
        request = self._client.build_request("POST", url, json=body)
        try:
            response = await self._client.send(request, stream=True)
        except (self._httpx.RemoteProtocolError, self._httpx.ReadError, self._httpx.WriteError):
            request = self._client.build_request("POST", url, json=body)
            response = await self._client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _post(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with self._answer(url, body) as response:
                content = await response.aread()
        except self._httpx.HTTPError as error:
            raise WorkerUnavailable(f"the upstream server is not reachable ({type(error).__name__})") from error
        if response.status_code != 200:
            raise to_error(response.status_code, content, response.headers)
        return _parse(content.decode("utf-8", "replace"))


async def _events(stream: AsyncIterator[str]) -> AsyncIterator[str]:
    """The data of server-sent events; comments and other fields are skipped."""
    data: list[str] = []
    async for line in stream:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)


def to_error(status: int, content: bytes, headers: Mapping[str, str]) -> FastChatError:
    """The domain error for an answer of the server. Its message is for the caller, who caused it; it is not logged."""
    error = _error_object(content)
    said_by_server = error.get("message") or error.get("detail") or ""  # the latter as FastAPI has it
    message = " ".join(str(said_by_server).split())[:MAX_MESSAGE_LENGTH]
    said = f": {message}" if message else ""
    match status:
        case 400 | 413 | 422:
            return _too_long(message) or _refusal(str(error.get("param") or ""), message)
        case 401 | 403:
            return BackendFailed("the upstream server refuses this worker's key")
        case 404:
            return ModelNotFound(f"the upstream server has no such model or call (HTTP 404){said}")
        case 429:
            return QueueFull(f"the upstream server is full{said}", retry_after_s=_retry_after(headers))
        case 408 | 502 | 503 | 504:
            return WorkerUnavailable(
                f"the upstream server is not available (HTTP {status})", retry_after_s=_retry_after(headers)
            )
        case _:
            kind = GivenUp if message == _GAVE_UP else BackendFailed
            return kind(f"the upstream server failed (HTTP {status})")


def _refusal(param: str, message: str) -> InvalidArgument:
    """The server's refusal, about the field of the request that its parameter stands for."""
    head = param.split(".")[0].split("[")[0]
    field = _FIELDS.get(head, param)
    if not param and "grammar" in message.lower():  # vLLM names no parameter here
        field = "structured_output"
    return InvalidArgument(
        field, f"refused by the upstream server: {message.removeprefix(f'{param}: ') or 'no reason'}"
    )


def _too_long(message: str) -> PromptTooLong | None:
    """The error for a prompt that does not fit, where the server's words for it are known."""
    for words in _TOO_LONG:
        if found := words.search(message):
            tokens, context = int(found["prompt"]), int(found["context"])
            about = "at least" in found[0]
            return PromptTooLong("input", tokens, context, at_least=about) if tokens >= context else None
    return None


def _error_object(content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        return {}
    error = answer.get("error", answer) if isinstance(answer, dict) else {}
    return error if isinstance(error, dict) else {"message": str(error)}


def _status(error: object) -> int:
    """The HTTP status that an error inside a stream names, else 500."""
    code = str(error.get("code") or error.get("status") or "") if isinstance(error, dict) else ""
    return int(code) if code.isdecimal() else 500


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server wants its callers to wait: it says a number of them, or a date (RFC 9110, 10.2.3)."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text)) if math.isfinite(float(text)) else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


_CONTEXT_KEYS = (
    "max_model_len",  # vLLM, SGLang, this product
    "context_length",  # OpenRouter, Together
    "context_window",  # Groq
    "max_context_length",  # Mistral, LM Studio
    "n_ctx",  # llama.cpp
    "max_total_tokens",  # TGI
)


def _context_length(said: Mapping[str, Any]) -> int:
    """The context length among the facts of a model, by any server's name for it; 0 where there is none."""
    for key in _CONTEXT_KEYS:
        value = said.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _parse(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise BackendFailed("the upstream server's answer is not JSON") from error
    if not isinstance(chunk, dict):
        raise BackendFailed("the upstream server's answer is not in the OpenAI schema")
    return chunk
