"""Any Hugging Face model, through the project's own engine."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from fastchat_grpc.backends.base import BackendLoad
from fastchat_grpc.backends.batched import BatchedBackend, Loaded
from fastchat_grpc.backends.capabilities import TRAITS, Feature, Traits
from fastchat_grpc.backends.served import Served, switch, whole_number
from fastchat_grpc.config import BackendConfig, EngineConfig
from fastchat_grpc.text.job import Job

if TYPE_CHECKING:
    from fastchat_grpc.engine.build import BuiltEngine
    from fastchat_grpc.engine.engine import Engine

logger = logging.getLogger(__name__)

OPTIONS = frozenset({"kv_cache_tokens", "prefill_tokens", "prefix_cache", "threads"})
_SEED_MASK = 2**64 - 1


def create(config: BackendConfig) -> TransformersBackend:
    """Make a backend of transformers models.

    Options: `kv_cache_tokens` that the KV cache holds, `prefill_tokens` of prompts that one step takes,
    `prefix_cache` on or off, `threads` for the CPU.
    """
    config.refuse_unknown_options(OPTIONS)
    settings = EngineConfig(
        kv_cache_tokens=whole_number(config, "kv_cache_tokens", None),
        prefill_tokens=whole_number(config, "prefill_tokens", None),
        prefix_cache=switch(config, "prefix_cache", True),
        threads=whole_number(config, "threads", None),
    )
    return TransformersBackend(config, settings)


class TransformersBackend(BatchedBackend):
    """One model with its adapters, and the thread that owns both.

    The model is loaded in that thread too: OpenMP keeps a pool for each thread that has computed, and lets its pools
    sleep between any two operations once they have more threads than there are processors.
    """

    def __init__(self, config: BackendConfig, settings: EngineConfig) -> None:
        super().__init__(config)
        self._settings = settings
        self._seeds = random.SystemRandom() if config.model.seed is None else random.Random(config.model.seed)

    def _load(self) -> Loaded:
        logger.info("starting torch and transformers")
        from fastchat_grpc.engine.build import build_engine
        from fastchat_grpc.engine.embedder import batches
        from fastchat_grpc.models.loading import load_model

        built = build_engine(load_model(self._config.model), self._config, self._settings)
        return Loaded(
            engine=built.engine,
            served=_served(built, self._config.model.served_names),
            max_running=built.max_running,
            embed=built.embed,
            embed_batches=batches,
            grammars=built.grammars,
        )

    def load(self) -> BackendLoad:
        load = super().load()
        if self._loaded is None:
            return load
        scheduler = cast("Engine", self._loaded.engine).scheduler
        return replace(
            load,
            kv_block_size=scheduler.pool.block_size,
            kv_block_count=scheduler.pool.block_count,
            prefix_cache=scheduler.limits.reuse_prefixes,
            preemptions=scheduler.preemptions,
        )

    def _seed(self, job: Job, index: int) -> int:
        """One for all choices of a request: their random numbers go by seed, choice and place (`engine.rng`)."""
        seed = job.request.sampling.seed
        return self._seeds.getrandbits(64) if seed is None else seed & _SEED_MASK


def _served(built: BuiltEngine, names: tuple[str, ...]) -> Served:
    loaded = built.loaded
    return Served(
        backend="transformers",
        names=names,
        tokenizer=loaded.tokenizer,
        context_length=built.context_length,
        capabilities=built.capabilities,
        adapters={name: name for name in loaded.adapters.names},
        embedding_size=loaded.hidden_size,
        embed_length=loaded.context_length,  # whatever the KV cache holds: an input to embed is never in it
        output_apart=built.output_apart,
        quantization=loaded.quantization or str(loaded.dtype).removeprefix("torch."),
        precision=loaded.precision,
        traits=_traits(built),
        default_sampling=loaded.default_sampling,
    )


def _traits(built: BuiltEngine) -> Traits:
    """What the backend declares, and what this kind of model changes of it."""
    traits = TRAITS["transformers"]
    if built.output_apart:
        reason = "an encoder-decoder has no probabilities of its input"
        traits = replace(traits, refuses={**traits.refuses, Feature.PROMPT_LOGPROBS: reason})
    return traits
