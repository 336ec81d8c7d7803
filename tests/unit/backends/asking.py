"""Requests and their events, in short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastchat_grpc.core import (
    Completion,
    Delta,
    Event,
    GenerateRequest,
    OutputOptions,
    PromptEcho,
    SamplingParams,
    StopConditions,
    TextPrompt,
    TokenLogprob,
)

SAMPLING = frozenset(SamplingParams.__slots__)
STOPPING = frozenset(StopConditions.__slots__)
OUTPUT = frozenset(OutputOptions.__slots__)


class Generates(Protocol):
    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]: ...


def request(prompt: str = "abc", **fields: Any) -> GenerateRequest:
    """A greedy request of up to 16 tokens unless said; fields of all groups are named flatly."""
    fields = {"temperature": 0.0, "max_new_tokens": 16, **fields}

    def group(names: frozenset[str]) -> dict[str, Any]:
        return {name: fields.pop(name) for name in list(fields) if name in names}

    sampling, stopping, output = group(SAMPLING), group(STOPPING), group(OUTPUT)
    return GenerateRequest(
        prompt=fields.pop("whole_prompt", TextPrompt(prompt)),
        sampling=SamplingParams(**sampling),
        stopping=StopConditions(**stopping),
        output=OutputOptions(**output),
        **fields,
    )


@dataclass
class Answer:
    """One choice."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    completion: Completion | None = None


@dataclass
class Answers:
    """Everything that came of a request."""

    events: list[Event]
    choices: dict[int, Answer]
    echo: PromptEcho | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def completion(self) -> Completion:
        completion = self.choices[0].completion
        assert completion is not None
        return completion


async def ask(backend: Generates, asked: GenerateRequest) -> Answers:
    """Run a request to its end."""
    answers = Answers([], {i: Answer() for i in range(asked.output.n)})
    async with asyncio.timeout(20), aclosing(backend.generate(asked)) as events:
        async for event in events:
            answers.events.append(event)
            if isinstance(event, PromptEcho):
                answers.echo = event
            elif isinstance(event, Delta):
                choice = answers.choices[event.index]
                choice.text += event.text
                choice.reasoning += event.reasoning
                choice.token_ids += event.token_ids
                choice.logprobs += event.logprobs
            else:
                answers.choices[event.index].completion = event
    return answers
