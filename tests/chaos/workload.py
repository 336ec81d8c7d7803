"""What is asked of the fleet, and what each answer must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fastchat_grpc.core import ChatMessage, Grammar, GrammarKind, Tool
from tests.chaos.dice import agrees

PROMPTS = tuple(f"{i}: The quick brown fox j\u00fcmps over \U0001f98a dogs. " for i in range(4))
SCHEMA = '{"type":"object","properties":{"z":{"type":"integer","minimum":1},"a":{"type":"number","default":1.50}}}'
"""Order of keys and spelling of numbers must reach every worker as they are."""
TOOLS = (Tool(name="look", description="Look it up", parameters_json=SCHEMA), Tool(name="wait"))

HTTP_OPTIONS = ("temperature", "seed", "n", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty")
"""Options that have the same name over HTTP."""


class Rule(Enum):
    """What an answer is held against."""

    EQUAL = "equal"
    """The answer that the undisturbed fleet gave."""
    OWN_KEY = "own key"
    """Its own key: the seed was drawn on the way, and must have stayed."""
    LENGTH = "length"
    """Only its length: the engine has no random numbers that another process could draw again."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One kind of request. `options` are those of the Python client."""

    name: str
    model: str
    prompt: str
    chat: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    rule: Rule = Rule.EQUAL
    away: bool = False
    """Whether all workers of the model may be away at once: what says so at the start is an answer, too."""

    @property
    def messages(self) -> list[ChatMessage]:
        """The prompt as a conversation."""
        return [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=self.prompt)]

    def body(self, *, stream: bool) -> tuple[str, dict[str, Any]]:
        """Path and body of the same request over HTTP."""
        options = dict(self.options)
        body: dict[str, Any] = {"model": self.model, "stream": stream, "max_tokens": options.pop("max_new_tokens")}
        body |= {key: options.pop(key) for key in HTTP_OPTIONS if key in options}
        if tools := options.pop("tools", ()):
            body["tools"] = [_tool(tool) for tool in tools]
        assert not options, f"{self.name} cannot be asked over HTTP: {sorted(options)}"
        if not self.chat:
            return "/v1/completions", {**body, "prompt": self.prompt}
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        return "/v1/chat/completions", {**body, "messages": messages}


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    if tool.parameters_json:
        function["parameters"] = json.loads(tool.parameters_json)
    return {"type": "function", "function": function}


@dataclass(frozen=True)
class Answer:
    """The choices of one answer, by index: text and token ids (none over HTTP)."""

    choices: tuple[tuple[str, tuple[int, ...]], ...]


def wrong(ask: Ask, answer: Answer, expected: Answer | None) -> str | None:
    """What is wrong with an answer, or None."""
    if ask.rule is Rule.EQUAL:
        return None if answer == expected else f"{ask.name}: {_difference(answer, expected)}"
    for index, (text, token_ids) in enumerate(answer.choices):
        if ask.rule is Rule.OWN_KEY and not agrees(text.rstrip("\ufffd")):
            return f"{ask.name}: choice {index} was put together of different texts: {text!r}"
        wanted = int(ask.options["max_new_tokens"])
        count = len(token_ids) or len(text.encode())
        if count < wanted:
            return f"{ask.name}: choice {index} has {count} tokens of {wanted}"
    return None


def _difference(answer: Answer, expected: Answer | None) -> str:
    assert expected is not None
    for index, (found, right) in enumerate(zip(answer.choices, expected.choices, strict=False)):
        if found != right:
            return f"choice {index} is {found[0]!r} ({len(found[1])} tokens), not {right[0]!r} ({len(right[1])})"
    return f"{len(answer.choices)} choices, not {len(expected.choices)}"


@dataclass(frozen=True)
class Workload:
    """The kinds of requests: all of them, and those that can be asked over HTTP, too."""

    grpc: tuple[Ask, ...]
    http: tuple[Ask, ...]


def dice_workload(main: str, solo: str, seedless: str, tokens: int) -> Workload:
    """Greedy, seeded, drawn, with penalties, tools, grammars, stops, several choices.

    Args:
        main: model of several workers; seeds come back on another worker.
        solo: model of one worker.
        seedless: model whose engine takes no seeds and whose workers are small.
        tokens: length of answers.
    """
    some = {"max_new_tokens": tokens, "ignore_eos": True}
    greedy = {**some, "temperature": 0.0}
    seeded = {**some, "temperature": 0.8, "seed": 7}
    penalized = {"presence_penalty": 0.3, "frequency_penalty": 0.15, "repetition_penalty": 1.1}
    grammar = Grammar(GrammarKind.JSON_OBJECT)
    http: list[Ask] = []
    grpc: list[Ask] = []
    for prompt in PROMPTS:
        http += [
            Ask(name="greedy", model=main, prompt=prompt, options=greedy),
            Ask(name="seeded", model=main, prompt=prompt, options=seeded),
            Ask(name="penalties", model=main, prompt=prompt, options={**seeded, **penalized}),
            Ask(name="greedy penalties", model=main, prompt=prompt, options={**greedy, **penalized, "n": 2}),
            Ask(name="two choices", model=main, prompt=prompt, options={**seeded, "n": 2}),
            Ask(name="tools", model=main, prompt=prompt, chat=True, options={**seeded, "tools": TOOLS}),
            Ask(name="drawn", model=main, prompt=prompt, options=some, rule=Rule.OWN_KEY),
            Ask(name="solo", model=solo, prompt=prompt, options=seeded, away=True),
            Ask(name="seedless", model=seedless, prompt=prompt, options=some, rule=Rule.LENGTH),
        ]
        grpc += [
            Ask(name="grammar", model=main, prompt=prompt, options={**seeded, "grammar": grammar}),
            Ask(name="logprobs", model=main, prompt=prompt, options={**seeded, "logprobs": 0}),
            Ask(name="stop", model=main, prompt=prompt, options={**seeded, "stop": ("q.", "\u00e9x")}),
        ]
    return Workload((*http, *grpc), tuple(http))


def text_workload(model: str, tokens: int) -> Workload:
    """Greedy texts of a real model."""
    options = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    prompts = [f"Write a sentence about {word}." for word in ("the sea", "bread", "rain", "a clock")]
    asks = tuple(Ask(name="greedy", model=model, prompt=prompt, options=options) for prompt in prompts)
    return Workload(asks, asks)
