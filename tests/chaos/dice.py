"""A backend whose text shows what it was made of, so that a stream that was put together wrongly is seen.

The first 16 characters of a choice are a key: a digest of the prompt as this process rendered it, of the sampling
parameters, of the random numbers' origin and of the choice's index. What follows depends on the key and on the place
alone. So a text is whole if it agrees with its own key (`agrees`), whoever made its pieces; and it is the undisturbed
one if the keys are equal, too: a prompt that another process renders otherwise, or a seed or a penalty that was lost,
gives another key. Presence and frequency penalties make what follows depend on all that was said, too: each letter is
the one next to the key's own that has been said seldom enough.

`seeds=counter`: random numbers come from the request's seed and the place (SEEDED_RESUME, as in our own engine).
`seeds=none`: the engine takes no seed and refuses one, as SGLang and LightLLM do; a resumed choice goes on from
the same tokens with other numbers.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from hashlib import blake2b

from fastchat_grpc.backends.echo import EOS, EchoBackend, EchoTokenizer
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import (
    SAMPLING_NUMBERS,
    Capability,
    ChatPrompt,
    Event,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
    Timings,
    TokenLogprob,
)
from fastchat_grpc.errors import UnsupportedField
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.choice import Choice, ChoiceLimits

KEY_LENGTH = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
LETTER_BYTES = LETTERS.encode()
NEXT_LETTER = 0.1
"""What the next letter has less of a logit than the one before it, beginning with the key's own."""
WIDE_EVERY = 7
"""Every so many characters stands one of two bytes, so that streams break in the middle of characters, too."""


def text_of(key: str, length: int) -> str:
    """The first `length` characters of the choice with a key."""
    tail = [_character(key, place) for place in range(KEY_LENGTH, length)]
    return key[:length] + "".join(tail)


def agrees(text: str) -> bool:
    """Whether a text is one that its own key gives."""
    return text == text_of(text[:KEY_LENGTH], len(text))


def _character(key: str, place: int) -> str:
    if place % WIDE_EVERY == 0:
        return "\N{LATIN SMALL LETTER E WITH ACUTE}"
    return LETTERS[blake2b(f"{key}{place}".encode(), digest_size=1).digest()[0] % len(LETTERS)]


def penalized(wanted: int, said: Counter[int], sampling: SamplingParams) -> int:
    """The byte that penalties leave in the place of the wanted one. Only letters are exchanged, for letters."""
    if wanted not in LETTER_BYTES or not (sampling.presence_penalty or sampling.frequency_penalty):
        return wanted
    first = LETTER_BYTES.index(wanted)

    def logit(letter: int) -> float:
        distance = (LETTER_BYTES.index(letter) - first) % len(LETTER_BYTES)
        penalty = sampling.presence_penalty * (said[letter] > 0) + sampling.frequency_penalty * said[letter]
        return -NEXT_LETTER * distance - penalty

    return max(LETTER_BYTES, key=logit)


class Tokenizer(EchoTokenizer):
    """Renders everything of a conversation that a worker was given, in the order in which it was given."""

    def render_chat(self, chat: ChatPrompt) -> str:
        tools = [f"{tool.name}|{tool.description}|{tool.parameters_json}" for tool in chat.tools]
        lines = [super().render_chat(chat), *tools, chat.template_arguments_json]
        return "\n".join(lines)


class Dice(EchoBackend):
    """See the module's documentation."""

    def __init__(self, config: BackendConfig) -> None:
        options = dict(config.options)
        self._counter = options.pop("seeds", "counter") == "counter"
        super().__init__(BackendConfig(name=config.name, model=config.model, options=options))
        self._tokenizer = Tokenizer()

    async def start(self) -> Sequence[ModelInfo]:
        able = {Capability.GENERATE, Capability.CHAT, Capability.EMBED, Capability.LOGPROBS, Capability.RESUME}
        able |= {Capability.STRUCTURED_OUTPUT, Capability.STATEFUL_RESUME}
        if self._counter:
            able |= {Capability.SEED, Capability.SEEDED_RESUME}
        return [
            ModelInfo(name=info.name, context_length=info.context_length, capabilities=frozenset(able), backend="dice")
            for info in await super().start()
        ]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if request.sampling.seed is not None and not self._counter:
            raise UnsupportedField("sampling.seed", "this engine has no seeds")
        token_ids = prompts.prepare(self._tokenizer, request, self._context_length)
        limits = ChoiceLimits(prompt_tokens=len(token_ids), context_length=self._context_length, stream_interval=2)
        await asyncio.sleep(self._first_delay_s)
        running = [
            (Choice(request, index, self._tokenizer, limits), self._tokens(request, index, token_ids))
            for index in range(request.output.n)
            if not request.resumed_choice(index).finished
        ]
        said = [Counter(request.resumed_choice(index).output_token_ids) for index in range(request.output.n)]
        while running:
            for choice, tokens in list(running):
                if choice.finish_reason is None:
                    self._push(request, choice, tokens, said[choice.index])
                if choice.due and (delta := choice.delta()) is not None:
                    yield delta
                if choice.finish_reason is not None:
                    running.remove((choice, tokens))
                    yield choice.completion(Timings())
            await asyncio.sleep(self._delay_s)

    def _push(self, request: GenerateRequest, choice: Choice, tokens: bytes, said: Counter[int]) -> None:
        self._processed_tokens += 1
        place = choice.token_count
        token_id = tokens[place] if place < len(tokens) else EOS
        if place >= KEY_LENGTH:
            token_id = penalized(token_id, said, request.sampling)
        said[token_id] += 1
        wanted = request.output.logprobs is not None
        choice.push(token_id, TokenLogprob(token_id, "", bytes([token_id % 256]), -place) if wanted else None)

    def _tokens(self, request: GenerateRequest, index: int, prompt: Sequence[int]) -> bytes:
        """What a choice says: as many bytes as it may have."""
        sampling = request.sampling
        origin = b"greedy" if sampling.greedy else str(sampling.seed).encode()
        if not sampling.greedy and sampling.seed is None:
            origin = os.urandom(16)
        numbers = {name: float(getattr(sampling, name)) for name in SAMPLING_NUMBERS}
        what = f"{list(prompt)}|{numbers}|{request.grammar}|{request.stopping.stop}|{index}".encode()
        key = blake2b(what + origin, digest_size=KEY_LENGTH // 2).hexdigest()
        return text_of(key, request.stopping.max_new_tokens).encode()
