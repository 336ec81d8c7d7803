"""The Hugging Face tokenizer: exact bytes of every kind of vocabulary, and decoding that agrees with them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_grpc.errors import InvalidArgument, ModelLoadError
from fastchat_grpc.models.tokenizer import HuggingFaceTokenizer, load_tokenizer
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


def streamed(tokenizer: HuggingFaceTokenizer, token_ids: list[int], *, keep: bool) -> str:
    detokenizer = make_detokenizer(tokenizer, keep)
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
