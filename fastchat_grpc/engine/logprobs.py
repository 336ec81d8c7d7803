"""Log probabilities from raw logits, before any processor."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from fastchat_grpc.core import TokenLogprob, TopLogprob
from fastchat_grpc.text.tokenizer import Tokenizer


def token_logprobs(
    logits: torch.Tensor, token_ids: Rows[int], alternatives: Rows[int], tokenizer: Tokenizer
) -> list[TokenLogprob]:
    """Natural log probability of one token per row of `logits` (rows, vocabulary), with the likeliest others.

    `alternatives` says how many of the likeliest tokens each row wants, 0 for none.
    """
    total = logits.logsumexp(dim=-1)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0] - total
    most = min(max(alternatives), logits.shape[-1])
    values, ids = logits.topk(most, dim=-1)
    values = values - total[:, None]
    rows = zip(token_ids, alternatives, chosen.tolist(), values.tolist(), ids.tolist(), strict=True)
    return [
        TokenLogprob(
            token_id=token_id,
            token=_text(tokenizer, token_id),
            token_bytes=tokenizer.token_bytes(token_id),
            logprob=logprob,
            top=tuple(
                TopLogprob(i, _text(tokenizer, i), tokenizer.token_bytes(i), v)
                for i, v in zip(top_ids[:count], top_values[:count], strict=True)
            ),
        )
        for token_id, count, logprob, top_values, top_ids in rows
    ]


def unknown_logprob(token_id: int, tokenizer: Tokenizer) -> TokenLogprob:
    """The entry of a prompt's first token, which follows nothing."""
    return TokenLogprob(token_id, _text(tokenizer, token_id), tokenizer.token_bytes(token_id), None)


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")
