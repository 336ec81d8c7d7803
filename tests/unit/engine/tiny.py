"""Tiny random models, and an engine around them that a test can drive."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    T5Config,
)

from fastchat_grpc.backends.driver import as_domain_error, drive
from fastchat_grpc.backends.echo import EOS, VOCABULARY_SIZE, EchoTokenizer
from fastchat_grpc.backends.engine_thread import EngineThread
from fastchat_grpc.core import Completion, Delta, Event, GenerateRequest, PromptEcho
from fastchat_grpc.engine.engine import Engine
from fastchat_grpc.engine.kv_cache import BlockPool
from fastchat_grpc.engine.model_runner import BLOCK_SIZE, PackedRunner, make_packed_runner
from fastchat_grpc.engine.scheduler import Scheduler, SchedulerLimits
from fastchat_grpc.engine.sequential_runner import SequentialRunner
from fastchat_grpc.text.job import Job

SMALL = {"vocab_size": VOCABULARY_SIZE, "eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
# Large weights, so that a random model has opinions and no two logits are close.
WIDE = {"initializer_range": 0.4}
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**HIDDEN, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512, **WIDE, **SMALL}

CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=16),
    "mistral_window": lambda: MistralConfig(**LLAMA, sliding_window=12),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **WIDE, **SMALL),
    "opt": lambda: OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        init_std=0.4,
        **SMALL,
    ),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **WIDE, **SMALL),
    "gemma2": lambda: Gemma2Config(**LLAMA, head_dim=8, sliding_window=12, query_pre_attn_scalar=8),
    "mamba": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **WIDE, **SMALL),
}


def tiny(name: str) -> Any:
    """A random model of that family; the same at every call."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    return model.requires_grad_(False)


def tiny_t5() -> Any:
    """A random encoder-decoder."""
    torch.manual_seed(1)
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=3.0,
        **SMALL,
    )
    return AutoModelForSeq2SeqLM.from_config(config).eval().requires_grad_(False)


@dataclass
class Sink:
    """Receives one request's events, on the harness's event loop."""

    events: list[Event] = field(default_factory=list)
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    seen: threading.Condition = field(default_factory=threading.Condition)
    reading: Future[None] | None = None

    def wait(self, timeout: float = 60) -> Sink:
        assert self.done.wait(timeout), "the request did not end"
        return self

    def wait_for_tokens(self, count: int) -> None:
        with self.seen:
            assert self.seen.wait_for(lambda: len(self.tokens()) >= count, 60)

    def tokens(self, index: int = 0) -> list[int]:
        return [t for e in self.events if isinstance(e, Delta) and e.index == index for t in e.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Delta) and e.index == index)

    def completions(self) -> dict[int, Completion]:
        return {e.index: e for e in self.events if isinstance(e, Completion)}

    def prompt(self) -> PromptEcho:
        first = self.events[0]
        assert isinstance(first, PromptEcho)
        return first


class Harness:
    """An engine over a model in its thread, an event loop in another, and sinks for its requests."""

    thread: EngineThread

    def __init__(
        self,
        model: Any,
        *,
        blocks: int = 256,
        max_running: int = 32,
        prefill_tokens: int = 32,
        packed: bool | None = None,
        prefix_cache: bool = True,
        activate: Any = lambda name: None,
        logprob_tokens: int = 10_000,
        rounds_inputs: bool = False,
        encoder_decoder: bool = False,
        **engine: Any,
    ) -> None:
        with torch.inference_mode():
            runner: Any = None
            if packed is not False:
                runner = make_packed_runner(model, activate, rounds_inputs=rounds_inputs)
        if packed:
            assert isinstance(runner, PackedRunner)
        if runner is None:
            runner = SequentialRunner(model, activate, logprob_tokens=logprob_tokens)
        else:
            runner.allocate(blocks)
        self.runner = runner
        self.pool = BlockPool(blocks, BLOCK_SIZE)
        limits = SchedulerLimits(
            max_running=max_running,
            prefill_tokens=prefill_tokens,
            reuse_prefixes=prefix_cache and runner.reuses_prefixes,
            whole_prompts=runner.whole_prompts,
            logprob_tokens=logprob_tokens,
        )
        self.scheduler = Scheduler(self.pool, limits)
        self.tokenizer = EchoTokenizer()
        self._context_length = min(512, blocks * BLOCK_SIZE)
        self._encoder_decoder = encoder_decoder
        self.engine = Engine(runner, self.scheduler, self.tokenizer, context_length=self._context_length, **engine)
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Harness:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._await(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._await(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def submit(self, request: GenerateRequest, grammar: Any = None) -> Sink:
        sink = Sink()
        sink.reading = asyncio.run_coroutine_threadsafe(self._read(request, grammar, sink), self._loop)
        return sink

    def abort(self, sink: Sink) -> None:
        """As when a caller goes."""
        assert sink.reading is not None
        sink.reading.cancel()

    def run(self, *requests: GenerateRequest) -> list[Sink]:
        return [sink.wait() for sink in [self.submit(request) for request in requests]]

    def run_job(self, pieces: Iterator[Any]) -> Future[list[Any]]:
        """Other work in the engine's thread, a piece between two steps; what the pieces give."""
        return asyncio.run_coroutine_threadsafe(self._run_job(pieces), self._loop)

    def close(self) -> None:
        self._await(self.thread.close())

    async def _start(self) -> None:
        self.thread = EngineThread("engine", lambda: self.engine, lambda job, index: job.request.sampling.seed or 0)
        await self.thread.start()

    async def _end(self) -> None:
        await self.thread.close()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    async def _read(self, request: GenerateRequest, grammar: Any, sink: Sink) -> None:
        job = Job(
            request,
            list(request.prompt.token_ids),  # type: ignore[union-attr]
            self.tokenizer,
            context_length=self._context_length,
            stream_interval=1,
            output_apart=self._encoder_decoder,
        )
        job.grammar = grammar
        try:
            async with aclosing(drive(job, self.thread)) as events:
                async for event in events:
                    with sink.seen:
                        sink.events.append(event)
                        sink.seen.notify_all()
        except Exception as error:
            sink.error = error
        sink.done.set()

    async def _run_job(self, pieces: Iterator[Any]) -> list[Any]:
        made = []
        try:
            while (piece := await self.thread.call(lambda: next(pieces, _END))) is not _END:
                made.append(piece)
        except Exception as error:
            raise as_domain_error(error) from error
        return made

    def _await(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(90)


_END = object()


def greedy_by_generate(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """What transformers' generate says, without ending early."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    return out[0, start:].tolist()


TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


def save_tokenizer(folder: Any) -> None:
    """Write a byte-level tokenizer of 258 tokens: bytes, an end, and a filler."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def save_tiny(folder: Any, model: Any = None, *, chat: bool = True) -> Any:
    """Write a model folder that load_model reads; returns the model."""
    if model is None:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "vocab_size": 258})).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if not chat:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return model
