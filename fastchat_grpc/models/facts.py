"""What the files of a model folder say of the model, whichever engine runs it.

The one reader of config.json and generation_config.json: context length, vocabulary, ends of output, chat template
and sampling are the same for a folder in every backend. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.core import SamplingDefaults
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.generation_config import default_sampling, generation_config
from fastchat_grpc.models.overrides import CHAT_TEMPLATES, override_for
from fastchat_grpc.models.resolve import read_json

if TYPE_CHECKING:
    from fastchat_grpc.models.tokenizer import HuggingFaceTokenizer

DEFAULT_CONTEXT_LENGTH = 2048
"""Where a configuration names none (FastChat's default, and vLLM's)."""
_TEXT_CONFIGS = (
    "thinker_config",
    "text_config",
    "llm_config",
    "language_config",
    "decoder",
    "generator",
    "text_encoder",
)
"""Where models of several modalities, or of several parts, keep the configuration of the part that writes."""
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "seq_len",
)
_STRETCHING = frozenset({"linear", "dynamic", "yarn"})
"""Rotary scalings that reach beyond the stated length. llama3 and longrope state the length that they reach."""
_STATES_STRETCHED = "gemma3"
"""In the model_type of models whose stated length has their scaling in it already, whatever its type."""
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet"})
"""They count positions from pad_token_id + 1, so that their table is so much longer than their context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model folder, or a GGUF file, says."""

    source: Path
    """The folder or the file."""
    config: Mapping[str, Any]
    """config.json, or what stands in for it."""
    context_length: int | None
    """Tokens; None where nothing is said."""
    vocabulary_size: int | None
    """Rows of the embedding."""
    hidden_size: int
    """0 where nothing is said."""
    stored_dtype: str
    """Of the weights in the files, by torch's name, such as "bfloat16"; empty where nothing is said."""
    eos_token_ids: tuple[int, ...]
    """Ends of output, besides the tokenizer's own."""
    stop_tokens: tuple[str, ...]
    """Further ends by name; those that the vocabulary lacks do not count."""
    default_chat_template: str | None
    """For a tokenizer that has none."""
    default_sampling: SamplingDefaults
    """What the model's makers want where a request chooses nothing."""

    def served_context(self, wanted: int | None) -> int:
        """The context length to serve: the model's, or less if asked. Raises ModelLoadError."""
        return limited_context(self.context_length or DEFAULT_CONTEXT_LENGTH, wanted)

    def tokenizer(self, settings: ModelConfig, vocabulary_size: int | None = None) -> HuggingFaceTokenizer:
        """The tokenizer, with the family's and the user's template and ends of output. Raises ModelLoadError.

        Args:
            vocabulary_size: rows of the embedding, where an engine knows better.
        """
        from fastchat_grpc.models.tokenizer import load_tokenizer

        return load_tokenizer(
            self.source,
            chat_template=chat_template_text(settings.chat_template),
            default_chat_template=self.default_chat_template,
            stop_tokens=self.stop_tokens,
            eos_token_ids=self.eos_token_ids,
            vocabulary_size=vocabulary_size or self.vocabulary_size,
            trust_remote_code=settings.trust_remote_code,
        )


def read_facts(source: Path, settings: ModelConfig, config: Mapping[str, Any] | None = None) -> ModelFacts:
    """The facts of a model folder, or of a GGUF file.

    Args:
        source: the folder, or the file.
        config: what stands in for config.json: with defaults filled in, or read from a GGUF file.

    Raises:
        ModelLoadError: a file is no JSON, or says what nobody can mean.
    """
    if config is None:
        config = read_json(source / "config.json")
    text = text_config(config)
    override = override_for(str(config.get("model_type", "")), settings.path)
    makers = generation_config(source) if source.is_dir() else {}
    return ModelFacts(
        source=source,
        config=config,
        context_length=override.context_length or _sentence_length(source) or stated_context(text),
        vocabulary_size=_count(text.get("vocab_size")) or _count(config.get("vocab_size")),
        hidden_size=_count(text.get("hidden_size")) or _count(config.get("hidden_size")) or 0,
        stored_dtype=_stored_dtype(text) or _stored_dtype(config),
        eos_token_ids=_eos_token_ids(source, makers, config, text),
        stop_tokens=override.stop_tokens,
        default_chat_template=override.chat_template,
        default_sampling=default_sampling(makers),
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the part that writes: of most models the whole."""
    inner = next((config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), Mapping)), None)
    return text_config(inner) if inner else config


def stated_context(config: Mapping[str, Any]) -> int | None:
    """The context length by a text model's configuration, as far as its scaling of positions reaches; else None.

    The rules of vLLM (`ModelConfig.get_and_verify_max_len`): the shortest of the lengths that are named, but Cohere's
    model_max_length before all; linear and dynamic scaling multiply it, and YaRN the length that it started from.
    """
    named = [count for count in (_count(config.get(key)) for key in _CONTEXT_KEYS) if count]
    limit = _count(config.get("model_max_length")) or min(named, default=None)
    if limit is None:
        return None
    model_type = str(config.get("model_type", ""))
    if model_type in _OFFSET_POSITIONS and config.get("position_embedding_type", "absolute") == "absolute":
        padding = config.get("pad_token_id")
        return limit - (padding if isinstance(padding, int) else 1) - 1
    if _STATES_STRETCHED in model_type:
        return limit
    for rope in _rope_scalings(config):
        factor = rope.get("factor") or 1.0
        if not isinstance(factor, int | float) or not math.isfinite(factor) or factor <= 0:
            raise ModelLoadError(f"config.json: the rotary scaling's factor must be a positive number, got {factor!r}")
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        return int((_count(original) or limit) * factor)
    return limit


def _rope_scalings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary scalings that reach beyond the stated length; a model may have one for each kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return []
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return [one for one in nested or [rope] if (one.get("rope_type") or one.get("type")) in _STRETCHING]


def _sentence_length(source: Path) -> int | None:
    """The length that sentence-transformers wrote down for an embedding model."""
    file = source / "sentence_bert_config.json"
    return _count(read_json(file).get("max_seq_length")) if file.is_file() else None


def _stored_dtype(config: Mapping[str, Any]) -> str:
    """transformers writes `dtype`, and wrote `torch_dtype`."""
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _eos_token_ids(source: Path, *stated: Mapping[str, Any]) -> tuple[int, ...]:
    """The first that is stated, in the order of transformers (`GenerationConfig.from_model_config`)."""
    eos = next((mapping["eos_token_id"] for mapping in stated if mapping.get("eos_token_id") is not None), ())
    ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(isinstance(i, int) for i in ids):
        raise ModelLoadError(f"{source}: eos_token_id must be a token id or a list of them, got {eos!r}")
    return ids


def _count(value: object) -> int | None:
    """A number of at least 1; what a configuration leaves open, or says in no such way, is None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def limited_context(own: int, wanted: int | None) -> int:
    """The model's own context length, shortened if asked. Raises ModelLoadError where more is asked than it has."""
    if wanted is not None and wanted > own:
        raise ModelLoadError(f"--context-length {wanted} exceeds the model's {own}")
    return wanted or own


def chat_template_text(wanted: str | None) -> str | None:
    """The template that the user set by --conv-template: Jinja text, a known name, or a file. Raises ModelLoadError."""
    if wanted is None or "{{" in wanted or "{%" in wanted:
        return wanted
    if wanted in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[wanted]
    try:
        return Path(wanted).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        known = ", ".join(CHAT_TEMPLATES)
        raise ModelLoadError(
            f"--conv-template {wanted} is no Jinja text, no readable file, and none of {known}"
        ) from error
