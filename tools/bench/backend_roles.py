"""The processes of the backends benchmark, each run by the Python of the backend's own environment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from fastchat_grpc.config import AdmissionConfig, BackendConfig, ListenConfig, ModelConfig, WorkerConfig
from fastchat_grpc.core import ChatMessage, ChatPrompt
from fastchat_grpc.models.embedded import embedded_gguf, embedded_model
from fastchat_grpc.text.tokenizer import Tokenizer
from tools.bench.engine import prompts

CONTEXT = 2048
CACHE_GB = 2
THREADS = len(os.sched_getaffinity(0))
TEMPERATURE = 0.7


def config(backend: str, kind: str) -> BackendConfig:
    """What a user would start, but for the size of the cache, which the raw engine has too."""
    options = {}
    path = str(embedded_model())
    match backend:
        case "openvino":
            options = {"weights": kind, "cache_gb": str(CACHE_GB)}
        case "vllm":
            options = {"kv_cache_memory_bytes": str(CACHE_GB << 30)}
        case "llama_cpp":
            path = str(embedded_gguf())
    model = ModelConfig(path=path, names=("smollm2",), context_length=CONTEXT)
    return BackendConfig(name=backend, model=model, options=options)


def serve_worker(backend: str, kind: str) -> None:
    """A worker as a user starts it, but for its port."""
    from fastchat_grpc.worker.app import WorkerApp

    settings = WorkerConfig(
        backend=config(backend, kind),
        listen=ListenConfig(),
        controller_addresses=(),
        admission=AdmissionConfig(max_waiting=1024),
        drain_timeout_s=0.0,
    )

    async def serve() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        app = WorkerApp(settings, stop)
        await app.start()
        print(f"ready {app.address}", flush=True)
        await stop.wait()
        await app.stop()

    asyncio.run(serve())


def run_raw(backend: str, kind: str, counts: str, tokens: str) -> None:
    """The engine's own interface, asked for the same."""
    ask = {"openvino": raw_openvino, "llama_cpp": raw_llama_cpp, "mlx": raw_mlx}[backend](kind)
    ask(["Hello"], 8)
    measured = {}
    for n, count in enumerate(map(int, counts.split(","))):
        began = time.perf_counter()
        received, firsts = ask(prompts(count, 1000 * n), int(tokens))
        seconds = time.perf_counter() - began
        measured[count] = {"tokens_per_s": received / seconds, "ttft_s": statistics.median(firsts)}
    print(f"ready {json.dumps(measured)}", flush=True)
    signal.pause()


Ask = Callable[[list[str], int], tuple[int, list[float]]]
"""(prompts, tokens) -> (tokens that came in all, seconds to the first of each)."""


@cache
def _tokenizer() -> Tokenizer:
    """The tokenizer that the workers have."""
    from fastchat_grpc.backends.served import find_model

    settings = ModelConfig(path=str(embedded_model()))
    return find_model(settings, "bench").tokenizer(settings)


def _chat_ids(texts: list[str]) -> list[list[int]]:
    """The prompts as chats in tokens."""
    from fastchat_grpc.text.prompt import tokenize

    tokenizer = _tokenizer()
    return [tokenize(tokenizer, ChatPrompt(messages=(ChatMessage(role="user", content=text),))) for text in texts]


def raw_openvino(kind: str) -> Ask:
    """ContinuousBatchingPipeline, stepped in a loop."""
    import numpy as np
    import openvino
    import openvino_genai

    from fastchat_grpc.backends.openvino import model as openvino_model

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = CACHE_GB, 64, True
    found = openvino_model.find(config("openvino", kind))
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(found.model), scheduler, "CPU", {})
    number = iter(range(1_000_000))

    def ask(texts: list[str], tokens: int) -> tuple[int, list[float]]:
        began, received = time.perf_counter(), 0
        handles = []
        for ids in _chat_ids(texts):
            settings = openvino_genai.GenerationConfig()
            settings.max_new_tokens, settings.ignore_eos, settings.apply_chat_template = tokens, True, False
            settings.do_sample, settings.temperature, settings.rng_seed = True, TEMPERATURE, next(number)
            tensor = openvino.Tensor(np.array([ids], dtype=np.int64))
            handles.append(pipeline.add_request(next(number), tensor, settings))
        firsts: dict[int, float] = {}
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for n, handle in enumerate(handles):
                while handle.can_read():
                    firsts.setdefault(n, time.perf_counter() - began)
                    received += sum(len(output.generated_ids) for output in handle.read().values())
        return received, list(firsts.values())

    return ask


def raw_llama_cpp(kind: str) -> Ask:
    """The binding's own class, one request at a time, as tokens: without its chat and text code."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama = Llama(str(embedded_gguf()), n_ctx=CONTEXT, n_threads=THREADS, verbose=False)
    template = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos_token="", bos_token="")

    def ask(texts: list[str], tokens: int) -> tuple[int, list[float]]:
        began, first, received = time.perf_counter(), 0.0, 0
        (text,) = texts
        prompt = template(messages=[{"role": "user", "content": text}]).prompt
        ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
        for _ in llama.generate(ids, temp=TEMPERATURE, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0):
            first = first or time.perf_counter() - began
            received += 1
            if received == tokens:
                break
        return received, [first]

    return ask


def raw_mlx(kind: str) -> Ask:
    """mlx-lm's batch generator, with the BLAS library that ours takes; MLX's own is ten times slower."""
    from fastchat_grpc.backends.mlx.backend import use_fast_blas

    use_fast_blas("auto")
    import mlx_lm
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    model, _ = mlx_lm.load(str(embedded_model()))

    def ask(texts: list[str], tokens: int) -> tuple[int, list[float]]:
        began, received = time.perf_counter(), 0
        firsts: dict[int, float] = {}
        generator: Any = BatchGenerator(model, max_tokens=tokens, sampler=make_sampler(temp=TEMPERATURE))
        generator.insert(_chat_ids(texts), [tokens] * len(texts))
        while responses := generator.next_generated():
            for response in responses:
                firsts.setdefault(response.uid, time.perf_counter() - began)
                received += 1
        return received, list(firsts.values())

    return ask


if __name__ == "__main__":
    {"worker": serve_worker, "raw": run_raw}[sys.argv[1]](*sys.argv[2:])
