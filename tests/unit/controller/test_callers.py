"""The OpenAI surface of a controller tells a model that is away from one that never was."""

from __future__ import annotations

from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.controller.callers import HOPS, MAX_HOPS, OnBehalf, forwarded
from fastchat_grpc.controller.dispatch import Dispatcher
from fastchat_grpc.controller.generation import RelayedGeneration
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.errors import FastChatError, ModelNotFound, NoLiveWorker, RelayLoop, Starting
from fastchat_grpc.openai.servicer import OpenAIServicer
from fastchat_grpc.rpc.pool import ChannelPool
from fastchat_grpc.v1 import openai_pb2 as pb
from tests.unit.controller.fleet import Fleet


class Context:
    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()


def asks(model: str) -> list[tuple[str, Any]]:
    check = f'{{"prompts": [{{"model": "{model}", "prompt": "x", "max_tokens": 1}}]}}'
    return [("GetModel", pb.GetOpenAIModelRequest(model=model)), ("TokenCheck", HttpBody(data=check.encode()))]


async def errors(fleet: Fleet, model: str) -> list[type[FastChatError]]:
    relay = Relay(Dispatcher(fleet.registry), ChannelPool(), FailoverConfig())
    servicer = OnBehalf(OpenAIServicer(RelayedGeneration(relay)), fleet.registry, 0.0)
    found = []
    for method, request in asks(model):
        with pytest.raises(FastChatError) as caught:
            await getattr(servicer, method)(request, Context())
        found.append(caught.type)
    return found


async def test_a_model_whose_workers_are_away_is_unavailable() -> None:
    fleet = Fleet()
    fleet.registry.deregister(fleet.join().lease_id)
    assert await errors(fleet, "m") == [NoLiveWorker, NoLiveWorker]


async def test_a_model_that_never_was_is_not_found() -> None:
    fleet = Fleet()
    fleet.join()
    assert await errors(fleet, "other") == [ModelNotFound, ModelNotFound]


async def test_a_young_controller_says_that_it_starts() -> None:
    assert await errors(Fleet(young=True), "m") == [Starting, Starting]


@pytest.mark.parametrize("hops", [str(MAX_HOPS), "1000", "9" * 5000])
def test_a_request_that_has_passed_too_many_controllers_is_a_circle(hops: str) -> None:
    with pytest.raises(RelayLoop):
        forwarded([(HOPS, hops)])


@pytest.mark.parametrize("hops", ["", "-1", "many"])
def test_what_counts_no_controllers_counts_none(hops: str) -> None:
    assert forwarded([(HOPS, hops)]) == [(HOPS, "1")]
