"""POST /v1/embeddings: from JSON to a domain request, and back."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastchat_grpc.core import MAX_EMBED_INPUTS, EmbedRequest, EmbedResult, ModelInfo
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.openai.fields import Fields, integers
from fastchat_grpc.openai.jsonio import dumps, type_name
from fastchat_grpc.openai.settings import find_model, ignore_harmless, model_name

RENAMES = {"inputs": "input"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCall:
    """A parsed request: what to embed, and how to answer."""

    request: EmbedRequest
    model: str
    as_base64: bool
    ignored: tuple[str, ...] = ()


def parse_embeddings(values: Mapping[str, Any], models: Sequence[ModelInfo], *, strict: bool = False) -> EmbeddingCall:
    """Check and convert. Raises InvalidArgument, which names the field."""
    fields = Fields(values)
    name = model_name(fields)
    model = find_model(models, name)
    inputs = _inputs(fields.raw("input"))
    dimensions = fields.integer("dimensions", 1)
    if dimensions is not None and model is not None and dimensions != model.embedding_size:
        raise fields.wrong("dimensions", f"must be the model's own {model.embedding_size}, got {dimensions}")
    as_base64 = fields.one_of("encoding_format", ("float", "base64")) == "base64"
    request = EmbedRequest(
        inputs=inputs,
        model=name,
        truncate=fields.flag("truncate"),
        normalize=fields.flag("normalize") is not False,
    )
    ignore_harmless(fields)
    fields.unsupported("truncate_prompt_tokens", hint="use truncate: true")
    fields.unsupported("output_dimension", hint="use dimensions")
    fields.unsupported("output_dtype", "float")
    # What other servers put before each text themselves.
    for name in ("input_type", "task", "prompt_name", "instruction"):
        fields.unsupported(name, hint="write it into the input, as the model wants it")
    return EmbeddingCall(
        request=request,
        model=name or (model.name if model is not None else ""),
        as_base64=as_base64,
        ignored=fields.rest(strict=strict),
    )


def _inputs(value: object) -> tuple[str | tuple[int, ...], ...]:
    if value is None:
        raise InvalidArgument("input", "is required")
    if isinstance(value, str):
        return (_input(value, "input"),)
    if not isinstance(value, list):
        raise InvalidArgument("input", f"must be a string, token ids, or a list of either, got {type_name(value)}")
    if value and isinstance(value[0], (int, float)):
        return (_input(value, "input"),)
    if not 1 <= len(value) <= MAX_EMBED_INPUTS:
        raise InvalidArgument("input", f"must hold 1 to {MAX_EMBED_INPUTS} inputs, got {len(value)}")
    return tuple(_input(item, f"input[{i}]") for i, item in enumerate(value))


def _input(value: object, path: str) -> str | tuple[int, ...]:
    if not isinstance(value, (str, list)):
        raise InvalidArgument(path, f"must be a string or token ids, got {type_name(value)}")
    if not value:
        raise InvalidArgument(path, "must not be empty")
    return value if isinstance(value, str) else integers(value, path)


def render_embeddings(call: EmbeddingCall, result: EmbedResult) -> bytes:
    """The body: vectors as numbers, or as base64 of little-endian 32-bit floats."""
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(vector) if call.as_base64 else list(vector)}
        for i, vector in enumerate(result.embeddings)
    ]
    usage = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
    return dumps({"object": "list", "data": data, "model": call.model, "usage": usage})


def _base64(vector: Sequence[float]) -> str:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode("ascii")
