"""The engine on tiny random models: what it says is what transformers' generate says, whatever else runs."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from fastchat_grpc.core import (
    FinishReason,
    GenerateRequest,
    OutputOptions,
    ResumedChoice,
    SamplingParams,
    StopConditions,
    TokenPrompt,
)
from fastchat_grpc.engine import engine
from fastchat_grpc.engine.model_runner import StepLogits
from fastchat_grpc.engine.output_rules import OutputRules
from fastchat_grpc.errors import BackendFailed, OutOfMemory, WorkerUnavailable
from tests.unit.engine.tiny import CONFIGS, Harness, greedy_by_generate, tiny, tiny_t5

PACKED = {"llama", "qwen3", "mistral_window", "gpt2", "opt"}
GREEDY = SamplingParams(temperature=0)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(1000 * length + seed)
    return [rng.randrange(1, 256) for _ in range(length)]


def ask(tokens, count=12, *, sampling=GREEDY, **more) -> GenerateRequest:
    stopping = StopConditions(max_new_tokens=count, ignore_eos=True)
    return GenerateRequest(prompt=TokenPrompt(tuple(tokens)), sampling=sampling, stopping=stopping, **more)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_output_equals_transformers_generate_on_every_kind_of_model(name):
    model = tiny(name)
    prompts = [prompt(n) for n in (1, 5, 17, 40, 70)]
    expected = [greedy_by_generate(model, p, 12) for p in prompts]
    with Harness(model, packed=name in PACKED) as harness:
        sinks = harness.run(*(ask(p) for p in prompts))
    assert [sink.tokens() for sink in sinks] == expected


def test_models_that_cannot_be_packed_fall_back_by_themselves():
    for name in set(CONFIGS) - PACKED:
        model = tiny(name)
        implementation = model.config._attn_implementation
        harness = Harness(model)
        assert type(harness.runner).__name__ == "SequentialRunner", name
        assert model.config._attn_implementation == implementation


def test_an_encoder_decoder_answers_as_generate_does():
    model = tiny_t5()
    prompts = [prompt(n) for n in (3, 30)]
    with Harness(model, packed=False) as harness:
        sinks = harness.run(*(ask(p) for p in prompts))
    assert [sink.tokens() for sink in sinks] == [greedy_by_generate(model, p, 12) for p in prompts]


def test_prompts_are_computed_in_pieces_beside_running_streams(llama):
    prompts = [prompt(n) for n in (200, 3, 150, 64)]
    with Harness(llama, prefill_tokens=16) as harness:
        sinks = harness.run(*(ask(p) for p in prompts))
    assert [s.tokens() for s in sinks] == [greedy_by_generate(llama, p, 12) for p in prompts]


def test_sampled_text_is_the_same_alone_and_among_31_others(llama):
    def request(seed):
        sampling = SamplingParams(
            temperature=0.9,
            seed=seed,
            top_p=(1.0, 0.9)[seed % 2],
            top_k=(-1, 40, -1)[seed % 3],
            repetition_penalty=(1.0, 1.2)[seed % 2],
        )
        return ask(prompt(5 + seed), 20, sampling=sampling)

    with Harness(llama) as harness:
        alone = [harness.run(request(seed))[0].tokens() for seed in range(0, 32, 5)]
        together = harness.run(*(request(seed) for seed in range(32)))
    assert alone == [together[seed].tokens() for seed in range(0, 32, 5)]


def test_preempted_requests_say_what_they_would_have_said(llama):
    requests = [ask(prompt(20, seed), 60, sampling=SamplingParams(seed=seed)) for seed in range(8)]
    with Harness(llama) as roomy:
        expected = [sink.tokens() for sink in roomy.run(*requests)]
    with Harness(llama, blocks=14, prefix_cache=False) as tight:
        sinks = tight.run(*requests)
        assert tight.scheduler.preemptions > 0
        assert tight.pool.available == 14
    assert [sink.tokens() for sink in sinks] == expected


def test_a_known_prefix_is_not_computed_again_and_changes_nothing(llama):
    system = prompt(64)
    first, second = [*system, *prompt(10, 1)], [*system, *prompt(10, 2)]
    with Harness(llama) as harness:
        harness.run(ask(first))
        sink = harness.run(ask(second))[0]
    assert sink.completions()[0].usage.cached_tokens == 64
    assert sink.tokens() == greedy_by_generate(llama, second, 12)


def test_the_next_turn_of_a_chat_reuses_the_last_answer(llama):
    with Harness(llama) as harness:
        answer = harness.run(ask(prompt(30), 34))[0].tokens()
        follow_up = [*prompt(30), *answer, *prompt(5, 9)]
        sink = harness.run(ask(follow_up))[0]
    # 63 of 64 tokens were computed: nobody needed what follows the last one.
    assert sink.completions()[0].usage.cached_tokens == 48
    assert sink.tokens() == greedy_by_generate(llama, follow_up, 12)


@pytest.mark.parametrize("name", ["llama", "mamba"])
@pytest.mark.parametrize("length", [20, 32])
def test_choices_share_one_prefill_and_differ_by_their_seeds(name, length):
    sampling = SamplingParams(seed=5, temperature=1.0)
    model = tiny(name)
    with Harness(model) as harness:
        sink = harness.run(ask(prompt(length), sampling=sampling, output=OutputOptions(n=4)))[0]
        assert harness.engine.processed_tokens == length + 4 * 11
        again = harness.run(ask(prompt(length), sampling=sampling, output=OutputOptions(n=2)))[0]
    texts = [tuple(sink.tokens(i)) for i in range(4)]
    assert len(set(texts)) == 4
    assert [tuple(again.tokens(i)) for i in range(2)] == texts[:2]
    assert set(sink.completions()) == {0, 1, 2, 3}


def test_more_choices_than_slots_run_one_after_the_other(llama):
    with Harness(llama, max_running=2) as harness:
        sink = harness.run(ask(prompt(20), output=OutputOptions(n=5)))[0]
        assert harness.pool.available == harness.pool.block_count
    expected = greedy_by_generate(llama, prompt(20), 12)
    assert [sink.tokens(i) for i in range(5)] == [expected] * 5


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_resumed_generation_continues_as_if_never_interrupted(name):
    sampling = SamplingParams(seed=11, temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.1)
    options = OutputOptions(n=3, logprobs=0)
    with Harness(tiny(name)) as first:
        whole = first.run(ask(prompt(20), 16, sampling=sampling, output=options))[0]
    known = [whole.tokens(0)[:7], whole.tokens(1)]
    resume = (
        ResumedChoice(index=0, output_token_ids=tuple(known[0]), text_length=2),
        ResumedChoice(index=1, output_token_ids=tuple(known[1]), finished=True),
    )
    with Harness(tiny(name)) as second:
        rest = second.run(ask(prompt(20), 16, sampling=sampling, output=options, resume=resume))[0]
    assert rest.tokens(0) == whole.tokens(0)[7:]
    assert rest.text(0) == whole.text(0)[2:]
    assert rest.tokens(1) == []
    assert rest.tokens(2) == whole.tokens(2)
    assert set(rest.completions()) == {0, 2}
    assert rest.completions()[0].usage == whole.completions()[0].usage


def test_a_resumed_choice_that_was_complete_ends_at_once(llama):
    tokens = tuple(prompt(12, 3))
    resume = (ResumedChoice(index=0, output_token_ids=tokens, text_length=0),)
    with Harness(llama) as harness:
        sink = harness.run(ask(prompt(20), 12, resume=resume))[0]
        assert harness.engine.processed_tokens == 0
    assert sink.completions()[0].finish_reason is FinishReason.LENGTH


def test_logprobs_come_from_the_raw_logits(llama):
    sampling = SamplingParams(temperature=0.3, repetition_penalty=1.5, top_k=5, logit_bias={3: 2.0}, seed=1)
    options = OutputOptions(logprobs=3, prompt_logprobs=2, echo=True)
    tokens = prompt(50)
    with Harness(llama, prefill_tokens=16) as harness:
        sink = harness.run(ask(tokens, sampling=sampling, output=options))[0]
    output = sink.tokens()
    expected = llama(torch.tensor([tokens + output])).logits[0].log_softmax(-1)
    entries = [entry for e in sink.events if hasattr(e, "index") and hasattr(e, "logprobs") for entry in e.logprobs]
    shown = sink.prompt().logprobs
    assert shown[0].logprob is None
    for position, entry in enumerate([*shown[1:], *entries], start=1):
        row = expected[position - 1]
        assert entry.token_id == (tokens + output)[position]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        count = 2 if position < len(tokens) else 3
        assert [t.token_id for t in entry.top] == row.topk(count).indices.tolist()
    assert len(shown) == len(tokens)
    assert len(entries) == len(output)


def test_cancelling_frees_the_request_at_the_next_step(llama):
    with Harness(llama) as harness:
        sink = harness.submit(ask(prompt(20), 400))
        other = harness.submit(ask(prompt(10), 60))
        sink.wait_for_tokens(3)
        harness.abort(sink)
        other.wait()
        until(lambda: not harness.engine._requests)
        assert harness.pool.available == harness.pool.block_count
        assert not harness.scheduler.running
    assert not sink.done.is_set()
    assert len(sink.tokens()) < 400


def until(condition, timeout=30):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_cancelling_while_waiting_and_twice_is_harmless(llama):
    with Harness(llama, max_running=1) as harness:
        running = harness.submit(ask(prompt(20), 60))
        waiting = harness.submit(ask(prompt(21), 60, output=OutputOptions(n=3)))
        harness.abort(waiting)
        harness.abort(waiting)
        running.wait()
        until(lambda: not harness.engine._requests)
        assert not waiting.events
        assert harness.pool.available == harness.pool.block_count


def test_priority_decides_who_leaves_the_queue_first(llama):
    with Harness(llama, max_running=1) as harness:
        harness.submit(ask(prompt(20), 30))
        late = harness.submit(ask(prompt(21), 4, priority=5))
        early = harness.submit(ask(prompt(22), 4, priority=-1))
        late.wait()
        assert early.done.is_set()


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(llama, monkeypatch):
    with Harness(llama) as harness:
        run = harness.runner.run
        monkeypatch.setattr(harness.runner, "run", lambda batch: (_ for _ in ()).throw(ValueError("broken")))
        sink = harness.run(ask(prompt(20)))[0]
        assert isinstance(sink.error, BackendFailed)
        monkeypatch.setattr(harness.runner, "run", run)
        assert harness.run(ask(prompt(20)))[0].error is None
        assert harness.pool.available == harness.pool.block_count


def test_a_request_that_breaks_alone_fails_alone(llama, monkeypatch):
    with Harness(llama) as harness:
        token_bytes = harness.tokenizer.token_bytes
        broken, fine = ask(prompt(20), request_id="broken"), ask(prompt(21), request_id="fine")
        advance = harness.engine._advance

        def fragile(sequence, *rest):
            if sequence.request.spec.request_id == "broken" and sequence.output_length == 3:
                raise KeyError("no such token")
            return advance(sequence, *rest)

        monkeypatch.setattr(harness.engine, "_advance", fragile)
        first, second = harness.run(broken, fine)
        assert token_bytes is not None
    assert isinstance(first.error, BackendFailed)
    assert second.error is None
    assert len(second.tokens()) == 12


def test_a_last_token_whose_output_cannot_be_made_fails_its_request(llama, monkeypatch):
    """It had been retired by then, so that nobody was told, and its caller waited for ever."""
    entries = engine._prompt_logprobs

    def fragile(request):
        if len(request.prompt) == 21:
            raise ValueError("this one")
        return entries(request)

    monkeypatch.setattr(engine, "_prompt_logprobs", fragile)
    with Harness(llama) as harness:
        broken, fine = harness.run(ask(prompt(21), 1), ask(prompt(20)))
        assert not harness.engine.busy
    assert isinstance(broken.error, BackendFailed)
    assert len(fine.tokens()) == 12


def test_out_of_memory_makes_steps_smaller_and_changes_no_text(llama, monkeypatch):
    requests = [ask(prompt(40, seed), 30, output=OutputOptions(n=1 + seed % 2)) for seed in range(6)]
    expected = [greedy_by_generate(llama, prompt(40, seed), 30) for seed in range(6)]
    with Harness(llama) as harness:
        run = harness.runner.run

        def limited(batch):
            if sum(chunk.count for chunk in batch.chunks) > 17:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(batch)

        monkeypatch.setattr(harness.runner, "run", limited)
        sinks = harness.run(*requests)
        assert harness.pool.available == harness.pool.block_count
    assert [sink.error for sink in sinks] == [None] * 6
    assert [sink.tokens() for sink in sinks] == expected


def test_out_of_memory_that_no_small_step_avoids_fails_the_largest_alone(llama, monkeypatch):
    with Harness(llama) as harness:
        run = harness.runner.run

        def limited(batch):
            if any(len(chunk.sequence.tokens) > 90 for chunk in batch.chunks):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
            return run(batch)

        monkeypatch.setattr(harness.runner, "run", limited)
        large, small = harness.run(ask(prompt(100)), ask(prompt(20)))
    assert isinstance(large.error, OutOfMemory)
    assert small.error is None
    assert small.tokens() == greedy_by_generate(llama, prompt(20), 12)


def test_closing_fails_what_runs_and_frees_everything(llama):
    with Harness(llama) as harness:
        sink = harness.submit(ask(prompt(20), 400))
        sink.wait_for_tokens(1)
        harness.close()
        assert isinstance(sink.wait().error, WorkerUnavailable)
        assert harness.pool.available == harness.pool.block_count
        harness.close()


def test_who_comes_while_the_engine_closes_is_answered_too(llama):
    """A request that came in the last step was taken by nobody, and waited for ever."""
    closing, entered = threading.Event(), threading.Event()
    with Harness(llama) as harness:
        run = harness.runner.run

        def slow(batch):
            entered.set()
            closing.wait(60)
            return run(batch)

        harness.runner.run = slow
        first = harness.submit(ask(prompt(20), 400))
        assert entered.wait(60)
        late, future = harness.submit(ask(prompt(10))), harness.run_job(iter(()))
        closer = threading.Thread(target=harness.close)
        closer.start()
        until(lambda: harness.thread._closed)
        closing.set()
        closer.join(60)
        assert isinstance(late.wait().error, WorkerUnavailable)
        assert isinstance(first.wait().error, WorkerUnavailable)
        assert isinstance(future.exception(60), WorkerUnavailable)
        assert isinstance(harness.submit(ask(prompt(10))).wait().error, WorkerUnavailable)
        assert isinstance(harness.run_job(iter(())).exception(60), WorkerUnavailable)


def test_nothing_is_left_after_many_requests_come_and_go(llama):
    rng = random.Random(3)
    with Harness(llama, blocks=40, max_running=6) as harness:
        sinks = []
        for i in range(120):
            request = ask(prompt(rng.randrange(1, 90), i % 7), rng.randrange(1, 40), output=OutputOptions(n=1 + i % 3))
            sinks.append(harness.submit(request))
            if rng.random() < 0.3:
                harness.abort(rng.choice(sinks))
        until(lambda: all(sink.reading.done() for sink in sinks), 120)
        until(lambda: not (harness.engine._requests or harness.thread._sequences), 120)
        assert harness.pool.available == harness.pool.block_count
        assert not harness.scheduler.waiting
        assert not harness.scheduler.running
        assert not harness.engine._sequences


def test_prefixes_of_one_adapter_do_not_serve_another(llama):
    active = []
    with Harness(llama, activate=active.append) as harness:
        harness.run(ask(prompt(64)))
        sinks = harness.run(ask(prompt(64), lora_adapter="a"), ask(prompt(64), lora_adapter="b"), ask(prompt(64)))
    assert [sink.completions()[0].usage.cached_tokens for sink in sinks] == [0, 0, 48]
    assert set(active) == {"", "a", "b"}


@pytest.mark.parametrize("name", ["t5", "mamba", "gemma2"])
@pytest.mark.parametrize("failing", [3, 8, 11])
def test_a_step_that_ran_out_of_memory_half_way_is_not_done_twice(name, failing):
    """Models with caches of their own have moved on by the chunks before the one that failed."""
    model = tiny_t5() if name == "t5" else tiny(name)
    prompts = [prompt(10 + n) for n in range(4)]
    expected = [greedy_by_generate(model, p, 12) for p in prompts]
    with Harness(model, packed=False) as harness:
        forward, calls = harness.runner._forward, []

        def limited(*arguments, **options):
            calls.append(1)
            if len(calls) == failing:
                raise MemoryError("simulated")
            return forward(*arguments, **options)

        harness.runner._forward = limited
        sinks = harness.run(*(ask(p) for p in prompts))
        assert harness.scheduler.preemptions > 0
    assert [sink.error for sink in sinks] == [None] * 4
    assert [sink.tokens() for sink in sinks] == expected


def test_a_preempted_sequence_keeps_nothing_in_memory():
    model = tiny("mamba")
    prompts = [prompt(30, seed) for seed in range(6)]
    expected = [greedy_by_generate(model, p, 40) for p in prompts]
    kept = []
    with Harness(model, blocks=14, packed=False) as harness:
        run = harness.runner.run

        def watched(batch):
            kept.extend(s for s in harness.scheduler.waiting if s.runner_state is not None)
            return run(batch)

        harness.runner.run = watched
        sinks = harness.run(*(ask(p, 40) for p in prompts))
        assert harness.scheduler.preemptions > 0
    assert not kept
    assert [sink.tokens() for sink in sinks] == expected


def test_the_last_batch_is_let_go_of_when_nothing_runs(llama):
    with Harness(llama) as harness:
        harness.run(ask(prompt(20)))
        until(lambda: harness.engine._sampler._parameters is None)


def test_events_that_cannot_be_delivered_fail_requests_and_not_the_engine(llama):
    with Harness(llama) as harness:
        pass_on, failing = harness.thread._pass_on, [True]

        def fragile(output):
            if failing and output.token_ids:
                failing.clear()
                raise ValueError("no such sink")
            pass_on(output)

        harness.thread._pass_on = fragile
        assert isinstance(harness.run(ask(prompt(20)))[0].error, BackendFailed)
        assert len(harness.run(ask(prompt(20)))[0].tokens()) == 12


def test_an_engine_thread_that_ends_by_itself_ends_the_process(llama):
    reasons = []
    with Harness(llama) as harness:
        harness.thread._die = reasons.append
        harness.thread._deliver = lambda outputs: (_ for _ in ()).throw(ValueError("gone"))
        sink = harness.submit(ask(prompt(20)))
        until(lambda: reasons)
        assert isinstance(sink.wait().error, WorkerUnavailable)
    assert reasons == ["the thread engine ended"]


def test_a_device_that_computes_nothing_any_more_ends_the_process(llama, monkeypatch):
    """A CUDA error sticks: each further step would fail, and the worker would look idle and well."""
    reasons = []
    with Harness(llama) as harness:
        harness.engine._die = reasons.append

        def illegal(batch):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(harness.runner, "run", illegal)
        sick = harness.run(ask(prompt(20)))[0]
        assert isinstance(sick.error, BackendFailed)
        assert not reasons, "the device still computes: only the step's requests fail"
        monkeypatch.setattr("fastchat_grpc.engine.engine.is_broken", lambda device: True)
        sick = harness.run(ask(prompt(20)))[0]
    assert isinstance(sick.error, WorkerUnavailable)
    assert reasons == ["the device cpu computes nothing any more"]


def test_closing_does_not_wait_for_ever(llama, monkeypatch, caplog):
    monkeypatch.setattr("fastchat_grpc.backends.engine_thread.CLOSE_TIMEOUT_S", 0.05)
    release, entered = threading.Event(), threading.Event()
    with Harness(llama) as harness:

        def stuck(batch):
            entered.set()
            release.wait(60)
            raise ValueError("late")

        monkeypatch.setattr(harness.runner, "run", stuck)
        harness.submit(ask(prompt(20)))
        assert entered.wait(60)
        harness.close()
        assert "left to end by itself" in caplog.text
        release.set()
        harness.thread._thread.join(60)
        assert not harness.thread._thread.is_alive()


def test_prompts_with_log_probabilities_are_computed_in_slices(llama):
    """Each takes a row of logits in float32: 1.2 GB for 2,048 tokens of a vocabulary of 152,000."""
    options = OutputOptions(prompt_logprobs=1)
    prompts = [prompt(100), prompt(90)]
    rows = []
    with Harness(llama, prefill_tokens=64, logprob_tokens=20) as harness:
        run = harness.runner.run

        def watched(batch):
            result = run(batch)
            rows.append(len(result.logits))
            return result

        harness.runner.run = watched
        sinks = harness.run(*(ask(p, output=options) for p in prompts), ask(prompt(60)))
    assert max(rows) <= 20 + 3
    for tokens, sink in zip(prompts, sinks, strict=False):
        expected = llama(torch.tensor([tokens])).logits[0].log_softmax(-1)
        shown = [entry.logprob for entry in sink.prompt().logprobs]
        assert shown[1:] == pytest.approx([float(expected[i, t]) for i, t in enumerate(tokens[1:])], abs=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "bloom", "mamba"])
def test_models_that_run_alone_make_the_logits_of_a_prompt_in_slices_too(name):
    """Those of 8,000 tokens of a vocabulary of 256,000 took 8 GB, three times over."""
    model = tiny(name)
    tokens, seen = prompt(50), []
    expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    with Harness(model, packed=False, logprob_tokens=16) as harness:
        run = harness.runner.run

        def watched(batch):
            result = run(batch)
            rows = [(chunk, list(slices)) for chunk, slices in result.prompts]
            seen.extend(len(logits) for _, slices in rows for logits in slices)
            return StepLogits(result.logits, result.sampled, rows)

        harness.runner.run = watched
        sinks = harness.run(
            ask(tokens, output=OutputOptions(prompt_logprobs=1, n=2)),
            ask(tokens),
            ask(prompt(1), output=OutputOptions(prompt_logprobs=0)),
        )
    assert seen == [16, 16, 16, 2, 1]
    shown = [entry.logprob for entry in sinks[0].prompt().logprobs]
    assert shown[1:] == pytest.approx([float(expected[i, t]) for i, t in enumerate(tokens[1:])], abs=1e-3)
    output = greedy_by_generate(model, tokens, 12)
    assert [sinks[0].tokens(0), sinks[0].tokens(1), sinks[1].tokens()] == [output] * 3
    assert len(sinks[2].prompt().logprobs) == 1


def test_an_encoder_decoders_prompt_takes_no_room_of_its_output():
    """A context of 512: an article of 500 tokens is followed by as many tokens as were asked for."""
    model = tiny_t5()
    with Harness(model, packed=False, encoder_decoder=True) as harness:
        sink = harness.run(ask(prompt(500), 40))[0]
    assert sink.tokens() == greedy_by_generate(model, prompt(500), 40)
    assert sink.completions()[0].usage.completion_tokens == 40


@pytest.mark.parametrize(
    "rules",
    [
        {"forced_bos_token_id": 7},
        {"forced_eos_token_id": 9},
        {"forced_eos_token_id": [9, 11]},
        {"suppress_tokens": list(range(0, 256, 3))},
        {"begin_suppress_tokens": list(range(1, 256, 2))},
        {"begin_suppress_tokens": list(range(0, 256, 2)), "forced_bos_token_id": 7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[i] for i in range(128)]},
        {"bad_words_ids": [[i, j] for i in range(40, 80) for j in range(0, 256, 2)]},
    ],
    ids=lambda rules: "_".join(rules),
)
def test_an_encoder_decoders_own_rules_hold_as_in_generate(rules):
    from transformers import GenerationConfig

    model = tiny_t5()
    config = GenerationConfig(**rules, decoder_start_token_id=0)
    free = greedy_by_generate(model, prompt(30), 20)
    expected = greedy_by_generate(model, prompt(30), 20, generation_config=config)
    with Harness(model, packed=False, encoder_decoder=True, rules=OutputRules.of(config, 0)) as harness:
        assert harness.run(ask(prompt(30), 20))[0].tokens() == expected
    assert expected != free
