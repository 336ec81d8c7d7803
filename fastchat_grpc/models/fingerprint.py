"""Identity of a model by its files: which weights, in which number format, with which tokenizer and template.

Read in a second, whatever the size: small files whole, of each weight file its size and blocks spread over it. Equal
models have equal fingerprints on every machine and in every folder. Training changes nearly every number, so that
blocks tell revisions apart whose files have the same names, headers and sizes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.models.embedded import EMBEDDED_MODEL, embedded_model
from fastchat_grpc.models.quantization_plan import FASTEST
from fastchat_grpc.models.resolve import TOKENIZER_FILES
from fastchat_grpc.text.reasoning import Marks

BLOCKS = 64
BLOCK_BYTES = 16 * 1024
WHOLE_BYTES = 1024 * 1024
"""Weight files up to this size are read whole."""
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
    "modules.json",
)
_WEIGHTS = (".safetensors", ".gguf", ".xml", ".bin")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a model from others of its name. Empty where unknown."""

    fingerprint: str = ""
    tokenizer: str = ""
    revision: str = ""
    quantization: str = ""


UNKNOWN = Identity()


def identify(settings: ModelConfig, loaded: str = "") -> Identity:
    """Identity of a model that is loaded, so that its files are here. Fetches nothing; UNKNOWN where they are not.

    Args:
        loaded: number format of weights and arithmetic as they are in memory; empty: as the model's settings say.
    """
    source = locate(settings.path, settings.revision)
    if source is None:
        return UNKNOWN
    wanted = _number_format(settings)
    template = settings.chat_template or ""
    try:
        if template and "{" not in template and Path(template).expanduser().is_file():
            template = Path(template).expanduser().read_text(encoding="utf-8")
        files = _digest([*_parts(source), ("number format", loaded or wanted), ("template", template)])
        tokenizer = _digest(_named(source, TOKENIZER_FILES)) if source.is_dir() else ""
    except (OSError, ValueError):
        return UNKNOWN
    return Identity(
        fingerprint=files,
        tokenizer=tokenizer,
        revision=source.name if source.parent.name == "snapshots" else settings.revision or "",
        quantization=wanted if wanted not in ("auto", FASTEST) else _stated_format(source),
    )


def identify_adapter(path: str, base: Identity) -> Identity:
    """Identity of a LoRA adapter on a model. UNKNOWN where its files, or the model's, are not known."""
    source = locate(path, None)
    if source is None or not base.fingerprint:
        return UNKNOWN
    try:
        fingerprint = _digest([("base", base.fingerprint), *_parts(source)])
    except OSError:
        return UNKNOWN
    return Identity(fingerprint, base.tokenizer, "", base.quantization)


def thinking(fingerprint: str, marks: Marks | None) -> str:
    """The fingerprint of a model whose reasoning is marked otherwise than its chat template tells.

    Workers that part reasoning from text at other places can't go on with each other's streams.
    """
    how = "none" if marks is None else [marks.start, marks.end, marks.assumed]
    return _digest([("model", fingerprint), ("reasoning", json.dumps(how))])


def locate(path: str, revision: str | None) -> Path | None:
    """The folder or file that a loaded model came from; None where it is not on this machine."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    if path == EMBEDDED_MODEL:
        return embedded_model()
    try:
        from huggingface_hub import hf_hub_download, snapshot_download

        if path.endswith(".gguf"):
            owner, name, file = path.split("/", 2)
            return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision, local_files_only=True))
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except Exception:  # no library, no such name, nothing in the cache: it is elsewhere
        return None


def _parts(source: Path) -> Iterable[tuple[str, str]]:
    """Names and digests of all that matters of a model, in order."""
    if source.is_file():
        yield "weights", _sampled(source)
        return
    yield from _named(source, (*_SETTINGS, *TOKENIZER_FILES))
    weights = [file for file in source.iterdir() if file.suffix in _WEIGHTS and file.name not in _NOT_WEIGHTS]
    if any(file.suffix == ".safetensors" for file in weights):  # the same weights may lie beside it as .bin
        weights = [file for file in weights if file.suffix != ".bin" or file.with_suffix(".xml").exists()]
    for file in sorted(weights, key=lambda file: file.name):
        yield file.name, _sampled(file)


def _named(folder: Path, names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in sorted(names):
        file = folder / name
        if file.is_file():
            yield name, blake2b(file.read_bytes(), digest_size=16).hexdigest()


def _sampled(file: Path) -> str:
    """Digest of a file's size and of blocks of it: the first, the last, and some at equal distances between."""
    digest = blake2b(digest_size=16)
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(str(size).encode())
        if size <= WHOLE_BYTES:
            digest.update(stream.read())
        else:
            for i in range(BLOCKS):
                stream.seek((size - BLOCK_BYTES) * i // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def _digest(parts: Iterable[tuple[str, str]]) -> str:
    listed = list(parts)
    return blake2b(json.dumps(listed).encode(), digest_size=16).hexdigest() if listed else ""


def _number_format(settings: ModelConfig) -> str:
    if settings.quantization:
        return settings.quantization
    return "int8" if settings.load_8bit else settings.dtype


def _stated_format(source: Path) -> str:
    """The number format that a model's own configuration tells."""
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    quantized = config.get("quantization_config")
    stated = quantized.get("quant_method") if isinstance(quantized, dict) else None
    return str(stated or config.get("dtype") or config.get("torch_dtype") or "")
