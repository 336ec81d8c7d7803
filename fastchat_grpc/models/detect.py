"""What kind of model a folder holds, from its configuration alone."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.core import NO_DEFAULTS, SamplingDefaults
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.architectures import generates, other_task
from fastchat_grpc.models.generation_config import default_sampling, generation_config
from fastchat_grpc.models.overrides import CHAT_TEMPLATES, override_for
from fastchat_grpc.models.resolve import read_json

if TYPE_CHECKING:
    import torch

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
    "model_max_length",
)
DEFAULT_CONTEXT_LENGTH = 2048
"""Where a configuration names none (FastChat's default)."""


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
    context_length: int
    stored_dtype: torch.dtype | None
    pooling: Pooling = Pooling.MEAN
    chat_template: str | None = None
    """Replaces the tokenizer's."""
    default_chat_template: str | None = None
    """For a tokenizer that has none."""
    stop_tokens: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    vocabulary_size: int | None = None
    default_sampling: SamplingDefaults = NO_DEFAULTS

    @property
    def prefers_full_precision(self) -> bool:
        """Whether half precision costs accuracy (T5 overflows in float16) or brings little (embeddings)."""
        return self.kind is not ModelKind.DECODER


def detect(source: Path, settings: ModelConfig) -> Detected:
    """Read the configuration of a model folder or GGUF file. Raises ModelLoadError."""
    folder, file_arguments = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    config = _read_config(source, folder, file_arguments, settings)
    kind = _kind(config, folder)
    override = override_for(str(getattr(config, "model_type", "")), settings.path)
    stated = {} if file_arguments else generation_config(folder)
    return Detected(
        folder=str(folder),
        file_arguments=file_arguments,
        config=config,
        kind=kind,
        auto_class=_auto_class(config, kind),
        context_length=_context_length(
            config, override.context_length or _sentence_length(folder), settings.context_length
        ),
        stored_dtype=getattr(config, "dtype", None),
        pooling=_pooling(folder, config, kind),
        chat_template=_chat_template(settings.chat_template),
        default_chat_template=override.chat_template,
        stop_tokens=override.stop_tokens,
        eos_token_ids=_eos_token_ids(stated, config),
        vocabulary_size=getattr(config.get_text_config(), "vocab_size", None),
        default_sampling=default_sampling(stated),
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


def _context_length(config: Any, known: int | None, wanted: int | None) -> int:
    """The model's context length, shortened if asked. Raises ModelLoadError where more is asked than it has."""
    text = config.get_text_config()
    limit = known or _configured_context(text) or DEFAULT_CONTEXT_LENGTH
    if wanted is not None and wanted > limit:
        raise ModelLoadError(f"--context-length {wanted} exceeds the model's {limit}")
    return wanted or limit


def _sentence_length(folder: Path) -> int | None:
    """The length that sentence-transformers wrote down for an embedding model."""
    file = folder / "sentence_bert_config.json"
    length = read_json(file).get("max_seq_length") if file.is_file() else None
    return length if isinstance(length, int) and length > 0 else None


def _configured_context(config: Any) -> int | None:
    values = [getattr(config, key, None) for key in _CONTEXT_KEYS]
    limit = next((int(value) for value in values if isinstance(value, int) and value > 0), None)
    if limit is None:
        return None
    if getattr(config, "position_embedding_type", "") == "absolute" and config.model_type in _OFFSET_POSITIONS:
        return limit - int(config.pad_token_id) - 1
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return limit  # one per kind of layer; such configurations state the final length
    factor = float(rope.get("factor") or 1)
    original = int(rope.get("original_max_position_embeddings") or limit)
    if rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        return max(limit, int(original * factor))
    return limit


# RoBERTa counts positions from pad_token_id + 1, so its table is that much longer than its context.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet"})


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


def _eos_token_ids(stated: Mapping[str, Any], config: Any) -> tuple[int, ...]:
    """Ends of output by the generation configuration, else by the model's own, as transformers' generate has it."""
    eos = stated.get("eos_token_id")
    if eos is None:
        eos = getattr(config.get_text_config(), "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(int(i) for i in eos) if isinstance(eos, list | tuple) else (int(eos),)


def _chat_template(wanted: str | None) -> str | None:
    """The template that the user set: Jinja text, or a file of it."""
    if wanted is None or "{{" in wanted or "{%" in wanted:
        return wanted
    if wanted in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[wanted]
    file = Path(wanted).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"--conv-template {wanted} is no Jinja text, no readable file, and none of {', '.join(CHAT_TEMPLATES)}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough to print."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
