"""A backend without a model: it says the prompt back. Deterministic, fast, and able to fail on purpose.

The vocabulary is the 256 bytes, and an end-of-sequence token. The "model" gives probability 1 to the
next byte of the prompt (of a conversation: of its last message), and to end of sequence after the last;
where the end is suppressed it starts again. No sampling parameter changes a choice of one, so all are
honoured; logprobs are 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from time import monotonic

from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.config import BackendConfig
from fastchat_grpc.core import (
    Capability,
    ChatPrompt,
    EmbedRequest,
    EmbedResult,
    Event,
    GenerateRequest,
    Image,
    ModelInfo,
    Prompt,
    Timings,
    TokenLogprob,
    TopLogprob,
)
from fastchat_grpc.errors import AdapterNotFound, BackendFailed, ConfigError, PromptTooLong, UnsupportedField
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.choice import Choice, ChoiceLimits
from fastchat_grpc.text.reasoning import marks_of

EOS = 256
VOCABULARY_SIZE = 257
EMBEDDING_SIZE = 16
FINGERPRINT = "echo"
"""It has no weights, and one tokenizer."""
OPTIONS = frozenset({"delay_ms", "first_delay_ms", "fail_after", "hang_after"})


def create(config: BackendConfig) -> EchoBackend:
    """Make an echo backend.

    Options: `delay_ms` before each token, `first_delay_ms` before the first, `fail_after` and
    `hang_after` a number of tokens of a request.
    """
    config.refuse_unknown_options(OPTIONS)
    return EchoBackend(config)


class EchoBackend:
    """See the module's documentation."""

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._context_length = config.model.context_length or 4096
        self._delay_s = _number(config, "delay_ms") / 1000
        self._first_delay_s = _number(config, "first_delay_ms") / 1000
        self._fail_after = _number(config, "fail_after") or math.inf
        self._hang_after = _number(config, "hang_after") or math.inf
        self._tokenizer = EchoTokenizer()
        self._processed_tokens = 0

    async def start(self) -> Sequence[ModelInfo]:
        capabilities = {
            Capability.GENERATE,
            Capability.CHAT,
            Capability.EMBED,
            Capability.LOGPROBS,
            Capability.SEED,
            Capability.RESUME,
            Capability.SEEDED_RESUME,
            Capability.STATEFUL_RESUME,
        }
        return [
            ModelInfo(
                name=name,
                context_length=self._context_length,
                capabilities=frozenset(capabilities),
                backend="echo",
                embedding_size=EMBEDDING_SIZE,
                vocabulary_size=VOCABULARY_SIZE,
                fingerprint=FINGERPRINT,
                tokenizer_fingerprint=FINGERPRINT,
            )
            for name in self._config.model.served_names
        ]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        arrival = monotonic()
        if request.grammar is not None:
            raise UnsupportedField("structured_output", "the echo backend cannot constrain its output")
        if request.lora_adapter:
            raise AdapterNotFound(f"lora_adapter: no adapter {request.lora_adapter!r} is loaded")
        token_ids = prompts.prepare(self._tokenizer, request, self._context_length)
        self._processed_tokens += len(token_ids)
        await asyncio.sleep(self._first_delay_s)
        echo = prompts.echo(self._tokenizer, request, token_ids, _prompt_logprobs(request, token_ids))
        if echo is not None:
            yield echo
        limits = ChoiceLimits(
            prompt_tokens=len(token_ids),
            context_length=self._context_length,
            stream_interval=self._config.stream_interval,
            reasoning=marks_of(self._config.model.reasoning_parser, self._tokenizer.chat_template),
        )
        source = self._source(request, token_ids)
        choices = [
            Choice(request, index, self._tokenizer, limits, token_ids)
            for index in range(request.output.n)
            if not request.resumed_choice(index).finished
        ]
        first_token_s = 0.0
        while choices:
            for choice in list(choices):
                if choice.finish_reason is None:
                    await self._step(request, choice, source)
                    first_token_s = first_token_s or monotonic() - arrival
                if choice.due and (delta := choice.delta()) is not None:
                    yield delta
                if choice.finish_reason is not None:
                    choices.remove(choice)
                    timings = Timings(time_to_first_token_s=first_token_s, total_s=monotonic() - arrival)
                    yield choice.completion(timings)
            await asyncio.sleep(self._delay_s)

    async def _step(self, request: GenerateRequest, choice: Choice, source: Sequence[int]) -> None:
        position = choice.token_count
        if position >= self._fail_after:
            raise BackendFailed(f"failed after {position} tokens, as told by fail_after")
        if position >= self._hang_after:
            await asyncio.Event().wait()
        stopping = request.stopping
        ends = position > 0 and position % len(source) == 0
        if ends and not stopping.ignore_eos and position >= stopping.min_new_tokens:
            token_id = EOS
        else:
            token_id = source[position % len(source)]
        self._processed_tokens += 1
        wanted = request.output.logprobs
        choice.push(token_id, _certain(token_id, wanted) if wanted is not None else None)

    def _source(self, request: GenerateRequest, token_ids: Sequence[int]) -> Sequence[int]:
        """The bytes to say: never empty."""
        if isinstance(request.prompt, ChatPrompt):
            return list(_content(request.prompt, len(request.prompt.messages) - 1).encode()) or [ord(" ")]
        return [t for t in token_ids if t != EOS] or [ord(" ")]

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        vectors, count = [], 0
        for i, item in enumerate(request.inputs):
            token_ids = self._tokenizer.encode(item) if isinstance(item, str) else list(item)
            prompts.check_token_ids(f"inputs[{i}]", token_ids, VOCABULARY_SIZE)
            truncate = self._config.model.embed_truncate if request.truncate is None else request.truncate
            if len(token_ids) > self._context_length and not truncate:
                raise PromptTooLong(f"inputs[{i}]", len(token_ids), self._context_length)
            token_ids = token_ids[: self._context_length]
            count += len(token_ids)
            digest = hashlib.shake_128(str(token_ids).encode()).digest(EMBEDDING_SIZE)
            vector = [byte - 127.5 for byte in digest]
            norm = math.hypot(*vector) if request.normalize else 1.0
            vectors.append([x / norm for x in vector])
        return EmbedResult(embeddings=vectors, prompt_tokens=count)

    async def tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        return prompts.tokenize(self._tokenizer, prompt)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        prompts.check_token_ids("token_ids", token_ids, VOCABULARY_SIZE)
        return self._tokenizer.decode(token_ids, keep_special_tokens=True)

    def chat_template(self, model: str) -> str:
        return self._tokenizer.chat_template

    def load(self) -> BackendLoad:
        return BackendLoad(max_running=self._config.model.max_running or 256, processed_tokens=self._processed_tokens)

    async def close(self) -> None:
        pass


class EchoTokenizer:
    """Bytes as tokens. Implements `fastchat_grpc.text.tokenizer.Tokenizer`."""

    vocabulary_size = VOCABULARY_SIZE
    eos_token_ids = frozenset({EOS})
    special_token_ids = frozenset({EOS})
    decodes_bytes = True
    longest_token = 1
    chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def render_chat(self, chat: ChatPrompt) -> str:
        lines = [f"{message.role}: {_content(chat, i)}" for i, message in enumerate(chat.messages)]
        return "\n".join(lines if chat.continue_final_message else [*lines, "assistant: "])

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        shown = (self.token_bytes(t) for t in token_ids if t != EOS or keep_special_tokens)
        return b"".join(shown).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"</s>" if token_id == EOS else bytes([token_id])


def _content(chat: ChatPrompt, index: int) -> str:
    content = chat.messages[index].content
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if isinstance(part, Image):
            raise UnsupportedField(f"chat.messages[{index}].parts[{i}].image", "the echo backend reads text only")
    return "".join(part for part in content if isinstance(part, str))


def _certain(token_id: int, alternatives: int | None) -> TokenLogprob:
    """The log probability of a token that had no rival."""
    data = EchoTokenizer().token_bytes(token_id)
    token = data.decode("utf-8", "replace")
    top = (TopLogprob(token_id, token, data, 0.0),) if alternatives else ()
    return TokenLogprob(token_id, token, data, 0.0, top)


def _prompt_logprobs(request: GenerateRequest, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
    wanted = request.output.prompt_logprobs
    if wanted is None:
        return ()
    first = replace(_certain(token_ids[0], 0), logprob=None)
    return (first, *(_certain(token_id, wanted) for token_id in token_ids[1:]))


def _number(config: BackendConfig, option: str) -> float:
    value = config.options.get(option, "0")
    try:
        number = float(value)
    except ValueError:
        number = -1
    if not 0 <= number < math.inf:
        raise ConfigError(f"--backend-option {option} must be a number of at least 0, got {value}")
    return number
