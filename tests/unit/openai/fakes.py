"""A generation port without a model, and a context without a server."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.core import (
    Capability,
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
    TokenLogprob,
    TopLogprob,
    Usage,
)
from fastchat_grpc.openai.servicer import OpenAIServicer

MODEL = ModelInfo(
    name="m",
    context_length=100,
    capabilities=frozenset({Capability.GENERATE, Capability.CHAT}),
    embedding_size=4,
    vocabulary_size=1000,
)


def logprob(token: str, value: float | None = -0.5) -> TokenLogprob:
    """A token's logprob with two alternatives."""
    top = (TopLogprob(1, token, token.encode(), value or 0.0), TopLogprob(2, "other", b"other", float("-inf")))
    return TokenLogprob(1, token, token.encode(), value, top if value is not None else ())


class FakePort:
    """Says the given pieces for every choice, one token each, and remembers what it was asked."""

    def __init__(
        self,
        pieces: Sequence[str] = ("Hel", "lo"),
        *,
        finish: FinishReason = FinishReason.STOP,
        matched: str | int | None = None,
        error: Exception | None = None,
        fail_after: int = 10**9,
        models: Sequence[ModelInfo] = (MODEL,),
    ) -> None:
        self.pieces = pieces
        self.finish = finish
        self.matched = matched
        self.error = error
        self.fail_after = fail_after
        self.requests: list[GenerateRequest] = []
        self.embeds: list[EmbedRequest] = []
        self.closed = 0
        self._models = list(models)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        try:
            if request.output.echo:
                yield PromptEcho(text="Say: ", token_ids=(7,), logprobs=(logprob("Say: ", None),))
            sent = 0
            for number, piece in enumerate(self.pieces, 1):
                for index in range(request.output.n):
                    if self.error is not None and sent >= self.fail_after:
                        raise self.error
                    sent += 1
                    yield Delta(
                        index=index,
                        text=piece,
                        token_ids=(number,),
                        usage=Usage(prompt_tokens=5, completion_tokens=number, cached_tokens=3),
                        logprobs=(logprob(piece),) if request.output.logprobs is not None else (),
                    )
            if self.error is not None:
                raise self.error
            usage = Usage(prompt_tokens=5, completion_tokens=len(self.pieces), cached_tokens=3)
            for index in range(request.output.n):
                yield Completion(index=index, finish_reason=self.finish, usage=usage, matched=self.matched)
        finally:
            self.closed += 1

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        self.embeds.append(request)
        if self.error is not None:
            raise self.error
        return EmbedResult(embeddings=[[0.5, -0.25, 0.0, 1.0] for _ in request.inputs], prompt_tokens=7)

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        return list(range(3))

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        return "-".join(str(token_id) for token_id in token_ids)

    def models(self) -> Sequence[ModelInfo]:
        return self._models


class FakeContext:
    """The only things that the servicer asks of a context."""

    def __init__(self, **metadata: str) -> None:
        self.initial_metadata: dict[str, str] = {}
        self._metadata = tuple((key.replace("_", "-"), value) for key, value in metadata.items())

    def invocation_metadata(self) -> Any:
        return self._metadata

    async def send_initial_metadata(self, metadata: Any) -> None:
        self.initial_metadata = dict(metadata)


def body(**values: Any) -> HttpBody:
    """A request body."""
    return HttpBody(content_type="application/json", data=json.dumps(values).encode())


def chat(**values: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **values}


async def ask_chat(port: FakePort, **values: Any) -> dict[str, Any]:
    """The whole reply of a chat completion."""
    bodies = [item async for item in OpenAIServicer(port).ChatCompletions(body(**chat(**values)), FakeContext())]
    assert [item.content_type for item in bodies] == ["application/json"]
    return json.loads(bodies[0].data)


async def ask_text(port: FakePort, **values: Any) -> dict[str, Any]:
    """The whole reply of a text completion."""
    request = body(**{"model": "m", "prompt": "Say: ", **values})
    bodies = [item async for item in OpenAIServicer(port).Completions(request, FakeContext())]
    assert [item.content_type for item in bodies] == ["application/json"]
    return json.loads(bodies[0].data)


def events(data: bytes) -> list[Any]:
    """Server-sent events: parsed JSON, and the word [DONE]."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        assert block.startswith("data: ")
        assert "\n" not in block
        text = block.removeprefix("data: ")
        found.append(text if text == "[DONE]" else json.loads(text))
    assert data.endswith(b"\n\n")
    return found


async def stream_chat(port: FakePort, **values: Any) -> list[Any]:
    """The events of a streamed chat completion."""
    request = body(**chat(stream=True, **values))
    bodies = [item async for item in OpenAIServicer(port).ChatCompletions(request, FakeContext())]
    assert bodies[0].content_type == "text/event-stream"
    return events(b"".join(item.data for item in bodies))


async def stream_text(port: FakePort, **values: Any) -> list[Any]:
    """The events of a streamed text completion."""
    request = body(**{"model": "m", "prompt": "Say: ", "stream": True, **values})
    bodies = [item async for item in OpenAIServicer(port).Completions(request, FakeContext())]
    assert bodies[0].content_type == "text/event-stream"
    return events(b"".join(item.data for item in bodies))
