"""Messages to domain types and back. The inside of the program never sees a message.

Presence decides: an unset optional field takes the default of the domain type. Conversion checks
what the wire allows and the domain does not, and raises InvalidArgument with the field's path.
"""

from __future__ import annotations

from fastchat_grpc.rpc.convert.chat import chat_from_pb, chat_to_pb
from fastchat_grpc.rpc.convert.embeddings import (
    embed_request_from_pb,
    embed_request_to_pb,
    embed_result_from_pb,
    embed_result_to_pb,
)
from fastchat_grpc.rpc.convert.events import event_from_pb, event_to_pb, logprob_from_pb, logprob_to_pb, usage_to_pb
from fastchat_grpc.rpc.convert.fields import duration, seconds
from fastchat_grpc.rpc.convert.requests import generate_request_from_pb, generate_request_to_pb, text_or_chat
from fastchat_grpc.rpc.convert.workers import (
    capability_from_pb,
    load_from_pb,
    load_to_pb,
    model_from_pb,
    model_to_pb,
    state_to_pb,
)

__all__ = [
    "capability_from_pb",
    "chat_from_pb",
    "chat_to_pb",
    "duration",
    "embed_request_from_pb",
    "embed_request_to_pb",
    "embed_result_from_pb",
    "embed_result_to_pb",
    "event_from_pb",
    "event_to_pb",
    "generate_request_from_pb",
    "generate_request_to_pb",
    "load_from_pb",
    "load_to_pb",
    "logprob_from_pb",
    "logprob_to_pb",
    "model_from_pb",
    "model_to_pb",
    "seconds",
    "state_to_pb",
    "text_or_chat",
    "usage_to_pb",
]
