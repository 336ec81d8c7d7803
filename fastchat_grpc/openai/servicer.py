"""The OpenAI API as a gRPC service: JSON in, JSON or server-sent events out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import grpc
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.core import Completion, Event, GenerateRequest, ModelInfo, PromptEcho
from fastchat_grpc.errors import InvalidArgument, ModelNotFound
from fastchat_grpc.openai import pings, sse
from fastchat_grpc.openai.beside import Beside
from fastchat_grpc.openai.call import Call
from fastchat_grpc.openai.chat_reply import ChatBody, ChatStream
from fastchat_grpc.openai.chat_request import parse_chat
from fastchat_grpc.openai.completion_reply import CompletionBody, CompletionStream
from fastchat_grpc.openai.completion_request import parse_completion
from fastchat_grpc.openai.embeddings import RENAMES as EMBED_RENAMES
from fastchat_grpc.openai.embeddings import parse_embeddings, render_embeddings
from fastchat_grpc.openai.ignored import Ignored
from fastchat_grpc.openai.jsonio import dumps, parse_object
from fastchat_grpc.openai.merge import merge
from fastchat_grpc.openai.paths import rename, renamed_errors
from fastchat_grpc.openai.port import GenerationPort
from fastchat_grpc.openai.settings import find_model
from fastchat_grpc.openai.tokens import (
    TOKENIZE_RENAMES,
    parse_detokenize,
    parse_token_check,
    parse_tokenize,
    render_detokenize,
    render_token_check,
    render_tokenize,
)
from fastchat_grpc.rpc.border import to_domain_error
from fastchat_grpc.rpc.request_ids import request_id, told
from fastchat_grpc.v1 import openai_pb2 as pb
from fastchat_grpc.v1 import openai_pb2_grpc

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["OpenAIService"].full_name
CATALOG_S = 0.5
"""Facts about models, such as context lengths, may be this old."""
_OWNER = "fastchat_grpc"

Context = grpc.aio.ServicerContext[Any, Any]


class StreamReply(Protocol):
    """Renders the events of a stream as they come."""

    def feed(self, event: Event, base: int = 0) -> bytes: ...
    def end(self) -> bytes: ...


class BodyReply(Protocol):
    """Collects the events of a generation into one body."""

    def feed(self, event: Event, base: int = 0) -> None: ...
    def end(self) -> bytes: ...


class OpenAIServicer(openai_pb2_grpc.OpenAIServiceServicer):
    """Answers in the OpenAI schema for whatever generates behind `port`.

    Nothing is sent before the first event, or ping: until then a failure is a status, and a bridge may retry elsewhere.

    Args:
        strict_fields: members of requests that nobody knows are refused; else they are ignored and named to the caller.
        ping_s: seconds of silence after which a stream says that it lives; 0: never.
    """

    def __init__(self, port: GenerationPort, *, strict_fields: bool = False, ping_s: float = 0.0) -> None:
        self._port = port
        self._strict = strict_fields
        self._ping_s = ping_s
        self._ignored = Ignored()
        self._beside = Beside()
        self._catalog: Sequence[ModelInfo] = ()
        self._catalog_until = 0.0
        self._started = int(time.time())

    async def ChatCompletions(self, request: HttpBody, context: Context) -> AsyncGenerator[HttpBody, None]:
        call = await self._parse(parse_chat, request, context)
        reply_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if call.reply.stream:
            chunks = self._stream(call, ChatStream(call, reply_id, created))
        else:
            chunks = self._body(call, ChatBody(call, reply_id, created))
        async with aclosing(self._named(chunks, call, context)) as named:
            async for chunk in named:
                yield chunk

    async def Completions(self, request: HttpBody, context: Context) -> AsyncGenerator[HttpBody, None]:
        call = await self._parse(parse_completion, request, context)
        reply_id, created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        if call.reply.stream:
            chunks = self._stream(call, CompletionStream(call, reply_id, created))
        else:
            chunks = self._body(call, CompletionBody(call, reply_id, created))
        async with aclosing(self._named(chunks, call, context)) as named:
            async for chunk in named:
                yield chunk

    async def Embeddings(self, request: HttpBody, context: Context) -> HttpBody:
        with renamed_errors(EMBED_RENAMES):
            values, size = await self._read(request), len(request.data)
            models = self._port.models()
            call = await self._beside.run(size, parse_embeddings, values, models, strict=self._strict)
            result = await self._port.embed(call.request)
            # A number takes about ten bytes.
            size = 10 * sum(len(vector) for vector in result.embeddings)
            reply = _json(await self._beside.run(size, render_embeddings, call, result))
        await context.send_initial_metadata(self._ignored.header(call.ignored))
        return reply

    async def Tokenize(self, request: HttpBody, context: Context) -> HttpBody:
        with renamed_errors(TOKENIZE_RENAMES):
            values, size = await self._read(request), len(request.data)
            name, prompt, ignored = await self._beside.run(size, parse_tokenize, values, strict=self._strict)
            token_ids = await self._port.tokenize(name, prompt)
        model = find_model(self._port.models(), name)
        reply = _json(await self._beside.run(6 * len(token_ids), render_tokenize, token_ids, model))
        await context.send_initial_metadata(self._ignored.header(ignored))
        return reply

    async def Detokenize(self, request: HttpBody, context: Context) -> HttpBody:
        values, size = await self._read(request), len(request.data)
        name, token_ids, ignored = await self._beside.run(size, parse_detokenize, values, strict=self._strict)
        with renamed_errors({"token_ids": "tokens"}):
            reply = _json(render_detokenize(await self._port.detokenize(name, token_ids)))
        await context.send_initial_metadata(self._ignored.header(ignored))
        return reply

    async def TokenCheck(self, request: HttpBody, context: Context) -> HttpBody:
        values, size = await self._read(request), len(request.data)
        checks = await self._beside.run(size, parse_token_check, values, self._port.models())
        counts = [len(await self._port.tokenize(check.model.name, check.prompt)) for check in checks]
        return _json(render_token_check(checks, counts))

    async def ListModels(self, request: pb.ListOpenAIModelsRequest, context: Context) -> HttpBody:
        models = sorted(self._port.models(), key=lambda model: model.name)
        return _json(dumps({"object": "list", "data": [self._model(model) for model in models]}))

    async def GetModel(self, request: pb.GetOpenAIModelRequest, context: Context) -> HttpBody:
        model = next((model for model in self._port.models() if model.name == request.model), None)
        if model is None:
            raise ModelNotFound("no such model is served; see /v1/models")
        return _json(dumps(self._model(model)))

    def _model(self, model: ModelInfo) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": _OWNER,
            "root": model.base_model or model.name,
            "parent": model.base_model or None,
            "max_model_len": model.context_length,
            "capabilities": sorted(capability.value for capability in model.capabilities),
        }

    async def _read(self, request: HttpBody) -> dict[str, Any]:
        return await self._beside.run(len(request.data), parse_object, request.data)

    async def _parse(self, parse: Callable[..., Call], request: HttpBody, context: Context) -> Call:
        values = await self._read(request)
        # A controller sums its models over its fleet, which is not for every request.
        name, now = values.get("model"), time.monotonic()
        if now >= self._catalog_until or not any(model.name == name for model in self._catalog):
            self._catalog, self._catalog_until = self._port.models(), now + CATALOG_S
        name = request_id("", context.invocation_metadata())
        return await self._beside.run(len(request.data), parse, values, self._catalog, name, strict=self._strict)

    async def _named(
        self, chunks: AsyncGenerator[HttpBody, None], call: Call, context: Context
    ) -> AsyncGenerator[HttpBody, None]:
        """The same, with metadata, which bridges make headers: the request's name, and what is ignored of it.

        A refusal comes before it: what has begun is not tried elsewhere.
        """
        begun = False
        async with aclosing(chunks):
            async for chunk in chunks:
                if not begun:
                    begun = True
                    name = told(request_id=call.generations[0].request_id)
                    await context.send_initial_metadata(name + self._ignored.header(call.ignored))
                yield chunk

    async def _stream(self, call: Call, reply: StreamReply) -> AsyncGenerator[HttpBody, None]:
        """One body per event of the generation that says something new; a failure midway ends the stream in band."""
        begun, said = False, 0.0
        try:
            async with (
                aclosing(self._events(call)) as events,
                aclosing(pings.with_pings(events, self._ping_s)) as items,
            ):
                async for item in items:
                    chunk = sse.PING
                    if item is not None:
                        base, event = item
                        chunk = await self._beside.write(_weight(event, call), reply.feed, event, base)
                    now = time.monotonic()
                    if not chunk and begun and 0 < self._ping_s < now - said:
                        chunk = sse.PING  # text is held back, such as a long argument of a call
                    if chunk:
                        yield HttpBody(data=chunk) if begun else HttpBody(content_type=sse.CONTENT_TYPE, data=chunk)
                        begun, said = True, now
            yield HttpBody(data=reply.end())
        except Exception as failure:
            if not begun or isinstance(failure, grpc.aio.AbortError):
                raise
            error = to_domain_error(failure, "OpenAIService")
            yield HttpBody(data=sse.failure(error))
            # For gRPC callers and metrics; over HTTP the status is already sent, and the event above tells.
            raise error from None

    async def _body(self, call: Call, reply: BodyReply) -> AsyncGenerator[HttpBody, None]:
        size = 0
        async with aclosing(self._events(call)) as events:
            async for base, event in events:
                reply.feed(event, base)
                size += _weight(event, call)
        yield _json(await self._beside.write(size, reply.end))

    async def _events(self, call: Call) -> AsyncGenerator[tuple[int, Event], None]:
        """Events of all prompts, each with the index of the first choice of its prompt."""
        generations = [self._generate(call, i, generation) for i, generation in enumerate(call.generations)]
        async with aclosing(merge(generations)) as merged:
            async for position, event in merged:
                yield position * call.choices_per_prompt, event

    async def _generate(self, call: Call, position: int, generation: GenerateRequest) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(self._port.generate(generation)) as events:
                async for event in events:
                    yield event
        except InvalidArgument as error:
            renames = call.reply.renames
            if len(call.generations) > 1:
                own = {path: f"prompt[{position}]" for path, shown in renames.items() if shown == "prompt"}
                renames = {**renames, **own, "prompt": f"prompt[{position}]"}
            raise rename(error, renames) from None


def _weight(event: Event, call: Call) -> int:
    """Bytes that an event adds to an answer, roughly."""
    if isinstance(event, Completion):
        return 0
    tokens = len(event.logprobs) * (1 + len(event.logprobs[-1].top)) if event.logprobs else 0
    size = len(event.text) + len(getattr(event, "reasoning", "")) + 100 * tokens
    return size * call.choices_per_prompt if isinstance(event, PromptEcho) else size


def _json(body: bytes) -> HttpBody:
    return HttpBody(content_type=sse.JSON_TYPE, data=body)
