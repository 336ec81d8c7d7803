"""A parsed request: what to generate, and how to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from fastchat_grpc.core import GenerateRequest, Tool


class ToolMode(Enum):
    """How calls are found in the output."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """What to do with calls in the output."""

    mode: ToolMode = ToolMode.NONE
    names: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    """Those of these names, with their schemas."""
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the output must be a call."""
        return self.mode in (ToolMode.REQUIRED, ToolMode.NAMED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """How a generation is answered."""

    model: str
    stream: bool = False
    fingerprint: str = ""
    """Identity of what generates; empty where it is unknown."""
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    reasoning: bool = True
    """Whether the caller wants to see it."""
    echo: bool = False
    prefix: str = ""
    """Text that each choice begins with: the assistant's last message, where a chat asks for echo."""
    without_output: bool = False
    """max_tokens was 0: the prompt is scored, and the one token that is generated is dropped."""
    tools: ToolOptions = ToolOptions()
    renames: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Paths of the domain's fields to the caller's, for errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One generation per prompt, and how to answer."""

    generations: tuple[GenerateRequest, ...]
    reply: Reply
    ignored: tuple[str, ...] = ()
    """Members of the request that nobody knows, printable and short."""

    @property
    def choices_per_prompt(self) -> int:
        return self.generations[0].output.n
