"""POST /v1/chat/completions: from JSON to a domain request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastchat_grpc.core import (
    DEFAULT_MAX_NEW_TOKENS,
    MAX_LOGPROBS,
    Capability,
    ChatPrompt,
    ModelInfo,
    ToolChoice,
    UnsetInt,
)
from fastchat_grpc.errors import UnsupportedField
from fastchat_grpc.openai.call import Call, ToolMode, ToolOptions
from fastchat_grpc.openai.fields import Fields
from fastchat_grpc.openai.grammar import forced_call, parse_grammar
from fastchat_grpc.openai.jsonio import dumps
from fastchat_grpc.openai.messages import first_image, last_text, parse_messages, parse_tools
from fastchat_grpc.openai.paths import GRAMMAR
from fastchat_grpc.openai.settings import RENAMES, find_model, model_name, parse_generation, parse_reply, refuse_rest

_RENAMES = {
    **RENAMES,
    "output.logprobs": "top_logprobs",
    "prompt": "messages",
    "prompt_token_ids": "messages",
    "input": "messages",
    "chat": "messages",
    "chat.messages": "messages",
    "chat.tools": "tools",
    "chat.tool_choice": "tool_choice",
    "chat.template_arguments_json": "chat_template_kwargs",
    "chat.continue_final_message": "continue_final_message",
}


def parse_chat(values: Mapping[str, Any], models: Sequence[ModelInfo], request_id: str = "") -> Call:
    """Check and convert a chat completion. Raises InvalidArgument, which names the field."""
    fields = Fields(values)
    model = find_model(models, model_name(fields))
    chat, tools = parse_conversation(fields)
    _refuse_images(chat, model)
    grammar, grammar_path = parse_grammar(fields)
    if tools.forced:
        grammar, grammar_path = forced_call(chat.tools, chat.tool_choice, parallel=tools.parallel), "tool_choice"
    max_tokens, max_tokens_path = _max_tokens(fields, model)
    logprobs = _logprobs(fields)
    echo = fields.flag("echo") and chat.messages[-1].role == "assistant"
    renames = {**_RENAMES, "stopping.max_new_tokens": max_tokens_path, GRAMMAR: grammar_path}
    reply = replace(
        parse_reply(fields, model, renames),
        logprobs=logprobs is not None,
        prefix=last_text(chat.messages) if echo else "",
        tools=tools,
    )
    generation = parse_generation(
        fields,
        chat,
        reply,
        grammar=grammar,
        max_tokens=max_tokens,
        logprobs=logprobs,
        # Calls are often marked by special tokens, which plain text leaves out.
        keep_special=tools.mode is ToolMode.AUTO,
        request_id=request_id,
    )
    _refuse_rest(fields)
    return Call(generations=(generation,), reply=reply)


def parse_conversation(fields: Fields) -> tuple[ChatPrompt, ToolOptions]:
    """The messages, tools and template settings of a request, and what to do with calls."""
    messages = parse_messages(fields.items("messages"))
    tools = parse_tools(fields.items("tools"))
    choice, options = _tool_choice(fields, tuple(tool.name for tool in tools))
    continues = bool(fields.flag("continue_final_message"))
    opens = fields.flag("add_generation_prompt")
    if continues and opens:
        raise fields.wrong("continue_final_message", "cannot be combined with add_generation_prompt")
    if opens is False and not continues:
        raise UnsupportedField("add_generation_prompt", "false is supported with continue_final_message only")
    if continues and messages[-1].role != "assistant":
        raise fields.wrong("continue_final_message", "the last message must be the assistant's")
    chat = ChatPrompt(
        messages=messages,
        tools=() if options.mode is ToolMode.NONE else tools,
        tool_choice=choice,
        template_arguments_json=_template_arguments(fields),
        continue_final_message=continues,
    )
    return chat, options


def _template_arguments(fields: Fields) -> str:
    arguments = dict(fields.table("chat_template_kwargs") or {})
    if (effort := fields.text("reasoning_effort")) is not None:
        arguments.setdefault("reasoning_effort", effort)
    return dumps(arguments).decode() if arguments else ""


def _tool_choice(fields: Fields, names: tuple[str, ...]) -> tuple[ToolChoice | str, ToolOptions]:
    value = fields.raw("tool_choice")
    parallel = fields.flag("parallel_tool_calls") is not False
    if value is None:
        value = "auto" if names else "none"
    if isinstance(value, dict):
        name = _named_tool(Fields(value, "tool_choice"), names)
        return name, ToolOptions(mode=ToolMode.NAMED, names=(name,), parallel=parallel)
    if value not in ("none", "auto", "required"):
        raise fields.wrong("tool_choice", "must be none, auto, required, or an object that names a function")
    if value == "none":
        return ToolChoice.NONE, ToolOptions()
    if not names:
        raise fields.wrong("tool_choice", f"{value} needs tools")
    return ToolChoice(value), ToolOptions(mode=ToolMode(value), names=names, parallel=parallel)


def _named_tool(wanted: Fields, names: tuple[str, ...]) -> str:
    if wanted.required("type") != "function":
        raise UnsupportedField(wanted.path("type"), "only function is supported")
    function = wanted.nested("function")
    if function is None:
        raise wanted.wrong("function", "is required")
    name = function.required("name")
    if name not in names:
        raise function.wrong("name", "is not the name of a tool of this request")
    function.finish()
    wanted.finish()
    return name


def _max_tokens(fields: Fields, model: ModelInfo | None) -> tuple[int, str]:
    old, new = fields.integer("max_tokens", 1), fields.integer("max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise fields.wrong("max_tokens", f"({old}) contradicts max_completion_tokens ({new}); send one of them")
    limit = new if new is not None else old
    if limit is None:
        # Up to the end of the context, where generation ends by itself; a server whose context is unknown knows it.
        known = model is not None and model.context_length > 0
        limit = model.context_length if model is not None and known else UnsetInt(DEFAULT_MAX_NEW_TOKENS)
    return limit, "max_completion_tokens" if old is None else "max_tokens"


def _logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if wanted:
        return top or 0
    if top:
        raise fields.wrong("top_logprobs", "needs logprobs: true")
    return None


def _refuse_images(chat: ChatPrompt, model: ModelInfo | None) -> None:
    image = first_image(chat.messages)
    if image is not None and model is not None and Capability.VISION not in model.capabilities:
        raise UnsupportedField(image, f"the model {model.name} reads text only")


def _refuse_rest(fields: Fields) -> None:
    fields.unsupported("functions", hint="use tools")
    fields.unsupported("function_call", hint="use tool_choice")
    fields.unsupported("modalities", ["text"])
    fields.unsupported("chat_template", hint="the model's own is used; see chat_template_kwargs")
    fields.unsupported("documents", [])
    fields.unsupported("add_special_tokens", False)
    for name in ("audio", "prediction", "web_search_options", "verbosity", "mm_processor_kwargs"):
        fields.unsupported(name)
    refuse_rest(fields)
