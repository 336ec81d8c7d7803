"""The KV cache takes memory as it is used, and models with caches of their own are counted too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastchat_grpc.config import EngineConfig
from fastchat_grpc.engine import build
from fastchat_grpc.engine.attention import make_pools
from fastchat_grpc.engine.model_runner import BLOCK_SIZE
from fastchat_grpc.engine.sequential_runner import SequentialRunner
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.detect import ModelKind
from tests.unit.engine.tiny import LLAMA, tiny, tiny_t5

CPU = torch.device("cpu")
MIB = 1024**2


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_large_cache_takes_no_memory_before_it_is_used():
    before = resident()
    keys, values = make_pools([(4, 64, 64, torch.float32, CPU)] * 4, 128 * 1024)
    assert sum(pool.nbytes for pool in (*keys, *values)) == 1024 * MIB
    assert resident() - before < 32 * MIB
    assert not keys[0][::4096].any(), "what was never written reads as zeros"
    assert resident() - before < 64 * MIB
    keys[0][: 32 * 1024] = 1.0  # 32 MiB
    assert 32 * MIB <= resident() - before < 128 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pools_are_ordinary_tensors_of_zeros(dtype):
    keys, values = make_pools([(2, 8, 4, dtype, CPU)], 32)
    assert (keys[0].shape, values[0].shape) == ((32, 2, 8), (32, 2, 4))
    assert keys[0].dtype == dtype
    assert not keys[0].any()
    keys[0][3] = 1
    assert keys[0].sum() == 16
    assert keys[0].data_ptr() % 64 == 0, "kernels read whole lines of the processor's cache"


def test_the_size_of_a_models_own_cache_is_measured():
    with torch.inference_mode():
        llama = SequentialRunner(tiny("llama"), lambda name: None).cache_sizes()[CPU]
        mamba = SequentialRunner(tiny("mamba"), lambda name: None).cache_sizes()[CPU]
        t5 = SequentialRunner(tiny_t5(), lambda name: None).cache_sizes()[CPU]
    head = LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
    exact = LLAMA["num_hidden_layers"] * LLAMA["num_key_value_heads"] * head * 2 * 4
    assert llama.per_token == exact
    assert mamba.per_token == 0
    assert mamba.per_sequence > 0
    assert t5.per_token > 0


def loaded(context_length: int, kind: ModelKind = ModelKind.DECODER):
    return SimpleNamespace(context_length=context_length, kind=kind)


def test_models_with_caches_of_their_own_get_what_memory_allows(monkeypatch):
    """A context of 131,072 tokens was taken for a million tokens of cache, whatever those weigh."""
    runner = SequentialRunner(tiny("llama"), lambda name: None)
    with torch.inference_mode():
        per_token = runner.cache_sizes()[CPU].per_token
    monkeypatch.setattr(build, "_free_bytes", lambda device: 10_000 * per_token)
    blocks = build._block_count(runner, loaded(131_072), EngineConfig(), 64)
    assert blocks == pytest.approx(4_000 / BLOCK_SIZE, abs=1)  # MEMORY_PART of a CPU: 0.4


def test_states_that_do_not_grow_are_counted_for_each_sequence(monkeypatch):
    runner = SequentialRunner(tiny("mamba"), lambda name: None)
    with torch.inference_mode():
        per_sequence = runner.cache_sizes()[CPU].per_sequence
    monkeypatch.setattr(build, "_free_bytes", lambda device: 100 * per_sequence)
    assert build._block_count(runner, loaded(1024), EngineConfig(), 8) == 8 * 1024 // BLOCK_SIZE
    with pytest.raises(ModelLoadError, match="no memory for the KV cache"):
        build._block_count(runner, loaded(1024), EngineConfig(), 64)
