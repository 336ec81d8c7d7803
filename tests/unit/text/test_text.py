"""Shared text code: detokenization, stop strings, choices, the event queue."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat_grpc.backends.echo import EOS, EchoTokenizer
from fastchat_grpc.core import (
    ChatPrompt,
    Completion,
    Delta,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    OutputOptions,
    ResumedChoice,
    StopConditions,
    TextPrompt,
    Timings,
    TokenPrompt,
    Usage,
)
from fastchat_grpc.errors import InvalidArgument, PromptTooLong
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.blanks import MAX_BLANKS, BlankRun
from fastchat_grpc.text.choice import Choice, ChoiceLimits
from fastchat_grpc.text.detokenizer import ByteDetokenizer, WindowDetokenizer, make_detokenizer
from fastchat_grpc.text.events import EventQueue
from fastchat_grpc.text.stop import StopMatcher

TOKENIZER = EchoTokenizer()


class Sentencepiece(EchoTokenizer):
    """Drops one space at the start of a text, as sentencepiece does, so that it is not bytes alone."""

    decodes_bytes = False

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        return super().decode(token_ids, keep_special_tokens=keep_special_tokens).removeprefix(" ")

    def render_chat(self, chat: ChatPrompt) -> str:
        raise NotImplementedError


def limits(prompt_tokens: int = 1, context_length: int = 10_000, stream_interval: int = 1) -> ChoiceLimits:
    return ChoiceLimits(prompt_tokens=prompt_tokens, context_length=context_length, stream_interval=stream_interval)


def request(
    stopping: StopConditions | None = None, output: OutputOptions | None = None, **fields: object
) -> GenerateRequest:
    return GenerateRequest(
        prompt=TextPrompt("x"),
        stopping=stopping or StopConditions(max_new_tokens=10_000),
        output=output or OutputOptions(),
        **fields,  # type: ignore[arg-type]
    )


def run(choice: Choice, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """Push tokens until the end, taking each Delta as soon as it is due; the text and the tokens sent."""
    text, sent = "", []
    for token_id in token_ids:
        if choice.finish_reason is not None:
            break
        choice.push(token_id)
        if choice.due and (delta := choice.delta()) is not None:
            text += delta.text
            sent += delta.token_ids
    return text, sent


@given(st.binary(max_size=200))
def test_joined_pieces_equal_the_decoding_of_all_tokens(data: bytes) -> None:
    detokenizer = make_detokenizer(TOKENIZER, keep_special_tokens=False)
    assert isinstance(detokenizer, ByteDetokenizer)
    pieces = [detokenizer.push(token_id) for token_id in data]
    assert "".join(pieces) + detokenizer.flush() == TOKENIZER.decode(list(data))


@given(st.text(max_size=100))
def test_a_vocabulary_with_context_rules_gives_the_same_text_as_decoding_at_once(text: str) -> None:
    tokenizer = Sentencepiece()
    detokenizer = make_detokenizer(tokenizer, keep_special_tokens=False)
    assert isinstance(detokenizer, WindowDetokenizer)
    token_ids = tokenizer.encode(text)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(token_ids)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Sentencepiece()], ids=["bytes", "window"])
def test_no_piece_shows_half_a_character(tokenizer: EchoTokenizer) -> None:
    detokenizer = make_detokenizer(tokenizer, keep_special_tokens=False)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode("né 🦜漢")]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == "né 🦜漢"


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Sentencepiece()], ids=["bytes", "window"])
def test_bytes_that_are_no_text_do_not_hold_the_rest_back(tokenizer: EchoTokenizer) -> None:
    detokenizer = make_detokenizer(tokenizer, keep_special_tokens=False)
    seen = "".join(detokenizer.push(0xFF) for _ in range(50))
    assert len(seen) >= 40


def first_completed(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The plain definition: the shortest prefix of the text that contains a stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
    st.data(),
)
def test_stops_are_found_at_once_wherever_the_text_is_cut(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    matcher = StopMatcher(stops, include)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    sent = "".join(matcher.feed(piece) for piece in pieces) + matcher.flush()
    expected = first_completed(text, stops)
    if expected is None:
        assert (sent, matcher.matched) == (text, None)
    else:
        end, stop = expected
        assert matcher.matched == stop
        assert sent == (text[:end] if include else text[: end - len(stop)])


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_no_more_is_held_back_than_might_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    sent = matcher.feed(text)
    if matcher.matched is None:
        held = text[len(sent) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_choice_ends_at_the_end_of_sequence_and_counts_it() -> None:
    choice = Choice(request(), 0, TOKENIZER, limits())
    text, sent = run(choice, [*b"hi", EOS])
    assert (text, sent) == ("hi", [*b"hi", EOS])
    assert choice.finish_reason is FinishReason.STOP
    completion = choice.completion(Timings())
    assert completion.matched is None
    assert completion.usage == Usage(prompt_tokens=1, completion_tokens=3)


def test_a_stop_token_of_the_request_is_named() -> None:
    choice = Choice(request(StopConditions(stop_token_ids=(ord("!"),))), 0, TOKENIZER, limits())
    text, _ = run(choice, b"hi!x")
    assert (text, choice.matched, choice.finish_reason) == ("hi", ord("!"), FinishReason.STOP)


def test_a_stop_string_across_tokens_is_cut_out() -> None:
    choice = Choice(request(StopConditions(stop=("END",))), 0, TOKENIZER, limits())
    text, sent = run(choice, b"the END of it")
    assert (text, choice.matched) == ("the ", "END")
    assert bytes(sent) == b"the END"


def test_a_stop_string_can_be_kept() -> None:
    choice = Choice(request(StopConditions(stop=("END",), include_stop=True)), 0, TOKENIZER, limits())
    assert run(choice, b"the END of it")[0] == "the END"


def test_length_ends_a_choice_and_sends_what_was_held_back() -> None:
    choice = Choice(request(StopConditions(max_new_tokens=5, stop=("END",))), 0, TOKENIZER, limits())
    text, _ = run(choice, b"abcENDx")
    assert (text, choice.finish_reason) == ("abcEN", FinishReason.LENGTH)


def test_the_end_of_the_context_ends_a_choice() -> None:
    choice = Choice(request(), 0, TOKENIZER, limits(prompt_tokens=6, context_length=10))
    text, _ = run(choice, b"abcdefgh")
    assert (text, choice.finish_reason) == ("abcd", FinishReason.LENGTH)


def test_ends_are_ignored_before_min_new_tokens() -> None:
    stopping = StopConditions(min_new_tokens=4, stop=("b",), stop_token_ids=(ord("a"),))
    choice = Choice(request(stopping), 0, TOKENIZER, limits())
    text, _ = run(choice, b"abababab")
    assert (text, choice.matched) == ("abab", ord("a"))


def test_under_a_grammar_an_end_is_the_end_before_min_new_tokens_too() -> None:
    grammar = Grammar(GrammarKind.REGEX, "ab")
    choice = Choice(request(StopConditions(min_new_tokens=9), grammar=grammar), 0, TOKENIZER, limits())
    text, sent = run(choice, [*b"ab", EOS, EOS, EOS])
    assert (text, sent, choice.finish_reason) == ("ab", [*b"ab", EOS], FinishReason.STOP)


@given(st.recursive(st.none() | st.text(' "\\a\n', max_size=6), lambda inner: st.lists(inner, max_size=3)))
def test_blanks_of_json_are_those_outside_of_its_strings(value: object) -> None:
    text = json.dumps(value, indent=3)
    outside = re.sub(r'"(\\.|[^"\\])*"', "s", text)
    longest = max(map(len, re.findall(r"\s+", outside)), default=0)
    run_of = BlankRun()
    assert max(run_of.feed(char) for char in text) == longest
    assert BlankRun().feed(text) == longest


@pytest.mark.parametrize("kind", [GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA])
def test_json_that_becomes_nothing_but_blanks_is_ended(kind: GrammarKind) -> None:
    asked = request(StopConditions(max_new_tokens=5000), grammar=Grammar(kind, "{}"))
    choice = Choice(asked, 0, TOKENIZER, limits())
    text, _ = run(choice, b'{"a": "' + b" " * 1000 + b'",' + b"\n" * 1000)
    assert (text.count("\n"), choice.finish_reason) == (MAX_BLANKS + 1, FinishReason.LENGTH)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_a_stop_counts_where_it_ends_behind_min_new_tokens(text: str, stops: list[str], data: st.DataObject) -> None:
    """As in vLLM: one that began before is still one, and is cut out as a whole."""
    least = data.draw(st.integers(0, 12))
    choice = Choice(request(StopConditions(min_new_tokens=least, stop=tuple(stops))), 0, TOKENIZER, limits())
    seen, _ = run(choice, text.encode())
    expected, matched = text, None
    for end in range(least + 1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            matched = max(complete, key=len)
            expected = text[: end - len(matched)]
            break
    if matched is None:
        choice.end(FinishReason.ABORT)
        if (rest := choice.delta()) is not None:
            seen += rest.text
    assert (seen, choice.matched) == (expected, matched)


def test_ignore_eos_goes_on_and_shows_nothing_of_it() -> None:
    choice = Choice(request(StopConditions(max_new_tokens=4, ignore_eos=True)), 0, TOKENIZER, limits())
    assert run(choice, [ord("a"), EOS, ord("b"), ord("c")])[0] == "abc"


def test_the_first_token_is_sent_at_once_and_then_one_delta_per_interval() -> None:
    choice = Choice(request(), 0, TOKENIZER, limits(stream_interval=3))
    sizes = []
    for token_id in b"abcdefgh":
        choice.push(token_id)
        if choice.due and (delta := choice.delta()) is not None:
            sizes.append(len(delta.token_ids))
    assert sizes == [1, 3, 3]


def test_cumulative_text_is_the_text_so_far() -> None:
    choice = Choice(request(output=OutputOptions(cumulative_text=True)), 0, TOKENIZER, limits())
    seen = []
    for token_id in b"abc":
        choice.push(token_id)
        delta = choice.delta()
        assert delta is not None
        seen.append(delta.cumulative_text)
    assert seen == ["a", "ab", "abc"]


@given(
    st.text("abE🦜", min_size=1, max_size=20),
    st.integers(0, 60),
    st.booleans(),
)
def test_a_resumed_choice_joins_without_a_seam(text: str, cut: int, cumulative: bool) -> None:
    stopping = StopConditions(max_new_tokens=1000, stop=("bE",))
    output = OutputOptions(cumulative_text=cumulative)
    token_ids = [*TOKENIZER.encode(text), EOS]
    whole = Choice(request(stopping, output), 0, TOKENIZER, limits())
    expected, all_sent = run(whole, token_ids)

    first = Choice(request(stopping, output), 0, TOKENIZER, limits())
    head, sent = run(first, token_ids[: min(cut, len(all_sent))])
    resumed = ResumedChoice(index=0, output_token_ids=tuple(sent), text_length=len(head))
    second = Choice(request(stopping, output, resume=(resumed,)), 0, TOKENIZER, limits())
    tail, rest = run(second, token_ids[len(sent) :])
    if (delta := second.delta()) is not None:
        tail, rest = tail + delta.text, [*rest, *delta.token_ids]
    assert (head + tail, sent + rest) == (expected, all_sent)
    assert second.finish_reason == whole.finish_reason
    assert second.matched == whole.matched
    assert second.usage == whole.usage


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers() -> None:
    exact = GenerateRequest(prompt=TextPrompt("abcd"))
    assert len(prompts.prepare(TOKENIZER, exact, context_length=5)) == 4
    with pytest.raises(PromptTooLong, match=r"4 tokens.*context of 4 tokens"):
        prompts.prepare(TOKENIZER, exact, context_length=4)


def test_a_prompt_is_truncated_from_the_left_only_when_asked() -> None:
    truncated = GenerateRequest(prompt=TextPrompt("abcd"), truncate_prompt_tokens=2)
    assert bytes(prompts.prepare(TOKENIZER, truncated, context_length=3)) == b"cd"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompt": TokenPrompt((1, 999))}, "prompt_token_ids.ids[1]"),
        ({"prompt": TextPrompt("a"), "stopping": StopConditions(stop_token_ids=(999,))}, "stopping.stop_token_ids[0]"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(fields: dict[str, object], path: str) -> None:
    with pytest.raises(InvalidArgument, match="999 is not below the vocabulary size of 257") as caught:
        prompts.prepare(TOKENIZER, GenerateRequest(**fields), context_length=100)  # type: ignore[arg-type]
    assert caught.value.field == path


def delta(index: int, text: str) -> Delta:
    return Delta(index=index, text=text, token_ids=tuple(text.encode()), usage=Usage())


async def test_a_slow_consumer_gets_all_text_in_fewer_deltas() -> None:
    queue = EventQueue()
    end = Completion(index=0, finish_reason=FinishReason.STOP, usage=Usage())
    queue.put([delta(0, "a"), delta(1, "x"), delta(0, "b")])
    queue.put([delta(0, "c"), end])
    queue.close()
    events = [event async for event in queue]
    assert events == [delta(0, "abc"), delta(1, "x"), end]


async def test_a_consumer_that_keeps_up_gets_every_delta() -> None:
    queue = EventQueue()
    seen: list[object] = []

    async def consume() -> None:
        async for event in queue:
            seen.append(event)

    task = asyncio.create_task(consume())
    for text in "abc":
        queue.put([delta(0, text)])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    queue.close()
    await task
    assert seen == [delta(0, "a"), delta(0, "b"), delta(0, "c")]


async def test_an_error_comes_after_what_was_queued() -> None:
    queue = EventQueue()
    queue.put([delta(0, "a")])
    queue.close(RuntimeError("broken"))
    seen = []
    with pytest.raises(RuntimeError, match="broken"):
        async for event in queue:
            seen.append(event)
    assert seen == [delta(0, "a")]


@pytest.mark.parametrize(("token_ids", "place"), [([0, -1], "[1]"), ([9], "[0]")])
def test_ids_outside_the_vocabulary_are_named(token_ids: list[int], place: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        prompts.check_token_ids("token_ids", token_ids, 9)
    assert caught.value.field == f"token_ids{place}"
