"""Replies of text completions: a stream of chunks, or one body."""

from __future__ import annotations

from typing import Any

from fastchat_grpc.core import Completion, Delta, Event, PromptEcho, TokenLogprob
from fastchat_grpc.openai import sse
from fastchat_grpc.openai.call import Call
from fastchat_grpc.openai.finish import base_of, final_reason
from fastchat_grpc.openai.jsonio import dumps, dumps_scalar, quote
from fastchat_grpc.openai.logprobs import completion_logprobs
from fastchat_grpc.openai.tally import Tally
from fastchat_grpc.text.offsets import TextOffsets


class CompletionStream:
    """Renders chunks: text chunks and a finish chunk per choice; usage and [DONE] at the end."""

    def __init__(self, call: Call, reply_id: str, created: int) -> None:
        self._reply = call.reply
        self._per_prompt = call.choices_per_prompt
        self._tally = Tally(call.choices_per_prompt, without_output=call.reply.without_output)
        base = base_of(call.reply, reply_id, "text_completion", created)
        self._head = sse.START + dumps(base)[:-1]
        self._no_usage = b',"usage":null' if call.reply.include_usage else b""
        self._plain = not (call.reply.logprobs or call.reply.continuous_usage)
        self._plain_tail = b',"logprobs":null,"finish_reason":null}]' + self._no_usage + b"}" + sse.END
        self._heads: dict[int, bytes] = {}
        self._places: dict[int, TextOffsets] = {}

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

    def end(self) -> bytes:
        """What follows the last choice."""
        if not self._reply.include_usage:
            return sse.DONE
        return self._head + b',"choices":[],"usage":' + dumps(self._tally.render()) + b"}" + sse.END + sse.DONE

    def _delta(self, event: Delta, index: int) -> bytes:
        self._tally.note(index, event.usage)
        if self._reply.without_output:
            return b""
        if self._plain:
            return self._chunk_head(index) + quote(event.text) + self._plain_tail if event.text else b""
        return self._text(index, event.text, event.logprobs)

    def _text(self, index: int, text: str, logprobs: tuple[TokenLogprob, ...]) -> bytes:
        shown = b"null"
        if self._reply.logprobs:
            places = self._places.get(index)
            if places is None:
                places = self._places[index] = TextOffsets()
            placed = places.feed(logprobs, text)
            shown = dumps(completion_logprobs(placed)) if placed else shown
        if not text and shown == b"null":
            return b""
        tail = b',"logprobs":' + shown + b',"finish_reason":null}]' + self._usage() + b"}" + sse.END
        return self._chunk_head(index) + quote(text) + tail

    def _completion(self, event: Completion, index: int) -> bytes:
        self._tally.note(index, event.usage)
        shown = b"null"
        if (places := self._places.get(index)) is not None:
            # Every token that was generated has its entry, whether it shows or not.
            seen, unseen = places.close()
            shown = dumps(completion_logprobs(seen + unseen)) if seen or unseen else shown
        tail = b',"logprobs":' + shown + b',"finish_reason":' + quote(final_reason(event))
        tail += b',"stop_reason":' + dumps_scalar(event.matched) + b"}]" + self._usage() + b"}" + sse.END
        return self._chunk_head(index) + b'""' + tail

    def _chunk_head(self, index: int) -> bytes:
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._head + b',"choices":[{"index":%d,"text":' % index
        return head

    def _usage(self) -> bytes:
        if self._reply.continuous_usage:
            return b',"usage":' + dumps(self._tally.render())
        return self._no_usage


class _Choice:
    """A choice that is collected."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.end: Completion | None = None


class CompletionBody:
    """Collects whole generations into one body."""

    def __init__(self, call: Call, reply_id: str, created: int) -> None:
        self._reply = call.reply
        self._per_prompt = call.choices_per_prompt
        self._tally = Tally(call.choices_per_prompt, without_output=call.reply.without_output)
        self._base = base_of(call.reply, reply_id, "text_completion", created)
        self._choices = {index: _Choice() for index in range(len(call.generations) * self._per_prompt)}

    def feed(self, event: Event, base: int = 0) -> None:
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

    def end(self) -> bytes:
        """The body."""
        choices = [self._render(index, choice) for index, choice in self._choices.items()]
        return dumps({**self._base, "choices": choices, "usage": self._tally.render()})

    def _render(self, index: int, choice: _Choice) -> dict[str, Any]:
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
            "stop_reason": choice.end.matched if choice.end is not None else None,
        }
