"""Domain types: what a generation is, whatever carries or runs it. Standard library only.

All types are immutable. A request that exists is valid in itself: ranges are checked on
construction and raise `InvalidArgument` with the field's path in the contract
(`proto/fastchat_grpc/v1/generation.proto`, which documents every field). What depends on a model,
such as the context length, is checked by the backend.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from fastchat_grpc.errors import InvalidArgument

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the likeliest token is taken (FastChat's rule)."""
GREEDY_TOP_P = 1e-8
"""Below this top_p the likeliest token is taken (FastChat's rule)."""

DEFAULT_MAX_NEW_TOKENS = 256
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.001, 1000.0
"""Logits are divided and multiplied by it; far beyond these bounds they would be no numbers any more."""
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_REQUEST_ID_LENGTH = 128
MAX_EMBED_INPUTS = 2048
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    CONTENT_FILTER = "content_filter"


class WorkerState(enum.Enum):
    """What a worker takes on."""

    STARTING = "starting"
    SERVING = "serving"
    DEGRADED = "degraded"
    DRAINING = "draining"


class Capability(enum.Enum):
    """What a model can do."""

    GENERATE = "generate"
    CHAT = "chat"
    EMBED = "embed"
    VISION = "vision"
    STRUCTURED_OUTPUT = "structured_output"
    LOGPROBS = "logprobs"
    RESUME = "resume"
    """Continues what another worker began: from the same tokens, with random numbers of its own."""
    SEEDED_RESUME = "seeded_resume"
    """A resumed generation draws the same random numbers as an undisturbed one of the same seed."""
    STATEFUL_RESUME = "stateful_resume"
    """Continues where the next token depends on the whole output so far: output penalties and grammars."""
    SEED = "seed"
    """Takes a seed: the same one gives the same text on the same worker."""


def _require(ok: bool, path: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidArgument(path, f"must be {limit}, got {value}")


def _require_token_ids(token_ids: Sequence[int], path: str) -> None:
    """Raise for the first negative id. A prompt has up to millions of them: no text is made while all is well."""
    if token_ids and min(token_ids) < 0:
        i, token_id = next((i, token_id) for i, token_id in enumerate(token_ids) if token_id < 0)
        raise InvalidArgument(f"{path}[{i}]", f"must be at least 0, got {token_id}")


def _within(path: str, value: float, low: float, high: float) -> None:
    _require(math.isfinite(value) and low <= value <= high, path, value, f"from {low:g} to {high:g}")


class Unset(float):
    """A number that the caller has not chosen: the contract's default, which a model's own default may replace."""

    __slots__ = ()


class UnsetInt(int):
    """As `Unset`, for a whole number."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How each next token is chosen.

    A field that nobody sets holds an `Unset` number, which computes as the contract's default and can be told
    from the same number when it was asked for: `given` names what was. `filled` puts a model's own defaults in
    the place of unset fields; a worker does that once (`worker.generation`), so a backend reads plain values and
    only says what its model's defaults are (`ModelInfo.default_sampling`).
    """

    temperature: float = Unset(1.0)
    top_p: float = Unset(1.0)
    top_k: int = UnsetInt(-1)
    min_p: float = Unset(0.0)
    repetition_penalty: float = Unset(1.0)
    presence_penalty: float = Unset(0.0)
    frequency_penalty: float = Unset(0.0)
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    fallback_seed: int | None = None
    """Seed that a relay or a client made up; see `seeded`. A backend never sees it."""

    def __post_init__(self) -> None:
        _within("sampling.temperature", self.temperature, 0, 100)
        _within("sampling.top_p", self.top_p, 0, 1)
        _require(self.top_k >= -1, "sampling.top_k", self.top_k, "at least 1, or -1 or 0 for off")
        _within("sampling.min_p", self.min_p, 0, 1)
        _within("sampling.repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _within("sampling.presence_penalty", self.presence_penalty, -2, 2)
        _within("sampling.frequency_penalty", self.frequency_penalty, -2, 2)
        for name in ("seed", "fallback_seed"):
            seed = getattr(self, name)
            if seed is not None:
                _require(INT64_MIN <= seed <= INT64_MAX, f"sampling.{name}", seed, "a 64-bit integer")
        for token_id, bias in self.logit_bias.items():
            if token_id < 0 or not -100 <= bias <= 100:
                _require(
                    token_id >= 0, "sampling.logit_bias", f"token id {token_id}", "keyed by token ids of at least 0"
                )
                _within(f"sampling.logit_bias[{token_id}]", bias, -100, 100)

    @property
    def given(self) -> dict[str, float]:
        """The numbers that were asked for, by field. (`seed` and `logit_bias` show by themselves if they were.)"""
        return {
            name: value for name in SAMPLING_NUMBERS if not isinstance(value := getattr(self, name), Unset | UnsetInt)
        }

    def filled(self, defaults: SamplingDefaults) -> SamplingParams:
        """The same with a model's own defaults for what is unset."""
        missing = {name: value for name, value in defaults.stated.items() if name not in self.given}
        return replace(self, **missing) if missing else self

    def plain(self) -> SamplingParams:
        """The same without a trace of what was unset: in numbers that any engine can send to its processes."""
        numbers = {name: getattr(self, name) for name in SAMPLING_NUMBERS}
        return replace(self, **{name: int(x) if isinstance(x, int) else float(x) for name, x in numbers.items()})  # type: ignore[arg-type]

    def seeded(self, *, counter_based: bool) -> SamplingParams:
        """The same with its fallback seed in the place of an unset seed, or without it.

        Args:
            counter_based: whether the model's random numbers depend on seed and place alone (SEEDED_RESUME), so
                that another worker can draw them. Elsewhere a seed is refused, or slow, and of no use.
        """
        if self.fallback_seed is None:
            return self
        wanted = counter_based and self.seed is None and not self.greedy
        return replace(self, seed=self.fallback_seed if wanted else self.seed, fallback_seed=None)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_p < GREEDY_TOP_P


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a model's makers want where a caller chooses nothing (its generation_config.json). None: nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        SamplingParams(**self.stated)

    @property
    def stated(self) -> dict[str, Any]:
        """Values by field, without those that say nothing."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def yielding(self, field_path: str) -> SamplingDefaults:
        """The same without the default of a field that a backend has refused, or without any where it refused another.

        What nobody asked for must not make a request fail: not because the backend has another range, nor because
        it cannot do it together with what was asked for.
        """
        name = field_path.removeprefix("sampling.")
        return replace(self, **{name: None}) if name in self.stated else SamplingDefaults()


NO_DEFAULTS = SamplingDefaults()
"""Of a model whose makers want nothing in particular."""
SAMPLING_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields of SamplingParams that are numbers and may be unset, in the order of the contract."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConditions:
    """When a generation ends."""

    max_new_tokens: int = UnsetInt(DEFAULT_MAX_NEW_TOKENS)
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "stopping.max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "stopping.min_new_tokens",
            self.min_new_tokens,
            f"from 0 to max_new_tokens ({self.max_new_tokens})",
        )
        _require(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stopping.stop",
            f"{len(self.stop)} strings",
            f"at most {MAX_STOP_STRINGS} strings",
        )
        for i, stop in enumerate(self.stop):
            _require(
                1 <= len(stop) <= MAX_STOP_LENGTH,
                f"stopping.stop[{i}]",
                f"{len(stop)} characters",
                f"1 to {MAX_STOP_LENGTH} characters long",
            )
        _require_token_ids(self.stop_token_ids, "stopping.stop_token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What a generation returns, and how often. `stream_interval` None: the worker's default."""

    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    stream_interval: int | None = None
    cumulative_text: bool = False
    keep_special_tokens: bool = False

    def __post_init__(self) -> None:
        _within("output.n", self.n, 1, MAX_CHOICES)
        if self.logprobs is not None:
            _within("output.logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _within("output.prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.stream_interval is not None:
            _require(self.stream_interval >= 1, "output.stream_interval", self.stream_interval, "at least 1")


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text to continue."""

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            raise InvalidArgument("prompt", "must not be empty")


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InvalidArgument("prompt_token_ids", "must not be empty")
        _require_token_ids(self.token_ids, "prompt_token_ids.ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image of a message: its encoded bytes, or its address."""

    data: bytes = b""
    url: str = ""
    media_type: str = ""


def json_object(text: str, path: str) -> dict[str, Any]:
    """The JSON object that a field holds as text; empty text is an empty object. Order and integers are kept.

    Raises:
        InvalidArgument: it is no JSON object, with the field's path.
    """
    if not text:
        return {}
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidArgument(path, f"is not valid JSON{place}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(path, "must be a JSON object")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters_json` is a JSON Schema object, empty for no arguments.

    It stays text until it is used: every process that reads it sees the same members in the same order.
    """

    name: str
    description: str = ""
    parameters_json: str = ""

    def parameters(self) -> dict[str, Any] | None:
        """The schema; None: no arguments. Parsed anew at each call."""
        return json_object(self.parameters_json, "parameters_json") if self.parameters_json else None


class ToolChoice(enum.Enum):
    """How freely the model decides on calls."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model made; `arguments_json` as the model wrote it."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message. `content` is text, or parts that are text or images; `reasoning` is what came before it."""

    role: str
    content: str | tuple[str | Image, ...] = ""
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""


CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation for the model's chat template.

    `tool_choice` as a string is the name of the one tool that must be called. `template_arguments_json` is a JSON
    object, or empty; as the schemas of tools it stays text until it is used.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | str = ToolChoice.AUTO
    template_arguments_json: str = ""
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidArgument("chat.messages", "must hold at least one message")
        for i, message in enumerate(self.messages):
            _require(
                message.role in CHAT_ROLES,
                f"chat.messages[{i}].role",
                repr(message.role[:32]),
                "one of " + ", ".join(CHAT_ROLES),
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidArgument("chat.continue_final_message", "the last message must be the assistant's")
        for i, tool in enumerate(self.tools):
            json_object(tool.parameters_json, f"chat.tools[{i}].parameters_json")
        json_object(self.template_arguments_json, "chat.template_arguments_json")
        if isinstance(self.tool_choice, str) and all(tool.name != self.tool_choice for tool in self.tools):
            raise InvalidArgument("chat.tool_choice.function", "is not the name of a tool of this request")

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model hears of."""
        return () if self.tool_choice is ToolChoice.NONE else self.tools

    def template_arguments(self) -> dict[str, Any]:
        """Further variables of the chat template. Parsed anew at each call."""
        return json_object(self.template_arguments_json, "chat.template_arguments_json")


Prompt: TypeAlias = TextPrompt | TokenPrompt | ChatPrompt


class GrammarKind(enum.Enum):
    """Kinds of grammar that an output may follow."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar for the output; `source` is its text, empty for JSON_OBJECT."""

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumedChoice:
    """A choice that another worker began: the tokens and the characters of reasoning and text that the caller has."""

    index: int
    output_token_ids: tuple[int, ...] = ()
    text_length: int = 0
    finished: bool = False

    def __post_init__(self) -> None:
        _require(self.index >= 0, "resume.choices.index", self.index, "at least 0")
        _require_token_ids(self.output_token_ids, "resume.choices.output_token_ids")
        _require(self.text_length >= 0, "resume.choices.text_length", self.text_length, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One request for one or more continuations of one prompt."""

    prompt: Prompt
    model: str = ""
    sampling: SamplingParams = SamplingParams()
    stopping: StopConditions = StopConditions()
    output: OutputOptions = OutputOptions()
    grammar: Grammar | None = None
    request_id: str = ""
    priority: int = 0
    lora_adapter: str = ""
    session_key: str = ""
    truncate_prompt_tokens: int | None = None
    resume: tuple[ResumedChoice, ...] | None = None
    """None for a new generation. A resumed one sends no prompt event again, even when empty."""
    resume_fingerprint: str = ""
    """`ModelInfo.fingerprint` of the model that began a resumed generation; empty: unknown."""
    resume_backend: str = ""
    """`ModelInfo.backend` of it; empty: unknown."""

    def __post_init__(self) -> None:
        _require(
            len(self.request_id) <= MAX_REQUEST_ID_LENGTH,
            "request_id",
            f"{len(self.request_id)} characters",
            f"at most {MAX_REQUEST_ID_LENGTH} characters long",
        )
        if self.truncate_prompt_tokens is not None:
            _require(
                self.truncate_prompt_tokens >= 1, "truncate_prompt_tokens", self.truncate_prompt_tokens, "at least 1"
            )
        for choice in self.resume or ():
            _require(
                choice.index < self.output.n, "resume.choices.index", choice.index, f"below output.n ({self.output.n})"
            )

    def resumed_choice(self, index: int) -> ResumedChoice:
        """What the caller has of choice `index` already."""
        for choice in self.resume or ():
            if choice.index == index:
                return choice
        return ResumedChoice(index=index)


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a token's place."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural) of one token; None for a prompt's first token."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one choice."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Those of the completion that are reasoning."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds since the request's arrival at the worker."""

    queued_s: float = 0.0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEcho:
    """The prompt as the model sees it; sent first, and only when asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Output of one choice since its last Delta. `reasoning` is what the model thinks before it says the text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    cumulative_text: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Who answered which request: names, and the model's fingerprint. Empty where unknown."""

    model: str = ""
    worker_id: str = ""
    request_id: str = ""
    model_fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The end of one choice. `matched` is the stop string or the request's stop token that ended it."""

    index: int
    finish_reason: FinishReason
    usage: Usage
    matched: str | int | None = None
    timings: Timings = Timings()
    origin: Origin | None = None
    """Who answered; set where the answer leaves a worker."""


Event: TypeAlias = PromptEcho | Delta | Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Inputs to embed: each a text or token ids. `truncate` None: the worker's default."""

    inputs: tuple[str | tuple[int, ...], ...]
    model: str = ""
    truncate: bool | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        count = len(self.inputs)
        _require(1 <= count <= MAX_EMBED_INPUTS, "inputs", f"{count} inputs", f"1 to {MAX_EMBED_INPUTS} inputs")
        for i, item in enumerate(self.inputs):
            if not item:
                raise InvalidArgument(f"inputs[{i}]", "must not be empty")
            if not isinstance(item, str):
                _require_token_ids(item, f"inputs[{i}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult:
    """One vector per input, and the tokens of all inputs."""

    embeddings: Sequence[Sequence[float]]
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as served. Sizes are 0, texts empty, where unknown or absent."""

    name: str
    context_length: int
    capabilities: frozenset[Capability] = frozenset({Capability.GENERATE})
    base_model: str = ""
    backend: str = ""
    embedding_size: int = 0
    vocabulary_size: int = 0
    fingerprint: str = ""
    """Identity of weights, number format, adapters and tokenizer: equal ones may go on with each other's streams."""
    revision: str = ""
    quantization: str = ""
    tokenizer_fingerprint: str = ""
    max_output_length: int = 0
    default_sampling: SamplingDefaults = NO_DEFAULTS
    """For the sampling fields that a request leaves unset. Known on the worker alone."""


class Load(NamedTuple):
    """Load of a worker at one moment. A tuple, since each heartbeat makes one."""

    state: WorkerState = WorkerState.SERVING
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    max_waiting: int = 0
    kv_cache_usage: float = 0.0
    tokens_per_second: float = 0.0
    kv_free_tokens: int = 0
    oldest_waiting_s: float | None = None

    @property
    def queue_length(self) -> int:
        """Running plus waiting (FastChat's queue length)."""
        return self.running + self.waiting
