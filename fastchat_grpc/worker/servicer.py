"""GenerationService on a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from time import monotonic
from typing import Any

import grpc

from fastchat_grpc import __version__
from fastchat_grpc.core import Load
from fastchat_grpc.rpc import convert
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.v1 import generation_pb2_grpc
from fastchat_grpc.worker.generation import LocalGeneration

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Messages in, messages out; the work is LocalGeneration's. Errors become statuses in the interceptor."""

    def __init__(
        self, generation: LocalGeneration, identity: Callable[[], tuple[str, str]], load: Callable[[], Load]
    ) -> None:
        self._generation = generation
        self._identity = identity
        self._load = load
        self._started = monotonic()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async with aclosing(self._generation.generate(convert.generate_request_from_pb(request))) as events:
            async for event in events:
                yield convert.event_to_pb(event)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        return convert.embed_result_to_pb(await self._generation.embed(convert.embed_request_from_pb(request)))

    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        model = self._generation.model(request.model)
        token_ids = await self._generation.tokenize(model.name, convert.text_or_chat(request))
        return pb.CountTokensResponse(token_count=len(token_ids), context_length=model.context_length)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        model = self._generation.model(request.model)
        token_ids = await self._generation.tokenize(model.name, convert.text_or_chat(request))
        return pb.TokenizeResponse(token_ids=token_ids, context_length=model.context_length)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        token_ids = tuple(request.token_ids)
        return pb.DetokenizeResponse(text=await self._generation.detokenize(request.model, token_ids))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        model = self._generation.model(request.model)
        return pb.GetModelInfoResponse(
            model=convert.model_to_pb(model), chat_template=self._generation.chat_template(model.name)
        )

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        worker_id, instance_id = self._identity()
        return pb.GetStatusResponse(
            worker_id=worker_id,
            instance_id=instance_id,
            version=__version__,
            models=[convert.model_to_pb(model) for model in self._generation.models()],
            load=convert.load_to_pb(self._load()),
            uptime=convert.duration(monotonic() - self._started),
        )
