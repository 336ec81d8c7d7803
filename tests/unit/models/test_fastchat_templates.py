"""The templates with FastChat's names give the token ids that FastChat's workers gave their models.

FastChat (0.2.36, conversation.py) renders a conversation to text and tokenizes it with what the tokenizer adds
to a text, a BOS for Llama and its kin and nothing for Qwen. The texts below are its own.
"""

from __future__ import annotations

import pytest

from fastchat_grpc.core import ChatMessage, ChatPrompt
from fastchat_grpc.models.overrides import CHAT_TEMPLATES, override_for
from fastchat_grpc.models.tokenizer import HuggingFaceTokenizer
from tests.e2e.tiny_models import byte_level_tokenizer, sentencepiece_tokenizer

SYSTEM = "Be brief."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ZERO_SHOT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
QWEN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
QWEN_TURNS = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
)
FASTCHAT = {
    "vicuna_v1.1": (
        f"{VICUNA} USER: Hi ASSISTANT:",
        "Be brief. USER: Hi ASSISTANT:",
        f"{VICUNA} USER: Hi ASSISTANT: Hello.</s>USER: Bye ASSISTANT:",
        "Be brief. USER: Hi ASSISTANT: Hello.</s>USER: Bye ASSISTANT:",
    ),
    "llama-2": (
        "[INST] Hi [/INST]",
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
        "[INST] Hi [/INST] Hello. </s><s>[INST] Bye [/INST]",
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Bye [/INST]",
    ),
    "alpaca": (
        f"{ALPACA}\n\n### Instruction: Hi\n\n### Response:",
        "Be brief.\n\n### Instruction: Hi\n\n### Response:",
        f"{ALPACA}\n\n### Instruction: Hi\n\n### Response: Hello.</s>### Instruction: Bye\n\n### Response:",
        "Be brief.\n\n### Instruction: Hi\n\n### Response: Hello.</s>### Instruction: Bye\n\n### Response:",
    ),
    "zero_shot": (
        f"{ZERO_SHOT}\n### Human: Hi\n### Assistant:",
        "Be brief.\n### Human: Hi\n### Assistant:",
        f"{ZERO_SHOT}\n### Human: Hi\n### Assistant: Hello.\n### Human: Bye\n### Assistant:",
        "Be brief.\n### Human: Hi\n### Assistant: Hello.\n### Human: Bye\n### Assistant:",
    ),
    "qwen-7b-chat": (
        QWEN + QWEN_TURNS[0],
        QWEN_SYSTEM + QWEN_TURNS[0],
        QWEN + QWEN_TURNS[1],
        QWEN_SYSTEM + QWEN_TURNS[1],
    ),
    # As FastChat's conversations of the style CHATML without a system message of their own.
    "chatml": (QWEN_TURNS[0], QWEN_SYSTEM + QWEN_TURNS[0], QWEN_TURNS[1], QWEN_SYSTEM + QWEN_TURNS[1]),
}
ONE = (("user", "Hi"),)
THREE = (*ONE, ("assistant", "Hello."), ("user", "Bye"))
CONVERSATIONS = (ONE, (("system", SYSTEM), *ONE), THREE, (("system", SYSTEM), *THREE))


def llama(template: str) -> HuggingFaceTokenizer:
    """A tokenizer that begins every text with its BOS."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_tokenizer(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return HuggingFaceTokenizer(tokenizer, chat_template=template)


def yi(template: str) -> HuggingFaceTokenizer:
    """A tokenizer that has a BOS and puts it nowhere."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), bos_token="<|im_start|>")
    return HuggingFaceTokenizer(tokenizer, chat_template=template)


@pytest.mark.parametrize("make", [llama, yi])
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_gives_the_tokens_that_fastchat_gave(name, make):
    tokenizer = make(CHAT_TEMPLATES[name])
    for turns, text in zip(CONVERSATIONS, FASTCHAT[name], strict=True):
        chat = ChatPrompt(messages=tuple(ChatMessage(role=role, content=content) for role, content in turns))
        rendered = tokenizer.encode(tokenizer.render_chat(chat), add_special_tokens=False)
        assert rendered == tokenizer.encode(text, add_special_tokens=True)
        assert rendered[0] == 1 or make is yi
        assert rendered.count(1) == 1 + text.count("<s>") or make is yi


@pytest.mark.parametrize(
    ("model_type", "path", "name"),
    [
        ("llama", "lmsys/vicuna-7b-v1.5", "vicuna_v1.1"),
        ("llama", "meta-llama/Llama-2-7b-chat", "llama-2"),
        ("qwen", "Qwen/Qwen-7B-Chat", "qwen-7b-chat"),
    ],
)
def test_a_model_that_brings_no_template_has_the_one_that_fastchat_chose(model_type, path, name):
    assert override_for(model_type, path).chat_template == CHAT_TEMPLATES[name]
