"""The processes of the engine benchmark: a worker, transformers' generate, and an engine with clocks."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from fastchat_grpc.models.embedded import embedded_model
from tools.bench.engine import prompts

PROFILED_STEPS = 40


def serve_worker(kind: str, *settings: str) -> None:
    """A worker as a user starts it, but for its port."""
    from fastchat_grpc.config import AdmissionConfig, BackendConfig, ListenConfig, ModelConfig, WorkerConfig
    from fastchat_grpc.worker.app import WorkerApp

    model = ModelConfig(path=str(embedded_model()), names=("smollm2",), load_8bit=kind == "8bit")
    config = WorkerConfig(
        backend=BackendConfig(name="transformers", model=model, options=dict(s.split("=") for s in settings)),
        listen=ListenConfig(),
        controller_addresses=(),
        admission=AdmissionConfig(max_waiting=1024),
    )

    async def serve() -> None:
        app = WorkerApp(config)
        await app.start()
        print(f"ready {app.address}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


def run_generate(counts: str, tokens: str) -> None:
    """transformers' generate over one padded batch; no server."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model(), padding_side="left")
    measured = {}
    for n, count in enumerate(map(int, counts.split(","))):
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts(count, 1000 * n)
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        length = {"max_new_tokens": int(tokens), "min_new_tokens": int(tokens)}
        began = time.perf_counter()
        model.generate(**inputs, do_sample=True, temperature=0.7, **length)
        measured[count] = {"tokens_per_s": count * int(tokens) / (time.perf_counter() - began)}
    print(f"ready {json.dumps(measured)}", flush=True)
    time.sleep(600)


def run_profile(kind: str, streams: str) -> None:
    """Steps of a full batch, with a clock around each part of the engine. Text is made beside it, on an event loop."""
    from fastchat_grpc.config import BackendConfig, EngineConfig, ModelConfig
    from fastchat_grpc.core import GenerateRequest, SamplingParams, StopConditions, TokenPrompt
    from fastchat_grpc.engine.build import build_engine
    from fastchat_grpc.models.loading import load_model
    from fastchat_grpc.text.batch import Running
    from fastchat_grpc.text.job import Job

    count = int(streams)
    model = ModelConfig(path=str(embedded_model()), load_8bit=kind == "8bit")
    loaded = load_model(model)
    engine = build_engine(loaded, BackendConfig(model=model), EngineConfig()).engine
    spent = _clocks(engine)
    for i in range(count):
        ids = tuple(100 + (7 * i + j) % 3000 for j in range(48))
        stopping = StopConditions(max_new_tokens=400, ignore_eos=True)
        request = GenerateRequest(prompt=TokenPrompt(ids), sampling=SamplingParams(temperature=0.7), stopping=stopping)
        job = Job(request, ids, loaded.tokenizer, context_length=1024, stream_interval=1)
        engine.add(Running(job=job, index=0, token_ids=ids, max_tokens=400, min_tokens=0, seed=i))
    _steps_until(engine, count * 4)
    spent.clear()
    began = time.perf_counter()
    _steps_until(engine, engine.generated_tokens + count * PROFILED_STEPS)
    whole = (time.perf_counter() - began) / PROFILED_STEPS * 1000
    parts = {name: seconds / PROFILED_STEPS * 1000 for name, seconds in spent.items()}
    report = {"step": whole, **parts, "other": whole - sum(parts.values())}
    report["outside the forward, %"] = 100 * (whole - parts["forward"]) / whole
    print(f"ready {json.dumps(report)}", flush=True)
    time.sleep(600)


def _steps_until(engine: Any, tokens: int) -> None:
    while engine.generated_tokens < tokens:
        engine.step()


def _clocks(engine: Any) -> dict[str, float]:
    """Wrap the engine's parts so that each adds its seconds to the dictionary returned."""
    spent: dict[str, float] = {}

    def timed(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def outer(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        setattr(owner, method, outer)

    timed(engine.scheduler, "next_batch", "schedule")
    timed(engine._runner, "run", "forward")
    timed(engine._sampler, "sample", "sample")
    timed(engine.scheduler, "commit", "commit")
    timed(engine, "_advance_safely", "take tokens")
    return spent


if __name__ == "__main__":
    {"worker": serve_worker, "generate": run_generate, "profile": run_profile}[sys.argv[1]](*sys.argv[2:])
