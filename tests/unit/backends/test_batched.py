"""What backends with one stepped thread tell of their load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from fastchat_grpc.backends.base import Steps
from fastchat_grpc.backends.transformers.backend import TransformersBackend
from fastchat_grpc.config import BackendConfig, EngineConfig, ModelConfig


def test_our_own_engine_tells_its_steps_beside_its_blocks() -> None:
    backend = TransformersBackend(BackendConfig(model=ModelConfig(path="m")), EngineConfig())
    scheduler = SimpleNamespace(
        pool=SimpleNamespace(block_size=16, block_count=8),
        limits=SimpleNamespace(reuse_prefixes=True),
        preemptions=2,
    )
    engine = SimpleNamespace(kv_cache_usage=0.5, kv_free_tokens=64, processed_tokens=9, scheduler=scheduler)
    backend._loaded = cast("Any", SimpleNamespace(engine=engine, max_running=4))
    steps = Steps(failures=3)
    backend._thread = cast("Any", SimpleNamespace(steps=steps))
    load = backend.load()
    assert load.steps is steps
    assert (load.kv_block_count, load.preemptions, load.prefix_cache) == (8, 2, True)
