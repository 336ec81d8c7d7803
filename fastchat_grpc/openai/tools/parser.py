"""Tool calls in what a model writes, found while it streams.

The common formats are told apart by how they begin:

- Hermes, Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times
- Qwen3-Coder: `<tool_call><function=name><parameter=city>Oslo</parameter></function></tool_call>`, also without the
  `<tool_call>` around it
- Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, `[TOOL_CALLS]name[ARGS]{...}`, and
  `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`
- Llama 3: `<|python_tag|>{"name": ..., "parameters": {...}}; ...`
- bare JSON (Llama 3.1 and 3.2; calls that a grammar forces): an object or a list of them at the very start
- Llama 3.2 and 4: `[name(city='Oslo'), ...]` at the very start, and in `<|python_start|>...<|python_end|>`
- DeepSeek V3, R1, V3.1: `<｜tool▁calls▁begin｜>`, calls, `<｜tool▁calls▁end｜>`

What turns out to be no call is given back as content, character for character, and so are thoughts
(`<think>...</think>`, `[THINK]...[/THINK]`): a call that is only considered is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from fastchat_grpc.core import Tool
from fastchat_grpc.openai.tools import deepseek, xml
from fastchat_grpc.openai.tools.deepseek import DeepSeekReader
from fastchat_grpc.openai.tools.pieces import CallArguments, CallStart, Content, Piece
from fastchat_grpc.openai.tools.pythonic import PythonicReader
from fastchat_grpc.openai.tools.reader import MAX_NAME, NAME, Malformed, Reader
from fastchat_grpc.openai.tools.scanner import CallScanner, ValueScanner
from fastchat_grpc.openai.tools.xml import FunctionReader, Kinds, kinds_of

HERMES, MISTRAL, LLAMA, LLAMA4 = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|python_start|>"
DEEPSEEK = "<｜tool▁calls▁begin｜>"
_THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_OPENERS = (HERMES, MISTRAL, LLAMA, LLAMA4, DEEPSEEK, xml.FUNCTION, *_THOUGHTS)
_OPENER = re.compile("|".join(re.escape(opener) for opener in _OPENERS))
_MARK_START = re.compile(r"[<\[]")
"""All marks begin with one of these."""
_LONGEST_MARK = max(len(mark) for mark in (*_OPENERS, *_THOUGHTS.values())) - 1
_MAX_BLANKS = 256
"""White space before a call that is not told; of more, which a model may write for ever, the rest is content."""
_CLOSERS = ("</tool_call>", "<|python_end|>", "<｜tool▁calls▁end｜>")
_CALLS = {HERMES: xml.FUNCTION, xml.FUNCTION: xml.FUNCTION, DEEPSEEK: deepseek.CALL}
"""How a call begins inside a block, beside the brace of JSON."""
_MISTRAL_ARGS = "[ARGS]"
_MISTRAL_ID = "[CALL_ID]"


class ToolCallParser:
    """Splits the output of one choice into content and calls. Feed it text as it comes; `close` it at the end.

    Args:
        names: the tools of the request.
        tools: the same, with their schemas: some formats write values whose types only those tell.
        parallel: whether all calls are wanted, or the first alone.
        forced: a grammar makes the output a list of calls: what is cut off before the first is known is no content.
    """

    def __init__(
        self, names: Collection[str], *, parallel: bool = True, forced: bool = False, tools: Sequence[Tool] = ()
    ) -> None:
        self._names = frozenset(names)
        self._tools = tools
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
        self._call: Reader = CallScanner()
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
            said = self._text[: found.start() - _blanks(self._text[: found.start()])]
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
        if opener == xml.FUNCTION:
            self._call, self._step = FunctionReader(self._kinds), self._object
            self._call.feed(opener)

    def _between(self) -> bool:
        """Between the calls of one block: separators, the next call, or the end of the block."""
        head = self._text.lstrip(" \t\r\n,;[" if not self._announced else " \t\r\n,;")
        self._consume(len(self._text) - len(head))  # looked at once, however many there are
        if not head or any(mark.startswith(head) for mark in self._marks):
            return False
        reader = self._reader(head)
        if reader is not None:
            self._call = reader
            self._announced = False
            self._step = self._object
        elif self._announced and head.startswith(("]", *_CLOSERS)):
            closer = next(mark for mark in ("]", *_CLOSERS) if head.startswith(mark))
            self._consume(len(closer))
            self._raw = ""
            if closer != "]" or self._format != LLAMA4:  # whose own closer follows the bracket
                self._end_block()
        elif self._format == MISTRAL and not self._announced and (head[0].isalpha() or head[0] == "_"):
            self._step = self._name
        elif self._announced:
            self._text = self._raw + self._text
            self._end_block()
        else:
            self._give_back()
        return True

    @property
    def _marks(self) -> tuple[str, ...]:
        """What may come between calls, and is waited for."""
        return (*_CLOSERS, _CALLS.get(self._format, HERMES))

    def _reader(self, head: str) -> Reader | None:
        """What reads the call at the head of a text; None: there is none."""
        if head[0] == "{":
            return CallScanner(strict=not self._format)
        if self._format in _CALLS and head.startswith(_CALLS[self._format]):
            return DeepSeekReader() if self._format == DEEPSEEK else FunctionReader(self._kinds)
        pythonic = not self._announced or isinstance(self._call, PythonicReader)
        if self._format in ("", LLAMA4) and pythonic and (head[0].isalpha() or head[0] == "_"):
            return PythonicReader(None if self._format else self._names)
        return None

    def _kinds(self, name: str) -> dict[str, Kinds]:
        return next((kinds_of(tool.parameters()) for tool in self._tools if tool.name == name), {})

    def _object(self) -> bool:
        """Inside a call that a reader reads."""
        rest = None
        try:
            self._consume(self._call.feed(self._text))
        except Malformed as failure:
            rest = failure.rest
        bare, name = not self._format, self._call.name
        # Bare JSON is a call only if it names a tool of the request and has arguments.
        strange = bare and name not in self._names
        sure = not strange and (self._call.has_arguments or not bare or self._forced)
        if name is not None and sure:
            if not self._announced:
                self._announce(name)
            self._arguments(self._call.take_arguments())
        if self._announced and rest is not None:
            self._text = rest
            self._end_block()
        elif rest is not None or (name is not None and strange) or (self._call.done and not self._announced):
            self._give_back()
            return True
        elif self._call.done:
            if not self._call.has_arguments:
                self._arguments("{}")
            self._step = self._between
        return bool(self._text)

    def _name(self) -> bool:
        """Mistral's newer format: the name, then the arguments."""
        at = self._text.find("{")
        if at < 0:
            if len(self._text) > MAX_NAME:
                self._give_back()
                return True
            return False
        name = self._text[:at].strip().removesuffix(_MISTRAL_ARGS).partition(_MISTRAL_ID)[0].strip()
        if NAME.fullmatch(name) is None:
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
        raw, self._raw = self._raw, ""
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
    return keep + _blanks(text[: len(text) - keep])


def _blanks(text: str) -> int:
    """Length of the white space at the end of `text` that belongs to what follows it."""
    end = text[-_MAX_BLANKS:]
    return len(end) - len(end.rstrip())


def _begun(text: str, marks: tuple[str, ...]) -> int:
    """Length of the end of `text` that may be the start of a mark."""
    for found in _MARK_START.finditer(text, max(0, len(text) - _LONGEST_MARK)):
        tail = text[found.start() :]
        if any(mark.startswith(tail) for mark in marks):
            return len(tail)
    return 0
