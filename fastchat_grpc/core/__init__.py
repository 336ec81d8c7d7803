"""Domain types: what a generation is, whatever carries or runs it. Standard library only.

All types are immutable. A request that exists is valid in itself: ranges are checked on
construction and raise `InvalidArgument` with the field's path in the contract
(`proto/fastchat_grpc/v1/generation.proto`, which documents every field). What depends on a model,
such as the context length, is checked by the backend.
"""

from __future__ import annotations

from fastchat_grpc.core.checks import json_object
from fastchat_grpc.core.distribution import Distribution
from fastchat_grpc.core.events import (
    Completion,
    Delta,
    Event,
    FinishReason,
    Origin,
    PromptEcho,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from fastchat_grpc.core.limits import (
    DEFAULT_MAX_NEW_TOKENS,
    INT64_MAX,
    INT64_MIN,
    MAX_CHOICES,
    MAX_EMBED_INPUTS,
    MAX_LOGPROBS,
    MAX_REQUEST_ID_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
)
from fastchat_grpc.core.models import Capability, Load, ModelInfo, WorkerState
from fastchat_grpc.core.prompts import (
    CHAT_ROLES,
    ChatMessage,
    ChatPrompt,
    Image,
    Prompt,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolChoice,
)
from fastchat_grpc.core.requests import (
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    Grammar,
    GrammarKind,
    OutputOptions,
    ResumedChoice,
    StopConditions,
)
from fastchat_grpc.core.sampling import (
    GREEDY_TEMPERATURE,
    GREEDY_TOP_P,
    MAX_REPETITION_PENALTY,
    MIN_REPETITION_PENALTY,
    NO_DEFAULTS,
    SAMPLING_NUMBERS,
    SamplingDefaults,
    SamplingParams,
    Unset,
    UnsetInt,
)

__all__ = [
    "CHAT_ROLES",
    "DEFAULT_MAX_NEW_TOKENS",
    "GREEDY_TEMPERATURE",
    "GREEDY_TOP_P",
    "INT64_MAX",
    "INT64_MIN",
    "MAX_CHOICES",
    "MAX_EMBED_INPUTS",
    "MAX_LOGPROBS",
    "MAX_REPETITION_PENALTY",
    "MAX_REQUEST_ID_LENGTH",
    "MAX_STOP_LENGTH",
    "MAX_STOP_STRINGS",
    "MIN_REPETITION_PENALTY",
    "NO_DEFAULTS",
    "SAMPLING_NUMBERS",
    "Capability",
    "ChatMessage",
    "ChatPrompt",
    "Completion",
    "Delta",
    "Distribution",
    "EmbedRequest",
    "EmbedResult",
    "Event",
    "FinishReason",
    "GenerateRequest",
    "Grammar",
    "GrammarKind",
    "Image",
    "Load",
    "ModelInfo",
    "Origin",
    "OutputOptions",
    "Prompt",
    "PromptEcho",
    "ResumedChoice",
    "SamplingDefaults",
    "SamplingParams",
    "StopConditions",
    "TextPrompt",
    "Timings",
    "TokenLogprob",
    "TokenPrompt",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "TopLogprob",
    "Unset",
    "UnsetInt",
    "Usage",
    "WorkerState",
    "json_object",
]
