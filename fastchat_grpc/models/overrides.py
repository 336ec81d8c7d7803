"""The few families whose files alone do not say how they are served.

Most models carry their chat template, ends of output and context length; those need no entry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """What to add to a model's own configuration."""

    model_type: str = ""
    """Regular expression for the configuration's model_type; empty: any."""
    name: str = ""
    """Regular expression for the lower-cased model path; empty: any."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer, besides EOS; unknown ones are skipped."""
    context_length: int | None = None
    chat_template: str | None = None
    """For models whose tokenizer has none; never replaces one."""

    def matches(self, model_type: str, path: str) -> bool:
        return bool(re.fullmatch(self.model_type or ".*", model_type) and re.search(self.name, path.lower()))


_BOS = "{{ bos_token }}"
"""What FastChat's tokenizers put before a prompt; `ChatTemplate` makes it empty where a tokenizer adds none."""
_REFUSE = "{{ raise_exception('This template takes one system message, then user and assistant messages') }}"


def _system(default: str) -> str:
    """Sets `system`, by default FastChat's, and `turns`, the messages after it."""
    return (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = "
        + default
        + " %}{% set turns = messages %}{% endif %}"
    )


def _colons(default: str, roles: tuple[str, str], separators: tuple[str, str], opening: str) -> str:
    """FastChat's styles ADD_COLON_SINGLE and ADD_COLON_TWO: role, colon, text, and a separator by role."""
    user, assistant = roles
    after_user, after_assistant = separators
    return (
        _BOS + _system(default) + "{{ system + '" + after_user + "' }}{% for message in turns %}"
        "{% if message['role'] == 'user' %}{{ '" + user + ": ' + message['content'] + '" + after_user + "' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '" + assistant + ": ' + message['content'] + '" + after_assistant + "' }}"
        "{% else %}" + _REFUSE + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opening + "' }}{% endif %}"
    )


_CHATML_TURNS = (
    "{% for message in turns %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CHATML = _BOS + "{% set turns = messages %}" + _CHATML_TURNS
_QWEN = (
    _BOS
    + _system("'You are a helpful assistant.'")
    + "{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}"
    + _CHATML_TURNS
)
_VICUNA = _colons(
    "'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.'",
    ("USER", "ASSISTANT"),
    (" ", "</s>"),
    "ASSISTANT:",
)
_ALPACA = _colons(
    "'Below is an instruction that describes a task. Write a response that appropriately completes the request.'",
    ("### Instruction", "### Response"),
    ("\\n\\n", "</s>"),
    "### Response:",
)
_ZERO_SHOT = _colons(
    "'A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human\\'s questions.'",
    ("Human", "Assistant"),
    ("\\n### ", "\\n### "),
    "Assistant:",
)
_LLAMA_2 = (
    _BOS + _system("''") + "{% set system = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system else '' %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ ('' if loop.first else '<s>') + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"
)

CHAT_TEMPLATES = {
    "chatml": _CHATML,
    "qwen-7b-chat": _QWEN,
    "vicuna_v1.1": _VICUNA,
    "llama-2": _LLAMA_2,
    "alpaca": _ALPACA,
    "zero_shot": _ZERO_SHOT,
}
"""Templates by FastChat's names, for `--conv-template`; each gives the tokens that FastChat's did."""

_OVERRIDES = (
    # Relative positions: the configuration's n_positions is what it was trained with, not a limit.
    Override(model_type="t5|mt5|umt5|switch_transformers|longt5", context_length=2048),
    Override(name="vicuna", chat_template=_VICUNA),
    Override(model_type="llama", name="llama-?2.*chat", chat_template=_LLAMA_2),
    Override(model_type="qwen", stop_tokens=("<|im_end|>", "<|endoftext|>"), chat_template=_QWEN),
    # Their generation configurations name <eos> alone, and answers end with the end of a turn.
    Override(model_type="gemma", stop_tokens=("<end_of_turn>",)),
    Override(model_type="chatglm", stop_tokens=("<|user|>", "<|observation|>")),
    Override(model_type="internlm", stop_tokens=("<eoa>",)),
)


def override_for(model_type: str, path: str) -> Override:
    """The override of a model, empty for most."""
    return next((override for override in _OVERRIDES if override.matches(model_type, path)), Override())
