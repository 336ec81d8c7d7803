"""Models, what they can do, and how busy their workers are."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from fastchat_grpc.core.sampling import NO_DEFAULTS, SamplingDefaults


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
    """Number format of the weights as they were loaded, such as "float32", "int8" or "Q4_1"."""
    precision: str = ""
    """Number format of the arithmetic, as far as the weights' does not tell it. Known on the worker alone."""
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
