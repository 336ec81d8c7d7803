"""Tiny models with random weights, as folders and files of the kinds that users have.

Functions write a model into a folder; fixtures make each once per test run. A test module gets the
fixtures with `pytest_plugins = ["tests.e2e.tiny_models"]`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "Ein schöner Tag für Käse, Brötchen & naïve café visits.",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 2))  # 😀 👍",
    "今日は良い天気です。Привет, мир! مرحبا",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN = 64
GROUP = 32
"""Inputs that share a scale in 4-bit checkpoints."""
# Large weights, so that a random model has opinions and no two logits are close.
WIDE = {"initializer_range": 0.2}


def byte_level_tokenizer(vocabulary_size: int = 400) -> Tokenizer:
    """A byte-level BPE tokenizer like GPT-2's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<tool call é>", special=False)])
    return tokenizer


def sentencepiece_tokenizer(vocabulary_size: int = 450) -> Tokenizer:
    """A BPE tokenizer with byte fallback like Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trained.train_from_iterator(TEXTS[:2], trainers.BpeTrainer(vocab_size=vocabulary_size - len(pieces)))
    model = json.loads(trained.to_str())["model"]
    pieces += sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def wordpiece_tokenizer(vocabulary_size: int = 300) -> Tokenizer:
    """A WordPiece tokenizer like BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=vocabulary_size, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def unigram_tokenizer(vocabulary_size: int = 300) -> Tokenizer:
    """A Unigram tokenizer like T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def save_chat_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level tokenizer with ChatML as its template."""
    tokenizer = byte_level_tokenizer()
    save_tokenizer(
        folder,
        tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    return tokenizer


def write_llama(
    folder: Path, dtype: torch.dtype = torch.bfloat16, shard_size: str = "5GB", kind: str = "llama", **settings: Any
) -> Path:
    """A Llama-shaped chat model of two layers; or of a kind that is much alike: qwen2, qwen3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = save_chat_tokenizer(folder)
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            **WIDE,
            **settings,
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # zero, before training
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def write_t5(folder: Path) -> Path:
    """An encoder-decoder of T5's kind."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = unigram_tokenizer()
    save_tokenizer(folder, tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=HIDDEN,
        d_kv=16,
        d_ff=2 * HIDDEN,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_bert(folder: Path, pooling: str | None = None) -> Path:
    """An encoder of BERT's kind; with `pooling`, as sentence-transformers saves one ("cls", "mean" or "lasttoken")."""
    from transformers import BertConfig, BertModel

    tokenizer = wordpiece_tokenizer()
    save_tokenizer(folder, tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    if pooling is not None:
        kinds = ["Transformer", "Pooling", "Normalize"]
        modules = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
        (folder / "1_Pooling").mkdir()
        key = "pooling_mode_mean_tokens" if pooling == "mean" else f"pooling_mode_{pooling}"
        key = "pooling_mode_cls_token" if pooling == "cls" else key
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN, key: True}))
    return folder


def write_lora(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA adapter of the attention layers of `base`, strong enough to change its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def write_gguf(file: Path, folder: Path) -> Path:
    """A model of `write_llama` as a GGUF file (float32, or float16 as it is), with its tokenizer."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    kind = config["model_type"]
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(file, kind)
    half = config["dtype"] == "float16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_vocab_size(config["vocab_size"])
    _add_gguf_tokenizer(writer, tokenizer)
    for name, weight in load_file(folder / "model.safetensors").items():
        stem, suffix = name.rsplit(".", 1)
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        for projection, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if kind == "llama" and stem == f"self_attn.{projection}_proj":
                rows, columns = weight.shape
                halves = weight.reshape(config[heads], 2, rows // config[heads] // 2, columns)
                weight = halves.swapaxes(1, 2).reshape(rows, columns)
        kept = weight if weight.ndim > 1 else weight.astype("float32")
        writer.add_tensor(f"{prefix}{names[stem]}.{suffix}", kept.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_compressed_tensors(folder: Path, base: Path) -> Path:
    """`base` with int8 weights and a scale for each output, as llm-compressor stores it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{name}_packed"] = pack_to_int32((weight / scale).round().to(torch.int8), 8)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gptq(folder: Path, base: Path) -> Path:
    """`base` with 4-bit weights in groups along the inputs, as GPTQ checkpoints store them (v1)."""

    def store(stem: str, levels: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        out, inputs = levels.shape
        return {
            f"{stem}.qweight": _pack_eights(levels.t(), range(8)),
            # v1 stores zero points less one.
            f"{stem}.qzeros": _pack_eights(torch.full((out, inputs // GROUP), 7), range(8)).t().contiguous(),
            f"{stem}.scales": scales.t().contiguous().to(torch.float16),
            f"{stem}.g_idx": (torch.arange(inputs) // GROUP).to(torch.int32),
        }

    settings = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    return _write_4_bit(folder, base, store, {"quant_method": "gptq", **settings})


def write_awq(folder: Path, base: Path) -> Path:
    """The same as AWQ checkpoints store them: packed along the outputs, in an order of their own."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def store(stem: str, levels: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        out, inputs = levels.shape
        return {
            f"{stem}.qweight": _pack_eights(levels, order).t().contiguous(),
            f"{stem}.qzeros": _pack_eights(torch.full((out, inputs // GROUP), 8), order).t().contiguous(),
            f"{stem}.scales": scales.t().contiguous().to(torch.float16),
        }

    settings = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _write_4_bit(folder, base, store, {"quant_method": "awq", **settings})


def _pack_eights(levels: torch.Tensor, order: Iterable[int]) -> torch.Tensor:
    """Eight 4-bit rows of (rows, columns) in one int32, lowest bits first, in the order given."""
    eights = levels.to(torch.int64).reshape(-1, 8, levels.shape[1])[:, list(order)]
    packed = (eights << torch.arange(0, 32, 4)[None, :, None]).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _write_4_bit(
    folder: Path,
    base: Path,
    store: Callable[[str, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    settings: dict[str, Any],
) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        grouped = weight.view(len(weight), -1, GROUP)
        scales = grouped.abs().amax(-1) / 7
        levels = (grouped / scales[..., None]).round().clamp(-8, 7) + 8
        tensors |= store(name.removesuffix(".weight"), levels.view(weight.shape), scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def _add_gguf_tokenizer(writer: Any, tokenizer: dict[str, Any]) -> None:
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    vocabulary |= {token["content"]: i for i, token in added.items()}
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(ordered)
    kinds = [1 if i not in added else 3 if added[i]["special"] else 4 for i in range(len(ordered))]
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama-shaped chat model stored in bfloat16."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_llama_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama-shaped chat model stored in float32."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "llama-fp32", torch.float32)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an encoder-decoder model."""
    return write_t5(tmp_path_factory.mktemp("tiny") / "t5")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an embedding model as sentence-transformers saves it, with CLS pooling."""
    return write_bert(tmp_path_factory.mktemp("tiny") / "bert", pooling="cls")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_llama_fp32: Path) -> Path:
    """A GGUF file of the model of `tiny_llama_fp32`."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_llama_fp32)


@pytest.fixture(scope="session")
def tiny_loras(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """Two LoRA adapters of `tiny_llama`, by name."""
    root = tmp_path_factory.mktemp("loras")
    return {name: write_lora(root / name, tiny_llama, seed) for seed, name in enumerate(("red", "blue"), start=7)}
