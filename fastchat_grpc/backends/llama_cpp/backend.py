"""llama.cpp, by the low-level interface of llama-cpp-python: GGUF files with continuous batching.

Source: `llama_cpp.llama_cpp` of llama-cpp-python 0.3.36, which mirrors `llama.h`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.batched import BatchedBackend, Loaded
from fastchat_grpc.backends.capabilities import TRAITS
from fastchat_grpc.backends.driver import Seeds
from fastchat_grpc.backends.llama_cpp.engine import EngineLimits, LlamaEngine, embed
from fastchat_grpc.backends.llama_cpp.tokenizer import LlamaTokenizer
from fastchat_grpc.backends.served import (
    Served,
    refuse_settings,
    switch,
    whole_number,
)
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.core import Capability, SamplingDefaults
from fastchat_grpc.errors import ConfigError, ModelLoadError
from fastchat_grpc.models.embedded import EMBEDDED_MODEL, embedded_gguf
from fastchat_grpc.models.facts import chat_template_text, limited_context
from fastchat_grpc.models.generation_config import default_sampling
from fastchat_grpc.models.machine import cpu_count
from fastchat_grpc.models.overrides import override_for
from fastchat_grpc.models.resolve import resolve
from fastchat_grpc.text.grammar import GrammarCompiler
from fastchat_grpc.text.job import Job

logger = logging.getLogger(__name__)

OPTIONS = frozenset({"gpu_layers", "kv_cache_tokens", "prefill_tokens", "prefix_cache", "threads"})
DEFAULT_MAX_RUNNING = 32
MAX_RUNNING = 256  # LLAMA_MAX_SEQ
DEFAULT_KV_CACHE_TOKENS = 32_768
_ALL_LAYERS = -1
_POOLING_NONE = 0


def create(config: BackendConfig) -> LlamaCppBackend:
    """Make a llama.cpp backend.

    Options: `threads` for the CPU, `gpu_layers` on the GPU (default all), `kv_cache_tokens` of all requests
    together, `prefill_tokens` that one step takes, `prefix_cache` on or off.
    """
    config.refuse_unknown_options(OPTIONS)
    refuse_settings(
        config,
        {
            "--num-gpus": "llama.cpp spreads a model over all GPUs that it sees; choose them with --gpus",
            "--max-gpu-memory": "use --backend-option gpu_layers=20",
            "--cpu-offloading": "use --backend-option gpu_layers=20",
            "--load-8bit": "choose a GGUF file of that precision, such as Q8_0",
            "--quantization": "choose a GGUF file of that precision, such as Q4_K_M",
            "--dtype": "a GGUF file has its own",
            "--lora": "merge the adapter into the GGUF file",
            "--trust-remote-code": "a GGUF file brings no code",
        },
    )
    if (config.model.max_running or 1) > MAX_RUNNING:
        raise ConfigError(f"llama.cpp runs at most {MAX_RUNNING} requests at once, got {config.model.max_running}")
    if config.model.gpus:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, config.model.gpus)))
    importlib.import_module("llama_cpp")
    return LlamaCppBackend(config)


class LlamaCppBackend(BatchedBackend):
    """One GGUF file and the thread that runs it."""

    thread_name = "llama-cpp-engine"

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._seeds = Seeds(config.model.seed)
        self._loader = _Loader(config)

    def _load(self) -> Loaded:
        return self._loader.load()

    def load(self) -> BackendLoad:
        return replace(super().load(), prefix_cache=True)

    def _seed(self, job: Job, index: int) -> int:
        return self._seeds.of_choice(job.request, index)


class _Loader:
    """Makes the engine, and keeps what belongs to its model. Used in the engine's thread."""

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._max_running = config.model.max_running or DEFAULT_MAX_RUNNING
        self._threads = whole_number(config, "threads", cpu_count())
        self._gpu_layers = whole_number(config, "gpu_layers", _ALL_LAYERS, low=_ALL_LAYERS)
        self._prefill_tokens = whole_number(config, "prefill_tokens", 256)
        self._kv_cache_tokens = whole_number(config, "kv_cache_tokens", 0, low=0)
        self._prefix_cache = switch(config, "prefix_cache", True)
        self._model: Any = None
        self._embedder: Any = None

    def load(self) -> Loaded:
        """Load the file. Raises ModelLoadError."""
        import llama_cpp as llama

        settings = self._config.model
        file = find_gguf(settings)
        _log_through_python(llama)
        llama.llama_backend_init()
        self._model = model = self._load_model(llama, file, settings)
        try:
            _refuse_encoders(llama, model, file)
            context_length = limited_context(int(llama.llama_model_n_ctx_train(model)), settings.context_length)
            tokenizer = self._tokenizer(llama, model, settings)
            limits = self._limits(llama, model, context_length)
            context = self._make_context(llama, limits)
        except BaseException:
            llama.llama_model_free(model)
            raise
        size = int(llama.llama_model_n_embd(model))
        served = Served(
            backend="llama_cpp",
            names=settings.served_names,
            tokenizer=tokenizer,
            context_length=context_length,
            capabilities=_capabilities(tokenizer),
            embedding_size=size,
            default_sampling=_default_sampling(llama, model),
            quantization=(llama.llama_ftype_name(llama.llama_model_ftype(model)) or b"").decode(),
        )
        engine = LlamaEngine(llama, model, context, tokenizer, limits, on_close=self._close_embedder)
        return Loaded(
            engine=engine,
            served=served,
            max_running=self._max_running,
            embed=lambda inputs, normalize, _: [self._embed(engine, served, ids, normalize) for ids in inputs],
            grammars=GrammarCompiler(tokenizer),
        )

    def _embed(self, engine: LlamaEngine, served: Served, token_ids: Sequence[int], normalize: bool) -> list[float]:
        """The embedding of one text. The first call makes a context for it."""
        import llama_cpp as llama

        if self._embedder is None:
            parameters = self._context_parameters(llama, served.context_length, 1)
            parameters.embeddings = True
            parameters.pooling_type = _POOLING_NONE
            self._embedder = llama.llama_init_from_model(self._model, parameters)
            if not self._embedder:
                raise ModelLoadError("llama.cpp has no memory for embeddings")
        vector = embed(llama, self._embedder, token_ids, served.embedding_size, self._prefill_tokens)
        engine.processed_tokens += len(token_ids)
        norm = sum(x * x for x in vector) ** 0.5 if normalize else 1.0
        return [x / (norm or 1.0) for x in vector]

    def _close_embedder(self) -> None:
        if self._embedder is not None:
            import llama_cpp as llama

            llama.llama_free(self._embedder)
            self._embedder = None

    def _load_model(self, llama: Any, file: Path, settings: ModelConfig) -> Any:
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0 if settings.device == "cpu" else self._gpu_layers
        model = llama.llama_model_load_from_file(os.fsencode(file), parameters)
        if not model:
            raise ModelLoadError(f"llama.cpp cannot load {file}: it is broken, of an unknown kind, or too large")
        return model

    def _tokenizer(self, llama: Any, model: Any, settings: ModelConfig) -> LlamaTokenizer:
        architecture = _metadata(llama, model, "general.architecture")
        override = override_for(architecture, settings.path)
        return LlamaTokenizer(llama, model, chat_template_text(settings.chat_template), override.chat_template)

    def _limits(self, llama: Any, model: Any, context_length: int) -> EngineLimits:
        most = context_length * self._max_running
        cache = self._kv_cache_tokens or min(most, max(context_length, DEFAULT_KV_CACHE_TOKENS))
        if cache < context_length:
            raise ModelLoadError(
                f"--backend-option kv_cache_tokens must hold one context of {context_length} tokens, got {cache}"
            )
        # A recurrent state, or a sliding window, cannot be cut back to a common beginning.
        cuttable = not (
            llama.llama_model_is_recurrent(model)
            or llama.llama_model_is_hybrid(model)
            or llama.llama_model_n_swa(model) > 0
        )
        return EngineLimits(
            slots=self._max_running,
            kv_cache_tokens=cache,
            prefill_tokens=max(self._prefill_tokens, self._max_running),
            prefix_cache=self._prefix_cache and cuttable,
        )

    def _make_context(self, llama: Any, limits: EngineLimits) -> Any:
        context = llama.llama_init_from_model(
            self._model, self._context_parameters(llama, limits.kv_cache_tokens, limits.slots, limits.prefill_tokens)
        )
        if not context:
            raise ModelLoadError(
                f"llama.cpp has no memory for a KV cache of {limits.kv_cache_tokens} tokens; "
                "set a smaller --backend-option kv_cache_tokens"
            )
        return context

    def _context_parameters(self, llama: Any, tokens: int, sequences: int, batch: int | None = None) -> Any:
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = tokens
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = batch or self._prefill_tokens
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.kv_unified = True  # one cache for all: a long request may use what short ones leave
        return parameters


def _capabilities(tokenizer: LlamaTokenizer) -> frozenset[Capability]:
    found = TRAITS["llama_cpp"].capabilities(chat=bool(tokenizer.chat_template))
    return found if GrammarCompiler.available() else found - {Capability.STRUCTURED_OUTPUT}


_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}  # ggml_log_level


def _log_through_python(llama: Any) -> None:
    """llama.cpp writes pages to stderr; they go to this module's logger."""

    def write(level: int, text: bytes, _: Any) -> None:
        logger.log(_LOG_LEVELS.get(level, logging.DEBUG), "%s", text.decode("utf-8", "replace").rstrip())

    callback = llama.llama_log_callback(write)
    # It is called until the process ends, so it must not be collected before.
    llama.fastchat_grpc_log_callback = callback
    llama.llama_log_set(callback, None)


def find_gguf(settings: ModelConfig) -> Path:
    """The GGUF file that the model path names. Raises ModelLoadError."""
    if settings.path == EMBEDDED_MODEL:
        return embedded_gguf()
    local = Path(settings.path).expanduser()
    if local.is_dir():
        files = sorted(local.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
        names = ", ".join(file.name for file in files[:3])
        raise ModelLoadError(
            f"the llama_cpp backend needs a GGUF file; {local} holds {names or 'none'}"
            + ("; name one of them" if files else "")
        )
    path = resolve(settings.path, settings.revision)
    if path.is_dir():
        raise ModelLoadError(f"the llama_cpp backend needs a GGUF file, such as owner/name/file.gguf, got {path}")
    return path


def _refuse_encoders(llama: Any, model: Any, file: Path) -> None:
    if not llama.llama_model_has_decoder(model) or llama.llama_model_has_encoder(model):
        raise ModelLoadError(f"{file} holds no decoder-only model; use the transformers backend")
    architecture = _metadata(llama, model, "general.architecture")
    if _metadata(llama, model, f"{architecture}.attention.causal") == "false":
        raise ModelLoadError(f"{file} holds an embedding model; use the transformers backend")


_SAMPLING_KEYS = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Fields of SamplingDefaults by llama.cpp's names of them (`general.sampling.*` of a GGUF file)."""


def _default_sampling(llama: Any, model: Any) -> SamplingDefaults:
    """What the file says of sampling where a request chooses nothing; most files say nothing."""
    said = {name: _metadata(llama, model, f"general.sampling.{key}") for name, key in _SAMPLING_KEYS.items()}
    return default_sampling({name: text for name, text in said.items() if text})


def _metadata(llama: Any, model: Any, key: str) -> str:
    import ctypes

    buffer = ctypes.create_string_buffer(256)
    length = llama.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if length >= 0 else ""
