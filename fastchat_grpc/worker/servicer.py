"""GenerationService on a worker."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from time import monotonic
from typing import Any

import grpc

from fastchat_grpc import __version__
from fastchat_grpc.core import Completion, Load, Origin
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.events import event_to_pb
from fastchat_grpc.rpc.pieces import GenerationPieces, Room, asked_for, beginning, can_go_on, seeded
from fastchat_grpc.rpc.request_ids import request_id, told
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.v1 import generation_pb2_grpc
from fastchat_grpc.worker.generation import LocalGeneration

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Messages in, messages out; the work is LocalGeneration's. Errors become statuses in the interceptor."""

    def __init__(
        self, generation: LocalGeneration, identity: Callable[[], tuple[str, str]], load: Callable[[], Load]
    ) -> None:
        self._generation = generation
        self._identity = identity
        self._load = load
        self._rng = random.Random()
        self._started = monotonic()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        request.request_id = request_id(request.request_id, context.invocation_metadata())
        domain = convert.generate_request_from_pb(request)
        model = self._generation.model(request.model)
        worker_id, _ = self._identity()
        origin = Origin(
            model=model.name, worker_id=worker_id, request_id=domain.request_id, model_fingerprint=model.fingerprint
        )
        logger.debug("request %r runs", domain.request_id)
        who = {"worker_id": worker_id, "fingerprint": model.fingerprint, "backend": model.backend}
        header = told(request_id=domain.request_id, **who)
        made: GenerationPieces | None = None
        if asked_for(context.invocation_metadata()):
            header += told(served_by=worker_id, knows_state="1")
            able = can_go_on(domain, model.capabilities)
            begins = beginning(domain, model, self._rng) if able else pb.Resume()
            domain, made = seeded(domain, begins), GenerationPieces(begins, Room(request.ByteSize(), able=able))
        begun = False
        async with aclosing(self._generation.generate(domain)) as events:
            async for event in events:
                if not begun:  # no sooner: a refusal must be able to go without, for proxies that retry it
                    begun = True
                    await context.send_initial_metadata(header)
                if isinstance(event, Completion):
                    event = replace(event, origin=origin)
                message = await event_to_pb(event)
                if made is not None and made.resumable:
                    message.resume_piece = made.of(event)
                yield message

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
