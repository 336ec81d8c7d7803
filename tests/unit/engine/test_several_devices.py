"""A model whose layers are on several devices. The second one here is torch's `meta`: it computes shapes alone, and
a mode stands in for what GPUs refuse: an operation on tensors of two devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastchat_grpc.config import EngineConfig
from fastchat_grpc.engine import build
from fastchat_grpc.engine.attention import PACKED, WholeStep, register, running
from fastchat_grpc.engine.model_runner import BLOCK_SIZE, PackedRunner
from fastchat_grpc.engine.request import Batch, Chunk, Request, Sequence
from fastchat_grpc.engine.step_model import TransformersModel
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.detect import ModelKind
from tests.unit.engine.test_engine import ask, prompt
from tests.unit.engine.tiny import tiny

FIRST, SECOND = torch.device("cpu"), torch.device("meta")
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OneDevicePerOperation(TorchDispatchMode):
    """Refuses what GPUs refuse."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
        assert len(devices) <= 1 or function in COPIES, f"{function} with tensors of {devices}"
        return function(*args, **(kwargs or {}))


def spread_out(model: Any) -> Any:
    """Put the second half of a model on the second device, with inputs that follow, as accelerate does."""

    def move(value: Any) -> Any:
        return value.to(SECOND) if isinstance(value, torch.Tensor) else value

    for part in (model.model.layers[1], model.model.norm, model.lm_head):
        part.to_empty(device=SECOND)
        part.register_forward_pre_hook(lambda _, args, kwargs: tree_map(move, (args, kwargs)), with_kwargs=True)
    register()
    model.set_attn_implementation(PACKED)
    return model


@pytest.fixture
def runner() -> PackedRunner:
    model = spread_out(tiny("mistral_window"))
    step = WholeStep([4])
    with torch.inference_mode(), running(step), OneDevicePerOperation():
        model(input_ids=torch.tensor([prompt(4)]), use_cache=False)
    return PackedRunner(TransformersModel(model), FIRST, [step.shapes[0], step.shapes[1]], lambda name: None, None)


def sequence(length: int, blocks: list[int]) -> Sequence:
    request = Request(spec=ask(prompt(length)), prompt=prompt(length))
    made = Sequence(request=request, index=0, tokens=prompt(length), seed=0)
    made.table.blocks = blocks
    return made


def test_a_step_takes_its_slots_to_the_device_of_each_layer(runner):
    runner.allocate(8)
    one, other = sequence(20, [3, 5]), sequence(7, [1])
    prefill = Batch((Chunk(one, 0, 20, True), Chunk(other, 0, 6, False)))
    mixed = Batch((Chunk(one, 19, 1, True), Chunk(other, 2, 5, True)))
    decode = Batch((Chunk(one, 19, 1, True), Chunk(other, 6, 1, True)), forks=((one, sequence(20, [3, 6])),))
    with torch.inference_mode(), OneDevicePerOperation():
        for batch in (prefill, mixed, decode):
            logits = runner.run(batch).logits
            assert logits.device == SECOND
            assert len(logits) == sum(chunk.samples for chunk in batch.chunks)
    stored = runner._keys[0].abs().sum(dim=(1, 2))
    assert stored[3 * BLOCK_SIZE : 4 * BLOCK_SIZE].all()
    assert torch.equal(runner._keys[0][6 * BLOCK_SIZE :][:4], runner._keys[0][5 * BLOCK_SIZE :][:4])


def test_the_cache_has_as_many_blocks_as_the_fullest_device_has_room_for(runner, monkeypatch):
    loaded = type("Loaded", (), {"context_length": 512, "kind": ModelKind.DECODER})()
    per_block = {device: size.per_token * BLOCK_SIZE for device, size in runner.cache_sizes().items()}
    assert set(per_block) == {FIRST, SECOND}
    free = {FIRST: 1 << 30, SECOND: 40 * per_block[SECOND]}
    monkeypatch.setattr(build, "_free_bytes", lambda device: free[device])
    assert build._block_count(runner, loaded, EngineConfig(), 64) == 20  # MEMORY_PART: half of what is free
    free[SECOND] = per_block[SECOND]
    with pytest.raises(ModelLoadError, match="free on meta"):
        build._block_count(runner, loaded, EngineConfig(), 64)
