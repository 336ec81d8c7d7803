"""A tiny model with the embedded model's tokenizer, template and shape, for tests of engines rather than of models.

`python -m tests.conformance.tiny_model FOLDER` writes a Hugging Face folder, and in it the same kind of model
as `tiny.gguf`; what is there already is kept. Weights are random: it says nothing of sense, and it says it fast.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastchat_grpc.models.embedded import embedded_gguf, embedded_model

VOCABULARY = 4096
"""The first of the embedded model's tokens: the special ones, all bytes, and what is merged of them first."""
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INNER = 2, 128, 2, 1, 64, 256
WIDE = 0.2
"""Standard deviation of weights: large, so that a random model has opinions and no two logits are close."""
GGUF_FILE = "tiny.gguf"


def weights() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Tensors by their names in Hugging Face's Llama."""
    rng = np.random.default_rng(1)

    def matrix(rows: int, columns: int) -> Any:
        return rng.normal(0, WIDE, (rows, columns)).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "lm_head.weight": matrix(VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": matrix(HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.k_proj": matrix(KV_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.v_proj": matrix(KV_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * HEAD_SIZE),
            "mlp.gate_proj": matrix(INNER, HIDDEN),
            "mlp.up_proj": matrix(INNER, HIDDEN),
            "mlp.down_proj": matrix(HIDDEN, INNER),
            "input_layernorm": np.ones(HIDDEN, np.float32),
            "post_attention_layernorm": np.ones(HIDDEN, np.float32),
        }
        found |= {f"model.layers.{i}.{name}.weight": weight for name, weight in layer.items()}
    return found | {"model.norm.weight": np.ones(HIDDEN, np.float32)}


def write_folder(folder: Path) -> None:
    """As Hugging Face has it, in float32."""
    from safetensors.numpy import save_file

    shutil.copytree(embedded_model(), folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "head_dim": HEAD_SIZE}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": False}
    config["vocab_size"] = VOCABULARY
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < VOCABULARY}
    model["merges"] = _merges(model["merges"], model["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file(weights(), folder / "model.safetensors", {"format": "pt"})


def _merges(merges: Sequence[Any], vocabulary: Container[str]) -> list[Any]:
    """Those whose result is in the vocabulary. A merge is a pair, or a pair with a space between."""
    return [merge for merge in merges if "".join(merge).replace(" ", "") in vocabulary]


def write_gguf(file: Path) -> None:
    """As llama.cpp has it, in float16, with all that the embedded file says of its tokenizer."""
    import gguf

    kind = "llama"
    writer = gguf.GGUFWriter(file, kind)
    own: dict[str, Any] = {
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HEAD_SIZE,
    }
    fields = gguf.GGUFReader(embedded_gguf()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()[:VOCABULARY]
    own |= {
        "vocab_size": VOCABULARY,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": fields["tokenizer.ggml.token_type"].contents()[:VOCABULARY],
        "tokenizer.ggml.merges": _merges(fields["tokenizer.ggml.merges"].contents(), set(tokens)),
    }
    for field in fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = own.get(field.name.removeprefix(f"{kind}."), field.contents())
        if field.name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_F16)
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in weights().items():
        kept = weight if weight.ndim == 1 else weight.astype(np.float16)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write what is missing."""
    folder = Path(sys.argv[1])
    if not (folder / GGUF_FILE).is_file():  # the last to be written
        write_folder(folder)
        write_gguf(folder / "unfinished")
        (folder / "unfinished").rename(folder / GGUF_FILE)


if __name__ == "__main__":
    main()
