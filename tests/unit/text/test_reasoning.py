"""Reasoning told apart from the answer, by what vLLM's parsers of the same names make of the same output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat_grpc.backends.echo import EOS, EchoTokenizer
from fastchat_grpc.config import REASONING_PARSERS
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    OutputOptions,
    ResumedChoice,
    StopConditions,
    TextPrompt,
)
from fastchat_grpc.text.choice import Choice, ChoiceLimits
from fastchat_grpc.text.reasoning import PARSERS, Marks, ReasoningParser, marks_of

THINK = PARSERS["qwen3"]


def parse(pieces: Sequence[str], *, inside: bool = False, marks: Marks = THINK) -> tuple[str, str]:
    """Reasoning and answer. Checks that no reasoning follows the answer."""
    parser = ReasoningParser(marks, inside=inside)
    reasoning = answer = ""
    for more, text in [*(parser.feed(piece) for piece in pieces), parser.close()]:
        assert not (more and answer)
        reasoning, answer = reasoning + more, answer + text
    return reasoning, answer


SECTION, REST = "This is a reasoning section", "This is the rest"
# Output, whether the prompt has opened the thought, and reasoning and content as vLLM's parsers for qwen3, deepseek_r1
# and mistral give them.
OUTPUTS = [
    ("This is a reasoning section</think>This is the rest", True, SECTION, REST),
    ("This is a reasoning section</think>", True, SECTION, ""),
    (SECTION, True, SECTION, ""),
    ("<think>This is a reasoning section</think>This is the rest", True, SECTION, REST),
    ("<think>This is a reasoning section</think>This is the rest", False, SECTION, REST),
    ("<think>This\nThat</think>This is the rest\nThat", False, "This\nThat", "This is the rest\nThat"),
    ("<think>This is a reasoning section", False, SECTION, ""),
    ("</think>This is the rest", True, "", REST),
    ("\n<think>This is a reasoning section</think>\nThis is the rest", True, SECTION, "\nThis is the rest"),
    ("<think>\n\n</think>\n\nHello", False, "\n\n", "\n\nHello"),
    ("This is plain content", False, "", "This is plain content"),
    ("", True, "", ""),
    ("", False, "", ""),
]  # fmt: skip
# What must not confuse: marks that are not whole, a second thought, a thought that is only spoken of.
ODD = [
    ("<", False, "", "<"),
    ("<think", False, "", "<think"),
    ("<thinking>a</thinking>", False, "", "<thinking>a</thinking>"),
    ("  \n ", False, "", "  \n "),
    ("a <think>b</think>", False, "", "a <think>b</think>"),
    ("<think>a</thin", False, "a</thin", ""),
    ("<think>a</think</think>b", False, "a</think", "b"),
    ("<think>a</think>b<think>c</think>d", False, "a", "b<think>c</think>d"),
    ("<<think>", True, "<<think>", ""),
]


@pytest.mark.parametrize(("text", "inside", "reasoning", "answer"), OUTPUTS + ODD)
def test_reasoning_is_told_apart_however_the_text_is_cut(text: str, inside: bool, reasoning: str, answer: str) -> None:
    assert parse([text], inside=inside) == (reasoning, answer)
    assert parse(list(text), inside=inside) == (reasoning, answer)
    for cut in range(len(text) + 1):
        assert parse([text[:cut], text[cut:]], inside=inside) == (reasoning, answer)


@pytest.mark.parametrize("marks", PARSERS.values(), ids=PARSERS)
@given(st.text("a<[", max_size=8), st.text("b</>", max_size=8), st.integers(1, 5))
def test_every_model_s_marks_are_found_in_pieces_of_any_size(marks: Marks, why: str, answer: str, size: int) -> None:
    text = f"{marks.start}{why}{marks.end}{answer}"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert parse(pieces, marks=marks) == (why, answer)


def test_no_more_is_held_back_than_may_be_a_mark() -> None:
    parser = ReasoningParser(THINK, inside=False)
    assert parser.feed("<think>a b") == ("a b", "")
    assert parser.feed(" </th") == (" ", "")
    assert parser.feed("e") == ("</the", "")
    assert parser.feed("</think>c") == ("", "c")
    assert parser.feed("</thi") == ("", "</thi")


@pytest.mark.parametrize(
    ("template", "parser", "found"),
    [
        ("{{ '<think>' }}", "auto", PARSERS["qwen3"]),
        ("[THINK]{{ m }}[/THINK]", "auto", PARSERS["mistral"]),
        ("{{ m }}", "auto", None),
        ("", "auto", None),
        ("<think>", "none", None),
        ("", "deepseek_r1", PARSERS["deepseek_r1"]),
    ],
)
def test_the_chat_template_tells_the_marks_unless_they_are_named(template: str, parser: str, found: Marks) -> None:
    assert marks_of(parser, template) is found


def test_the_setting_knows_every_parser() -> None:
    assert set(REASONING_PARSERS) == {"auto", "none", *PARSERS}


SPECIAL = {300: "[THINK]", 301: "[/THINK]", 302: "[INST]"}


class Special(EchoTokenizer):
    """Its marks are single special tokens."""

    vocabulary_size = 303
    special_token_ids = frozenset({EOS, *SPECIAL})

    def token_bytes(self, token_id: int) -> bytes:
        return SPECIAL[token_id].encode() if token_id in SPECIAL else super().token_bytes(token_id)


CHAT = ChatPrompt(messages=(ChatMessage(role="user", content="x"),))


def choice(
    *, ends: str = "assistant: ", marks: Marks = THINK, tokenizer: EchoTokenizer | None = None, **fields: Any
) -> Choice:
    """A choice whose prompt ends so; `fields` are those of the request."""
    limits = ChoiceLimits(prompt_tokens=1, context_length=10_000, stream_interval=3, reasoning=marks)
    request = GenerateRequest(**{"prompt": CHAT, **fields})
    return Choice(request, 0, tokenizer or EchoTokenizer(), limits, list(ends.encode()))


def run(made: Choice, token_ids: Sequence[int], *, close: bool = True) -> tuple[str, str]:
    """Reasoning and text of all Deltas."""
    reasoning = text = ""
    for token_id in [*token_ids, *([EOS] if close else [])]:
        if made.finish_reason is not None:
            break
        made.push(token_id)
        if made.due and (delta := made.delta()) is not None:
            reasoning, text = reasoning + delta.reasoning, text + delta.text
    return reasoning, text


def test_a_choice_tells_its_reasoning_apart_and_counts_its_tokens() -> None:
    made = choice()
    assert run(made, b"<think>why</think>so") == ("why", "so")
    # Each byte is a token: those of "why", and the mark's but the last, which ends the thought.
    assert made.usage.reasoning_tokens == len("why") + len("</think>") - 1
    assert made.usage.completion_tokens == len("<think>why</think>so") + 1


@pytest.mark.parametrize("prompt", ["assistant: <think>", "assistant: <think>\n"])
def test_a_prompt_may_open_the_thought(prompt: str) -> None:
    assert run(choice(ends=prompt), b"why</think>so") == ("why", "so")
    assert run(choice(ends=prompt), b"why") == ("why", "")


def test_a_prompt_may_end_the_thought_before_the_output() -> None:
    prompt = "assistant: <think>\n\n</think>\n\n"
    assert run(choice(ends=prompt), b"<think>no</think>") == ("", "<think>no</think>")


def test_deepseek_r1_begins_in_a_thought_though_no_prompt_says_so() -> None:
    assert run(choice(marks=PARSERS["deepseek_r1"]), b"why</think>so") == ("why", "so")


def test_marks_that_are_special_tokens_count_though_text_leaves_them_out() -> None:
    made = choice(marks=PARSERS["mistral"], tokenizer=Special())
    assert run(made, [300, *b"why", 302, 301, *b"so", 300]) == ("why", "so")
    assert made.usage.reasoning_tokens == 4


def begun(text: str) -> ChatPrompt:
    messages = (*CHAT.messages, ChatMessage(role="assistant", content=text))
    return ChatPrompt(messages=messages, continue_final_message=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": TextPrompt("<think>")}, ("", "why</think>so")),
        ({"grammar": Grammar(GrammarKind.JSON_OBJECT)}, ("", "why</think>so")),
        ({"prompt": begun("<think>he")}, ("why", "so")),
        ({"prompt": begun("<think>he</think>b")}, ("", "why</think>so")),
    ],
    ids=["text", "grammar", "continues a thought", "continues an answer"],
)
def test_what_goes_on_from_text_or_follows_a_grammar(fields: dict[str, Any], said: tuple[str, str]) -> None:
    assert run(choice(ends="<think>", **fields), b"why</think>so") == said


def test_stop_strings_end_a_thought_too() -> None:
    made = choice(stopping=StopConditions(stop=("END",), max_new_tokens=100))
    assert run(made, b"<think>abENDcd</think>x") == ("ab", "")
    assert (made.finish_reason, made.matched) == (FinishReason.STOP, "END")
    made = choice(stopping=StopConditions(stop=("END",), max_new_tokens=100))
    assert run(made, b"<think>ab</think>cEND") == ("ab", "c")
    assert made.matched == "END"


def test_what_is_held_back_of_a_cut_thought_is_reasoning() -> None:
    made = choice(stopping=StopConditions(max_new_tokens=11))
    assert run(made, b"<think>ab</think>", close=False) == ("ab</", "")
    assert made.finish_reason is FinishReason.LENGTH


@given(st.integers(0, 25), st.booleans())
def test_a_resumed_choice_joins_without_a_seam(cut: int, cumulative: bool) -> None:
    tokens = list(b"<think>why</think>the end")
    output = OutputOptions(cumulative_text=cumulative)
    first = choice(output=output)
    reasoning, text = run(first, tokens[:cut], close=False)
    sent = cut - len(first._token_ids)
    resumed = ResumedChoice(index=0, output_token_ids=tuple(tokens[:sent]), text_length=len(reasoning) + len(text))
    second = choice(output=output, resume=(resumed,))
    more, rest = run(second, tokens[sent:])
    assert (reasoning + more, text + rest) == ("why", "the end")
    assert second.usage.reasoning_tokens == len("why</think")
