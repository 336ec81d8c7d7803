"""POST /v1/chat/completions: from JSON to a domain request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastchat_grpc.core import (
    MAX_LOGPROBS,
    Capability,
    ChatPrompt,
    Grammar,
    ModelInfo,
    ToolChoice,
)
from fastchat_grpc.errors import UnsupportedField
from fastchat_grpc.openai.call import Call, ToolMode, ToolOptions
from fastchat_grpc.openai.fields import Fields
from fastchat_grpc.openai.grammar import parse_grammar
from fastchat_grpc.openai.jsonio import dumps
from fastchat_grpc.openai.messages import first_image, last_text, parse_messages, parse_tools
from fastchat_grpc.openai.paths import GRAMMAR
from fastchat_grpc.openai.settings import (
    RENAMES,
    find_model,
    limit,
    longest,
    model_name,
    parse_generation,
    parse_reply,
    refuse_rest,
)
from fastchat_grpc.openai.tools.schema import call_or_answer, forced_call

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
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def parse_chat(
    values: Mapping[str, Any], models: Sequence[ModelInfo], request_id: str = "", *, strict: bool = False
) -> Call:
    """Check and convert a chat completion. Raises InvalidArgument, which names the field.

    Args:
        strict: members that nobody knows are refused, too.
    """
    fields = Fields(values)
    model = find_model(models, model_name(fields))
    chat, tools = parse_conversation(fields)
    _refuse_images(chat, model)
    grammar, grammar_path = _grammar(fields, chat, tools)
    max_tokens, max_tokens_path = _max_tokens(fields, model)
    logprobs = _logprobs(fields)
    echo = fields.flag("echo") and chat.messages[-1].role == "assistant"
    renames = {**_RENAMES, "stopping.max_new_tokens": max_tokens_path, GRAMMAR: grammar_path}
    reply = replace(
        parse_reply(fields, model, renames),
        logprobs=logprobs is not None,
        reasoning=fields.flag("include_reasoning") is not False,
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
    return Call(
        generations=(generation,), reply=reply, ignored=_refuse_rest(fields, generation.output.n, strict=strict)
    )


def _grammar(fields: Fields, chat: ChatPrompt, tools: ToolOptions) -> tuple[Grammar | None, str]:
    """The grammar of the output and the field that asked for it, where it and calls must get along."""
    grammar, path = parse_grammar(fields)
    # What a response_format asks for is the text of an answer; a forced call has none.
    if tools.forced:
        if grammar is not None and not path.startswith("response_format"):
            raise UnsupportedField(path, "cannot be combined with a tool_choice that forces a call")
        return forced_call(chat.tools, chat.tool_choice, parallel=tools.parallel), "tool_choice"
    if grammar is not None and tools.mode is ToolMode.AUTO:
        combined = call_or_answer(chat.tools, grammar, parallel=tools.parallel)
        if combined is None:
            raise UnsupportedField(path, "would keep the model from calling its tools; set tool_choice to none")
        return combined, path
    return grammar, path


def parse_conversation(fields: Fields) -> tuple[ChatPrompt, ToolOptions]:
    """The messages, tools and template settings of a request, and what to do with calls."""
    messages = parse_messages(fields.items("messages"))
    tools = parse_tools(fields.items("tools"))
    choice, options = _tool_choice(fields, tuple(tool.name for tool in tools))
    if options.mode is ToolMode.AUTO:
        options = replace(options, tools=tools)
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
    if (effort := fields.one_of("reasoning_effort", _EFFORTS)) is not None:
        arguments.setdefault("reasoning_effort", effort)
    thinking = fields.flag("enable_thinking")
    if (wanted := fields.nested("thinking")) is not None:
        thinking = wanted.one_of("type", ("enabled", "disabled", "adaptive")) != "disabled"
        wanted.unsupported("budget_tokens")
    if thinking is not None:
        arguments.setdefault("enable_thinking", thinking)
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
        if value == "required":
            raise fields.wrong("tool_choice", f"{value} needs tools")
        return ToolChoice.NONE, ToolOptions()
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
    return name


def _max_tokens(fields: Fields, model: ModelInfo | None) -> tuple[int, str]:
    # A gateway sets one of them and leaves the other as its caller sent it: the newer name wins.
    new, unlimited = limit(fields, "max_completion_tokens", 1)
    old, _ = limit(fields, "max_tokens", 1)
    if new is not None or unlimited or old is None:
        return longest(model) if new is None else new, "max_completion_tokens"
    return old, "max_tokens"


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


def _refuse_rest(fields: Fields, n: int, *, strict: bool) -> tuple[str, ...]:
    fields.unsupported("functions", [], hint="use tools")
    fields.unsupported("function_call", "none", "auto", hint="use tool_choice")
    fields.unsupported("modalities", ["text"])
    fields.unsupported("chat_template", hint="the model's own is used; see chat_template_kwargs")
    fields.unsupported("documents", [])
    for name in ("prompt", "input"):
        fields.unsupported(name, "", [], hint="use messages")
    fields.unsupported("system", "", hint="use a message of the role system")
    fields.unsupported("add_special_tokens", False)
    fields.unsupported("verbosity", "medium")
    fields.unsupported("mm_processor_kwargs", {})
    # A prediction makes an answer faster, and no other.
    fields.table("prediction")
    for name in ("audio", "web_search_options"):
        fields.unsupported(name)
    return refuse_rest(fields, n, strict=strict)
