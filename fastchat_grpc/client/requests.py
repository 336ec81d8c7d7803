"""What a client asks for, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, Unpack

from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    Completion,
    Delta,
    FinishReason,
    GenerateRequest,
    Grammar,
    OutputOptions,
    Prompt,
    SamplingParams,
    StopConditions,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Tool,
    Usage,
)
from fastchat_grpc.errors import InvalidArgument

PromptLike = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, Any]] | Prompt
"""A text, token ids, messages (also as mappings with role and content), or a prompt of `core`."""


class GenerateOptions(TypedDict, total=False):
    """Options of a generation; the contract documents each."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    max_new_tokens: int
    min_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    n: int
    logprobs: int
    prompt_logprobs: int
    echo: bool
    stream_interval: int
    cumulative_text: bool
    keep_special_tokens: bool
    tools: Sequence[Tool]
    grammar: Grammar
    request_id: str
    priority: int
    lora_adapter: str
    session_key: str
    truncate_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    completion: Completion
    reasoning: str = ""

    @property
    def finish_reason(self) -> FinishReason:
        return self.completion.finish_reason

    @property
    def usage(self) -> Usage:
        return self.completion.usage


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation: its choices, by index."""

    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


def build_request(prompt: PromptLike, model: str = "", **options: Unpack[GenerateOptions]) -> GenerateRequest:
    """A GenerateRequest from flat options. Raises InvalidArgument for an unknown option or a bad value."""
    given: dict[str, Any] = dict(options)
    if isinstance(given.get("stop"), str):  # a sequence, too: of strings that nobody meant
        given["stop"] = (given["stop"],)
    for key in ("stop", "stop_token_ids"):
        if key in given:
            given[key] = tuple(given[key])
    tools = tuple(given.pop("tools", ()))
    groups: dict[str, Any] = {
        name: cls(**{f.name: given.pop(f.name) for f in fields(cls) if f.name in given})
        for name, cls in (("sampling", SamplingParams), ("stopping", StopConditions), ("output", OutputOptions))
    }
    own = {f.name for f in fields(GenerateRequest)}
    for key in given:
        if key not in own:
            raise InvalidArgument(key, "is no option of a generation")
    return GenerateRequest(prompt=_build_prompt(prompt, tools), model=model, **groups, **given)


def _build_prompt(prompt: PromptLike, tools: tuple[Tool, ...]) -> Prompt:
    if isinstance(prompt, TextPrompt | TokenPrompt | ChatPrompt):
        return prompt
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if all(isinstance(item, int) for item in prompt):
        return TokenPrompt(tuple(prompt))  # type: ignore[arg-type]
    messages = tuple(
        item if isinstance(item, ChatMessage) else ChatMessage(**item)  # type: ignore[arg-type]
        for item in prompt
    )
    return ChatPrompt(messages=messages, tools=tools)


def collect(deltas: Sequence[Delta], completion: Completion) -> Choice:
    return Choice(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        completion=completion,
        reasoning="".join(delta.reasoning for delta in deltas),
    )
