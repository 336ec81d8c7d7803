"""The Hugging Face tokenizer: exact bytes of every kind of vocabulary, and decoding that agrees with them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_grpc.core import ChatMessage, ChatPrompt, FinishReason, GenerateRequest, ResumedChoice, TextPrompt
from fastchat_grpc.errors import InvalidArgument, ModelLoadError
from fastchat_grpc.models.tokenizer import HuggingFaceTokenizer, load_tokenizer
from fastchat_grpc.text.choice import Choice, ChoiceLimits
from fastchat_grpc.text.detokenizer import ByteDetokenizer, WindowDetokenizer, make_detokenizer
from tests.e2e.tiny_models import (
    byte_level_tokenizer,
    save_chat_tokenizer,
    save_tokenizer,
    sentencepiece_tokenizer,
    unigram_tokenizer,
    wordpiece_tokenizer,
)

KINDS = {
    "byte level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "wordpiece": wordpiece_tokenizer,
    "unigram": unigram_tokenizer,
}
_loaded: dict[str, HuggingFaceTokenizer] = {}


def wrapped(kind: str, **settings: Any) -> HuggingFaceTokenizer:
    """A tokenizer of that kind behind our interface."""
    from transformers import PreTrainedTokenizerFast

    if settings:
        return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]()), **settings)
    if kind not in _loaded:
        _loaded[kind] = HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]()))
    return _loaded[kind]


def streamed(
    tokenizer: HuggingFaceTokenizer, token_ids: list[int], *, keep: bool, prompt_ids: Sequence[int] = ()
) -> str:
    detokenizer = make_detokenizer(tokenizer, keep, prompt_ids)
    return "".join([detokenizer.push(i) for i in token_ids] + [detokenizer.flush()])


@given(st.text(max_size=60))
def test_bytes_of_byte_level_tokens_join_to_the_text(text: str) -> None:
    tokenizer = wrapped("byte level")
    token_ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in token_ids) == text.encode()
    assert tokenizer.decode(token_ids, keep_special_tokens=True) == text


@given(st.lists(st.integers(0, 401), max_size=30), st.booleans())
def test_byte_level_decoding_of_any_tokens_is_that_of_the_tokenizers_library(token_ids: list[int], keep: bool) -> None:
    tokenizer = wrapped("byte level")
    expected = tokenizer._core.decode(token_ids, skip_special_tokens=not keep)
    assert tokenizer.decode(token_ids, keep_special_tokens=keep) == expected
    assert streamed(tokenizer, token_ids, keep=keep) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_a_question_mark(kind: str) -> None:
    tokenizer = wrapped(kind)
    assert tokenizer.encode("a \ud83d b \udfff") == tokenizer.encode("a ? b ?")
    assert tokenizer.encode("é\ud83d") == tokenizer.encode("é?")


@given(st.text(max_size=60).filter(lambda text: "▁" not in text and "<" not in text))
def test_bytes_of_sentencepiece_tokens_join_to_the_text_after_a_space(text: str) -> None:
    tokenizer = wrapped("sentencepiece")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(i) for i in token_ids)
    assert joined == (b" " + text.encode() if text else b"")
    assert tokenizer.decode(token_ids) == text


@given(st.text(alphabet="The quick brown fox 日本é😀\n", max_size=40))
@settings(max_examples=50)
def test_streamed_sentencepiece_text_is_the_decoded_text(text: str) -> None:
    tokenizer = wrapped("sentencepiece")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, token_ids, keep=False) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", KINDS)
@given(
    prompt=st.text(alphabet="The quick brown fox 日本é😀\n", max_size=20),
    output=st.text(alphabet="The quick brown fox 日本é😀\n", max_size=30),
)
@settings(max_examples=60)
def test_text_after_a_prompt_is_what_decoding_both_at_once_adds(kind: str, prompt: str, output: str) -> None:
    tokenizer = wrapped(kind)
    prompt_ids = tokenizer.encode("fox" + prompt)
    if kind == "wordpiece":
        prompt_ids = prompt_ids[:-1]  # without [SEP]
    token_ids = tokenizer.encode(output, add_special_tokens=False)
    library = tokenizer._core
    before, whole = library.decode(prompt_ids), library.decode(prompt_ids + token_ids)
    assert whole.startswith(before)
    assert streamed(tokenizer, token_ids, keep=False, prompt_ids=prompt_ids) == whole[len(before) :]


def test_a_text_completion_of_a_sentencepiece_model_keeps_its_first_space() -> None:
    tokenizer = wrapped("sentencepiece")
    hello, world = tokenizer.encode("the"), tokenizer.encode("fox", add_special_tokens=False)
    request = GenerateRequest(prompt=TextPrompt("the"))
    assert text_of(request, tokenizer, hello, world) == " fox"
    chat = GenerateRequest(prompt=ChatPrompt(messages=(ChatMessage(role="user", content="the"),)))
    assert text_of(chat, tokenizer, hello, world) == "fox"
    begun = (ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="the"))
    continued = GenerateRequest(prompt=ChatPrompt(messages=begun, continue_final_message=True))
    assert text_of(continued, tokenizer, hello, world) == " fox"


def test_a_resumed_completion_keeps_its_first_space_too() -> None:
    tokenizer = wrapped("sentencepiece")
    prompt, output = tokenizer.encode("the"), tokenizer.encode("fox quick", add_special_tokens=False)
    resume = (ResumedChoice(index=0, output_token_ids=tuple(output[:1]), text_length=0),)
    request = GenerateRequest(prompt=TextPrompt("the"), resume=resume)
    assert text_of(request, tokenizer, prompt, output[1:]) == " fox quick"


def text_of(request: GenerateRequest, tokenizer: HuggingFaceTokenizer, prompt: list[int], output: list[int]) -> str:
    limits = ChoiceLimits(prompt_tokens=len(prompt), context_length=100, stream_interval=1)
    choice = Choice(request, 0, tokenizer, limits, prompt)
    for token_id in output:
        choice.push(token_id)
    choice.end(FinishReason.STOP)
    delta = choice.delta()
    assert delta is not None
    return delta.text


BYTE_TOKENS = range(3, 259)  # <0x00> to <0xFF>


@given(st.lists(st.sampled_from([*BYTE_TOKENS, 300, 310, 320, 330]), max_size=60))
@settings(max_examples=200)
def test_broken_bytes_hold_no_text_back_for_long_and_lose_none(token_ids: list[int]) -> None:
    tokenizer = wrapped("sentencepiece")
    detokenizer = make_detokenizer(tokenizer, False)
    word = tokenizer.encode("quick fox", add_special_tokens=False)
    for token_id in tokenizer.encode("你", add_special_tokens=False) + token_ids:
        detokenizer.push(token_id)
    assert "fox" in "".join(detokenizer.push(token_id) for token_id in word * 3)


@given(
    st.text(alphabet="ab é你😀\n", min_size=1, max_size=12),
    st.integers(0, 255),
    st.text(alphabet="The quick", max_size=8),
)
@settings(max_examples=200)
def test_what_is_text_before_and_after_a_broken_byte_stays_so(before: str, byte: int, after: str) -> None:
    tokenizer = wrapped("sentencepiece")
    first = tokenizer.encode(before, add_special_tokens=False)
    rest = tokenizer.encode(after, add_special_tokens=False)
    shown = streamed(tokenizer, [*first, BYTE_TOKENS[byte], *rest], keep=False)
    middle = bytes([byte]).decode("utf-8", "replace")
    assert shown == before + middle + (" " + after if after else "")


def test_bytes_of_wordpiece_tokens_show_where_words_begin() -> None:
    tokenizer = wrapped("wordpiece")
    token_ids = tokenizer.encode("the quickest fox", add_special_tokens=False)
    assert len(token_ids) > 3, "some word must be in pieces"
    assert b"".join(tokenizer.token_bytes(i) for i in token_ids) == b" the quickest fox"
    assert tokenizer.decode(token_ids) == "the quickest fox"


def test_bytes_of_unigram_tokens_join_to_the_words() -> None:
    tokenizer = wrapped("unigram")
    token_ids = tokenizer.encode("The quick fox", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(i) for i in token_ids) == b" The quick fox"


def test_bytes_of_byt5_tokens_are_the_bytes() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = HuggingFaceTokenizer(ByT5Tokenizer())
    token_ids = tokenizer.encode("é 😀", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(i) for i in token_ids) == "é 😀".encode()
    assert tokenizer.decode(token_ids) == "é 😀"


def test_a_slow_sentencepiece_tokenizer_gives_bytes_and_text(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    from transformers import BertGenerationTokenizer

    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = HuggingFaceTokenizer(BertGenerationTokenizer(str(tmp_path / "spiece.model")))
    token_ids = tokenizer.encode("the fox 😀", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(i) for i in token_ids) == " the fox 😀".encode()
    assert tokenizer.decode(token_ids) == "the fox 😀"
    assert isinstance(make_detokenizer(tokenizer, False), WindowDetokenizer)


def test_only_byte_level_vocabularies_claim_to_decode_bytes() -> None:
    assert {kind for kind in KINDS if wrapped(kind).decodes_bytes} == {"byte level"}
    assert isinstance(make_detokenizer(wrapped("byte level"), False), ByteDetokenizer)


def test_tokens_outside_the_vocabulary_are_empty_and_harmless() -> None:
    for kind in KINDS:
        tokenizer = wrapped(kind)
        assert tokenizer.token_bytes(10_000) == b""
        assert tokenizer.decode([10_000]) == ""


def test_special_tokens_are_hidden_and_other_added_tokens_are_text() -> None:
    tokenizer = wrapped("byte level")
    token_ids = tokenizer.encode("<think>a<|im_end|>")
    assert tokenizer.decode(token_ids) == "<think>a"
    assert tokenizer.decode(token_ids, keep_special_tokens=True) == "<think>a<|im_end|>"
    assert tokenizer.special_token_ids == {0, 1, 2}


def test_the_beginning_of_sequence_is_added_only_when_asked_for() -> None:
    tokenizer = wrapped("sentencepiece")
    with_bos, without = tokenizer.encode("fox"), tokenizer.encode("fox", add_special_tokens=False)
    assert with_bos == [1, *without]


def test_a_truncating_tokenizer_file_does_not_truncate() -> None:
    from transformers import PreTrainedTokenizerFast

    core = byte_level_tokenizer()
    core.enable_truncation(max_length=2)
    core.enable_padding(length=50)
    tokenizer = HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=core))
    assert tokenizer.decode(tokenizer.encode("a longer text, whole")) == "a longer text, whole"


def test_a_token_that_the_model_lacks_is_refused() -> None:
    tokenizer = wrapped("byte level", vocabulary_size=400)
    assert tokenizer.vocabulary_size == 400
    with pytest.raises(InvalidArgument, match="400 tokens"):
        tokenizer.encode("<think>")


def test_ends_of_output_come_from_tokenizer_configuration_and_names(tmp_path: Path) -> None:
    save_chat_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, eos_token_ids=[7], stop_tokens=["<think>", "<absent>"])
    assert tokenizer.eos_token_ids == {2, 7, 400}


def test_many_threads_may_encode_and_decode_at_once() -> None:
    tokenizer = wrapped("sentencepiece")
    texts = [f"the quick brown fox number {i} é😀" * 20 for i in range(8)]
    failures: list[str] = []

    def work(text: str) -> None:
        for _ in range(30):
            if tokenizer.decode(tokenizer.encode(text)) != text:
                failures.append(text)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_broken_tokenizer_file_is_one_line(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level_tokenizer())
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ModelLoadError, match=r"tokenizer of .* cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200))
def test_no_token_stands_for_more_characters_than_the_longest(text: str) -> None:
    """By this a text that cannot fit is refused without being tokenized, so it must never be too small."""
    tokenizer = wrapped("byte level")
    longest = tokenizer.longest_token
    assert longest is not None
    assert len(text) <= longest * len(tokenizer.encode(text))


def test_where_text_may_vanish_there_is_no_longest_token() -> None:
    for kind in ("sentencepiece", "wordpiece", "unigram"):
        assert wrapped(kind).longest_token is None


def test_unicode_that_is_normalized_counts_for_four() -> None:
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    core = byte_level_tokenizer()
    plain = HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer())).longest_token
    core.normalizer = normalizers.NFC()
    tokenizer = HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=core))
    assert tokenizer.longest_token == 4 * plain
    accented = "e\u0301" * 400
    assert len(accented) <= tokenizer.longest_token * len(tokenizer.encode(accented))


@pytest.fixture
def no_switching() -> Iterator[None]:
    """Threads run until they let others by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("no_switching")
@pytest.mark.parametrize("kind", ["byte level", "wordpiece"])
def test_a_long_text_is_tokenized_without_stopping_other_threads(kind: str) -> None:
    tokenizer = wrapped(kind)
    text = "the quick brown fox " * 50_000
    assert _lets_run(lambda: tokenizer.encode(text))
    if kind == "wordpiece":  # the texts of others are joined in Python
        token_ids = tokenizer.encode(text)
        assert _lets_run(lambda: tokenizer.decode(token_ids))


def _lets_run(call: Callable[[], object]) -> bool:
    """Whether another thread runs between the beginning and the end of a call."""
    seen: list[str] = []
    begun, over = threading.Event(), threading.Event()

    def other() -> None:
        begun.wait()
        while not over.is_set():
            seen.append("other")
            over.wait(0.001)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        begun.set()  # the other one wants to run from here on, and may not until this one waits
        seen.append("begin")
        call()
        seen.append("end")
    finally:
        over.set()
        thread.join()
    return "other" in seen[seen.index("begin") : seen.index("end")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [True, False])
def test_a_long_text_is_read_as_a_short_one(kind: str, special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = wrapped(kind)
    text = "the quick brown fox </s> " * 20
    expected = tokenizer.encode(text, add_special_tokens=special)
    shown = [tokenizer.decode(expected, keep_special_tokens=keep) for keep in (True, False)]
    monkeypatch.setattr("fastchat_grpc.models.tokenizer.LONG", 1)
    assert tokenizer.encode(text, add_special_tokens=special) == expected
    assert [tokenizer.decode(expected, keep_special_tokens=keep) for keep in (True, False)] == shown
