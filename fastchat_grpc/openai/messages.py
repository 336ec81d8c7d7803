"""Chat messages and tools of the OpenAI schema to the domain's."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from fastchat_grpc.core import CHAT_ROLES, ChatMessage, Image, Tool, ToolCall, json_object
from fastchat_grpc.errors import InvalidArgument, UnsupportedField
from fastchat_grpc.openai.fields import Fields, objects
from fastchat_grpc.openai.jsonio import dumps, type_name

MAX_TOOLS = 128
MAX_MESSAGES = 16_384
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,", re.IGNORECASE)


def parse_messages(values: list[Any] | None, path: str = "messages") -> tuple[ChatMessage, ...]:
    """Check and convert the messages of a conversation. Raises InvalidArgument with the member's path."""
    if not values:
        raise InvalidArgument(path, "is required" if values is None else "must hold at least one message")
    if len(values) > MAX_MESSAGES:
        raise InvalidArgument(path, f"must hold at most {MAX_MESSAGES} messages, got {len(values)}")
    return tuple(_message(fields) for fields in objects(values, path))


def _message(fields: Fields) -> ChatMessage:
    role = fields.one_of("role", CHAT_ROLES)
    if role is None:
        raise fields.wrong("role", "is required")
    assistant = role == "assistant"
    calls = tuple(_tool_call(call) for call in objects(fields.items("tool_calls"), fields.path("tool_calls")))
    if calls and not assistant:
        raise fields.wrong("tool_calls", "belong to an assistant message")
    refusal = fields.text("refusal")
    # An assistant's turn may be empty: it called tools, was cut, or only thought. So may what a tool has to say.
    content, thoughts = _content(fields, required=role not in ("assistant", "tool"), thinks=assistant)
    call_id = fields.text("tool_call_id")
    if role == "tool" and not call_id:
        raise fields.wrong("tool_call_id", "is required in a tool message")
    fields.unsupported("function_call", hint="use tool_calls")
    fields.unsupported("audio")
    for prefill in ("prefix", "partial"):
        fields.unsupported(prefill, False, hint="use continue_final_message")
    return ChatMessage(
        role=role,
        content=content or (refusal or "" if assistant else content),
        name=fields.text("name") or "",
        tool_calls=calls,
        tool_call_id=call_id or "",
        reasoning=(_reasoning(fields) or thoughts) if assistant else "",
    )


def _reasoning(fields: Fields) -> str:
    """What an assistant thought, under either name that servers give it."""
    return fields.text("reasoning_content") or fields.text("reasoning") or ""


def _content(fields: Fields, *, required: bool, thinks: bool) -> tuple[str | tuple[str | Image, ...], str]:
    """What a message says, and what was thought before it where it `thinks`: some servers give that as parts, too."""
    value = fields.raw("content")
    match value:
        case str():
            return value, ""
        case None:
            if required:
                raise fields.wrong("content", "is required")
            return "", ""
        case list():
            parts, thoughts = [], []
            for part in objects(value, fields.path("content")):
                if thinks and part.raw("type") in ("thinking", "redacted_thinking"):
                    thoughts.append(_thought(part))
                else:
                    parts.append(_part(part))
            return _joined(parts), "\n".join(filter(None, thoughts))
    raise fields.wrong("content", f"must be a string or a list of parts, got {type_name(value)}")


def _joined(parts: list[str | Image]) -> str | tuple[str | Image, ...]:
    """Text parts alone are text: templates that know no parts can render them."""
    if all(isinstance(part, str) for part in parts):
        return "\n".join(part for part in parts if isinstance(part, str))
    return tuple(parts)


def _thought(fields: Fields) -> str:
    """The text of a part that was thought: a string, or parts in turn. One that is encrypted has none for us."""
    if fields.raw("type") == "redacted_thinking":
        return ""
    if isinstance(fields.raw("thinking"), list):
        return "\n".join(part.required("text") for part in objects(fields.items("thinking"), fields.path("thinking")))
    return fields.text("thinking") or ""


def _part(fields: Fields) -> str | Image:
    match fields.required("type"):
        case "text" | "input_text" | "output_text":
            return fields.required("text")
        case "refusal":
            return fields.required("refusal")
        case "image_url":
            return _image(fields)
        case "input_audio" | "file" | "video_url" | "audio_url" | "input_image" as kind:
            raise UnsupportedField(fields.path("type"), f"parts of type {kind} are not supported")
        case _:
            raise fields.wrong("type", "must be text or image_url")


def _image(fields: Fields) -> Image:
    if isinstance(fields.raw("image_url"), str):
        url, path = fields.required("image_url"), fields.path("image_url")
    else:
        source = fields.nested("image_url")
        if source is None:
            raise fields.wrong("image_url", "is required")
        url, path = source.required("url"), source.path("url")
        source.one_of("detail", ("auto", "low", "high"))
    if not url.startswith("data:"):
        if not url.startswith(("http://", "https://")):
            raise InvalidArgument(path, "must be an http, https or data address")
        return Image(url=url)
    header = _DATA_URL.match(url)
    if header is None:
        raise InvalidArgument(path, "a data address must look like data:image/png;base64,...")
    try:
        return Image(data=base64.b64decode(url[header.end() :], validate=True), media_type=header[1].lower())
    except binascii.Error:
        raise InvalidArgument(path, "is not valid base64") from None


def _tool_call(fields: Fields) -> ToolCall:
    fields.one_of("type", ("function",))
    function = fields.nested("function")
    if function is None:
        raise fields.wrong("function", "is required")
    return ToolCall(id=fields.required("id"), name=function.required("name"), arguments_json=_arguments(function))


def _arguments(function: Fields) -> str:
    """Arguments of a call of the history, as the caller wrote them: templates want an object, or fail on some."""
    text = (function.text("arguments") or "").strip()
    if text in ("", "null"):
        return "{}"
    json_object(text, function.path("arguments"))
    return text


def parse_tools(values: list[Any] | None, path: str = "tools") -> tuple[Tool, ...]:
    """Check and convert the tools of a request."""
    if values is not None and len(values) > MAX_TOOLS:
        raise InvalidArgument(path, f"must hold at most {MAX_TOOLS} tools, got {len(values)}")
    tools = tuple(_tool(fields) for fields in objects(values, path))
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in names:
            raise InvalidArgument(f"{path}[{i}].function.name", f"must be unique, but {tool.name} is there twice")
        names.add(tool.name)
    return tools


def _tool(fields: Fields) -> Tool:
    if fields.required("type") != "function":
        raise UnsupportedField(fields.path("type"), "only tools of type function are supported")
    function = fields.nested("function")
    if function is None:
        raise fields.wrong("function", "is required")
    name = function.required("name")
    if _TOOL_NAME.fullmatch(name) is None:
        raise function.wrong("name", "must be 1 to 64 letters, digits, underscores, dots and dashes")
    parameters = function.table("parameters")
    # Arguments follow their schema strictly where tool_choice forces a call; else as well as the model can.
    function.flag("strict")
    return Tool(
        name=name,
        description=function.text("description") or "",
        parameters_json=dumps(parameters).decode() if parameters is not None else "",
    )


def last_text(messages: tuple[ChatMessage, ...]) -> str:
    """Text of the last message."""
    content = messages[-1].content
    return content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))


def first_image(messages: tuple[ChatMessage, ...]) -> str | None:
    """Path of the first image of a conversation, or None."""
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content if isinstance(message.content, tuple) else ()):
            if isinstance(part, Image):
                return f"messages[{i}].content[{j}]"
    return None
