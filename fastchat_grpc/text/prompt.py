"""Prompts to token ids, with the checks that need a model."""

from __future__ import annotations

from collections.abc import Sequence

from fastchat_grpc.core import ChatPrompt, GenerateRequest, Prompt, PromptEcho, TextPrompt, TokenLogprob, TokenPrompt
from fastchat_grpc.errors import InvalidArgument, PromptTooLong
from fastchat_grpc.text.tokenizer import Tokenizer


def tokenize(tokenizer: Tokenizer, prompt: Prompt, most: int | None = None) -> list[int]:
    """Token ids of a prompt.

    Args:
        most: tokens of which there can be no more; a text that must have more is refused before it is tokenized.

    Raises:
        InvalidArgument: ids are outside the vocabulary, or there are none.
        PromptTooLong: see `most`.
    """
    match prompt:
        case TextPrompt(text):
            _refuse_longer(tokenizer, text, most)
            token_ids = tokenizer.encode(text)
        case ChatPrompt() as chat:
            # The template writes the special tokens itself.
            text = tokenizer.render_chat(chat)
            _refuse_longer(tokenizer, text, most)
            token_ids = tokenizer.encode(text, add_special_tokens=False)
        case TokenPrompt(ids):
            check_token_ids("prompt_token_ids.ids", ids, tokenizer.vocabulary_size)
            token_ids = list(ids)
    if not token_ids:
        raise InvalidArgument("input", "the prompt has no tokens")
    return token_ids


def prepare(
    tokenizer: Tokenizer, request: GenerateRequest, context_length: int, *, output_apart: bool = False
) -> list[int]:
    """Token ids of a request's prompt, truncated if it asks for that.

    Args:
        output_apart: the output has a context of its own, as in an encoder-decoder, and needs no room beside it.

    Raises:
        InvalidArgument: a token id of the request is outside the vocabulary.
        PromptTooLong: the context has no room for the prompt and one new token.
    """
    vocabulary_size = tokenizer.vocabulary_size
    check_token_ids("stopping.stop_token_ids", request.stopping.stop_token_ids, vocabulary_size)
    check_token_ids("sampling.logit_bias", tuple(request.sampling.logit_bias), vocabulary_size)
    for choice in request.resume or ():
        check_token_ids("resume.choices.output_token_ids", choice.output_token_ids, vocabulary_size)
    most = context_length if request.truncate_prompt_tokens is None else None
    token_ids = tokenize(tokenizer, request.prompt, most)
    if request.truncate_prompt_tokens is not None:
        token_ids = token_ids[-request.truncate_prompt_tokens :]
    if len(token_ids) >= context_length + output_apart:
        raise PromptTooLong("input", len(token_ids), context_length)
    return token_ids


def _refuse_longer(tokenizer: Tokenizer, text: str, most: int | None) -> None:
    """Raise PromptTooLong for a text of more than `most` tokens, where its length alone says so."""
    if most is None or len(text) <= most:
        return
    longest = tokenizer.longest_token
    if longest is not None and len(text) > most * longest:
        raise PromptTooLong("input", -(-len(text) // longest), most, at_least=True)


def echo(
    tokenizer: Tokenizer, request: GenerateRequest, token_ids: Sequence[int], logprobs: tuple[TokenLogprob, ...] = ()
) -> PromptEcho | None:
    """The event that shows the prompt, or None where it is not asked for or was already sent."""
    if request.resume is not None or not (request.output.echo or request.output.prompt_logprobs is not None):
        return None
    match request.prompt:
        case TextPrompt(text) if request.truncate_prompt_tokens is None:
            pass
        case _:
            text = tokenizer.decode(token_ids, keep_special_tokens=True)
    return PromptEcho(text=text, token_ids=tuple(token_ids), logprobs=logprobs)


def check_token_ids(path: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    """Raise InvalidArgument for the first id outside the vocabulary."""
    if token_ids and min(token_ids) < 0:
        i, token_id = next((i, token_id) for i, token_id in enumerate(token_ids) if token_id < 0)
        raise InvalidArgument(f"{path}[{i}]", f"must be at least 0, got {token_id}")
    if token_ids and max(token_ids) >= vocabulary_size:
        i, token_id = next((i, token_id) for i, token_id in enumerate(token_ids) if token_id >= vocabulary_size)
        place = token_id if path == "sampling.logit_bias" else i
        raise InvalidArgument(
            f"{path}[{place}]", f"token id {token_id} is not below the vocabulary size of {vocabulary_size}"
        )
