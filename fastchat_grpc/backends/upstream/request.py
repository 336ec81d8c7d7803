"""Requests in the words of the OpenAI API, and of vLLM's additions to it."""

from __future__ import annotations

import base64
import json
from typing import Any

from fastchat_grpc.backends.upstream.options import Habits
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    EmbedRequest,
    GenerateRequest,
    GrammarKind,
    Image,
    Prompt,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolChoice,
    UnsetInt,
)
from fastchat_grpc.errors import UnsupportedField


def generation_body(
    request: GenerateRequest,
    model: str,
    *,
    vllm: bool,
    seed: int | None,
    context_length: int,
    habits: Habits,
    n: int = 1,
) -> tuple[str, dict[str, Any]]:
    """Path and body of some choices: what the caller has asked for, and no more, as servers refuse what they do not
    know. Raises UnsupportedField. `context_length` is 0 where the server does not say it."""
    chat = isinstance(request.prompt, ChatPrompt)
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        **_stream_options(habits, vllm),
        **_limit(request, chat, context_length, habits),
        **_prompt(request.prompt, vllm, reasoning=habits.reasoning),
        **_tools(request),
        **_sampling(request, seed),
        **_logprobs(request, chat),
    }
    if n > 1:
        body["n"] = n
    if request.stopping.stop:
        body["stop"] = list(request.stopping.stop)
    if vllm:
        body |= _vllm(request, context_length)
    elif request.stopping.include_stop:
        raise UnsupportedField("stopping.include_stop", "needs a server of vLLM's dialect")
    return ("/chat/completions" if chat else "/completions"), body | _grammar(request, vllm)


def _stream_options(habits: Habits, vllm: bool) -> dict[str, Any]:
    if not habits.stream_options:
        return {}
    return {"stream_options": {"include_usage": True, **({"continuous_usage_stats": True} if vllm else {})}}


def _limit(request: GenerateRequest, chat: bool, context_length: int, habits: Habits) -> dict[str, int]:
    """The limit of the output, unless a chat may use the rest of the context, which is every server's default.

    Completions have another default at each server, so there it is always said. A server may refuse more than its
    context, where this product's own engines just end there.
    """
    wanted = request.stopping.max_new_tokens
    if chat and (isinstance(wanted, UnsetInt) or (context_length and wanted >= context_length)):
        return {}
    return {habits.limit_name if chat else "max_tokens": min(wanted, context_length) if context_length else wanted}


def _logprobs(request: GenerateRequest, chat: bool) -> dict[str, Any]:
    wanted = request.output.logprobs
    if wanted is None:
        return {}
    if not chat:
        return {"logprobs": wanted}
    return {"logprobs": True, **({"top_logprobs": wanted} if wanted else {})}


def tokenize_body(prompt: Prompt, model: str) -> dict[str, Any]:
    """Body of vLLM's /tokenize. Raises UnsupportedField for tokens, which are tokenized already."""
    if isinstance(prompt, TokenPrompt):
        raise UnsupportedField("prompt_token_ids", "are tokens already")
    body = {"model": model, **_prompt(prompt, vllm=True)}
    if isinstance(prompt, ChatPrompt) and prompt.offered:
        body["tools"] = [_tool(tool) for tool in prompt.tools]
    return body


def embedding_body(request: EmbedRequest, model: str) -> dict[str, Any]:
    """Body of /embeddings. Raises UnsupportedField for what the API has no field for."""
    if not request.normalize:
        raise UnsupportedField("skip_normalization", "the OpenAI API has no such field")
    if request.truncate:
        raise UnsupportedField("truncate", "the OpenAI API has no such field")
    return {"model": model, "input": [item if isinstance(item, str) else list(item) for item in request.inputs]}


def _prompt(prompt: Prompt, vllm: bool, *, reasoning: bool = True) -> dict[str, Any]:
    match prompt:
        case TextPrompt(text):
            return {"prompt": text}
        case TokenPrompt(token_ids):
            return {"prompt": list(token_ids)}
        case ChatPrompt() as chat:
            return _chat(chat, vllm, reasoning)


def _chat(chat: ChatPrompt, vllm: bool, reasoning: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [_message(message, vllm, reasoning) for message in chat.messages]}
    if chat.continue_final_message:
        _need(vllm, "chat.continue_final_message")
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    arguments = dict(chat.template_arguments() or {})
    if not vllm and "reasoning_effort" in arguments:  # a field of the OpenAI API itself
        body["reasoning_effort"] = arguments.pop("reasoning_effort")
    if arguments:
        _need(vllm, "chat.template_arguments_json")
        body["chat_template_kwargs"] = arguments
    return body


def _tools(request: GenerateRequest) -> dict[str, Any]:
    chat = request.prompt
    if not isinstance(chat, ChatPrompt) or not chat.offered:
        return {}
    # What follows a grammar is the answer as a whole, and our own API finds the calls in it.
    choice = ToolChoice.NONE if request.grammar is not None else chat.tool_choice
    named = {"type": "function", "function": {"name": choice}}
    tools = [_tool(tool) for tool in chat.tools]
    return {"tools": tools, "tool_choice": named if isinstance(choice, str) else choice.value}


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    parameters = tool.parameters()
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def _message(message: ChatMessage, vllm: bool, reasoning: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"role": message.role, "content": _content(message)}
    if message.name:
        result["name"] = message.name
    if message.reasoning and reasoning:
        result["reasoning_content"] = message.reasoning
        if vllm:
            result["reasoning"] = message.reasoning  # its newer name of it
    if message.tool_call_id:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
            for call in message.tool_calls
        ]
    return result


def _content(message: ChatMessage) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": _image(part)}
        for part in message.content
    ]


def _image(image: Image) -> dict[str, str]:
    if image.url:
        return {"url": image.url}
    data = base64.b64encode(image.data).decode()
    return {"url": f"data:{image.media_type or 'image/png'};base64,{data}"}


def _sampling(request: GenerateRequest, seed: int | None) -> dict[str, Any]:
    sampling = request.sampling
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    body: dict[str, Any] = {name: sampling.given[name] for name in names if name in sampling.given}
    if sampling.greedy:
        body |= {"temperature": 0.0}
        body.pop("top_p", None)
    if seed is not None:
        body["seed"] = seed
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    return body


def _vllm(request: GenerateRequest, context_length: int) -> dict[str, Any]:
    """What vLLM's dialect adds, each where it says something."""
    sampling, stopping, output = request.sampling, request.stopping, request.output
    least = min(stopping.min_new_tokens, context_length or stopping.min_new_tokens)  # not more than the limit that goes
    fields: dict[str, tuple[bool, Any]] = {
        "top_k": ("top_k" in sampling.given, sampling.top_k if sampling.top_k > 0 else -1),
        "min_p": ("min_p" in sampling.given, sampling.min_p),
        "repetition_penalty": ("repetition_penalty" in sampling.given, sampling.repetition_penalty),
        "min_tokens": (least > 0, least),
        "stop_token_ids": (bool(stopping.stop_token_ids), list(stopping.stop_token_ids)),
        "ignore_eos": (stopping.ignore_eos, True),
        "include_stop_str_in_output": (stopping.include_stop, True),
        "skip_special_tokens": (output.keep_special_tokens, False),
        "truncate_prompt_tokens": (request.truncate_prompt_tokens is not None, request.truncate_prompt_tokens),
    }
    return {name: value for name, (given, value) in fields.items() if given}


def _grammar(request: GenerateRequest, vllm: bool) -> dict[str, Any]:
    if request.grammar is None:
        return {}
    match request.grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return {"response_format": {"type": "json_object"}}
        case GrammarKind.JSON_SCHEMA:
            try:
                schema = json.loads(request.grammar.source)
            except ValueError as error:
                raise UnsupportedField("structured_output.json_schema", "is not JSON") from error
            named = {"name": "output", "schema": schema}
            if vllm or _is_strict(schema):
                named["strict"] = True
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        case GrammarKind.REGEX:
            return {"structured_outputs": {"regex": request.grammar.source}}
        case GrammarKind.LARK:
            raise AssertionError("refused before")


def _is_strict(schema: Any) -> bool:
    """Whether OpenAI takes a schema as strict: its objects name all that they hold, and hold all of it."""
    if isinstance(schema, list):
        return all(_is_strict(item) for item in schema)
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        named, required = schema.get("properties"), schema.get("required")
        if schema.get("additionalProperties") is not False or not isinstance(named, dict):
            return False
        if not isinstance(required, list) or set(named) != {name for name in required if isinstance(name, str)}:
            return False
    return all(_is_strict(value) for value in schema.values())


def _need(vllm: bool, path: str) -> None:
    if not vllm:
        raise UnsupportedField(path, "needs a server of vLLM's dialect: --backend-option dialect=vllm")
