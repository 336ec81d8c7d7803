"""How transformers runs the model of a folder, from its configuration alone: kind, class, pooling."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.architectures import generates, other_task
from fastchat_grpc.models.facts import ModelFacts, read_facts
from fastchat_grpc.models.resolve import read_json

if TYPE_CHECKING:
    import torch


class ModelKind(enum.Enum):
    """How a model is run."""

    DECODER = "decoder"
    ENCODER_DECODER = "encoder-decoder"
    EMBEDDING = "embedding"
    """Gives vectors only: an encoder, or a decoder trained for embeddings."""


class Pooling(enum.Enum):
    """How the last hidden states of a text become one vector."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What the configuration says."""

    folder: str
    file_arguments: dict[str, str]
    """For from_pretrained: which GGUF file of the folder, if it is one."""
    config: Any
    kind: ModelKind
    auto_class: Any
    stored_dtype: torch.dtype | None
    facts: ModelFacts
    pooling: Pooling = Pooling.MEAN

    @property
    def prefers_full_precision(self) -> bool:
        """Whether half precision costs accuracy (T5 overflows in float16) or brings little (embeddings)."""
        return self.kind is not ModelKind.DECODER


def detect(source: Path, settings: ModelConfig) -> Detected:
    """Read the configuration of a model folder or GGUF file. Raises ModelLoadError."""
    folder, file_arguments = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    config = _read_config(source, folder, file_arguments, settings)
    kind = _kind(config, folder)
    return Detected(
        folder=str(folder),
        file_arguments=file_arguments,
        config=config,
        kind=kind,
        auto_class=_auto_class(config, kind),
        stored_dtype=getattr(config, "dtype", None),
        facts=read_facts(source, settings, config.to_dict()),
        pooling=_pooling(folder, config, kind),
    )


def _read_config(source: Path, folder: Path, file_arguments: dict[str, str], settings: ModelConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code, **file_arguments)
    except Exception as error:  # transformers raises anything from KeyError to ImportError for a bad configuration
        if "trust_remote_code" in str(error):
            raise ModelLoadError(
                f"the model {source} brings its own Python code; read it, then add --trust-remote-code to run it"
            ) from error
        raise ModelLoadError(f"the configuration of {source} is not understood: {first_line(error)}") from error


def _kind(config: Any, folder: Path) -> ModelKind:
    architectures = [str(name) for name in getattr(config, "architectures", None) or ()]
    if (folder / "modules.json").is_file():  # sentence-transformers wrote it
        _check_modules(folder)
        return ModelKind.EMBEDDING
    if "T5EncoderModel" in architectures:
        return ModelKind.EMBEDDING
    if getattr(config, "is_encoder_decoder", False) and other_task(architectures) is None:
        return ModelKind.ENCODER_DECODER
    remote = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in remote or generates(architectures):
        return ModelKind.DECODER
    if not architectures and _has_class("AutoModelForCausalLM", config) and not _bidirectional(config):
        return ModelKind.DECODER
    if (other := other_task(architectures)) is not None:
        raise ModelLoadError(
            f"{folder} holds a {other}, a reranker or classifier or the like: models that make text or embeddings "
            "are served, and these are not yet"
        )
    return ModelKind.EMBEDDING


def _check_modules(folder: Path) -> None:
    """Raise ModelLoadError where a sentence-transformers model does more than pool and normalise."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{folder / 'modules.json'} cannot be read: {first_line(error)}") from error
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise ModelLoadError(f"{folder}: embedding models with a {unknown[0]} module are not supported")


def _bidirectional(config: Any) -> bool:
    """Encoders such as BERT, which transformers also lists as causal models for when `is_decoder` is set."""
    return hasattr(config, "is_decoder") and not config.is_decoder and hasattr(config, "type_vocab_size")


def _auto_class(config: Any, kind: ModelKind) -> Any:
    import transformers

    names = {
        ModelKind.DECODER: ["AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"],
        ModelKind.ENCODER_DECODER: ["AutoModelForSeq2SeqLM"],
        ModelKind.EMBEDDING: ["AutoModel"],
    }[kind]
    if kind is ModelKind.EMBEDDING and getattr(config, "is_encoder_decoder", False):
        names = ["AutoModelForTextEncoding"]
    name = next((name for name in names if _has_class(name, config)), None)
    if name is None:
        raise ModelLoadError(f"models of type {config.model_type} cannot be served as {kind.value} models")
    return getattr(transformers, name)


def _has_class(auto_class: str, config: Any) -> bool:
    import transformers

    if auto_class in (getattr(config, "auto_map", None) or {}):
        return True
    return type(config) in getattr(transformers, auto_class)._model_mapping


def _pooling(folder: Path, config: Any, kind: ModelKind) -> Pooling:
    """How embeddings are pooled: as sentence-transformers wrote it down, else by the mean."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        decoder = any(str(name).startswith(("Llama", "Mistral", "Qwen")) for name in config.architectures or ())
        return Pooling.LAST if kind is ModelKind.EMBEDDING and decoder else Pooling.MEAN
    stated = read_json(file)
    if stated.get("pooling_mode_cls_token"):
        return Pooling.CLS
    if stated.get("pooling_mode_lasttoken"):
        return Pooling.LAST
    if stated.get("pooling_mode_mean_tokens") or stated.get("pooling_mode_mean_sqrt_len_tokens"):
        return Pooling.MEAN  # the two differ in length alone, and vectors are normalised
    mode = next((key for key, value in stated.items() if key.startswith("pooling_mode") and value), "an unnamed one")
    raise ModelLoadError(f"{file}: pooling {mode} is not supported; cls, mean and last token are")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough to print."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
