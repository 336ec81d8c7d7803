"""HTTP to a server of the OpenAI API: one connection pool, server-sent events, errors as domain errors."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

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
    "skip_special_tokens": "output.keep_special_tokens",
}
"""Fields of the contract by the OpenAI API's (and vLLM's) names."""
# (tokens of the prompt, context length), as servers word it: this product, vLLM, vLLM and OpenAI before, llama.cpp.
_TOO_LONG = (
    re.compile(r"has (?P<prompt>\d+) tokens, but the context of (?P<context>\d+) tokens"),
    re.compile(
        r"maximum context length is (?P<context>\d+) tokens.*?\D(?P<prompt>\d+) (?:input tokens|in the messages)"
    ),
    re.compile(r"request \((?P<prompt>\d+) tokens\) exceeds the available context size \((?P<context>\d+) tokens\)"),
)


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
            return {str(entry["id"]): int(entry.get("max_model_len") or 0) for entry in entries}
        except self._httpx.HTTPError as error:
            raise ModelLoadError(f"no server answers at {self._url} ({type(error).__name__})") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelLoadError(f"{self._url}/models does not answer in the OpenAI schema") from error

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A call with a JSON answer."""
        return await self._post(self._url + path, body)

    async def post_root(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The same, for calls that lie outside /v1."""
        return await self._post(self._url.removesuffix("/v1") + path, body)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer. Closing the generator closes the connection, which stops the server."""
        try:
            async with self._client.stream("POST", self._url + path, json=body) as response:
                if response.status_code != 200:
                    raise to_error(response.status_code, await response.aread(), response.headers)
                async for data in _events(response.aiter_lines()):
                    if data == "[DONE]":
                        return
                    chunk = _parse(data)
                    if chunk.get("error"):
                        raise to_error(_status(chunk["error"]), data.encode(), {})
                    yield chunk
        except self._httpx.HTTPError as error:
            raise WorkerUnavailable(f"the upstream server is not reachable ({type(error).__name__})") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _post(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = await self._client.post(url, json=body)
        except self._httpx.HTTPError as error:
            raise WorkerUnavailable(f"the upstream server is not reachable ({type(error).__name__})") from error
        if response.status_code != 200:
            raise to_error(response.status_code, response.content, response.headers)
        return _parse(response.text)


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The data of server-sent events; comments and other fields are skipped."""
    data: list[str] = []
    async for line in lines:
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
    message = " ".join(str(error.get("message") or "").split())[:MAX_MESSAGE_LENGTH]
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
            return WorkerUnavailable(f"the upstream server is not available (HTTP {status})")
        case _:
            return BackendFailed(f"the upstream server failed (HTTP {status})")


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
            return PromptTooLong("input", tokens, context) if tokens >= context else None
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
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None


def _parse(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise BackendFailed("the upstream server's answer is not JSON") from error
    if not isinstance(chunk, dict):
        raise BackendFailed("the upstream server's answer is not in the OpenAI schema")
    return chunk
