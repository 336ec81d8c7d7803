"""Models and loads of workers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fastchat_grpc.core import (
    INT32_MAX,
    INT64_MAX,
    Capability,
    Load,
    ModelInfo,
    WorkerState,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.rpc.convert.fields import duration, seconds
from fastchat_grpc.v1 import generation_pb2 as pb

_STATE_TO_PB = {
    WorkerState.STARTING: pb.WORKER_STATE_STARTING,
    WorkerState.SERVING: pb.WORKER_STATE_SERVING,
    WorkerState.DEGRADED: pb.WORKER_STATE_DEGRADED,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
}
_STATE_FROM_PB = {number: state for state, number in _STATE_TO_PB.items()}
_CAPABILITY_TO_PB: dict[Capability, Any] = {c: pb.Capability.Value(f"CAPABILITY_{c.name}") for c in Capability}
_CAPABILITY_FROM_PB = {number: c for c, number in _CAPABILITY_TO_PB.items()}


@lru_cache(maxsize=4096)
def model_to_pb(model: ModelInfo) -> pb.ModelInfo:
    """Convert a model's description. Not to be changed: equal descriptions share one message."""
    return pb.ModelInfo(
        name=model.name,
        context_length=model.context_length,
        capabilities=sorted(_CAPABILITY_TO_PB[c] for c in model.capabilities),
        base_model=model.base_model,
        backend=model.backend,
        embedding_size=model.embedding_size,
        vocabulary_size=model.vocabulary_size,
        fingerprint=model.fingerprint,
        revision=model.revision,
        quantization=model.quantization,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        max_output_length=model.max_output_length,
    )


def model_from_pb(message: pb.ModelInfo) -> ModelInfo:
    """Convert a model's description back; capabilities of a newer contract are dropped."""
    return ModelInfo(
        name=message.name,
        context_length=message.context_length,
        capabilities=frozenset(_CAPABILITY_FROM_PB[c] for c in message.capabilities if c in _CAPABILITY_FROM_PB),
        base_model=message.base_model,
        backend=message.backend,
        embedding_size=message.embedding_size,
        vocabulary_size=message.vocabulary_size,
        fingerprint=message.fingerprint,
        revision=message.revision,
        quantization=message.quantization,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        max_output_length=message.max_output_length,
    )


def capability_from_pb(number: int, path: str) -> Capability:
    """The capability of a number in the contract. Raises InvalidArgument for one that is unknown here."""
    found = _CAPABILITY_FROM_PB.get(number)
    if found is None:
        raise InvalidArgument(path, f"is no capability of this version: {number}")
    return found


def state_to_pb(state: WorkerState) -> Any:
    """The number of a state in the contract."""
    return _STATE_TO_PB[state]


def load_to_pb(load: Load) -> pb.WorkerLoad:
    """Convert a load. What is more than a field holds, as the sum of a fleet may be, is as much as it holds."""
    return pb.WorkerLoad(
        state=_STATE_TO_PB[load.state],
        running_count=min(load.running, INT32_MAX),
        waiting_count=min(load.waiting, INT32_MAX),
        max_running_count=min(load.max_running, INT32_MAX),
        max_waiting_count=min(load.max_waiting, INT32_MAX),
        kv_cache_usage=load.kv_cache_usage,
        tokens_per_second=load.tokens_per_second,
        kv_free_token_count=min(load.kv_free_tokens, INT64_MAX),
        oldest_waiting_age=None if load.oldest_waiting_s is None else duration(load.oldest_waiting_s),
    )


def load_from_pb(message: pb.WorkerLoad) -> Load:
    """Convert a load back. An unset state counts as SERVING."""
    return Load(
        state=_STATE_FROM_PB.get(message.state, WorkerState.SERVING),
        running=message.running_count,
        waiting=message.waiting_count,
        max_running=message.max_running_count,
        max_waiting=message.max_waiting_count,
        kv_cache_usage=message.kv_cache_usage,
        tokens_per_second=message.tokens_per_second,
        kv_free_tokens=message.kv_free_token_count,
        oldest_waiting_s=seconds(message.oldest_waiting_age) if message.HasField("oldest_waiting_age") else None,
    )
