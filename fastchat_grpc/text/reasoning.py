"""Reasoning that a model writes before its answer, told apart from it while both stream.

A thought comes first or not at all, between two marks: `<think>why</think>answer`. Some chat templates write the
first mark themselves, at the end of the prompt, and the output begins in the thought. What follows the second mark is
the answer, whatever it holds. As in vLLM, whose names the parsers have, white space around the marks is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastchat_grpc.core import ChatPrompt, GenerateRequest

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True)
class Marks:
    """What a model writes around its reasoning. `assumed`: an output begins in it though nothing has opened it."""

    start: str
    end: str
    assumed: bool = False

    def part_of(self, token: str) -> bool:
        """Whether a token, which may be hidden from text, is a mark or the beginning of one."""
        return bool(token) and (self.start.startswith(token) or token == self.end)


PARSERS = {
    "qwen3": Marks("<think>", "</think>"),
    "deepseek_r1": Marks("<think>", "</think>", assumed=True),
    "mistral": Marks("[THINK]", "[/THINK]"),
    "seed_oss": Marks("<seed:think>", "</seed:think>"),
    "gemma4": Marks("<|channel>thought\n", "<channel|>"),
}
"""By vLLM's names. `qwen3` serves every model that writes `<think>`: GLM-4.5, Kimi K2, QwQ, SmolLM3 and more."""


@lru_cache(maxsize=64)
def marks_of(parser: str, chat_template: str) -> Marks | None:
    """The marks of a model. None: it does not reason.

    Args:
        parser: a name of PARSERS, none, or auto: by what the chat template mentions.
    """
    if parser == NONE:
        return None
    if parser != AUTO:
        return PARSERS[parser]
    return next((marks for marks in PARSERS.values() if marks.start.strip() in chat_template), None)


class ReasoningParser:
    """Splits the text of one choice into reasoning and answer. Feed it text as it comes; `close` it at the end.

    Args:
        inside: the output begins in a thought. It may still write the first mark again.
    """

    def __init__(self, marks: Marks, *, inside: bool) -> None:
        self.marks = marks
        self.inside = inside
        """Whether what comes next is reasoning, as far as is known."""
        self.done = False
        """Whether all that follows is the answer."""
        self._begun = False
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Reasoning and answer that are certain after this text."""
        text, self._held = self._held + text, ""
        if self.done:
            return "", text
        if not self._begun:
            head = text.lstrip()
            if len(head) < len(self.marks.start) and self.marks.start.startswith(head):
                self._held = text
                return "", ""
            self._begun = True
            if head.startswith(self.marks.start):
                self.inside, text = True, head[len(self.marks.start) :]
        return self._thought(text) if self.inside else self._answer("", text)

    def close(self) -> tuple[str, str]:
        """The rest, at the end of the output."""
        held, self._held = self._held, ""
        return (held, "") if self.inside else ("", held)

    def _thought(self, text: str) -> tuple[str, str]:
        at = text.find(self.marks.end)
        if at >= 0:
            return self._answer(text[:at], text[at + len(self.marks.end) :])
        cut = len(text) - _begun(text, self.marks.end)
        self._held = text[cut:]
        return text[:cut], ""

    def _answer(self, reasoning: str, text: str) -> tuple[str, str]:
        self.inside, self.done = False, True
        return reasoning, text


def parser_for(request: GenerateRequest, marks: Marks | None, prompt_end: str) -> ReasoningParser | None:
    """The parser of a choice; None: all of it is the answer.

    That is so for a text that is completed, for an output that follows a grammar, and where the prompt has ended the
    thought already.

    Args:
        prompt_end: the last characters of the prompt, special tokens included.
    """
    chat = request.prompt
    if marks is None or request.grammar is not None or not isinstance(chat, ChatPrompt):
        return None
    if chat.continue_final_message:
        said = chat.messages[-1].content
        text = said if isinstance(said, str) else ""
        opened = text.rfind(marks.start) > text.rfind(marks.end)
        return ReasoningParser(marks, inside=True) if opened else None
    end = prompt_end.rstrip()
    if end.endswith(marks.end):
        return None
    return ReasoningParser(marks, inside=marks.assumed or end.endswith(marks.start.rstrip()))


def _begun(text: str, mark: str) -> int:
    """Length of the end of `text` that may be the start of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
