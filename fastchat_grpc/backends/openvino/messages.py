"""What a worker and its OpenVINO process say to each other.

Frames are a length (4 bytes, big-endian) and a pickled message, over pipes that only these two hold.
To the process: Load first, once; then lists of Add, or the key of a choice to stop; the end of input ends it.
From the process: Loaded or Failed once, then a Step whenever there is something to tell.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from fastchat_grpc.backends.openvino.lora import LoraFile

HEADER = struct.Struct(">I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to load."""

    model: str
    vocabulary: str
    """File or folder of its vocabulary; empty: it has none, and no grammars."""
    device: str
    scheduler: Mapping[str, Any]
    properties: Mapping[str, Any]
    adapters: tuple[LoraFile, ...]
    vocabulary_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The model is ready."""

    seconds: float
    precision: str = ""
    """Number format of the arithmetic; empty: unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The model cannot be loaded."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """A choice to continue. `config` holds fields of GenerationConfig."""

    key: int
    token_ids: tuple[int, ...]
    config: Mapping[str, Any]
    grammar: tuple[str, str] | None = None
    """Field of StructuredOutputConfig, and its value."""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of a choice. `finish` is "stop", "length", "memory" (it did not fit) or empty: it goes on."""

    key: int
    token_ids: list[int]
    logprobs: list[float]
    finish: str


@dataclass(slots=True, kw_only=True)
class Step:
    """What one step brought."""

    outputs: list[Output] = field(default_factory=list)
    begun: dict[int, float] = field(default_factory=dict)
    """Choices whose prompt is now being read, and since when (monotonic clock)."""
    refused: dict[int, str] = field(default_factory=dict)
    """Choices with a grammar that cannot be compiled, and why."""
    failed: dict[int, str] = field(default_factory=dict)
    """Choices that the library does not take, and why."""
    processed_tokens: int = 0
    """Tokens processed since the process began."""
    cache_usage: float = 0.0


def write_frame(stream: IO[bytes], message: object) -> None:
    """Send one message."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()


def read_frames(stream: IO[bytes]) -> Iterator[Any]:
    """Messages until the other side has closed."""
    while header := stream.read(HEADER.size):
        (length,) = HEADER.unpack(header)
        yield pickle.loads(stream.read(length))
