"""Conversations."""

from __future__ import annotations

from typing import Any

from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    Image,
    Tool,
    ToolCall,
    ToolChoice,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.v1 import generation_pb2 as pb

_CHOICE_TO_PB: dict[ToolChoice, Any] = {c: pb.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{c.name}") for c in ToolChoice}
_CHOICE_FROM_PB = {number: choice for choice, number in _CHOICE_TO_PB.items()} | {0: ToolChoice.AUTO}


def chat_from_pb(message: pb.ChatInput) -> ChatPrompt:
    """Check and convert a conversation. Raises InvalidArgument."""
    return ChatPrompt(
        messages=tuple(_message_from_pb(item, f"chat.messages[{i}]") for i, item in enumerate(message.messages)),
        tools=tuple(
            Tool(name=tool.name, description=tool.description, parameters_json=tool.parameters_json)
            for tool in message.tools
        ),
        tool_choice=_choice_from_pb(message.tool_choice),
        template_arguments_json=message.template_arguments_json,
        continue_final_message=message.continue_final_message,
    )


def chat_to_pb(chat: ChatPrompt) -> pb.ChatInput:
    """Convert a conversation."""
    return pb.ChatInput(
        messages=[_message_to_pb(message) for message in chat.messages],
        tools=[
            pb.Tool(name=tool.name, description=tool.description, parameters_json=tool.parameters_json)
            for tool in chat.tools
        ],
        tool_choice=_choice_to_pb(chat.tool_choice),
        template_arguments_json=chat.template_arguments_json,
        continue_final_message=chat.continue_final_message,
    )


def _choice_from_pb(message: pb.ToolChoice) -> ToolChoice | str:
    if message.WhichOneof("choice") == "function":
        return message.function
    choice = _CHOICE_FROM_PB.get(message.mode)
    if choice is None:
        raise InvalidArgument("chat.tool_choice.mode", f"is no mode of this version: {message.mode}")
    return choice


def _choice_to_pb(choice: ToolChoice | str) -> pb.ToolChoice | None:
    if isinstance(choice, str):
        return pb.ToolChoice(function=choice)
    return pb.ToolChoice(mode=_CHOICE_TO_PB[choice]) if choice is not ToolChoice.AUTO else None


def _message_from_pb(message: pb.ChatMessage, path: str) -> ChatMessage:
    content: str | tuple[str | Image, ...] = message.content
    if message.parts:
        if message.content:
            raise InvalidArgument(path, "set content or parts, not both")
        content = tuple(_part_from_pb(part, f"{path}.parts[{i}]") for i, part in enumerate(message.parts))
    return ChatMessage(
        role=message.role,
        content=content,
        name=message.name,
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in message.tool_calls
        ),
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning,
    )


def _part_from_pb(part: pb.ContentPart, path: str) -> str | Image:
    match part.WhichOneof("part"):
        case "text":
            return part.text
        case "image":
            if part.image.WhichOneof("source") is None:
                raise InvalidArgument(f"{path}.image", "set data or url")
            return Image(data=part.image.data, url=part.image.url, media_type=part.image.media_type)
    raise InvalidArgument(path, "set text or image")


def _message_to_pb(message: ChatMessage) -> pb.ChatMessage:
    result = pb.ChatMessage(
        role=message.role,
        name=message.name,
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning,
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in message.tool_calls
        ],
    )
    if isinstance(message.content, str):
        result.content = message.content
    else:
        result.parts.extend(_part_to_pb(part) for part in message.content)
    return result


def _part_to_pb(part: str | Image) -> pb.ContentPart:
    if isinstance(part, str):
        return pb.ContentPart(text=part)
    if part.data:
        return pb.ContentPart(image=pb.Image(data=part.data, media_type=part.media_type))
    return pb.ContentPart(image=pb.Image(url=part.url, media_type=part.media_type))
