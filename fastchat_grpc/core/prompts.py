"""What a model is given: texts, token ids, conversations."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastchat_grpc.core.checks import json_object, require, require_token_ids
from fastchat_grpc.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text to continue."""

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            raise InvalidArgument("prompt", "must not be empty")


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InvalidArgument("prompt_token_ids", "must not be empty")
        require_token_ids(self.token_ids, "prompt_token_ids.ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image of a message: its encoded bytes, or its address."""

    data: bytes = b""
    url: str = ""
    media_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters_json` is a JSON Schema object, empty for no arguments.

    It stays text until it is used: every process that reads it sees the same members in the same order.
    """

    name: str
    description: str = ""
    parameters_json: str = ""

    def parameters(self) -> dict[str, Any] | None:
        """The schema; None: no arguments. Parsed anew at each call."""
        return json_object(self.parameters_json, "parameters_json") if self.parameters_json else None


class ToolChoice(enum.Enum):
    """How freely the model decides on calls."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model made; `arguments_json` as the model wrote it."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message. `content` is text, or parts that are text or images; `reasoning` is what came before it."""

    role: str
    content: str | tuple[str | Image, ...] = ""
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""


CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation for the model's chat template.

    `tool_choice` as a string is the name of the one tool that must be called. `template_arguments_json` is a JSON
    object, or empty; as the schemas of tools it stays text until it is used.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | str = ToolChoice.AUTO
    template_arguments_json: str = ""
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidArgument("chat.messages", "must hold at least one message")
        for i, message in enumerate(self.messages):
            require(
                message.role in CHAT_ROLES,
                f"chat.messages[{i}].role",
                repr(message.role[:32]),
                "one of " + ", ".join(CHAT_ROLES),
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidArgument("chat.continue_final_message", "the last message must be the assistant's")
        for i, tool in enumerate(self.tools):
            json_object(tool.parameters_json, f"chat.tools[{i}].parameters_json")
        json_object(self.template_arguments_json, "chat.template_arguments_json")
        if isinstance(self.tool_choice, str) and all(tool.name != self.tool_choice for tool in self.tools):
            raise InvalidArgument("chat.tool_choice.function", "is not the name of a tool of this request")

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model hears of."""
        return () if self.tool_choice is ToolChoice.NONE else self.tools

    def template_arguments(self) -> dict[str, Any]:
        """Further variables of the chat template. Parsed anew at each call."""
        return json_object(self.template_arguments_json, "chat.template_arguments_json")


Prompt: TypeAlias = TextPrompt | TokenPrompt | ChatPrompt
