"""What the picker must know of a request: read from its body without holding up the event loop.

A small body is parsed. Of a large one only the members that matter are found, piece by piece with other work
in between: a full parse of megabytes of brackets would stop the controller for a second.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import DecodeError

from fastchat_grpc.config import MAX_MESSAGE_BYTES
from fastchat_grpc.controller.relay import AFFINITY_CHARACTERS
from fastchat_grpc.core import Capability
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.openai.asks import ASKING_MEMBERS, asks_for, goes_on_with
from fastchat_grpc.openai.jsonio import parse_object, type_name
from fastchat_grpc.rpc.resume import EMBEDS, ResumeNeeds, going_on_needs, resume_needs, uses
from fastchat_grpc.v1 import generation_pb2 as pb

SMALL_BYTES = 64 * 1024
MAX_TOKENS = 500_000
"""Strings and brackets of a body. Ten times what 128 tools and a thousand messages have."""
SLICE = 2_000
"""So many of them are read between two looks at other work; about a millisecond."""
_FRAME = 5  # a flag for compression, and four bytes of length
_OPENAI = "/fastchat_grpc.v1.OpenAIService/"
_GENERATE = "/fastchat_grpc.v1.GenerationService/Generate"
_EMBED = "/fastchat_grpc.v1.GenerationService/Embed"
_CHAT = "ChatCompletions"
_EMBEDDINGS = "Embeddings"
_WANTED = frozenset({"model", "stream", "prompt_cache_key", "prompt", "messages", *ASKING_MEMBERS})
MAX_NAME_BYTES = 256
"""Of a member's name. Each character may be written as six, and the longest that matters has less than 40."""
LARGE_OBJECT: Mapping[str, Any] = MappingProxyType({"type": "json_schema"})
"""Stands for an object that is too large to be read: what has one is a schema."""
_STRUCTURE = re.compile(rb'["\[\]{}]')
_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"[^\s,\]}]+")


class Asked(NamedTuple):
    """What a request asks for.

    Attributes:
        model: its name; empty for the only one.
        adapter: name of a LoRA adapter that is given apart from the model.
        key: what prefix_affinity goes by, where it is asked for.
        stream: whether the answer comes in pieces.
        typed: whether it is one of the native API.
        prefers: what the request asks of a model that not every backend can do.
        resumed: what goes on with an answer that another server has begun must have.
        goes_on: what goes on with this request's answer must have; `backend` is set where it must be the same.
    """

    model: str
    adapter: str = ""
    key: str = ""
    stream: bool = False
    typed: bool = False
    prefers: frozenset[Capability] = frozenset()
    resumed: ResumeNeeds | None = None
    goes_on: ResumeNeeds = ResumeNeeds(frozenset())


async def read_request(
    path: str, encoding: str, body: bytes, key_of: Callable[[pb.GenerateRequest], str] | None
) -> Asked:
    """Read the gRPC message of a request of `path`. Raises InvalidArgument as its worker would.

    Args:
        key_of: what prefix_affinity groups typed requests by; None where nothing goes by it.
    """
    message = unframe(body, encoding)
    try:
        if path == _GENERATE:
            generate = pb.GenerateRequest.FromString(message)
            key = key_of(generate) if key_of is not None else ""
            return Asked(
                generate.model,
                generate.lora_adapter,
                key,
                stream=True,
                typed=True,
                prefers=uses(generate),
                resumed=resume_needs(generate, generate.resume) if generate.HasField("resume") else None,
                goes_on=going_on_needs(generate),
            )
        if path == _EMBED:
            return Asked(pb.EmbedRequest.FromString(message).model, prefers=EMBEDS)
        if path.startswith(_OPENAI):
            data = HttpBody.FromString(message).data
            values = parse_object(data) if len(data) <= SMALL_BYTES else await find_members(data)
            return _of_openai(path.removeprefix(_OPENAI), values, wants_key=key_of is not None)
    except DecodeError:
        raise InvalidArgument("body", "is not a valid message of this method") from None
    raise InvalidArgument("", "this method is not served through the picker")


def _of_openai(method: str, values: Mapping[str, Any], *, wants_key: bool) -> Asked:
    model = values.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidArgument("model", f"must be a string, not {type_name(model)}")
    key = _json_key(values) if wants_key else ""
    prefers = EMBEDS if method == _EMBEDDINGS else asks_for(values, chat=method == _CHAT)
    stream = values.get("stream") is True
    return Asked(model or "", key=key, stream=stream, prefers=prefers, goes_on=goes_on_with(values))


def unframe(body: bytes, encoding: str) -> bytes:
    """The first gRPC message of a body. Raises InvalidArgument."""
    length = int.from_bytes(body[1:_FRAME], "big")
    message = body[_FRAME : _FRAME + length]
    if len(body) < _FRAME or len(message) < length:
        raise InvalidArgument("body", "is cut short or is not a gRPC message")
    if not body[0]:
        return message
    if encoding not in ("gzip", "deflate"):
        raise InvalidArgument("body", "is compressed by a method other than gzip or deflate")
    try:
        inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
        message = inflater.decompress(message, MAX_MESSAGE_BYTES)
    except zlib.error:
        raise InvalidArgument("body", f"is not valid {encoding}") from None
    if inflater.unconsumed_tail:
        raise InvalidArgument("body", f"must have at most {MAX_MESSAGE_BYTES} bytes when decompressed")
    return message


# ------------------------------------------------------------------------------------------ large JSON bodies


async def find_members(body: bytes) -> dict[str, Any]:
    """The members of a JSON object that the picker reads; of a list, what its beginning has.

    What is passed over is not checked: the worker does that. Raises InvalidArgument.
    """
    scanner = _Scanner(body)
    found: dict[str, Any] = {}
    at = scanner.expect(0, b"{")
    if (closing := scanner.skip_space(at)) < len(body) and body[closing : closing + 1] == b"}":
        return found
    while True:
        start = scanner.expect(at, b'"') - 1
        at = await scanner.string(start)
        name = _name(body[start + 1 : at - 1])
        start = scanner.skip_space(scanner.expect(at, b":"))
        at = await scanner.value(start)
        if name in _WANTED:
            found[name] = _load(body, start, at)
        at = scanner.skip_space(at)
        if body[at : at + 1] == b"}":
            return found
        at = scanner.expect(at, b",")


def _name(text: bytes) -> str:
    """A member's name, as the worker will read it; empty for one that is too long to be of those that matter."""
    if len(text) > MAX_NAME_BYTES:
        return ""
    if b"\\" not in text:
        return text.decode("ascii", "replace")
    try:
        return str(json.loads(b'"' + text + b'"'))
    except ValueError:
        return ""


class _Scanner:
    """Finds where the values of a JSON text end."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._tokens = 0

    def skip_space(self, at: int) -> int:
        found = _SPACE.match(self._body, at)
        return found.end() if found is not None else at

    def expect(self, at: int, mark: bytes) -> int:
        """Where the text goes on after a mark that must come next."""
        at = self.skip_space(at)
        if self._body[at : at + 1] != mark:
            raise _invalid(at)
        return at + 1

    async def value(self, at: int) -> int:
        """The end of the value that begins here."""
        first = self._body[at : at + 1]
        if first == b'"':
            return await self.string(at)
        if first in (b"{", b"["):
            return await self._nested(at)
        found = _SCALAR.match(self._body, at)
        if found is None:
            raise _invalid(at)
        return found.end()

    async def string(self, at: int) -> int:
        """The end of the string whose first quote is here."""
        body, start = self._body, at + 1
        while True:
            await self._count()
            quote = body.find(b'"', start)
            if quote < 0:
                raise _invalid(len(body))
            between = body[start:quote]
            if (len(between) - len(between.rstrip(b"\\"))) % 2 == 0:
                return quote + 1
            start = quote + 1

    async def _nested(self, at: int) -> int:
        depth = 0
        while True:
            await self._count()
            found = _STRUCTURE.search(self._body, at)
            if found is None:
                raise _invalid(len(self._body))
            at, mark = found.end(), found[0]
            if mark == b'"':
                at = await self.string(at - 1)
            elif mark in b"[{":
                depth += 1
            else:
                depth -= 1
                if depth == 0:
                    return at

    async def _count(self) -> None:
        self._tokens += 1
        if self._tokens % SLICE == 0:
            if self._tokens > MAX_TOKENS:
                raise InvalidArgument("body", f"must have at most {MAX_TOKENS} strings, lists and objects")
            await asyncio.sleep(0)


def _invalid(at: int) -> InvalidArgument:
    return InvalidArgument("body", f"is not valid JSON (at byte {at})")


def _load(body: bytes, start: int, end: int) -> Any:
    """A value: a string or list at least as far as its beginning goes, anything else as it is."""
    text = body[start : min(end, start + SMALL_BYTES)].decode("utf-8", "replace")
    try:
        if end - start <= SMALL_BYTES:
            return json.loads(text)
        if text.startswith('"'):
            return json.loads(text.rstrip("\\")[:-12].rstrip("\\") + '"')  # no escape is cut in two
    except ValueError:
        return None
    if text.startswith("{"):
        return LARGE_OBJECT
    return _first_items(text) if text.startswith("[") else None


def _first_items(text: str) -> list[Any]:
    """The items of a list that are whole in the beginning of its text."""
    decoder, items, at = json.JSONDecoder(), [], 1
    try:
        while True:
            at += len(text[at:]) - len(text[at:].lstrip())
            item, at = decoder.raw_decode(text, at)
            items.append(item)
            at = text.index(",", at) + 1
    except ValueError:
        return items


# ------------------------------------------------------------------------------------------ prefix affinity


def _json_key(values: Mapping[str, Any]) -> str:
    """What prefix_affinity groups an OpenAI request by: its cache key, or how its prompt begins."""
    if isinstance(named := values.get("prompt_cache_key"), str) and named:
        return named
    if isinstance(prompt := values.get("prompt"), str):
        return prompt[:AFFINITY_CHARACTERS]
    text = ""
    messages = values.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            content = message.get("content")
            text += f"{message.get('role')}:{content if isinstance(content, str) else ''}\n"
        if len(text) >= AFFINITY_CHARACTERS:
            break
    return text[:AFFINITY_CHARACTERS]
