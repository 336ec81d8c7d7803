"""GenerationService on a controller: every call is relayed to a worker, as bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from time import monotonic
from typing import Any

import grpc

from fastchat_grpc import __version__
from fastchat_grpc.config import MAX_WEIGHT
from fastchat_grpc.controller.callers import CALLER, caller_of
from fastchat_grpc.controller.relay import Relay, naming
from fastchat_grpc.core import (
    Capability,
    EmbedRequest,
    EmbedResult,
    Event,
    GenerateRequest,
    Load,
    ModelInfo,
    Prompt,
    WorkerState,
)
from fastchat_grpc.errors import Draining
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.events import event_from_pb
from fastchat_grpc.rpc.receiving import parse_request
from fastchat_grpc.rpc.request_ids import request_id, told
from fastchat_grpc.rpc.resume import EMBEDS, ResumeState
from fastchat_grpc.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = "fastchat_grpc.v1.GenerationService"
IDLE_LOOK_S = 0.02


class RelayedGeneration:
    """Generation by the fleet, for every service that needs it: the GenerationPort of the OpenAI surface.

    Args:
        identity: worker id and instance id that GetStatus tells.
    """

    def __init__(self, relay: Relay, identity: tuple[str, str] = ("", "")) -> None:
        self._relay = relay
        self._registry = relay.dispatcher.registry
        self.identity = identity
        self.draining = False

    def close(self) -> None:
        """Refuse new requests from now on; those under way go on."""
        self.draining = True

    async def idle(self) -> None:
        """Return when no request is under way."""
        while self._relay.failover.running:  # noqa: ASYNC110  # asked once in a life; an event would cost every request
            await asyncio.sleep(IDLE_LOOK_S)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Events of one generation, as `Backend.generate`."""
        self.check()
        message = convert.generate_request_to_pb(request)
        async with aclosing(self._relay.generate(message, CALLER.get())) as items:
            async for item in items:
                yield await event_from_pb(pb.GenerateResponse.FromString(item))

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Embed each input."""
        self.check()
        message = convert.embed_request_to_pb(request)
        raw = await self._relay.call(f"/{SERVICE}/Embed", message.model, naming(message), CALLER.get(), EMBEDS)
        return convert.embed_result_from_pb(pb.EmbedResponse.FromString(raw))

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt."""
        asked = convert.generate_request_to_pb(GenerateRequest(prompt=prompt))
        self.check()
        message = pb.TokenizeRequest(model=model)
        match asked.WhichOneof("input"):
            case "prompt":
                message.prompt = asked.prompt
            case "chat":
                message.chat.CopyFrom(asked.chat)
            case _:
                return list(asked.prompt_token_ids.ids)
        raw = await self._relay.call(f"/{SERVICE}/Tokenize", model, naming(message), CALLER.get())
        return list(pb.TokenizeResponse.FromString(raw).token_ids)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        self.check()
        message = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        raw = await self._relay.call(f"/{SERVICE}/Detokenize", model, naming(message), CALLER.get())
        return pb.DetokenizeResponse.FromString(raw).text

    def models(self) -> Sequence[ModelInfo]:
        """The models of the live workers."""
        return [model for model, _ in self._registry.catalogue()]

    def load(self) -> Load:
        """Load of all workers together."""
        loads = [worker.load for worker in self._registry.workers()]
        return Load(
            state=WorkerState.DRAINING if self.draining else _sum_state([load.state for load in loads]),
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            max_running=sum(load.max_running for load in loads),
            max_waiting=sum(load.max_waiting for load in loads),
            kv_cache_usage=max((load.kv_cache_usage for load in loads), default=0.0),
            tokens_per_second=sum(load.tokens_per_second for load in loads),
            kv_free_tokens=sum(load.kv_free_tokens for load in loads),
            oldest_waiting_s=max((age for load in loads if (age := load.oldest_waiting_s) is not None), default=None),
        )

    def weight(self) -> float:
        """Weight of all workers together, as far as a weight goes."""
        return min(MAX_WEIGHT, sum(worker.weight for worker in self._registry.workers()))

    def check(self) -> None:
        """Raise Draining after `close`."""
        if self.draining:
            raise Draining("this controller is shutting down and takes no new requests")


def _sum_state(states: Sequence[WorkerState]) -> WorkerState:
    for state in (WorkerState.SERVING, WorkerState.DEGRADED, WorkerState.DRAINING):
        if state in states:
            return state
    return WorkerState.STARTING


class GenerationServicer:
    """The methods of GenerationService. All but GetStatus take and give serialized messages."""

    def __init__(self, relay: Relay, generation: RelayedGeneration) -> None:
        self._relay = relay
        self._generation = generation
        self._started = monotonic()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve the methods on a server."""
        unary = grpc.unary_unary_rpc_method_handler
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(self.Generate, pb.GenerateRequest.FromString),
            "Embed": unary(self._relayed("Embed", pb.EmbedRequest, EMBEDS)),
            "CountTokens": unary(self._relayed("CountTokens", pb.CountTokensRequest)),
            "Tokenize": unary(self._relayed("Tokenize", pb.TokenizeRequest)),
            "Detokenize": unary(self._relayed("Detokenize", pb.DetokenizeRequest)),
            "GetModelInfo": unary(self._relayed("GetModelInfo", pb.GetModelInfoRequest)),
            "GetStatus": unary(self.GetStatus, pb.GetStatusRequest.FromString, pb.GetStatusResponse.SerializeToString),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(SERVICE, handlers)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[bytes]:
        self._generation.check()
        if request.HasField("resume"):
            # What a worker refuses of such a request is taken for that worker's inability, and another is waited for.
            convert.generate_request_from_pb(request)
        request.request_id = name = request_id(request.request_id, context.invocation_metadata())
        logger.debug("request %r is relayed", name)
        begun = False
        states: list[ResumeState[bytes]] = []
        async with aclosing(self._relay.generate(request, caller_of(context), states.append)) as events:
            async for event in events:
                if not begun:  # no sooner: a refusal must be able to go without, for proxies that retry it
                    begun = True
                    origin = {"fingerprint": states[-1].fingerprint, "backend": states[-1].backend}
                    await context.send_initial_metadata(told(request_id=name, **origin))
                yield event

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        worker_id, instance_id = self._generation.identity
        return pb.GetStatusResponse(
            worker_id=worker_id,
            instance_id=instance_id,
            version=__version__,
            models=[convert.model_to_pb(model) for model in self._generation.models()],
            load=convert.load_to_pb(self._generation.load()),
            uptime=convert.duration(monotonic() - self._started),
        )

    def _relayed(self, name: str, kind: Any, prefers: frozenset[Capability] = frozenset()) -> Any:
        async def relayed(raw: bytes, context: Context) -> bytes:
            self._generation.check()
            request = parse_request(kind.FromString, raw)
            method = f"/{SERVICE}/{name}"
            return await self._relay.call(method, request.model, naming(request), caller_of(context), prefers)

        return relayed
