"""The OpenAI API as a gRPC service: JSON in, JSON or server-sent events out."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.core import ModelInfo
from fastchat_grpc.errors import ModelNotFound
from fastchat_grpc.openai import sse
from fastchat_grpc.openai.answer import Answer, Reply
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
from fastchat_grpc.openai.paths import renamed_errors
from fastchat_grpc.openai.port import GenerationPort
from fastchat_grpc.openai.settings import find_model
from fastchat_grpc.openai.state import ReplyPieces, read_state, seeded_apart
from fastchat_grpc.openai.tokens import (
    TOKENIZE_RENAMES,
    parse_detokenize,
    parse_token_check,
    parse_tokenize,
    render_detokenize,
    render_token_check,
    render_tokenize,
)
from fastchat_grpc.rpc.pieces import Room, asked_for, beginning, can_go_on
from fastchat_grpc.rpc.request_ids import request_id, told
from fastchat_grpc.v1 import openai_pb2 as pb
from fastchat_grpc.v1 import openai_pb2_grpc

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["OpenAIService"].full_name
CATALOG_S = 0.5
"""Facts about models, such as context lengths, may be this old."""
_OWNER = "fastchat_grpc"

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of the two kinds of completions."""

    parse: Callable[..., Call]
    stream: Callable[[Call, str, int], Reply]
    whole: Callable[[Call, str, int], Reply]
    prefix: str

    def id(self) -> str:
        """The id of a new reply."""
        return self.prefix + uuid.uuid4().hex


_CHAT = _Kind(parse_chat, ChatStream, ChatBody, "chatcmpl-")
_TEXT = _Kind(parse_completion, CompletionStream, CompletionBody, "cmpl-")


class OpenAIServicer(openai_pb2_grpc.OpenAIServiceServicer):
    """Answers in the OpenAI schema for whatever generates behind `port`.

    Nothing is sent before the first event, or ping: until then a failure is a status, and a bridge may retry elsewhere.

    Args:
        strict_fields: members of requests that nobody knows are refused; else they are ignored and named to the caller.
        ping_s: seconds of silence after which a stream says that it lives; 0: never.
        worker_id: who answers, where that is a worker: one hands out the state of its answers to bridges that ask.
    """

    def __init__(
        self,
        port: GenerationPort,
        *,
        strict_fields: bool = False,
        ping_s: float = 0.0,
        worker_id: Callable[[], str] | None = None,
    ) -> None:
        self._port = port
        self._strict = strict_fields
        self._ping_s = ping_s
        self._worker_id = worker_id
        self._rng = random.Random()
        self._ignored = Ignored()
        self._beside = Beside()
        self._catalog: Sequence[ModelInfo] = ()
        self._catalog_until = 0.0
        self._started = int(time.time())

    async def ChatCompletions(self, request: HttpBody, context: Context) -> AsyncGenerator[HttpBody, None]:
        async with aclosing(self._answer(_CHAT, request, context)) as bodies:
            async for body in bodies:
                yield body

    async def Completions(self, request: HttpBody, context: Context) -> AsyncGenerator[HttpBody, None]:
        async with aclosing(self._answer(_TEXT, request, context)) as bodies:
            async for body in bodies:
                yield body

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

    async def _answer(self, kind: _Kind, request: HttpBody, context: Context) -> AsyncGenerator[HttpBody, None]:
        """The bodies of an answer, with metadata, which bridges make headers.

        These name the request, and what is ignored of it. A refusal comes before them: what has begun is not tried
        elsewhere.
        """
        call = await self._parse(kind.parse, request, context)
        size = request.ByteSize()
        begun = await self._beside.write(size, read_state, request.extensions, call) if request.extensions else None
        if begun is not None and begun.complete:
            return
        start = begun.start if begun is not None else pb.ReplyStart(id=kind.id(), created=int(time.time()))
        header = told(request_id=call.generations[0].request_id) + self._ignored.header(call.ignored)
        pieces = None
        if self._worker_id is not None and asked_for(context.invocation_metadata()):
            model = find_model(self._catalog, call.generations[0].model)
            pieces = self._pieces(call, model, start, size, begun=begun is not None)
            header += told(served_by=self._worker_id(), knows_state="1")
            if model is not None:
                header += told(fingerprint=model.fingerprint, backend=model.backend)
        call = replace(call, generations=seeded_apart(call.generations, start.resume))
        answer = Answer(self._port, self._beside, call, pieces=pieces, begun=begun, ping_s=self._ping_s)
        reply = (kind.stream if call.reply.stream else kind.whole)(call, start.id, start.created)
        if begun is not None:
            await self._beside.write(size, begun.replay, reply)
        told_header = False
        async with aclosing(answer.bodies(reply)) as bodies:
            async for body in bodies:
                if not told_header:
                    told_header = True
                    await context.send_initial_metadata(header)
                yield body

    def _pieces(
        self, call: Call, model: ModelInfo | None, start: pb.ReplyStart, size: int, *, begun: bool
    ) -> ReplyPieces:
        """What makes pieces of an answer's state. Unless it has begun elsewhere, notes in `start` how it begins."""
        request = call.generations[0]
        able = model is not None and can_go_on(request, model.capabilities)
        if model is not None and able and not begun:
            start.resume.CopyFrom(beginning(request, model, self._rng))
        return ReplyPieces(start, call, Room(size, able=able))


def _json(body: bytes) -> HttpBody:
    return HttpBody(content_type=sse.JSON_TYPE, data=body)
