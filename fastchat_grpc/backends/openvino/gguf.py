"""GGUF files for OpenVINO GenAI, whose reader is exact for some kinds of weights only.

Measured on SmolLM2-135M-Instruct, perplexity of one text by the kind of the file's matrices, against 6.43 of
the same weights in fp32: F16 6.43, Q8_0 6.47, Q4_1 8.28. F32 and BF16 it does not read at all. So files of other
kinds are rewritten once into the cache, as Q8_0 or F16. Needs gguf and numpy, and no torch.

LoRA adapters need a graph whose layers have names, which a GGUF file has once it is an OpenVINO folder.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastchat_grpc.backends.openvino import cache
from fastchat_grpc.errors import ModelLoadError

logger = logging.getLogger(__name__)

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
"""What OpenVINO GenAI can read from a GGUF file."""
EXACT = frozenset({"F16", "Q8_0"})
FLOAT = frozenset({"F32", "BF16"})
"""Kinds that lose next to nothing as F16."""
KINDS = {"fp16": "F16", "int8": "Q8_0"}
"""Kind of the matrices by the precision asked for."""
_FILE_TYPES = {"F16": 1, "Q8_0": 7}  # llama.cpp's numbers for general.file_type
_OWN_KEYS = frozenset({"general.architecture", "general.file_type", "general.quantization_version"})
_VERSION = 1  # grows when what is written changes
_GRAPH_VERSION = 1  # grows when openvino_gguf_graph changes what it writes
_GRAPH_TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a file says of itself. An empty architecture: it cannot be read."""

    architecture: str = ""
    context_length: int | None = None
    kinds: frozenset[str] = frozenset()
    """Of its matrices."""


def facts(file: Path) -> GgufFacts:
    """The facts of a file, without its weights."""
    try:
        from gguf import GGUFReader

        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
        limit = reader.fields.get(f"{architecture}.context_length")
        kinds = frozenset(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
        return GgufFacts(architecture, None if limit is None else int(limit.contents()), kinds)
    except (ImportError, OSError, ValueError, KeyError):
        return GgufFacts()


def exact_file(file: Path, known: GgufFacts, weights: str | None) -> Path:
    """A file that OpenVINO reads exactly: this one, or a rewritten copy in the cache.

    Args:
        weights: "fp16" or "int8": rewrite unless it is so already; "int4": as it is; None: rewrite where it
            would not be read exactly, as fp16 if it holds more, else as int8.

    Raises:
        ModelLoadError: the copy cannot be written.
    """
    if weights == "int4" or (weights is None and known.kinds <= EXACT):
        return file
    kind = KINDS[weights or ("fp16" if known.kinds <= EXACT | FLOAT else "int8")]
    if known.kinds <= {kind}:
        return file
    return _once(file, f"{kind}-{_VERSION}.gguf", lambda part: _rewrite(file, part, known.architecture, kind))


def graph_folder(file: Path) -> Path:
    """A file that OpenVINO reads as a folder whose layers have names, in the cache. Raises ModelLoadError."""
    return _once(file, f"graph-{_GRAPH_VERSION}", lambda part: _write_graph(file, part))


def _once(file: Path, suffix: str, make: Callable[[Path], None]) -> Path:
    """What is made of a file, in the cache. Raises ModelLoadError."""
    status = file.stat()
    name = f"{file.stem}-{status.st_size}-{status.st_mtime_ns}-{suffix}"

    def write(part: Path) -> None:
        logger.info("rewriting %s as %s (once)", file.name, name)
        make(part)

    try:
        return cache.once(name, write)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ModelLoadError(f"cannot rewrite {file} as {name}: {error}") from error


def _write_graph(file: Path, target: Path) -> None:
    """By another process, whose memory is then free again. Raises ValueError."""
    target.mkdir()
    command = [sys.executable, "-m", "fastchat_grpc.backends.openvino.gguf_graph", str(file), str(target)]
    cache.run(command, _GRAPH_TIMEOUT_S)


def _rewrite(source: Path, target: Path, architecture: str, kind: str) -> None:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    writer = GGUFWriter(target, architecture, use_temp_file=True)
    for name, field in reader.fields.items():
        if name in _OWN_KEYS or name.startswith("GGUF."):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_file_type(_FILE_TYPES[kind])
    for name, data, tensor_kind in _tensors(reader, kind):
        writer.add_tensor(name, data, raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(reader: Any, kind: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, data and kind of each tensor: vectors in F32, matrices as asked."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    wanted = GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if values.ndim == 1:
            yield tensor.name, values, GGMLQuantizationType.F32
        else:
            yield tensor.name, values.astype(np.float16) if kind == "F16" else quantize(values, wanted), wanted
