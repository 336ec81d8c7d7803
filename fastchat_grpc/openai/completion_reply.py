"""Replies of text completions: a stream of chunks, or one body."""

from __future__ import annotations

from typing import Any

from fastchat_grpc.core import Completion, Delta, Event, PromptEcho, TokenLogprob
from fastchat_grpc.openai.call import Call
from fastchat_grpc.openai.chunks import ChunkWriter, Collected, write_body
from fastchat_grpc.openai.finish import base_of, final_reason
from fastchat_grpc.openai.jsonio import dumps, quote
from fastchat_grpc.openai.logprobs import completion_logprobs
from fastchat_grpc.openai.tally import Tally
from fastchat_grpc.text.offsets import TextOffsets


class _StreamedChoice:
    """What a streamed choice has pending."""

    __slots__ = ("head", "places")

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.places = TextOffsets()


class CompletionStream:
    """Renders chunks: text chunks and a finish chunk per choice; usage and [DONE] at the end."""

    def __init__(self, call: Call, reply_id: str, created: int) -> None:
        self._reply = call.reply
        self._per_prompt = call.choices_per_prompt
        self._tally = Tally(call.choices_per_prompt, without_output=call.reply.without_output)
        base = base_of(call.reply, reply_id, "text_completion", created)
        self._chunks = ChunkWriter(call.reply, base, self._tally, b'"text":')
        self._choices: dict[int, _StreamedChoice] = {}

    def feed(self, event: Event, base: int = 0) -> bytes:
        """The chunks of an event; `base` is the index of the first choice of its prompt."""
        match event:
            case Delta():
                return self._delta(event, base + event.index)
            case Completion():
                return self._completion(event, base + event.index)
            case PromptEcho():
                choices = range(base, base + self._per_prompt)
                return b"".join(self._text(index, event.text, event.logprobs) for index in choices)

    def settled(self, index: int) -> bool:
        """Whether all log probabilities of a choice have been told."""
        choice = self._choices.get(index)
        return choice is None or choice.places.settled

    def end(self) -> bytes:
        """What follows the last choice."""
        return self._chunks.end()

    def _delta(self, event: Delta, index: int) -> bytes:
        self._tally.note(index, event.usage)
        if self._reply.without_output:
            return b""
        if self._chunks.plain:
            return self._choice(index).head + quote(event.text) + self._chunks.plain_tail if event.text else b""
        return self._text(index, event.text, event.logprobs)

    def _text(self, index: int, text: str, logprobs: tuple[TokenLogprob, ...]) -> bytes:
        choice, shown = self._choice(index), b"null"
        if self._reply.logprobs:
            placed = choice.places.feed(logprobs, text)
            shown = dumps(completion_logprobs(placed)) if placed else shown
        if not text and shown == b"null":
            return b""
        return choice.head + quote(text) + self._chunks.tail(shown)

    def _completion(self, event: Completion, index: int) -> bytes:
        self._tally.note(index, event.usage)
        choice = self._choice(index)
        # Every token that was generated has its entry, whether it shows or not.
        seen, unseen = choice.places.close()
        shown = dumps(completion_logprobs(seen + unseen)) if seen or unseen else b"null"
        return choice.head + b'""' + self._chunks.last_tail(shown, final_reason(event), event.matched)

    def _choice(self, index: int) -> _StreamedChoice:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _StreamedChoice(self._chunks.head(index))
        return choice


class CompletionBody:
    """Collects whole generations into one body."""

    def __init__(self, call: Call, reply_id: str, created: int) -> None:
        self._reply = call.reply
        self._per_prompt = call.choices_per_prompt
        self._tally = Tally(call.choices_per_prompt, without_output=call.reply.without_output)
        self._base = base_of(call.reply, reply_id, "text_completion", created)
        self._choices = {index: Collected() for index in range(len(call.generations) * self._per_prompt)}

    def feed(self, event: Event, base: int = 0) -> bytes:
        """Take an event; `base` is the index of the first choice of its prompt."""
        match event:
            case Delta():
                self._tally.note(base + event.index, event.usage)
                if not self._reply.without_output:
                    self._choices[base + event.index].texts.append(event.text)
                    self._choices[base + event.index].logprobs.extend(event.logprobs)
            case Completion():
                self._tally.note(base + event.index, event.usage)
                self._choices[base + event.index].end = event
            case PromptEcho():
                for index in range(base, base + self._per_prompt):
                    self._choices[index].texts.append(event.text)
                    self._choices[index].logprobs.extend(event.logprobs)
        return b""

    def settled(self, index: int) -> bool:
        """Nothing is told before the end."""
        return False

    def end(self) -> bytes:
        """The body."""
        choices = [self._render(index, choice) for index, choice in self._choices.items()]
        return write_body(self._base, choices, self._tally)

    def _render(self, index: int, choice: Collected) -> dict[str, Any]:
        reason, text, logprobs = final_reason(choice.end), "".join(choice.texts), None
        if self._reply.logprobs:
            places = TextOffsets()
            placed = places.feed(choice.logprobs, text)
            seen, unseen = places.close()
            # Every token that was generated has its entry, whether it shows or not.
            logprobs = completion_logprobs(placed + seen + unseen)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": choice.matched,
        }
