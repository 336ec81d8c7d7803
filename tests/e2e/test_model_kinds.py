"""Every kind of model file serves a request over gRPC, through a worker, from tiny models made here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

from fastchat_grpc.client import AsyncClient, Choice
from fastchat_grpc.config import BackendConfig, ListenConfig, ModelConfig, WorkerConfig
from fastchat_grpc.errors import ModelLoadError
from tests.conftest import running_worker
from tests.e2e.tiny_models import (
    write_awq,
    write_compressed_tensors,
    write_gguf,
    write_gptq,
    write_llama,
    write_lora,
    write_t5,
)

PROMPT = "The quick brown fox"
TEN = {"max_new_tokens": 10, "temperature": 0, "ignore_eos": True}


@asynccontextmanager
async def serving(path: Path | str, **model: Any) -> AsyncIterator[AsyncClient]:
    """A client of a worker with the Transformers engine."""
    settings = ModelConfig(path=str(path), names=("tiny",), **model)
    backend = BackendConfig(name="transformers", model=settings)
    config = WorkerConfig(backend=backend, listen=ListenConfig(), controller_addresses=())
    async with running_worker(config) as app, AsyncClient(app.address) as client:
        yield client


async def answer(client: AsyncClient, **options: Any) -> Choice:
    return (await client.complete(PROMPT, **{**TEN, **options})).choices[0]


def greedy(model: Any, folder: Path, count: int = 10) -> tuple[int, ...]:
    """What transformers' generate says alone, end of sequence ignored."""
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    length = {"max_new_tokens": count, "min_new_tokens": count}
    out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
    return tuple(out[0].tolist()[1 if model.config.is_encoder_decoder else ids.shape[1] :])


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("kinds") / "llama", torch.float32)


async def test_sharded_files_in_16_bits(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "sharded", torch.bfloat16, shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    async with serving(folder) as client:
        assert (await answer(client)).token_ids == greedy(load(folder), folder)


async def test_8_bit_weights(llama: Path) -> None:
    async with serving(llama) as client:
        full = await answer(client, logprobs=0)
    async with serving(llama, load_8bit=True) as client:
        eight = await answer(client, logprobs=0)
        again = await asyncio.gather(*(answer(client, logprobs=0) for _ in range(4)))
    assert eight.token_ids[0] == full.token_ids[0]
    assert eight.logprobs[0].logprob != full.logprobs[0].logprob
    assert eight.logprobs[0].logprob == pytest.approx(full.logprobs[0].logprob, abs=0.1)
    assert [other.token_ids for other in again] == [eight.token_ids] * 4


async def test_lora_adapters(llama: Path, tmp_path: Path) -> None:
    adapters = {name: write_lora(tmp_path / name, llama, seed) for seed, name in enumerate(("red", "blue"))}
    expected = {"tiny": greedy(load(llama), llama)}
    for name, folder in adapters.items():
        adapted = PeftModel.from_pretrained(load(llama), folder).merge_and_unload()
        expected[name] = greedy(adapted, llama)
    assert len(set(expected.values())) == 3
    async with serving(llama, lora_adapters={name: str(folder) for name, folder in adapters.items()}) as client:
        choices = await asyncio.gather(*(answer(client, model=name) for name in expected))
    assert {name: choice.token_ids for name, choice in zip(expected, choices, strict=True)} == expected


async def test_an_encoder_decoder(tmp_path: Path) -> None:
    folder = write_t5(tmp_path / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    async with serving(folder) as client:
        choices = await asyncio.gather(*(answer(client) for _ in range(3)))
    assert [choice.token_ids for choice in choices] == [greedy(model, folder)] * 3


async def test_a_gguf_file(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    async with serving(file) as client:
        assert (await answer(client)).token_ids == greedy(load(llama), llama)


@pytest.mark.parametrize("method", ["bnb-8bit", "bnb-4bit"])
async def test_bitsandbytes(llama: Path, method: str) -> None:
    pytest.importorskip("bitsandbytes")
    if method == "bnb-8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32)
    async with serving(llama, quantization=method) as client:
        assert (await answer(client)).token_ids == greedy(model, llama)


async def test_a_checkpoint_of_compressed_tensors(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = write_compressed_tensors(tmp_path / "compressed", llama)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    async with serving(folder) as client:
        assert (await answer(client)).token_ids == greedy(model, folder)


@pytest.mark.parametrize("write", [write_gptq, write_awq])
async def test_gptq_and_awq_checkpoints(llama: Path, tmp_path: Path, write: Callable[[Path, Path], Path]) -> None:
    pytest.importorskip("gptqmodel", reason="needs an environment of its own: tools/envs/gptq.sh")
    folder = write(tmp_path / "four-bit", llama)
    async with serving(llama) as client:
        full = await answer(client, logprobs=0)
    async with serving(folder) as client:
        choice = await answer(client, logprobs=0)
    assert len(choice.token_ids) == 10
    assert choice.logprobs[0].logprob == pytest.approx(full.logprobs[0].logprob, abs=1.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert choice.token_ids == greedy(model, folder)


async def test_a_model_of_full_32_bits_that_16_cannot_hold(llama: Path) -> None:
    """Its layers are packed by oneDNN instead; the answers are the same."""
    async with serving(llama, quantization="none") as client:
        plain = await answer(client)
    async with serving(llama) as client:
        assert (await answer(client)).token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"load_8bit": True, "dtype": "bfloat16"}, "float32"),
        ({"quantization": "gptq"}, "choose one of"),
        ({"load_8bit": True, "quantization": "bnb-4bit"}, "contradict"),
    ],
)
async def test_what_cannot_be_loaded_so_is_refused(llama: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        async with serving(llama, **settings):
            pass


async def test_a_checkpoint_that_needs_a_gpu_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelLoadError, match="fp8, which needs a GPU"):
        async with serving(tmp_path):
            pass
