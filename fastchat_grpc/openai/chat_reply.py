"""Replies of chat completions: a stream of chunks, or one body."""

from __future__ import annotations

import hashlib
import string
from typing import Any

from fastchat_grpc.core import Completion, Delta, Event, PromptEcho, TokenLogprob
from fastchat_grpc.openai.call import Call, Reply, ToolMode
from fastchat_grpc.openai.chunks import ChunkWriter, Collected, write_body
from fastchat_grpc.openai.finish import base_of, final_reason
from fastchat_grpc.openai.jsonio import dumps, quote
from fastchat_grpc.openai.logprobs import chat_logprobs
from fastchat_grpc.openai.tally import Tally
from fastchat_grpc.openai.tools.parser import NamedCallParser, ToolCallParser
from fastchat_grpc.openai.tools.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from fastchat_grpc.text.offsets import TextOffsets

_ID_LETTERS = string.ascii_letters + string.digits


def _parser(reply: Reply) -> ToolCallParser | NamedCallParser | None:
    tools = reply.tools
    match tools.mode:
        case ToolMode.NONE:
            return None
        case ToolMode.NAMED:
            return NamedCallParser(tools.names[0])
        case _:
            return ToolCallParser(tools.names, parallel=tools.parallel, forced=tools.forced, tools=tools.tools)


def _finish_reason(end: Completion | None, reply: Reply, *, called: bool) -> str:
    reason = final_reason(end)
    # As OpenAI does: a call that the caller named ends with "stop", one that the model chose with "tool_calls".
    return "tool_calls" if called and reason == "stop" and reply.tools.mode is not ToolMode.NAMED else reason


def _call_id(reply_id: str, choice: int, call: int) -> str:
    """The name of a call, the same at every worker that makes the reply.

    Chat templates of Mistral's models take nine letters and digits, and nothing else.
    """
    number = int.from_bytes(hashlib.blake2b(f"{reply_id}/{choice}/{call}".encode(), digest_size=8).digest())
    letters = []
    for _ in range(9):
        number, letter = divmod(number, len(_ID_LETTERS))
        letters.append(_ID_LETTERS[letter])
    return "".join(letters)


class _StreamedChoice:
    """What a streamed choice has pending."""

    __slots__ = ("head", "index", "logprobs", "parser", "places")

    def __init__(self, index: int, head: bytes, reply: Reply) -> None:
        self.index = index
        self.head = head
        self.parser = _parser(reply)
        self.places = TextOffsets()
        self.logprobs: list[TokenLogprob] = []


class ChatStream:
    """Renders chunks: per choice a role chunk, content chunks and a finish chunk; usage and [DONE] at the end."""

    def __init__(self, call: Call, reply_id: str, created: int) -> None:
        self._id = reply_id
        self._reply = call.reply
        self._tally = Tally(call.choices_per_prompt)
        base = base_of(call.reply, reply_id, "chat.completion.chunk", created)
        self._chunks = ChunkWriter(call.reply, base, self._tally, b'"delta":{', b"}")
        self._choices: dict[int, _StreamedChoice] = {}

    def feed(self, event: Event, base: int = 0) -> bytes:
        """The chunks of an event; nothing where it says nothing new. A chat has one prompt, so `base` is 0."""
        match event:
            case Delta():
                return self._delta(event)
            case Completion():
                return self._completion(event)
            case PromptEcho():
                return b""

    def settled(self, index: int) -> bool:
        """Whether all log probabilities of a choice have been told."""
        choice = self._choices.get(index)
        return choice is None or (choice.places.settled and not choice.logprobs)

    def end(self) -> bytes:
        """What follows the last choice."""
        return self._chunks.end()

    def _delta(self, event: Delta) -> bytes:
        self._tally.note(event.index, event.usage)
        choice = self._choices.get(event.index)
        opening = b""
        if choice is None:
            choice, opening = self._open(event.index)
        if choice.parser is None and self._chunks.plain and not event.reasoning:
            if not event.text:
                return opening
            return opening + choice.head + b'"content":' + quote(event.text) + self._chunks.plain_tail
        if self._reply.logprobs:
            said = event.reasoning + event.text
            choice.logprobs.extend([entry for entry, _ in choice.places.feed(event.logprobs, said)])
        return opening + self._render(choice, self._pieces(choice, event))

    def _pieces(self, choice: _StreamedChoice, event: Delta) -> list[Piece]:
        pieces: list[Piece] = []
        if event.reasoning:
            if self._reply.reasoning:
                pieces.append(Reasoning(event.reasoning))
            if not event.text:
                return pieces
        return pieces + ([Content(event.text)] if choice.parser is None else choice.parser.feed(event.text))

    def _completion(self, event: Completion) -> bytes:
        self._tally.note(event.index, event.usage)
        choice = self._choices.get(event.index)
        opening = b""
        if choice is None:
            choice, opening = self._open(event.index)
        # Tokens that do not show, such as the end or a stop string, are no part of what is told.
        choice.logprobs.extend(entry for entry, _ in choice.places.close()[0])
        rest = self._render(choice, choice.parser.close()) if choice.parser is not None else b""
        called = choice.parser is not None and choice.parser.called
        finish = _finish_reason(event, self._reply, called=called)
        return opening + rest + choice.head + self._chunks.last_tail(_take_logprobs(choice), finish, event.matched)

    def _open(self, index: int) -> tuple[_StreamedChoice, bytes]:
        choice = self._choices[index] = _StreamedChoice(index, self._chunks.head(index), self._reply)
        tail = self._chunks.tail()
        opening = choice.head + b'"role":"assistant","content":""' + tail
        if self._reply.prefix:
            opening += choice.head + b'"content":' + quote(self._reply.prefix) + tail
        return choice, opening

    def _render(self, choice: _StreamedChoice, pieces: list[Piece]) -> bytes:
        chunks = []
        for piece in pieces:
            if isinstance(piece, Content) and not piece.text and not choice.logprobs:
                continue
            chunks.append(choice.head + self._piece(choice, piece) + self._chunks.tail(_take_logprobs(choice)))
        return b"".join(chunks)

    def _piece(self, choice: _StreamedChoice, piece: Piece) -> bytes:
        """The members of a chunk's delta."""
        match piece:
            case Content(text):
                return b'"content":' + quote(text)
            case Reasoning(text):
                # The name that most servers and clients know, and vLLM's newer one.
                quoted = quote(text)
                return b'"reasoning_content":' + quoted + b',"reasoning":' + quoted
            case CallStart(call, name):
                name_of_call = _call_id(self._id, choice.index, call)
                function = {"name": name, "arguments": ""}
                return b'"tool_calls":' + dumps(
                    [{"index": call, "id": name_of_call, "type": "function", "function": function}]
                )
            case CallArguments(call, text):
                return b'"tool_calls":' + dumps([{"index": call, "function": {"arguments": text}}])


def _take_logprobs(choice: _StreamedChoice) -> bytes:
    """Those that wait for a chunk, as JSON: logprobs of text that is held back go out with the next one."""
    if not choice.logprobs:
        return b"null"
    rendered = dumps(chat_logprobs(choice.logprobs))
    choice.logprobs = []
    return rendered


class ChatBody:
    """Collects a whole generation into one body."""

    def __init__(self, call: Call, reply_id: str, created: int) -> None:
        self._id = reply_id
        self._reply = call.reply
        self._tally = Tally(call.choices_per_prompt)
        self._base = base_of(call.reply, reply_id, "chat.completion", created)
        self._choices = {index: Collected() for index in range(call.choices_per_prompt)}

    def feed(self, event: Event, base: int = 0) -> bytes:
        """Take an event. A chat has one prompt, so `base` is 0."""
        match event:
            case Delta():
                choice = self._choices[event.index]
                choice.texts.append(event.text)
                choice.reasoning.append(event.reasoning)
                choice.logprobs.extend(event.logprobs)
                self._tally.note(event.index, event.usage)
            case Completion():
                self._choices[event.index].end = event
                self._tally.note(event.index, event.usage)
        return b""

    def settled(self, index: int) -> bool:
        """Nothing is told before the end."""
        return False

    def end(self) -> bytes:
        """The body."""
        choices = [self._render(index, choice) for index, choice in self._choices.items()]
        return write_body(self._base, choices, self._tally)

    def _render(self, index: int, choice: Collected) -> dict[str, Any]:
        text, reasoning = "".join(choice.texts), "".join(choice.reasoning)
        content, calls = self._split(index, text)
        message: dict[str, Any] = {"role": "assistant", "content": self._reply.prefix + content, "refusal": None}
        if calls or reasoning or self._reply.tools.forced:
            message["content"] = message["content"] or None
        if reasoning and self._reply.reasoning:
            message["reasoning_content"] = message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if self._reply.logprobs:
            places = TextOffsets()
            seen = [*places.feed(choice.logprobs, reasoning + text), *places.close()[0]]
            logprobs = chat_logprobs(entry for entry, _ in seen)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(choice.end, self._reply, called=bool(calls)),
            "stop_reason": choice.matched,
        }

    def _split(self, index: int, text: str) -> tuple[str, list[dict[str, Any]]]:
        parser = _parser(self._reply)
        if parser is None:
            return text, []
        content: list[str] = []
        calls: list[dict[str, Any]] = []
        for piece in [*parser.feed(text), *parser.close()]:
            match piece:
                case Content(more):
                    content.append(more)
                case CallStart(call, name):
                    function = {"name": name, "arguments": ""}
                    calls.append({"id": _call_id(self._id, index, call), "type": "function", "function": function})
                case CallArguments(call, more):
                    calls[call]["function"]["arguments"] += more
        return "".join(content), calls
