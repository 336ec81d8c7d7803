"""Embeddings."""

from __future__ import annotations

from fastchat_grpc.core import (
    EmbedRequest,
    EmbedResult,
    Usage,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.rpc.convert.events import usage_to_pb
from fastchat_grpc.rpc.convert.fields import present
from fastchat_grpc.v1 import generation_pb2 as pb


def embed_request_from_pb(message: pb.EmbedRequest) -> EmbedRequest:
    """Check and convert an EmbedRequest. Raises InvalidArgument."""
    inputs: list[str | tuple[int, ...]] = []
    for i, item in enumerate(message.inputs):
        match item.WhichOneof("input"):
            case "text":
                inputs.append(item.text)
            case "token_ids":
                inputs.append(tuple(item.token_ids.ids))
            case _:
                raise InvalidArgument(f"inputs[{i}]", "set text or token_ids")
    return EmbedRequest(
        inputs=tuple(inputs),
        model=message.model,
        normalize=not message.skip_normalization,
        **present(message, "truncate"),
    )


def embed_request_to_pb(request: EmbedRequest) -> pb.EmbedRequest:
    """Convert an EmbedRequest."""
    return pb.EmbedRequest(
        model=request.model,
        inputs=[
            pb.EmbedInput(text=item) if isinstance(item, str) else pb.EmbedInput(token_ids=pb.TokenIds(ids=item))
            for item in request.inputs
        ],
        truncate=request.truncate,
        skip_normalization=not request.normalize,
    )


def embed_result_to_pb(result: EmbedResult) -> pb.EmbedResponse:
    """Convert embeddings."""
    return pb.EmbedResponse(
        embeddings=[pb.Embedding(values=vector) for vector in result.embeddings],
        usage=usage_to_pb(Usage(prompt_tokens=result.prompt_tokens)),
    )


def embed_result_from_pb(message: pb.EmbedResponse) -> EmbedResult:
    """Convert embeddings back."""
    return EmbedResult(
        embeddings=[list(embedding.values) for embedding in message.embeddings],
        prompt_tokens=message.usage.prompt_token_count,
    )
