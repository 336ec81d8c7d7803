"""Text, tokens, stops and usage: the same on every backend."""

from __future__ import annotations

import asyncio

import pytest

from fastchat_grpc.backends.capabilities import Feature
from fastchat_grpc.core import Capability, FinishReason
from fastchat_grpc.errors import InvalidArgument, PromptTooLong
from tests.conformance.harness import LONG, PROMPT, Harness, chat

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_greedy_text_is_the_same_every_time(harness: Harness) -> None:
    first, second = await harness.ask(), await harness.ask()
    assert first.text == second.text
    assert first.token_ids == second.token_ids


async def test_text_is_the_decoding_of_its_tokens(harness: Harness) -> None:
    result = await harness.ask(max_new_tokens=48, keep_special_tokens=harness.supports(Feature.KEEP_SPECIAL_TOKENS))
    if not result.token_ids:
        pytest.skip("this backend gives no token ids")
    ended_by_token = result.first.finish is FinishReason.STOP
    assert result.text == await harness.text_of(result.token_ids[:-1] if ended_by_token else result.token_ids)


async def test_wild_text_is_the_decoding_of_its_tokens(harness: Harness) -> None:
    """At a high temperature tokens are nearly random, so characters are often left incomplete."""
    for seed in range(3):
        fields = {"seed": seed} if harness.supports(Feature.SEED) else {}
        ignore_eos = {"ignore_eos": True} if harness.supports(Feature.IGNORE_EOS) else {}
        result = await harness.ask(
            "🤖 你好, привет: ",
            temperature=min(20.0, harness.target.max_temperature),
            max_new_tokens=48,
            keep_special_tokens=harness.supports(Feature.KEEP_SPECIAL_TOKENS),
            **ignore_eos,
            **fields,
        )
        if not result.token_ids:
            pytest.skip("this backend gives no token ids")
        ended_by_token = result.first.finish is FinishReason.STOP
        assert result.text == await harness.text_of(result.token_ids[:-1] if ended_by_token else result.token_ids)


async def test_deltas_never_repeat_text_and_cumulative_text_is_their_sum(harness: Harness) -> None:
    plain = await harness.ask()
    cumulative = await harness.ask(cumulative_text=True, stream_interval=1)
    assert cumulative.text == plain.text  # `run` has checked each Delta's cumulative text
    assert len(cumulative.first.deltas) >= 1


async def test_a_stop_string_ends_the_text_before_it(harness: Harness) -> None:
    text = (await harness.ask(max_new_tokens=24)).text
    for start in range(2, min(len(text) - 6, 26), 3):
        stop = text[start : start + 5]  # wherever tokens begin and end
        result = await harness.ask(max_new_tokens=24, stop=(stop,))
        assert result.text == text[: text.index(stop)]
        assert result.first.finish is FinishReason.STOP
        assert result.first.completion is not None
        assert result.first.completion.matched == stop


async def test_the_earliest_stop_string_wins_and_may_be_included(harness: Harness) -> None:
    text = (await harness.ask(max_new_tokens=24)).text
    early, late = text[4:8], text[12:16]
    result = await harness.ask(max_new_tokens=24, stop=(late, early), include_stop=True)
    assert result.text == text[: text.index(early) + len(early)]
    assert result.first.completion is not None
    assert result.first.completion.matched == early


async def test_text_held_back_for_a_stop_string_that_does_not_come_is_sent(harness: Harness) -> None:
    text = (await harness.ask()).text
    result = await harness.ask(stop=(text[-4:] + "\u0000never",))
    assert result.text == text
    assert result.first.finish is FinishReason.LENGTH


async def test_a_stop_token_ends_the_text_before_it(harness: Harness) -> None:
    if not harness.supports(Feature.STOP_TOKEN_IDS, Feature.TOKEN_IDS):
        pytest.skip("no stop tokens, or no token ids")
    plain = await harness.ask(stream_interval=1)
    token_id = plain.token_ids[5]
    position = plain.token_ids.index(token_id)
    result = await harness.ask(stop_token_ids=(token_id,))
    assert result.token_ids == plain.token_ids[: position + 1]
    assert result.first.tokens == position + 1
    assert result.first.finish is FinishReason.STOP
    assert result.first.completion is not None
    assert result.first.completion.matched == token_id
    assert result.text == await harness.text_of(plain.token_ids[:position])


async def test_an_output_can_be_empty(harness: Harness) -> None:
    plain = await harness.ask()
    result = await harness.ask(stop=(plain.text[:1],))
    assert result.text == ""
    assert result.first.finish is FinishReason.STOP
    if harness.supports(Feature.STOP_TOKEN_IDS, Feature.TOKEN_IDS):
        result = await harness.ask(stop_token_ids=(plain.token_ids[0],))
        assert result.text == ""
        assert result.first.tokens == 1


async def test_length_is_exact(harness: Harness) -> None:
    for max_new_tokens in (1, 2, 7):
        result = await harness.ask(max_new_tokens=max_new_tokens)
        assert result.first.tokens == max_new_tokens
        assert result.first.finish is FinishReason.LENGTH


async def test_usage_counts_the_prompt_as_tokenized(harness: Harness) -> None:
    result = await harness.ask()
    assert result.first.prompt_tokens == len(await harness.tokens_of(PROMPT))
    if harness.supports(Feature.CHAT) and Capability.CHAT in harness.info.capabilities:
        messages = chat("Hello!", "Hi.", "What is the capital of France?")
        result = await harness.ask(messages)
        assert result.first.prompt_tokens == len(await harness.tokens_of(messages))
        if harness.supports(Feature.TOKEN_IDS):  # a server keeps its template
            assert harness.backend.chat_template("tested")


async def test_a_token_prompt_is_continued_like_its_text(harness: Harness) -> None:
    if not harness.supports(Feature.TOKEN_PROMPT):
        pytest.skip("no token prompts")
    as_text = await harness.ask(PROMPT)
    as_tokens = await harness.ask(await harness.tokens_of(PROMPT))
    assert as_tokens.token_ids == as_text.token_ids
    assert as_tokens.text == as_text.text


async def test_end_of_sequence_ends_the_text_unless_it_is_ignored(harness: Harness) -> None:
    prompt = chat("What is 2 + 2? Answer with one number.") if harness.supports(Feature.CHAT) else PROMPT
    ended = await harness.ask(prompt, max_new_tokens=200)
    assert ended.first.finish is FinishReason.STOP
    assert ended.first.completion is not None
    assert ended.first.completion.matched is None
    if ended.token_ids:
        assert ended.first.tokens == len(ended.token_ids)
    if harness.supports(Feature.IGNORE_EOS):
        more = ended.first.tokens + 5
        result = await harness.ask(prompt, max_new_tokens=more, ignore_eos=True)
        assert result.first.tokens == more
        assert result.first.finish is FinishReason.LENGTH


async def test_min_new_tokens_puts_off_the_end(harness: Harness) -> None:
    if not harness.supports(Feature.MIN_NEW_TOKENS):
        pytest.skip("no min_new_tokens")
    prompt = chat("What is 2 + 2? Answer with one number.") if harness.supports(Feature.CHAT) else PROMPT
    ended = await harness.ask(prompt, max_new_tokens=200)
    wanted = ended.first.tokens + 4
    result = await harness.ask(prompt, max_new_tokens=wanted + 2, min_new_tokens=wanted)
    assert result.first.tokens >= wanted
    if not harness.supports(Feature.TOKEN_IDS):
        return
    plain = await harness.ask(max_new_tokens=12)
    stop = await harness.ask(max_new_tokens=12, min_new_tokens=8, stop_token_ids=(plain.token_ids[1],))
    assert stop.first.tokens >= 8


async def test_a_generation_ends_where_the_context_ends(harness: Harness) -> None:
    if not harness.supports(Feature.TOKEN_PROMPT, Feature.IGNORE_EOS):
        pytest.skip("no token prompts")
    context = harness.info.context_length
    unit = await harness.tokens_of(PROMPT)
    prompt = (unit * (context // len(unit) + 1))[: context - 5]
    result = await harness.ask(prompt, max_new_tokens=LONG, ignore_eos=True)
    assert result.first.tokens == 5
    assert result.first.finish is FinishReason.LENGTH
    result = await harness.ask([*prompt, *unit[:4]], max_new_tokens=LONG, ignore_eos=True)
    assert result.first.tokens == 1


async def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(harness: Harness) -> None:
    context = harness.info.context_length
    unit = await harness.tokens_of(PROMPT)
    if harness.supports(Feature.TOKEN_PROMPT):
        with pytest.raises(PromptTooLong) as refused:
            await harness.ask((unit * (context // len(unit) + 1))[:context])
        assert refused.value.token_count == context
        assert refused.value.context_length == context
    with pytest.raises(PromptTooLong):
        await harness.ask(PROMPT * (context // len(unit) + 10))


async def test_a_prompt_is_truncated_when_asked_for(harness: Harness) -> None:
    if not harness.supports(Feature.TRUNCATE_PROMPT):
        pytest.skip("no truncation")
    tokens = await harness.tokens_of(PROMPT)
    truncated = await harness.ask(PROMPT, truncate_prompt_tokens=4)
    assert truncated.first.prompt_tokens == 4
    if harness.supports(Feature.TOKEN_PROMPT):
        assert truncated.token_ids == (await harness.ask(tokens[-4:])).token_ids


async def test_tokens_outside_the_vocabulary_are_refused_by_field(harness: Harness) -> None:
    unknown = harness.info.vocabulary_size
    if not unknown:
        pytest.skip("the vocabulary is not known here")
    if harness.supports(Feature.TOKEN_PROMPT):
        with pytest.raises(InvalidArgument) as refused:
            await harness.ask([1, unknown])
        assert refused.value.field == "prompt_token_ids.ids[1]"
    if harness.supports(Feature.STOP_TOKEN_IDS):
        with pytest.raises(InvalidArgument) as refused:
            await harness.ask(stop_token_ids=(unknown,))
        assert refused.value.field == "stopping.stop_token_ids[0]"


async def test_the_prompt_is_echoed_when_asked_for(harness: Harness) -> None:
    if not harness.supports(Feature.ECHO):
        pytest.skip("no echo")
    result = await harness.ask(echo=True)
    assert result.echo is not None
    assert result.echo.text == PROMPT
    assert list(result.echo.token_ids) == await harness.tokens_of(PROMPT)
    assert result.text == (await harness.ask()).text


async def test_unicode_survives_in_prompt_and_text(harness: Harness) -> None:
    prompt = "Grüße aus 東京 🗼👨‍👩‍👧 — naïve café"
    tokens = await harness.tokens_of(prompt)
    assert prompt in await harness.text_of(tokens)
    result = await harness.ask(prompt, max_new_tokens=8, echo=harness.supports(Feature.ECHO))
    if result.echo is not None:
        assert result.echo.text == prompt
    assert result.first.tokens >= 1


async def test_a_slow_reader_gets_everything_in_fewer_deltas(harness: Harness) -> None:
    from tests.conformance.harness import request

    plain = await harness.ask(max_new_tokens=24, stream_interval=1)
    texts = []
    events = harness.events(request(max_new_tokens=24, stream_interval=1))
    try:
        async for event in events:
            if hasattr(event, "text"):
                texts.append(event.text)
            await asyncio.sleep(0.05)
    finally:
        await events.aclose()
    assert "".join(texts) == plain.text
