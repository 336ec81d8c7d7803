"""Embeddings: what each input gives alone, whatever stands beside it."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import pytest
import torch

from fastchat_grpc.engine.build import BuiltEngine
from fastchat_grpc.engine.embedder import Embedder, batches, pool
from fastchat_grpc.engine.model_runner import make_packed_runner
from fastchat_grpc.engine.step_model import TransformersModel
from fastchat_grpc.errors import WorkerUnavailable
from tests.unit.engine.test_engine import ask, prompt
from tests.unit.engine.tiny import Harness, tiny, tiny_t5

INPUTS = [prompt(n) for n in (3, 40, 1, 17)]


def pieces(embedder, normalize=True):
    """(index, vector) of all inputs, batch by batch."""
    for batch in batches([len(token_ids) for token_ids in INPUTS]):
        yield zip(batch, embedder.embed([INPUTS[i] for i in batch], normalize, ""), strict=True)


def embed(model, pooling="mean", normalize=True, packed=None):
    embedder = Embedder(model, pooling, lambda name: None, packed=packed)
    return torch.tensor([vector for _, vector in sorted(chain.from_iterable(pieces(embedder, normalize)))])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("make", [lambda: tiny("llama"), lambda: tiny("bloom"), tiny_t5], ids=["llama", "bloom", "t5"])
def test_a_batch_gives_what_each_input_gives_alone(make, pooling):
    model = make()
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    for vector, token_ids in zip(embed(model, pooling, normalize=False), INPUTS, strict=True):
        hidden = encoder(input_ids=torch.tensor([token_ids])).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        assert torch.allclose(vector, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_packed_inputs_give_what_padded_ones_give(pooling):
    model = tiny("llama")
    expected = embed(model, pooling, normalize=False)
    with torch.inference_mode():
        runner = make_packed_runner(model, lambda name: None)
    for packed in (runner.model, TransformersModel(model)):
        assert torch.allclose(embed(model, pooling, normalize=False, packed=packed), expected, atol=1e-4, rtol=1e-4)


def test_vectors_have_length_one_unless_asked_otherwise():
    assert torch.allclose(embed(tiny("llama")).norm(dim=-1), torch.ones(4), atol=1e-5)


def test_batches_keep_to_the_budget_and_lose_nothing():
    lengths = [5, 100, 1, 7, 64, 64, 2, 300]
    groups = batches(lengths, 128)
    assert sorted(i for group in groups for i in group) == list(range(8))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= 128


def test_padding_never_counts():
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for pooling in ("mean", "cls", "last"):
        changed = hidden.clone()
        changed[0, 2] = 99.0
        assert torch.equal(pool(hidden, mask, pooling), pool(changed, mask, pooling))


def test_embedding_runs_between_the_steps_of_running_streams():
    model = tiny("llama")
    with Harness(model) as harness:
        expected = harness.run(ask(prompt(20), 60))[0].tokens()
        sink = harness.submit(ask(prompt(20), 60))
        sink.wait_for_tokens(2)
        embedder = Embedder(model, "mean", lambda name: None)
        future = harness.run_job(pieces(embedder))
        assert len(list(chain.from_iterable(future.result(timeout=30)))) == 4
        assert sink.wait().tokens() == expected


def test_a_cancelled_embedding_stops_and_a_failing_one_says_so():
    with Harness(tiny("llama")) as harness:
        started = []

        def pieces():
            for i in range(10**9):
                started.append(i)
                yield

        endless = harness.run_job(pieces())
        while len(started) < 3:
            pass
        endless.cancel()
        broken = harness.run_job(1 / 0 for _ in [0])
        with pytest.raises(Exception, match="ZeroDivisionError"):
            broken.result(timeout=30)
        assert harness.run(ask(prompt(5)))[0].error is None
        assert not harness.thread._calls


def built(harness) -> BuiltEngine:
    model: Any = harness.runner.model
    return BuiltEngine(
        engine=harness.engine,
        loaded=cast(Any, None),
        embedder=Embedder(tiny("llama"), "mean", lambda name: None, packed=model),
        grammars=cast(Any, None),
        context_length=512,
        max_running=1,
        capabilities=frozenset(),
    )


def test_embedded_tokens_are_progress():
    """Else a worker that embeds without a pause calls itself DEGRADED, as one whose engine hangs."""
    harness = Harness(tiny("llama"))
    built(harness).embed(INPUTS, True, "")
    assert harness.engine.processed_tokens == sum(map(len, INPUTS))


def test_a_device_that_an_embedding_breaks_ends_the_process(monkeypatch):
    """A worker that only embeds runs no step that would find out, and would fail each request for ever."""
    reasons: list[str] = []
    harness = Harness(tiny("llama"), die=reasons.append)
    engine = built(harness)

    def illegal(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(harness.runner.model, "hidden_states", illegal)
    with pytest.raises(RuntimeError, match="illegal"):
        engine.embed(INPUTS, True, "")
    assert not reasons, "the device still computes: only this call fails"
    monkeypatch.setattr("fastchat_grpc.engine.engine.is_broken", lambda device: True)
    with pytest.raises(WorkerUnavailable):
        engine.embed(INPUTS, True, "")
    assert reasons == ["the device cpu computes nothing any more"]
