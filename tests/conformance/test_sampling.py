"""Every sampling field is honoured, or refused by its name."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest

from fastchat_grpc.backends.capabilities import GRAMMARS, Feature
from fastchat_grpc.core import (
    Capability,
    ChatMessage,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Image,
    ResumedChoice,
)
from fastchat_grpc.errors import AdapterNotFound, InvalidArgument, UnsupportedField
from tests.conformance.fuzz_watch import Memory
from tests.conformance.harness import PROMPT, REPEATING, Harness, chat, grammar_request, lively, request

pytestmark = pytest.mark.asyncio(loop_scope="session")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def needs(harness: Harness, *features: Feature) -> None:
    for feature in features:
        if not harness.supports(feature):
            pytest.skip(f"refuses {feature.value}; see test_what_is_not_supported_is_refused_by_name")


ASKING: dict[Feature, GenerateRequest] = {
    Feature.TEXT_PROMPT: request(),
    Feature.TOKEN_PROMPT: request([1, 2, 3]),
    Feature.CHAT: request(chat("Hello")),
    Feature.IMAGES: request([ChatMessage(role="user", content=("What is this?", Image(data=b"\x89PNG")))]),
    Feature.N: request(n=2),
    Feature.SEED: request(seed=1, temperature=1.0),
    Feature.TOP_K: request(top_k=5, temperature=1.0),
    Feature.TOP_P: request(top_p=0.5, temperature=1.0),
    Feature.MIN_P: request(min_p=0.1, temperature=1.0),
    Feature.REPETITION_PENALTY: request(repetition_penalty=1.2),
    Feature.PRESENCE_PENALTY: request(presence_penalty=0.5),
    Feature.FREQUENCY_PENALTY: request(frequency_penalty=0.5),
    Feature.LOGIT_BIAS: request(logit_bias={5: 1.0}),
    Feature.MIN_NEW_TOKENS: request(min_new_tokens=3),
    Feature.STOP_TOKEN_IDS: request(stop_token_ids=(5,)),
    Feature.IGNORE_EOS: request(ignore_eos=True),
    Feature.LOGPROBS: request(logprobs=0),
    Feature.TOP_LOGPROBS: request(logprobs=2),
    Feature.PROMPT_LOGPROBS: request(prompt_logprobs=0),
    Feature.ECHO: request(echo=True),
    Feature.KEEP_SPECIAL_TOKENS: request(keep_special_tokens=True),
    Feature.TRUNCATE_PROMPT: request(truncate_prompt_tokens=2),
    Feature.JSON_OBJECT: grammar_request(Grammar(GrammarKind.JSON_OBJECT)),
    Feature.JSON_SCHEMA: grammar_request(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON))),
    Feature.REGEX: grammar_request(Grammar(GrammarKind.REGEX, "[a-z]+")),
    Feature.LARK: grammar_request(Grammar(GrammarKind.LARK, 'start: "yes" | "no"')),
    Feature.LORA: request(lora_adapter="missing"),
    Feature.RESUME: request(resume=(ResumedChoice(index=0, output_token_ids=(5,)),)),
    Feature.RESUME_STATE: request(presence_penalty=1.0, resume=(ResumedChoice(index=0, output_token_ids=(5,)),)),
    Feature.RESUME_SEED: request(seed=1, temperature=1.0, resume=(ResumedChoice(index=0, output_token_ids=(5,)),)),
}
"""A request for each feature."""


async def test_what_is_not_supported_is_refused_by_name(harness: Harness) -> None:
    for feature in harness.traits.refuses:
        if feature not in ASKING:  # not asked for by a field of a generation
            continue
        events = harness.events(ASKING[feature])
        with pytest.raises((UnsupportedField, AdapterNotFound)) as refused:
            await anext(events)
        assert str(refused.value), feature
        await events.aclose()


async def test_what_is_supported_is_not_refused(harness: Harness) -> None:
    for feature, asking in ASKING.items():
        if harness.supports(feature) and feature not in (Feature.IMAGES, Feature.LORA):
            asking = replace(asking, stopping=replace(asking.stopping, max_new_tokens=4))
            await harness.run(asking)


async def test_an_adapter_that_is_not_loaded_is_refused_by_name(harness: Harness) -> None:
    with pytest.raises((AdapterNotFound, UnsupportedField), match="lora_adapter"):
        await harness.ask(lora_adapter="missing")


async def test_filters_that_leave_one_token_are_greedy(harness: Harness) -> None:
    greedy = await harness.ask()
    for feature, fields in (
        (Feature.TOP_K, {"top_k": 1}),
        (Feature.TOP_P, {"top_p": 1e-6}),
        (Feature.TOP_P, {"top_p": 0.0}),
        (Feature.MIN_P, {"min_p": 1.0}),
    ):
        if harness.supports(feature):
            filtered = await harness.ask(temperature=1.0, **fields)
            assert filtered.text == greedy.text, fields


async def test_the_same_seed_gives_the_same_text_and_others_give_others(harness: Harness) -> None:
    needs(harness, Feature.SEED)
    texts = {}
    for seed in (0, 7, 2**62, -5):
        first = await harness.ask(temperature=1.2, seed=seed)
        second = await harness.ask(temperature=1.2, seed=seed)
        assert first.text == second.text, f"seed {seed}"
        texts[seed] = first.text
    if harness.target.real:
        assert len(set(texts.values())) > 1


async def test_without_a_seed_texts_differ(harness: Harness) -> None:
    if not harness.target.real:
        pytest.skip("an echo has no choice")
    texts = {(await harness.ask(temperature=1.5)).text for _ in range(4)}
    assert len(texts) > 1


async def test_n_choices_are_counted_and_differ(harness: Harness) -> None:
    needs(harness, Feature.N)
    result = await harness.ask(n=3, temperature=1.5, max_new_tokens=12)
    assert set(result.choices) == {0, 1, 2}
    for choice in result.choices.values():
        assert choice.tokens <= 12
        assert choice.prompt_tokens == len(await harness.tokens_of(PROMPT))
    if harness.target.real:
        assert len({choice.text for choice in result.choices.values()}) > 1


async def test_choices_of_one_seed_differ_and_are_repeatable(harness: Harness) -> None:
    needs(harness, Feature.N, Feature.SEED)
    first = await harness.ask(n=2, seed=3, **lively(harness))
    second = await harness.ask(n=2, seed=3, **lively(harness))
    assert [c.text for c in first.choices.values()] == [c.text for c in second.choices.values()]
    if harness.target.real:
        assert first.choices[0].text != first.choices[1].text


async def test_a_stop_string_ends_one_choice_and_not_the_others(harness: Harness) -> None:
    needs(harness, Feature.N, Feature.SEED)
    plain = await harness.ask(n=2, seed=3, max_new_tokens=20, **lively(harness))
    stop = plain.choices[0].text[2:6]
    result = await harness.ask(n=2, seed=3, max_new_tokens=20, stop=(stop,), **lively(harness))
    for index, choice in result.choices.items():
        assert choice.text == plain.choices[index].text.partition(stop)[0]


def most_repeated(token_ids: list[int]) -> int:
    return max(Counter(token_ids).values())


@pytest.mark.parametrize(
    ("feature", "fields"),
    [
        (Feature.REPETITION_PENALTY, {"repetition_penalty": 1.8}),
        (Feature.PRESENCE_PENALTY, {"presence_penalty": 2.0}),
        (Feature.FREQUENCY_PENALTY, {"frequency_penalty": 2.0}),
    ],
    ids=["repetition", "presence", "frequency"],
)
async def test_penalties_break_repetition(harness: Harness, feature: Feature, fields: dict[str, float]) -> None:
    needs(harness, feature)
    if not harness.target.real:
        pytest.skip("an echo has no choice")
    plain = await harness.ask(REPEATING, max_new_tokens=48)
    assert most_repeated(plain.token_ids) >= 6, "the prompt should make the model repeat itself"
    penalized = await harness.ask(REPEATING, max_new_tokens=48, **fields)
    if feature is Feature.PRESENCE_PENALTY:  # of a logit margin that is larger, 2 may change little
        assert penalized.token_ids != plain.token_ids
    else:
        assert most_repeated(penalized.token_ids) < most_repeated(plain.token_ids)


async def test_logit_bias_forbids_and_forces_tokens(harness: Harness) -> None:
    needs(harness, Feature.LOGIT_BIAS)
    if not harness.target.real:
        pytest.skip("an echo has no choice")
    plain = await harness.ask(max_new_tokens=6)
    forbidden = await harness.ask(max_new_tokens=6, logit_bias={plain.token_ids[0]: -100.0})
    assert plain.token_ids[0] not in forbidden.token_ids[:1]
    wanted = (await harness.tokens_of(" banana"))[-1]
    forced = await harness.ask(max_new_tokens=3, logit_bias={wanted: 100.0})
    assert forced.token_ids == [wanted] * 3


async def test_logprobs_are_of_the_raw_logits(harness: Harness) -> None:
    needs(harness, Feature.LOGPROBS, Feature.TOKEN_IDS)
    greedy = await harness.ask(logprobs=0)
    assert len(greedy.first.logprobs) == len(greedy.token_ids)
    for token_id, entry in zip(greedy.token_ids, greedy.first.logprobs, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob is not None
        assert -100 < entry.logprob <= 1e-3
    fields = {"top_k": 1} if harness.supports(Feature.TOP_K) else {"top_p": 1e-6}
    hot = await harness.ask(logprobs=0, temperature=min(3.0, harness.target.max_temperature), **fields)
    assert hot.token_ids == greedy.token_ids
    assert [e.logprob for e in hot.first.logprobs] == pytest.approx(
        [e.logprob for e in greedy.first.logprobs], abs=0.02
    ), "temperature and filters must not show in log probabilities"


async def test_top_logprobs_are_sorted_and_hold_the_greedy_token_first(harness: Harness) -> None:
    needs(harness, Feature.TOP_LOGPROBS, Feature.TOKEN_IDS)
    wanted = min(5, harness.traits.max_top_logprobs)
    result = await harness.ask(logprobs=wanted)
    for entry in result.first.logprobs:
        values = [top.logprob for top in entry.top]
        assert len(values) >= (wanted if harness.target.real else 1)
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1.001
        assert entry.top[0].token_id == entry.token_id
        assert entry.top[0].logprob == pytest.approx(entry.logprob, abs=1e-4)


async def test_prompt_logprobs_are_those_the_output_had(harness: Harness) -> None:
    needs(harness, Feature.PROMPT_LOGPROBS, Feature.LOGPROBS, Feature.TOKEN_PROMPT)
    prompt = await harness.tokens_of(PROMPT)
    output = await harness.ask(prompt, logprobs=0)
    echoed = await harness.ask([*prompt, *output.token_ids], prompt_logprobs=0, max_new_tokens=1)
    assert echoed.echo is not None
    logprobs = echoed.echo.logprobs
    assert len(logprobs) == len(prompt) + len(output.token_ids)
    assert logprobs[0].logprob is None
    assert [e.logprob for e in logprobs[len(prompt) :]] == pytest.approx(
        [e.logprob for e in output.first.logprobs], abs=0.05
    )


async def test_logprobs_of_more_alternatives_than_declared_are_refused(harness: Harness) -> None:
    limit = harness.traits.max_top_logprobs
    if not harness.supports(Feature.TOP_LOGPROBS) or limit >= 20:
        pytest.skip("all that the contract allows are supported")
    with pytest.raises(UnsupportedField, match=r"output\.logprobs"):
        await harness.ask(logprobs=limit + 1)


async def test_seeds_of_more_prompts_than_one_step_reads_harm_nobody(harness: Harness) -> None:
    needs(harness, Feature.SEED, Feature.TRUNCATE_PROMPT)
    asked = [
        request(f"{word} " * 600, truncate_prompt_tokens=450, seed=1, temperature=1.0, max_new_tokens=1)
        for word in ("one", "two", "three", "four", "five", "six")
    ]
    for result in await asyncio.gather(*map(harness.run, asked)):
        assert result.first.finish in (FinishReason.LENGTH, FinishReason.STOP)


async def test_a_json_schema_is_followed(harness: Harness) -> None:
    needs(harness, Feature.JSON_SCHEMA)
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON))
    for seed in range(2):
        asking = grammar_request(grammar, temperature=1.0, max_new_tokens=160)
        if harness.supports(Feature.SEED):
            asking = replace(asking, sampling=replace(asking.sampling, seed=seed))
        result = await harness.run(asking)
        assert result.first.finish is FinishReason.STOP
        value = json.loads(result.text)
        assert set(value) == {"name", "age"}
        assert isinstance(value["age"], int)


async def test_a_json_object_is_json(harness: Harness) -> None:
    needs(harness, Feature.JSON_OBJECT)
    result = await harness.run(grammar_request(Grammar(GrammarKind.JSON_OBJECT), max_new_tokens=160))
    assert result.text.lstrip().startswith("{")
    if result.first.finish is FinishReason.STOP:
        assert isinstance(json.loads(result.text), dict)


async def test_a_regular_expression_is_followed(harness: Harness) -> None:
    needs(harness, Feature.REGEX)
    pattern = "(red|green|blue)-[0-9]{3}"
    result = await harness.run(grammar_request(Grammar(GrammarKind.REGEX, pattern), temperature=1.5))
    assert re.fullmatch(pattern, result.text)


async def test_a_lark_grammar_is_followed(harness: Harness) -> None:
    needs(harness, Feature.LARK)
    result = await harness.run(grammar_request(Grammar(GrammarKind.LARK, 'start: "yes" | "no"'), temperature=1.5))
    assert result.text in ("yes", "no")


async def test_a_grammar_that_cannot_be_compiled_is_refused(harness: Harness) -> None:
    for kind, source in (
        (GrammarKind.JSON_SCHEMA, '{"type": "no such type"}'),
        (GrammarKind.REGEX, "(unclosed"),
        (GrammarKind.LARK, "start: undefined_rule"),
    ):
        if harness.supports(GRAMMARS[kind]):
            with pytest.raises(InvalidArgument, match="structured_output"):
                await harness.run(grammar_request(Grammar(kind, source)))


NOTHING = [
    *((GrammarKind.REGEX, pattern) for pattern in (r"[^\s\S]", r"[^\x00-\U0010ffff]", "(?!)")),
    *((GrammarKind.JSON_SCHEMA, schema) for schema in ("false", '{"enum": []}')),
    (GrammarKind.LARK, 'start: start "a"'),
]


@pytest.mark.parametrize(("kind", "source"), NOTHING)
async def test_a_grammar_that_no_output_follows_is_the_callers_error(
    harness: Harness, kind: GrammarKind, source: str
) -> None:
    needs(harness, GRAMMARS[kind])
    if harness.target.name == "openvino" and source.startswith("[^"):
        pytest.skip("its compiler lets the characters beyond ASCII pass where a class excludes them")
    with pytest.raises(InvalidArgument, match=rf"structured_output\.{kind.value}"):
        await harness.run(grammar_request(Grammar(kind, source), max_new_tokens=8))


async def test_classes_of_unicode_are_followed_or_refused(harness: Harness) -> None:
    needs(harness, Feature.REGEX)
    with suppress(InvalidArgument):
        result = await harness.run(grammar_request(Grammar(GrammarKind.REGEX, r"\p{L}+"), max_new_tokens=8))
        assert result.text.isalpha()


_LISTS = [{"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1, "maxItems": most} for most in (1, 2)]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 1_000_000_000},
        {"anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"anyOf": [*_LISTS, {"type": "integer"}]}}},
    ],
    ids=["long", "ambiguous"],
)
async def test_no_grammar_takes_the_worker_from_others(harness: Harness, schema: dict[str, object]) -> None:
    needs(harness, Feature.JSON_SCHEMA)
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    fields = {"logit_bias": {(await harness.tokens_of("["))[-1]: 100.0}} if harness.supports(Feature.LOGIT_BIAS) else {}
    memory = Memory()
    memory.begin()
    with suppress(InvalidArgument):  # where it cannot be served
        await harness.run(request("[" * 40, grammar=grammar, max_new_tokens=40, **fields))
    assert memory.grown() < 1 << 30


async def test_a_generation_is_resumed_without_a_seam(harness: Harness) -> None:
    needs(harness, Feature.RESUME)
    whole = await harness.ask(max_new_tokens=20)
    for cut in (1, 9, 19):
        known = whole.token_ids[:cut]
        prefix = await _text_of_output(harness, known)
        resumed = await harness.ask(
            max_new_tokens=20,
            resume=(ResumedChoice(index=0, output_token_ids=tuple(known), text_length=len(prefix)),),
        )
        assert prefix + resumed.text == whole.text
        assert known + resumed.token_ids == whole.token_ids
        assert resumed.first.tokens == whole.first.tokens
        assert resumed.first.prompt_tokens == whole.first.prompt_tokens


async def test_a_seeded_sample_goes_on_with_the_random_numbers_it_would_have_had(harness: Harness) -> None:
    if Capability.SEEDED_RESUME not in harness.info.capabilities:
        pytest.skip("its random numbers go by more than the seed and the place; see the refusals")
    fields = {"max_new_tokens": 16, "seed": 5, **lively(harness)}
    whole = await harness.ask(**fields)
    for cut in (1, 9):
        known = whole.token_ids[:cut]
        prefix = await _text_of_output(harness, known)
        resumed = await harness.ask(
            resume=(ResumedChoice(index=0, output_token_ids=tuple(known), text_length=len(prefix)),), **fields
        )
        assert known + resumed.token_ids == whole.token_ids


async def test_a_grammar_that_the_resumed_output_does_not_follow_harms_nobody_else(harness: Harness) -> None:
    if not harness.supports(Feature.RESUME, Feature.RESUME_STATE, Feature.JSON_OBJECT):
        pytest.skip("refuses what is resumed with a grammar")
    known = ResumedChoice(index=0, output_token_ids=tuple(await harness.tokens_of("} no JSON")))
    asked = grammar_request(Grammar(GrammarKind.JSON_OBJECT), resume=(known,), max_new_tokens=24)
    alone = await harness.ask("one two three", max_new_tokens=8)
    beside = asyncio.create_task(harness.ask("one two three", max_new_tokens=8))
    with pytest.raises(InvalidArgument):
        await harness.run(asked)
    assert (await beside).text == alone.text


async def test_a_finished_choice_is_not_resumed(harness: Harness) -> None:
    needs(harness, Feature.RESUME, Feature.N)
    result = await harness.ask(
        n=2, resume=(ResumedChoice(index=0, finished=True), ResumedChoice(index=1, output_token_ids=(5, 6)))
    )
    assert set(result.choices) == {1}


async def test_a_resumed_choice_that_had_all_its_tokens_just_ends(harness: Harness) -> None:
    needs(harness, Feature.RESUME)
    whole = await harness.ask(max_new_tokens=6)
    resumed = await harness.ask(
        max_new_tokens=6,
        resume=(ResumedChoice(index=0, output_token_ids=tuple(whole.token_ids), text_length=len(whole.text)),),
    )
    assert resumed.token_ids == []
    assert resumed.text == ""
    assert resumed.first.finish is FinishReason.LENGTH


async def _text_of_output(harness: Harness, token_ids: list[int]) -> str:
    """Text of an output's tokens without the incomplete character at its end."""
    return (await harness.text_of(token_ids)).rstrip("\ufffd")
