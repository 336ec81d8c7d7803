"""What a model's makers recommend holds where a caller chooses nothing, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from fastchat_grpc.backends.capabilities import Feature, Traits, supported_defaults
from fastchat_grpc.core import (
    SAMPLING_NUMBERS,
    Completion,
    Event,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    OutputOptions,
    SamplingDefaults,
    SamplingParams,
    TextPrompt,
    Usage,
)
from fastchat_grpc.errors import UnsupportedField
from fastchat_grpc.models.generation_config import default_sampling, generation_config
from fastchat_grpc.openai.completion_request import parse_completion
from fastchat_grpc.rpc.convert import generate_request_from_pb, generate_request_to_pb
from fastchat_grpc.v1 import generation_pb2 as pb
from fastchat_grpc.worker.admission import Admission
from fastchat_grpc.worker.generation import LocalGeneration

QWEN = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True, "eos_token_id": 2}


def test_a_number_that_was_asked_for_is_told_from_the_same_number_by_default():
    assert SamplingParams().given == {}
    assert SamplingParams(temperature=1.0, top_k=-1).given == {"temperature": 1.0, "top_k": -1}
    assert SamplingParams() == SamplingParams(temperature=1.0)


def test_defaults_fill_what_is_unset_and_nothing_else():
    defaults = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20)
    filled = SamplingParams(temperature=1.0, seed=3, presence_penalty=0.5).filled(defaults)
    assert filled == SamplingParams(temperature=1.0, top_p=0.8, top_k=20, seed=3, presence_penalty=0.5)
    assert SamplingParams().filled(SamplingDefaults()) == SamplingParams()


def test_what_is_unset_stays_so_in_copies():
    assert replace(SamplingParams(top_p=0.5), seed=1).given == {"top_p": 0.5}


def test_what_is_unset_stays_so_over_the_wire():
    request = GenerateRequest(prompt=TextPrompt("x"), sampling=SamplingParams(top_p=1.0, top_k=5))
    message = generate_request_to_pb(request)
    assert not message.sampling.HasField("temperature")
    back = generate_request_from_pb(pb.GenerateRequest.FromString(message.SerializeToString()))
    assert back.sampling.given == {"top_p": 1.0, "top_k": 5}


def test_a_generation_config_gives_the_fields_that_vllm_takes_from_it(tmp_path):
    assert default_sampling(generation_config(tmp_path)) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN))
    assert default_sampling(generation_config(tmp_path)) == SamplingDefaults(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
    )


@pytest.mark.parametrize("value", [-1, "warm", [], float("nan"), 1e400])
def test_a_senseless_default_is_left_out_and_the_others_hold(value, caplog):
    assert default_sampling({"temperature": value, "top_p": 0.9}) == SamplingDefaults(top_p=0.9)
    assert "temperature is left out" in caplog.text


def test_a_default_that_the_backend_cannot_honour_is_left_out():
    traits = Traits(summary="", refuses={Feature.MIN_P: "no", Feature.TOP_K: "no"})
    defaults = SamplingDefaults(temperature=0.7, top_k=20, min_p=0.1)
    assert supported_defaults(defaults, traits) == SamplingDefaults(temperature=0.7)


class Recorder:
    """A backend that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.asked.append(request)
        yield Completion(index=0, finish_reason=FinishReason.STOP, usage=Usage())


def test_what_is_unset_stays_so_over_http():
    body = {"model": "m", "prompt": "x", "temperature": 1, "top_p": None}
    call = parse_completion(body, [ModelInfo(name="m", context_length=64)])
    assert [generation.sampling.given for generation in call.generations] == [{"temperature": 1.0}]


async def test_a_worker_fills_in_its_models_defaults_for_each_of_its_models():
    backend: Any = Recorder()
    generation = LocalGeneration(backend)
    infos = [
        ModelInfo(name="qwen", context_length=64, default_sampling=SamplingDefaults(temperature=0.7, top_k=20)),
        ModelInfo(name="plain", context_length=64),
    ]
    generation.open(infos, Admission(max_running=1, max_waiting=1))
    for model in ("qwen", "plain"):
        for sampling in (SamplingParams(), SamplingParams(temperature=1.0)):
            request = GenerateRequest(prompt=TextPrompt("x"), model=model, sampling=sampling)
            async for _ in generation.generate(request):
                pass
    assert [(r.sampling.temperature, r.sampling.top_k) for r in backend.asked] == [
        (0.7, 20),
        (1.0, 20),
        (1.0, -1),
        (1.0, -1),
    ]


def test_a_fallback_seed_acts_where_seeds_can_be_continued_and_nobody_chose_one() -> None:
    made_up = SamplingParams(fallback_seed=5)
    assert made_up.seeded(counter_based=True).seed == 5
    assert made_up.seeded(counter_based=False).seed is None
    assert SamplingParams(seed=3, fallback_seed=5).seeded(counter_based=True).seed == 3
    assert SamplingParams(temperature=0.0, fallback_seed=5).seeded(counter_based=True).seed is None
    for able in (True, False):
        assert made_up.seeded(counter_based=able).fallback_seed is None, "no backend sees it"


class Choosy:
    """An engine that takes repetition penalties up to 2, and none together with log probabilities."""

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        sampling = request.sampling
        if sampling.repetition_penalty > 2:
            raise UnsupportedField("sampling.repetition_penalty", "at most 2")
        if sampling.repetition_penalty != 1 and request.output.logprobs is not None:
            raise UnsupportedField("output.logprobs", "not with penalties")
        self.asked.append(sampling)
        yield Completion(index=0, finish_reason=FinishReason.STOP, usage=Usage())


@pytest.mark.parametrize(
    ("default", "logprobs", "left"),
    [
        ({"temperature": 0.7, "repetition_penalty": 1.05}, None, (0.7, 1.05)),
        ({"temperature": 0.7, "repetition_penalty": 1.05}, 0, (1.0, 1.0)),
        ({"temperature": 0.7, "repetition_penalty": 2.5}, None, (0.7, 1.0)),
        ({"temperature": 0.7, "repetition_penalty": 2.5}, 0, (0.7, 1.0)),
    ],
)
async def test_what_nobody_asked_for_makes_no_request_fail(
    default: dict[str, float], logprobs: int | None, left: tuple[float, float]
) -> None:
    backend = Choosy()
    generation = LocalGeneration(backend)  # type: ignore[arg-type]
    model = ModelInfo(name="m", context_length=99, default_sampling=SamplingDefaults(**default))
    generation.open([model], Admission(1, 0))
    asked = GenerateRequest(prompt=TextPrompt("x"), output=OutputOptions(logprobs=logprobs))
    assert [event async for event in generation.generate(asked)]
    assert (backend.asked[0].temperature, backend.asked[0].repetition_penalty) == left
    assert generation.admission.running == 0
    own = GenerateRequest(prompt=TextPrompt("x"), sampling=SamplingParams(repetition_penalty=2.5))
    with pytest.raises(UnsupportedField):
        [event async for event in generation.generate(own)]


def test_plain_numbers_are_what_any_encoder_knows() -> None:
    plain = SamplingParams(temperature=0.5, top_k=3, seed=1).plain()
    assert plain == SamplingParams(temperature=0.5, top_k=3, seed=1)
    assert {type(value) for value in SamplingParams().plain().given.values()} == {float, int}
    assert SamplingParams().plain().given.keys() == set(SAMPLING_NUMBERS)
