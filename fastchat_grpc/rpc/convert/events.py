"""Events of a generation."""

from __future__ import annotations

from collections.abc import Iterable

from fastchat_grpc.core import (
    Completion,
    Delta,
    Event,
    FinishReason,
    Origin,
    PromptEcho,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from fastchat_grpc.rpc.convert.fields import duration, seconds
from fastchat_grpc.v1 import generation_pb2 as pb

_FINISH_TO_PB = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.CONTENT_FILTER: pb.FINISH_REASON_CONTENT_FILTER,
}
_FINISH_FROM_PB = {number: reason for reason, number in _FINISH_TO_PB.items()}
_NOBODY = Origin()


def event_to_pb(event: Event) -> pb.GenerateResponse:
    """Convert an event of a generation."""
    match event:
        case Delta():
            return pb.GenerateResponse(
                delta=pb.Delta(
                    index=event.index,
                    text=event.text,
                    token_ids=event.token_ids,
                    logprobs=[logprob_to_pb(entry) for entry in event.logprobs],
                    usage=usage_to_pb(event.usage),
                    cumulative_text=event.cumulative_text,
                    reasoning=event.reasoning,
                )
            )
        case Completion():
            return pb.GenerateResponse(completion=_completion_to_pb(event))
        case PromptEcho():
            return pb.GenerateResponse(
                prompt=pb.Prompt(
                    text=event.text,
                    token_ids=event.token_ids,
                    logprobs=[logprob_to_pb(entry) for entry in event.logprobs],
                )
            )


def event_from_pb(message: pb.GenerateResponse, logprobs: tuple[TokenLogprob, ...] | None = None) -> Event:
    """Convert an event of a generation back. Raises ValueError on an event of a newer contract.

    Args:
        logprobs: those of the event, where they have been converted already.
    """
    match message.WhichOneof("event"):
        case "delta":
            delta = message.delta
            return Delta(
                index=delta.index,
                text=delta.text,
                token_ids=tuple(delta.token_ids),
                logprobs=_logprobs(delta.logprobs) if logprobs is None else logprobs,
                usage=_usage_from_pb(delta.usage),
                cumulative_text=delta.cumulative_text,
                reasoning=delta.reasoning,
            )
        case "completion":
            return _completion_from_pb(message.completion)
        case "prompt":
            prompt = message.prompt
            return PromptEcho(
                text=prompt.text,
                token_ids=tuple(prompt.token_ids),
                logprobs=_logprobs(prompt.logprobs) if logprobs is None else logprobs,
            )
    raise ValueError("GenerateResponse without a known event")


def _logprobs(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(map(logprob_from_pb, messages))


def _completion_to_pb(event: Completion) -> pb.Completion:
    message = pb.Completion(
        index=event.index,
        finish_reason=_FINISH_TO_PB[event.finish_reason],
        usage=usage_to_pb(event.usage),
        timings=pb.Timings(
            queued=duration(event.timings.queued_s),
            time_to_first_token=duration(event.timings.time_to_first_token_s),
            total=duration(event.timings.total_s),
        ),
    )
    if isinstance(event.matched, str):
        message.stop_string = event.matched
    elif event.matched is not None:
        message.stop_token_id = event.matched
    if event.origin is not None:
        message.model = event.origin.model
        message.worker_id = event.origin.worker_id
        message.request_id = event.origin.request_id
        message.model_fingerprint = event.origin.model_fingerprint
    return message


def _completion_from_pb(message: pb.Completion) -> Completion:
    match message.WhichOneof("matched"):
        case "stop_string":
            matched: str | int | None = message.stop_string
        case "stop_token_id":
            matched = message.stop_token_id
        case _:
            matched = None
    return Completion(
        index=message.index,
        finish_reason=_FINISH_FROM_PB.get(message.finish_reason, FinishReason.ABORT),
        matched=matched,
        usage=_usage_from_pb(message.usage),
        timings=Timings(
            queued_s=seconds(message.timings.queued),
            time_to_first_token_s=seconds(message.timings.time_to_first_token),
            total_s=seconds(message.timings.total),
        ),
        origin=_origin_from_pb(message),
    )


def _origin_from_pb(message: pb.Completion) -> Origin | None:
    origin = Origin(
        model=message.model,
        worker_id=message.worker_id,
        request_id=message.request_id,
        model_fingerprint=message.model_fingerprint,
    )
    return origin if origin != _NOBODY else None


def usage_to_pb(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_token_count=usage.prompt_tokens,
        completion_token_count=usage.completion_tokens,
        total_token_count=usage.total_tokens,
        cached_token_count=usage.cached_tokens,
        reasoning_token_count=usage.reasoning_tokens,
    )


def _usage_from_pb(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_token_count,
        completion_tokens=message.completion_token_count,
        cached_tokens=message.cached_token_count,
        reasoning_tokens=message.reasoning_token_count,
    )


def logprob_to_pb(entry: TokenLogprob) -> pb.TokenLogprob:
    """Convert the log probability of a token."""
    return pb.TokenLogprob(
        token_id=entry.token_id,
        token=entry.token,
        token_bytes=entry.token_bytes,
        logprob=entry.logprob,
        top=[
            pb.TopLogprob(token_id=top.token_id, token=top.token, token_bytes=top.token_bytes, logprob=top.logprob)
            for top in entry.top
        ],
    )


def logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    """Convert the log probability of a token back."""
    return TokenLogprob(
        token_id=message.token_id,
        token=message.token,
        token_bytes=message.token_bytes,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple(TopLogprob(top.token_id, top.token, top.token_bytes, top.logprob) for top in message.top),
    )
