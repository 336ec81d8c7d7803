"""Puts an engine together for a loaded model: which runner, how large a cache, how many threads."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from fastchat_grpc.config import BackendConfig, EngineConfig
from fastchat_grpc.core import Capability
from fastchat_grpc.engine.embedder import Embedder, Vectors
from fastchat_grpc.engine.engine import Engine
from fastchat_grpc.engine.kv_cache import BlockPool
from fastchat_grpc.engine.model_runner import BLOCK_SIZE, ModelRunner, PackedRunner, make_packed_runner
from fastchat_grpc.engine.output_rules import OutputRules
from fastchat_grpc.engine.scheduler import Scheduler, SchedulerLimits
from fastchat_grpc.engine.sequential_runner import SequentialRunner
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.detect import ModelKind
from fastchat_grpc.models.loading import LoadedModel
from fastchat_grpc.models.machine import available_memory, cpu_count
from fastchat_grpc.models.quantization_plan import INT8
from fastchat_grpc.text.grammar import GrammarCompiler

log = logging.getLogger(__name__)

CPU_CACHE_BYTES = 2 * 1024**3
CPU_CACHE_CONTEXTS = 4
"""Whole contexts that the cache holds at least on a CPU, if memory allows."""
MEMORY_PART = {"cpu": 0.4, "cuda": 0.85}
"""Most of the free memory that the cache takes."""
MAX_RUNNING = {"cpu": 64}
MAX_RUNNING_ELSEWHERE = 256
PREFILL_TOKENS = {"cpu": 256}
PREFILL_TOKENS_ELSEWHERE = 2048
LOGPROB_BYTES = 64 * 1024**2
"""Logits of a step's prompt tokens whose log probabilities are wanted; what is made of them takes as much again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine with what belongs to it."""

    engine: Engine
    loaded: LoadedModel
    embedder: Embedder
    grammars: GrammarCompiler
    context_length: int
    """The model's, or what the cache holds if that is less."""
    max_running: int
    capabilities: frozenset[Capability]

    @property
    def output_apart(self) -> bool:
        """Whether prompt and output have a context each."""
        return self.loaded.kind is ModelKind.ENCODER_DECODER

    def embed(self, inputs: list[list[int]], normalize: bool, adapter: str) -> Vectors:
        """As `Embedder.embed`, with what a step does besides: it counts its tokens, and sees a device that fails."""
        try:
            vectors = self.embedder.embed(inputs, normalize, adapter)
        except Exception as error:
            self.engine.end_if_broken(error)
            raise
        self.engine.processed_tokens += sum(map(len, inputs))
        return vectors


def build_engine(loaded: LoadedModel, config: BackendConfig, settings: EngineConfig) -> BuiltEngine:
    """Make the engine of a model, in the thread that will own it.

    Raises:
        ModelLoadError: not even one block of the cache fits into memory.
    """
    device = loaded.device.type
    torch.set_num_threads(settings.threads or cpu_count())
    logprob_tokens = max(1, LOGPROB_BYTES // (4 * loaded.vocabulary_size))
    with torch.inference_mode():
        runner = _runner(loaded, logprob_tokens)
    max_running = config.model.max_running or MAX_RUNNING.get(device, MAX_RUNNING_ELSEWHERE)
    block_count = _block_count(runner, loaded, settings, max_running)
    if isinstance(runner, PackedRunner):
        runner.allocate(block_count)
    encoder_decoder = loaded.kind is ModelKind.ENCODER_DECODER
    # An encoder-decoder has a whole context for its input and another for its output.
    context_length = min(loaded.context_length, block_count * BLOCK_SIZE // (2 if encoder_decoder else 1))
    limits = SchedulerLimits(
        max_running=max_running,
        prefill_tokens=settings.prefill_tokens or PREFILL_TOKENS.get(device, PREFILL_TOKENS_ELSEWHERE),
        reuse_prefixes=runner.reuses_prefixes and settings.prefix_cache,
        whole_prompts=runner.whole_prompts,
        logprob_tokens=logprob_tokens,
    )
    log.info(
        "%s, %d requests at once, cache of %d tokens", type(runner).__name__, max_running, block_count * BLOCK_SIZE
    )
    engine = Engine(
        runner,
        Scheduler(BlockPool(block_count, BLOCK_SIZE), limits),
        loaded.tokenizer,
        context_length=context_length,
        rules=OutputRules.of(loaded.base.generation_config, runner.start_token)
        if encoder_decoder and isinstance(runner, SequentialRunner)
        else None,
    )
    return BuiltEngine(
        engine=engine,
        loaded=loaded,
        embedder=Embedder(
            loaded.base,
            loaded.pooling.value,
            loaded.adapters.activate,
            packed=runner.model if isinstance(runner, PackedRunner) else None,
        ),
        grammars=GrammarCompiler(loaded.tokenizer),
        context_length=context_length,
        max_running=max_running,
        capabilities=_capabilities(loaded),
    )


def _runner(loaded: LoadedModel, logprob_tokens: int) -> ModelRunner:
    activate = loaded.adapters.activate
    if loaded.kind is ModelKind.DECODER:
        packed = make_packed_runner(
            loaded.base, activate, rounds_inputs=loaded.quantization == INT8, context_length=loaded.context_length
        )
        if packed is not None:
            return packed
    return SequentialRunner(loaded.base, activate, logprob_tokens=logprob_tokens)


def _block_count(runner: ModelRunner, loaded: LoadedModel, settings: EngineConfig, max_running: int) -> int:
    """Blocks of the cache. Where caches are the model's own, they count what those may take."""
    context_blocks = -(-loaded.context_length // BLOCK_SIZE)
    if settings.kv_cache_tokens is not None:
        return max(1, settings.kv_cache_tokens // BLOCK_SIZE)
    if loaded.kind is ModelKind.EMBEDDING:
        return context_blocks  # nothing is ever kept
    blocks = context_blocks * max_running
    with torch.inference_mode():
        sizes = runner.cache_sizes()
    for device, need in sizes.items():
        per_block = need.per_token * BLOCK_SIZE
        room = int(_free_bytes(device) * MEMORY_PART.get(device.type, 0.5))
        if device.type == "cpu":
            room = min(room, max(CPU_CACHE_BYTES, CPU_CACHE_CONTEXTS * context_blocks * per_block))
        room -= need.per_sequence * max_running
        if room < max(per_block, 1):
            raise ModelLoadError(
                f"no memory for the KV cache: {max(room, 0) >> 20} MiB are free on {device} beside"
                f" {max_running} x {need.per_sequence >> 10} KiB, a block takes {per_block >> 10} KiB"
            )
        if per_block:
            blocks = min(blocks, room // per_block)
    if blocks < context_blocks:
        log.warning(
            "the KV cache holds %d tokens, less than the context of %d", blocks * BLOCK_SIZE, loaded.context_length
        )
    return blocks


def _capabilities(loaded: LoadedModel) -> frozenset[Capability]:
    can = set(loaded.capabilities)
    if Capability.GENERATE in can:
        can |= {
            Capability.LOGPROBS,
            Capability.SEED,
            Capability.RESUME,
            Capability.SEEDED_RESUME,  # its random numbers go by the token's place (engine/rng.py)
            Capability.STATEFUL_RESUME,
        }
        if GrammarCompiler.available() and loaded.tokenizer.eos_token_ids:
            can.add(Capability.STRUCTURED_OUTPUT)
    return frozenset(can)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return available_memory()
    accelerator = getattr(torch, device.type, None)
    if accelerator is not None and hasattr(accelerator, "mem_get_info"):
        return int(accelerator.mem_get_info(device)[0])
    return available_memory() // 2  # mps: the main memory, shared with everything else
