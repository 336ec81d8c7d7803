"""Tool calls in what a model writes, found while it streams.

The common formats are told apart by how they begin:

- Hermes, Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times
- Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, `[TOOL_CALLS]name[ARGS]{...}`, and
  `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`
- Llama 3: `<|python_tag|>{"name": ..., "parameters": {...}}; ...`
- bare JSON (Llama 3.1 and 3.2; calls that a grammar forces): an object or a list of them at the very start

What turns out to be no call is given back as content, character for character, and so are thoughts
(`<think>...</think>`, `[THINK]...[/THINK]`): a call that is only considered is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from fastchat_grpc.openai.tools.pieces import CallArguments, CallStart, Content, Piece
from fastchat_grpc.openai.tools.scanner import CallScanner, Malformed, ValueScanner

HERMES, MISTRAL, LLAMA = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
_THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_OPENERS = (HERMES, MISTRAL, LLAMA, *_THOUGHTS)
_OPENER = re.compile("|".join(re.escape(opener) for opener in _OPENERS))
_MARK_START = re.compile(r"[<\[]")
"""All marks begin with one of these."""
_LONGEST_MARK = max(len(mark) for mark in (*_OPENERS, *_THOUGHTS.values())) - 1
_CLOSER = "</tool_call>"
_MISTRAL_ARGS = "[ARGS]"
_MISTRAL_ID = "[CALL_ID]"
_MAX_NAME = 160
_NAME = re.compile(r"[\w.-]+")


class ToolCallParser:
    """Splits the output of one choice into content and calls. Feed it text as it comes; `close` it at the end.

    Args:
        names: the tools of the request.
        parallel: whether all calls are wanted, or the first alone.
        forced: a grammar makes the output a list of calls: what is cut off before the first is known is no content.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True, forced: bool = False) -> None:
        self._names = frozenset(names)
        self._parallel = parallel
        self._forced = forced
        self._text = ""
        """Read but not decided."""
        self._raw = ""
        """Decided to belong to a call that is not announced yet: given back if it is none."""
        self._pieces: list[Piece] = []
        self._step: Callable[[], bool] = self._begin
        self._format = ""
        self._opener = ""
        """The format's opener as it stood, with the white space before it."""
        self._thought_end = ""
        self._calls = 0
        self._announced = False
        self._call = CallScanner()
        self._value = ValueScanner()

    @property
    def called(self) -> bool:
        """Whether a call was found."""
        return self._calls > 0

    def feed(self, text: str) -> list[Piece]:
        """What is certain after this text."""
        self._text += text
        while self._text and self._step():
            pass
        return self._take()

    def close(self) -> list[Piece]:
        """The rest, at the end of the output. A call that was cut short keeps the arguments it has."""
        rest = self._text if self._announced else self._raw + self._text
        separators = self._announced and self._step == self._between
        cut = self._forced and self._step in (self._begin, self._between, self._object) and not self._format
        if not separators and not (cut and rest.lstrip()[:1] in ("[", "{", "")) and (rest.strip() or not self.called):
            self._content(rest)
        self._raw = self._text = ""
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _content(self, text: str) -> None:
        if text:
            self._pieces.append(Content(text))

    # Each step below looks at the head of `_text`, and says whether it got any further.

    def _begin(self) -> bool:
        """The start of the output, where a bare JSON call may stand."""
        head = self._text.lstrip()
        if not head or any(opener.startswith(head) for opener in _OPENERS):
            return False
        if head[0] in "{[" and not head.startswith(_OPENERS):
            self._open("", "")
        else:
            self._step = self._search
        return True

    def _search(self) -> bool:
        """Plain text, up to the next opener."""
        found = _OPENER.search(self._text)
        if found is not None:
            opener, end = found[0], found.end()
            if opener in _THOUGHTS:
                self._content(self._text[:end])
                self._text, self._thought_end, self._step = self._text[end:], _THOUGHTS[opener], self._thought
                return True
            said = self._text[: found.start()].rstrip()
            self._content(said)
            self._raw, self._text = self._text[len(said) : end], self._text[end:]
            self._open(opener, self._raw)
            return True
        keep = _undecided(self._text)
        self._content(self._text[: len(self._text) - keep])
        self._text = self._text[len(self._text) - keep :]
        return False

    def _thought(self) -> bool:
        """Inside a thought: content, up to its end."""
        at = self._text.find(self._thought_end)
        end = at + len(self._thought_end) if at >= 0 else len(self._text) - _begun(self._text, (self._thought_end,))
        self._content(self._text[:end])
        self._text = self._text[end:]
        if at >= 0:
            self._step = self._begin
        return at >= 0

    def _open(self, opener: str, as_it_stood: str) -> None:
        self._format = opener
        self._opener = as_it_stood
        self._announced = False
        self._step = self._between

    def _between(self) -> bool:
        """Between the calls of one block: separators, the next call, or the end of the block."""
        head = self._text.lstrip(" \t\r\n,;[" if not self._announced else " \t\r\n,;")
        if not head or _CLOSER.startswith(head):
            return False
        if head[0] == "{":
            self._consume(len(self._text) - len(head))
            self._call = CallScanner(strict=not self._format)
            self._announced = False
            self._step = self._object
        elif self._announced and head.startswith(("]", _CLOSER)):
            self._consume(len(self._text) - len(head) + (1 if head[0] == "]" else len(_CLOSER)))
            self._end_block()
        elif self._format == MISTRAL and not self._announced and (head[0].isalpha() or head[0] == "_"):
            self._consume(len(self._text) - len(head))
            self._step = self._name
        elif self._announced:
            self._end_block()
        else:
            self._give_back()
        return True

    def _object(self) -> bool:
        """Inside a call that is one JSON object."""
        try:
            end = self._call.feed(self._text)
        except Malformed:
            self._give_back()
            return True
        self._consume(end)
        name = self._call.name
        # Bare JSON is a call only if it names a tool of the request and has arguments.
        bare = not self._format
        if name is not None and bare and name not in self._names:
            self._give_back()
            return True
        sure = self._call.has_arguments or not bare or self._forced
        if name is not None and not self._announced and sure:
            self._announce(name)
        if self._announced:
            self._arguments(self._call.take_arguments())
        if self._call.done:
            if not self._announced:
                self._give_back()
                return True
            if not self._call.has_arguments:
                self._arguments("{}")
            self._step = self._between
        return bool(self._text)

    def _name(self) -> bool:
        """Mistral's newer format: the name, then the arguments."""
        at = self._text.find("{")
        if at < 0:
            if len(self._text) > _MAX_NAME:
                self._give_back()
                return True
            return False
        name = self._text[:at].strip().removesuffix(_MISTRAL_ARGS).partition(_MISTRAL_ID)[0].strip()
        if _NAME.fullmatch(name) is None:
            self._give_back()
            return True
        self._consume(at)
        self._announce(name)
        self._value = ValueScanner()
        self._step = self._plain_arguments
        return True

    def _plain_arguments(self) -> bool:
        end = self._value.feed(self._text, 0)
        piece = self._text[:end]
        self._consume(end)
        self._arguments(piece)
        if self._value.done:
            self._step = self._between
        return bool(self._text)

    def _consume(self, count: int) -> None:
        self._raw += self._text[:count]
        self._text = self._text[count:]

    def _announce(self, name: str) -> None:
        self._announced = True
        self._raw = ""
        if self._wanted(self._calls):
            self._pieces.append(CallStart(self._calls, name))
        self._calls += 1

    def _arguments(self, text: str) -> None:
        self._raw = ""
        if text and self._wanted(self._calls - 1):
            self._pieces.append(CallArguments(self._calls - 1, text))

    def _wanted(self, index: int) -> bool:
        return self._parallel or index == 0

    def _end_block(self) -> None:
        self._raw = ""
        self._step = self._search

    def _give_back(self) -> None:
        """It was no call: its opener is content, and the rest is searched like any text."""
        raw, self._raw = "" if self._announced else self._raw, ""
        if self._opener and raw.startswith(self._opener):
            self._content(self._opener)
            raw = raw.removeprefix(self._opener)
        self._text = raw + self._text
        self._step = self._search


class NamedCallParser:
    """The output as a whole is the arguments of one call, as `tool_choice` naming a function makes it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    @property
    def called(self) -> bool:
        return self._begun

    def feed(self, text: str) -> list[Piece]:
        """The arguments so far; the call itself comes first."""
        pieces: list[Piece] = []
        if not self._begun:
            self._begun = True
            pieces.append(CallStart(0, self._name))
        if text:
            pieces.append(CallArguments(0, text))
        return pieces

    def close(self) -> list[Piece]:
        """Nothing is held back."""
        return []


def _undecided(text: str) -> int:
    """Length of the end of `text` that may be the start of an opener, with the white space before it."""
    keep = _begun(text, _OPENERS)
    rest = text[: len(text) - keep]
    return keep + len(rest) - len(rest.rstrip())


def _begun(text: str, marks: tuple[str, ...]) -> int:
    """Length of the end of `text` that may be the start of a mark."""
    for found in _MARK_START.finditer(text, max(0, len(text) - _LONGEST_MARK)):
        tail = text[found.start() :]
        if any(mark.startswith(tail) for mark in marks):
            return len(tail)
    return 0
