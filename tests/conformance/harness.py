"""A backend under test, and what came out of one request, with the rules of the event stream checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.base import Backend
from fastchat_grpc.backends.capabilities import TRAITS, Feature, Traits
from fastchat_grpc.core import (
    ChatMessage,
    ChatPrompt,
    Completion,
    Delta,
    Event,
    FinishReason,
    GenerateRequest,
    Grammar,
    ModelInfo,
    OutputOptions,
    PromptEcho,
    SamplingParams,
    StopConditions,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)
from tests.conformance.targets import Target

TIMEOUT_S = 100.0
PROMPT = "The capital of France is Paris, a city that"
REPEATING = "one two three four one two three four one two three four one two three"
LONG = 10_000


@dataclass
class ChoiceResult:
    """What one choice said."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    completion: Completion | None = None

    @property
    def finish(self) -> FinishReason:
        assert self.completion is not None
        return self.completion.finish_reason

    @property
    def tokens(self) -> int:
        """Completion tokens by usage."""
        assert self.completion is not None
        return self.completion.usage.completion_tokens

    @property
    def prompt_tokens(self) -> int:
        assert self.completion is not None
        return self.completion.usage.prompt_tokens


@dataclass
class Result:
    """What one request gave. `text` and the like are of its first choice."""

    choices: dict[int, ChoiceResult]
    echo: PromptEcho | None = None

    @property
    def first(self) -> ChoiceResult:
        return self.choices[min(self.choices)]

    @property
    def text(self) -> str:
        return self.first.text

    @property
    def token_ids(self) -> list[int]:
        return self.first.token_ids


SAMPLING = frozenset(SamplingParams.__slots__)
STOPPING = frozenset(StopConditions.__slots__)
OUTPUT = frozenset(OutputOptions.__slots__)


def request(prompt: str | Sequence[int] | list[ChatMessage] = PROMPT, **fields: Any) -> GenerateRequest:
    """A request; greedy and of 16 tokens unless said. Fields of all three groups are named flatly."""
    fields.setdefault("temperature", 0.0)
    fields.setdefault("max_new_tokens", 16)
    groups: dict[str, dict[str, Any]] = {"sampling": {}, "stopping": {}, "output": {}}
    own: dict[str, Any] = {}
    for name, value in fields.items():
        for group, names in (("sampling", SAMPLING), ("stopping", STOPPING), ("output", OUTPUT)):
            if name in names:
                groups[group][name] = value
                break
        else:
            own[name] = value
    return GenerateRequest(
        prompt=_prompt(prompt),
        model="tested",
        sampling=SamplingParams(**groups["sampling"]),
        stopping=StopConditions(**groups["stopping"]),
        output=OutputOptions(**groups["output"]),
        **own,
    )


def _prompt(prompt: str | Sequence[int] | list[ChatMessage]) -> TextPrompt | TokenPrompt | ChatPrompt:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if prompt and isinstance(prompt[0], ChatMessage):
        return ChatPrompt(messages=tuple(prompt))  # type: ignore[arg-type]
    return TokenPrompt(tuple(prompt))  # type: ignore[arg-type]


def chat(*texts: str) -> list[ChatMessage]:
    """A conversation of user and assistant by turns."""
    return [ChatMessage(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


class Harness:
    """A started backend, and ways to ask it."""

    def __init__(self, target: Target, **model: Any) -> None:
        """`model` overrides settings of the target's model."""
        self.target = target
        self.traits: Traits = TRAITS[target.name]
        self.info: ModelInfo
        self.infos: Sequence[ModelInfo] = ()
        """The model, then its adapters."""
        self.backend: Backend
        self._stack = AsyncExitStack()
        self._options: dict[str, str] = {}
        self._model = model

    async def open(self) -> None:
        """Start what the backend talks to, then the backend."""
        self._options = await self._stack.enter_async_context(self.target.open())
        await self.start()

    async def start(self) -> None:
        """Make and start the backend; after `backend.close()` this is a restart."""
        self.backend = registry.create(self.target.config(self._options, **self._model))
        self.infos = await self.backend.start()
        self.info, *adapters = self.infos
        assert len(adapters) == len(self._model.get("lora_adapters", ()))
        self.traits = getattr(self.backend, "traits", self.traits)  # as its options have it

    async def close(self) -> None:
        """Close everything."""
        await self.backend.close()
        await self._stack.aclose()

    @asynccontextmanager
    async def another(self, **model: Any) -> AsyncIterator[Backend]:
        """A second backend that is made but not started, with other settings of its model."""
        backend = registry.create(self.target.config(self._options, **model))
        try:
            yield backend
        finally:
            await backend.close()

    def supports(self, *features: Feature) -> bool:
        """Whether the backend declares all of these, and the model under test can do them."""
        return all(self.traits.supports(feature) and feature not in self.target.lacks for feature in features)

    def events(self, request: GenerateRequest) -> Any:
        """The events of a request, as an asynchronous generator."""
        return self.backend.generate(request)

    async def ask(self, prompt: Any = PROMPT, **fields: Any) -> Result:
        """Run `request(prompt, **fields)` to its end."""
        return await self.run(request(prompt, **fields))

    async def run(self, request: GenerateRequest) -> Result:
        """Run a request to its end and check the rules of its events."""
        result = empty(request)
        async with asyncio.timeout(TIMEOUT_S), aclosing(self.backend.generate(request)) as events:
            async for event in events:
                take(result, event, request)
        for choice in result.choices.values():
            assert choice.completion is not None, "every choice ends with one Completion"
        return result

    async def text_of(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return await self.backend.detokenize("tested", token_ids)

    async def tokens_of(self, prompt: Any) -> list[int]:
        """Tokens of a prompt."""
        return list(await self.backend.tokenize("tested", _prompt(prompt)))


def empty(request: GenerateRequest) -> Result:
    """The result of a request before its first event."""
    wanted = [i for i in range(request.output.n) if not request.resumed_choice(i).finished]
    return Result({i: ChoiceResult() for i in wanted})


def take(result: Result, event: Event, request: GenerateRequest) -> None:
    """Add an event to what a request gave; asserts the rules of the stream."""
    if isinstance(event, PromptEcho):
        assert result.echo is None, "the prompt is sent once"
        assert not any(choice.deltas for choice in result.choices.values()), "the prompt is sent first"
        result.echo = event
        return
    choice = result.choices[event.index]
    assert choice.completion is None, "nothing follows a Completion"
    if isinstance(event, Completion):
        choice.completion = event
        return
    assert event.text or event.token_ids or event.logprobs, "a Delta holds something"
    if event.token_ids or request.output.logprobs is None:  # one each, where a backend knows ids at all
        assert len(event.logprobs) == (len(event.token_ids) if request.output.logprobs is not None else 0)
    choice.deltas.append(event)
    choice.text += event.text
    choice.token_ids += event.token_ids
    choice.logprobs += event.logprobs
    if request.output.cumulative_text and request.resume is None:
        assert event.cumulative_text == choice.text
    if request.resume is None and choice.token_ids:
        assert event.usage.completion_tokens == len(choice.token_ids)


def grammar_request(grammar: Grammar, **fields: Any) -> GenerateRequest:
    """A chat request whose answer follows a grammar."""
    return request(chat("Describe a person named Ada, aged 36, in JSON."), grammar=grammar, **fields)


def lively(harness: Harness) -> dict[str, float]:
    """Sampling that varies, but not into the far tail, where rounding reorders tokens of nearly equal probability."""
    return {"temperature": 1.2, "top_k": 20} if harness.supports(Feature.TOP_K) else {"temperature": 1.0, "top_p": 0.9}
