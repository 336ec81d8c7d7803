"""Conversations to text, by the model's chat template.

Templates are Jinja programs that come with a model; transformers runs them in Jinja's immutable
sandbox. Their failures are the caller's (a role out of turn, a tool where none is understood) and
are reported without quoting the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastchat_grpc.core import ChatMessage, ChatPrompt, Image, Tool, ToolChoice
from fastchat_grpc.errors import InvalidArgument, UnsupportedField
from fastchat_grpc.models.overrides import CHAT_TEMPLATES

_ALLOWED_ARGUMENTS_OF_OURS = frozenset({"documents", "add_generation_prompt"})
_MAX_QUOTED = 300
_HERE = "ContinuationOfTheFinalMessage8c1f"
"""Stands after the final message while it is rendered: a template may strip blanks and add an end of turn."""


class ChatTemplate:
    """The chat template of one tokenizer. Thread-safe: rendering changes nothing."""

    def __init__(self, tokenizer: Any, override: str | None = None, *, adds_bos: bool = True) -> None:
        self._tokenizer = tokenizer
        self._adds_bos = adds_bos
        """Whether the tokenizer puts its BOS before a text, and so FastChat's templates before a conversation."""
        self._override = override
        self._reserved = _parameters(tokenizer.apply_chat_template) - _ALLOWED_ARGUMENTS_OF_OURS
        own = tokenizer.chat_template or ""
        self._templates: dict[str, str] = dict(own) if isinstance(own, Mapping) else {"default": own}
        if override is not None:
            self._templates = {"default": override}

    @property
    def source(self) -> str:
        """Jinja text of the template for plain chats, or an empty string."""
        return self._templates.get("default") or next(iter(self._templates.values()), "")

    def render(self, chat: ChatPrompt) -> str:
        """Text of a conversation, ready to be continued. Raises InvalidArgument."""
        template = self._template_for(chat)
        arguments = self._arguments(chat, template)
        messages = [self._message(i, message, template) for i, message in enumerate(chat.messages)]
        tools = [_tool(tool) for tool in chat.offered] or None
        if chat.continue_final_message:
            messages[-1]["content"] += _HERE
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, **arguments
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            raise InvalidArgument(
                "chat", f"the chat template refused the conversation{_why(error, template)}"
            ) from error
        return _up_to_here(str(text)) if chat.continue_final_message else str(text)

    def _template_for(self, chat: ChatPrompt) -> str:
        template = self._templates.get("tool_use", self.source) if chat.tools else self.source
        if not template:
            raise InvalidArgument("chat", "the model has no chat template; send a prompt instead of messages")
        # A call that is forced comes from the grammar, whether or not the template can show its tool.
        forced = chat.tool_choice not in (ToolChoice.AUTO, ToolChoice.NONE)
        if chat.offered and not forced and "tools" not in template:
            raise InvalidArgument("chat.tools", "the model's chat template takes no tools")
        return template

    def _arguments(self, chat: ChatPrompt, template: str) -> dict[str, Any]:
        given = chat.template_arguments()
        for key in given:
            if key in self._reserved:
                raise InvalidArgument(f"chat.template_arguments_json.{key}", "is set by the server")
        arguments: dict[str, Any] = {"add_generation_prompt": not chat.continue_final_message}
        if not self._adds_bos and template in CHAT_TEMPLATES.values():
            arguments["bos_token"] = ""
        arguments |= given
        if chat.continue_final_message and arguments["add_generation_prompt"]:
            raise InvalidArgument(
                "chat.continue_final_message", "the final message is continued, or an answer begun, not both"
            )
        return arguments

    def _message(self, index: int, message: ChatMessage, template: str) -> dict[str, Any]:
        role = message.role
        if role == "developer" and "developer" not in template:
            role = "system"  # OpenAI's newer name for it
        result: dict[str, Any] = {"role": role, "content": _text(index, message)}
        if message.name:
            result["name"] = message.name
        if message.reasoning:
            result["reasoning_content"] = message.reasoning  # transformers adds the other names of it
        if message.tool_call_id:
            result["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            result["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": _parsed(call.arguments_json)},
                }
                for call in message.tool_calls
            ]
        return result


def _text(index: int, message: ChatMessage) -> str:
    """Content as one text: parts are joined by newlines, as FastChat and vLLM do for text models."""
    if isinstance(message.content, str):
        return message.content
    for j, part in enumerate(message.content):
        if isinstance(part, Image):
            raise UnsupportedField(f"chat.messages[{index}].parts[{j}].image", "this model reads text only")
    return "\n".join(part for part in message.content if isinstance(part, str))


def _up_to_here(text: str) -> str:
    """The text before the place where the final message is to be continued: it ends exactly in that message."""
    end = text.rfind(_HERE)
    if end < 0:
        raise InvalidArgument(
            "chat.continue_final_message", "the chat template does not show the end of the final message"
        )
    return text[:end]


def _tool(tool: Tool) -> dict[str, Any]:
    parameters = tool.parameters()
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = parameters if parameters is not None else {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _parsed(arguments_json: str) -> Any:
    """Arguments as the object that templates expect, or the text itself where the model wrote no JSON."""
    try:
        return json.loads(arguments_json)
    except ValueError:
        return arguments_json


def _parameters(function: Any) -> frozenset[str]:
    import inspect

    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds) | {
        "messages",
        "continue_final_message",
    }


def _why(error: Exception, template: str) -> str:
    """The template's own message, where it is a constant of the template and so quotes no conversation."""
    message = str(error).strip()
    if 0 < len(message) <= _MAX_QUOTED and message in template.replace("\\'", "'").replace('\\"', '"'):
        return f": {message}"
    return f" ({type(error).__name__})"
