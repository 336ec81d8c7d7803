"""What a model folder says, and that every backend reads the same in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.core import SamplingDefaults
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.detect import detect
from fastchat_grpc.models.facts import ModelFacts, read_facts, stated_context

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, "vocab_size": 100}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LLAVA = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 99}
GEMMA3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    **SIZES,
    "vocab_size": 100,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def read(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelFacts:
    """What a folder of such files says."""
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_facts(folder, ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),  # MPT
        ({"max_position_embeddings": "long"}, None),
        ({"max_position_embeddings": True, "n_positions": 512}, 512),
        # Qwen-7B-Chat names two, of which the shorter one needs no scaling.
        ({"max_position_embeddings": 32768, "seq_length": 8192}, 8192),
        # Command R: the length that it was trained for, before that of its table.
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        # Qwen2.5 and Qwen3 as their pages tell to write it down for long texts: 131,072 tokens.
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", **YARN}}, 131072),
        ({"max_position_embeddings": 40960, "rope_parameters": {"rope_type": "yarn", **YARN}}, 131072),
        # DeepSeek-V3 and gpt-oss state the length that they reach as well.
        (
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        # A length that its scaling does not reach is none.
        ({"max_position_embeddings": 262144, "rope_scaling": {"type": "yarn", **YARN}}, 131072),
        # transformers: without the original length it is the stated one.
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        # Vicuna 16k and Qwen with dynamic scaling.
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.5}}, 5120),
        # Llama 3.1 and Phi-3 state the length that they reach.
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", "factor": 32.0}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "su", "factor": 32.0}}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 32768),
        ({"max_position_embeddings": 32768, "rope_scaling": None}, 32768),
        ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 32768),
        # A scaling for each kind of layer: the longest sequence is what the scaled ones reach.
        ({"max_position_embeddings": 32768, "rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, 32768),
        (
            {
                "max_position_embeddings": 65536,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {
                        "rope_type": "yarn",
                        "factor": 8.0,
                        "original_max_position_embeddings": 8192,
                    },
                },
            },
            65536,
        ),
        (GEMMA3, 131072),
        # RoBERTa's table has two rows that are no positions.
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514}, 512),
    ],
)
def test_the_context_is_as_long_as_vllm_makes_it(config: dict[str, Any], expected: int | None) -> None:
    assert stated_context(config) == expected


@pytest.mark.parametrize("factor", ["2", float("nan"), float("inf"), -2.0, [2]])
def test_a_factor_that_is_no_number_is_an_error_of_loading(factor: object) -> None:
    with pytest.raises(ModelLoadError, match="factor must be a positive number"):
        stated_context({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": factor}})


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "max_position_embeddings": 4096},
        {**LLAMA, "max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**LLAMA, "max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {**LLAMA, "max_position_embeddings": 262144, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {
            **LLAMA,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "eos_token_id": [1, 2, 3],
            "torch_dtype": "bfloat16",
        },
        GEMMA3,
        {**LLAVA, "text_config": {**LLAMA, "max_position_embeddings": 4096}, "eos_token_id": 7},
        {**LLAVA, "text_config": {**LLAMA, "max_position_embeddings": 4096, "eos_token_id": 8}},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 512, "vocab_size": 100},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "n_positions": 512, "vocab_size": 100},
    ],
    ids=lambda config: f"{config['model_type']}-{(config.get('rope_scaling') or {}).get('rope_type', '')}",
)
def test_our_engine_and_foreign_ones_read_the_same(tmp_path: Path, config: dict[str, Any]) -> None:
    """Ours reads what transformers makes of the configuration, which fills in what a file leaves out."""
    foreign = read(tmp_path, config)
    ours = detect(tmp_path, ModelConfig(path=str(tmp_path))).facts
    for name in ("context_length", "vocabulary_size", "default_chat_template", "stop_tokens", "default_sampling"):
        assert getattr(ours, name) == getattr(foreign, name), name
    assert ours.eos_token_ids == foreign.eos_token_ids or not foreign.eos_token_ids
    assert ours.stored_dtype == foreign.stored_dtype
    assert ours.served_context(None) > 0


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": [4, 5]}, {"eos_token_id": 6}])
@pytest.mark.parametrize("outer", [{}, {"eos_token_id": 7}, {"eos_token_id": [7, 9]}])
@pytest.mark.parametrize("inner", [{}, {"eos_token_id": 8}])
def test_ends_of_output_are_those_of_transformers(
    tmp_path: Path, generation: dict[str, Any] | None, outer: dict[str, Any], inner: dict[str, Any]
) -> None:
    from transformers import AutoConfig, GenerationConfig

    # Of a family whose class has no end of its own, so that nothing is filled in.
    text = {"model_type": "qwen2", **SIZES, "vocab_size": 100, **inner}
    facts = read(tmp_path, {**LLAVA, "text_config": text, **outer}, generation)
    expected = GenerationConfig.from_pretrained(tmp_path).eos_token_id if generation else None
    if expected is None:
        expected = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path)).eos_token_id
    assert facts.eos_token_ids == tuple(
        [] if expected is None else expected if isinstance(expected, list) else [expected]
    )


@pytest.mark.parametrize("eos", ["</s>", [1, "2"], 1.5])
def test_an_end_of_output_that_is_no_token_is_an_error_of_loading(tmp_path: Path, eos: object) -> None:
    with pytest.raises(ModelLoadError, match="eos_token_id must be a token id or a list of them"):
        read(tmp_path, LLAMA, {"eos_token_id": eos})


def test_a_nested_configuration_is_read_where_the_text_is(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "vocab_size": 300, "max_position_embeddings": 512, "torch_dtype": "float16"}
    omni = {"model_type": "omni", "thinker_config": {"text_config": text, "vision_config": {"hidden_size": 5}}}
    facts = read(tmp_path, omni)
    assert (facts.context_length, facts.vocabulary_size, facts.hidden_size) == (512, 300, 64)
    assert facts.stored_dtype == "float16"
    # What the text's part leaves open, the whole may say.
    facts = read(tmp_path, {"text_config": {"max_position_embeddings": 512}, "vocab_size": 9, "dtype": "bfloat16"})
    assert (facts.vocabulary_size, facts.hidden_size, facts.stored_dtype) == (9, 0, "bfloat16")


def test_the_makers_sampling_is_read(tmp_path: Path) -> None:
    facts = read(tmp_path, LLAMA, {"temperature": 0.6, "eos_token_id": [2, 3]})
    assert facts.default_sampling == SamplingDefaults(temperature=0.6)
    assert facts.eos_token_ids == (2, 3)


def test_a_family_and_sentence_transformers_may_know_the_length_better(tmp_path: Path) -> None:
    assert read(tmp_path, {"model_type": "t5", "n_positions": 512}).context_length == 2048
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256}))
    assert read(tmp_path, {"model_type": "bert", "max_position_embeddings": 512}).context_length == 256


def test_less_than_the_models_length_is_served_where_less_is_asked(tmp_path: Path) -> None:
    facts = read(tmp_path, {**LLAMA, "max_position_embeddings": 4096})
    assert facts.served_context(None) == 4096
    assert facts.served_context(100) == 100
    with pytest.raises(ModelLoadError, match="--context-length 5000 exceeds the model's 4096"):
        facts.served_context(5000)
    assert read(tmp_path, LLAMA).served_context(None) == 2048


def test_facts_need_no_torch(tmp_path: Path) -> None:
    read(tmp_path, LLAMA)
    code = (
        "import sys; from pathlib import Path; from fastchat_grpc.config import ModelConfig;"
        "from fastchat_grpc.models.facts import read_facts;"
        f"read_facts(Path({str(tmp_path)!r}), ModelConfig(path='x'));"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
