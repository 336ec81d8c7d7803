"""A Llama-shaped GGUF file as a plain Hugging Face folder: fp32 safetensors, config, tokenizer.

Needs gguf, safetensors and tokenizers, and neither torch nor transformers, whose own GGUF loader
takes ten times as long and forgets that SmolLM splits numbers into digits. Tensor names and the
order of rotary dimensions are those of llama.cpp's convert_hf_to_gguf.py, backwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.progress import track

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def convert_llama_gguf(source: Path, target: Path) -> None:
    """Write the model of a GGUF file to the new folder `target`.

    Raises:
        ModelLoadError: not a Llama-shaped GGUF file with a byte-level BPE tokenizer of SmolLM's kind.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelLoadError("a GGUF file needs the package gguf; install fastchat-grpc[transformers]") from error
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"not a readable GGUF file: {source} ({error})") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields.get("general.architecture"), fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ModelLoadError(f"cannot convert {source}: architecture and tokenizer are {kind}, not those of SmolLM")
    target.mkdir()
    _write_weights(reader, fields, target)
    _write_json(target / "config.json", _config(fields, tied=all(t.name != "output.weight" for t in reader.tensors)))
    _write_json(target / "generation_config.json", _generation_config(fields))
    _write_tokenizer(fields, target)


def _write_weights(reader: Any, fields: dict[str, Any], target: Path) -> None:
    from safetensors.numpy import save_file

    weights = dict(_hugging_face_tensors(reader, fields))
    file = target / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes for the owner alone; a cache may be shared


def _hugging_face_tensors(reader: Any, fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    import numpy as np
    from gguf.quants import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for tensor in track(reader.tensors, "Converting weights"):
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if weight.ndim == 2:
            # The published weights have 16 bits; what quantization left is far coarser than this rounding,
            # and whoever computes in float32 may keep such weights in half the memory.
            weight = weight.astype(np.float16).astype(np.float32)
        stem, _, suffix = tensor.name.rpartition(".")
        if not stem.startswith("blk."):
            yield f"{_TOP_NAMES[stem]}.{suffix}", weight
            continue
        _, layer, part = stem.split(".")
        if part in heads:
            weight = _split_rotary_halves(weight, heads[part])
        yield f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{suffix}", np.ascontiguousarray(weight)


def _split_rotary_halves(weight: Any, heads: int) -> Any:
    """Rows of each head from llama.cpp's interleaved rotary pairs to Hugging Face's two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        **_token_ids(fields),
    }


def _shortest(value: float) -> float:
    """The shortest decimal number with the same float32 value, such as 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _token_ids(fields: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: fields[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {"_from_model_config": True, **_token_ids(fields)}


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(target / "tokenizer.json"))
    ids = _token_ids(fields)
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[ids["bos_token_id"]],
            "eos_token": tokens[ids["eos_token_id"]],
            "pad_token": tokens[ids["pad_token_id"]],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
