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


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}{% set turns = messages %}"
    "{% endif %}{{ system + ' ' }}{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% else %}"
    "{{ raise_exception('This template takes one system message, then user and assistant messages') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
_PLAIN = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"

CHAT_TEMPLATES = {
    "chatml": _CHATML,
    "vicuna_v1.1": _VICUNA,
    "llama-2": _LLAMA_2,
    "alpaca": _ALPACA,
    "zero_shot": _PLAIN,
}
"""Templates by FastChat's names, for `--conv-template`; each was that family's format."""

_OVERRIDES = (
    # Relative positions: the configuration's n_positions is what it was trained with, not a limit.
    Override(model_type="t5|mt5|umt5|switch_transformers|longt5", context_length=2048),
    Override(name="vicuna", chat_template=_VICUNA),
    Override(model_type="llama", name="llama-?2.*chat", chat_template=_LLAMA_2),
    Override(model_type="qwen", stop_tokens=("<|im_end|>", "<|endoftext|>"), chat_template=_CHATML),
    # Their generation configurations name <eos> alone, and answers end with the end of a turn.
    Override(model_type="gemma", stop_tokens=("<end_of_turn>",)),
    Override(model_type="chatglm", stop_tokens=("<|user|>", "<|observation|>")),
    Override(model_type="internlm", stop_tokens=("<eoa>",)),
)


def override_for(model_type: str, path: str) -> Override:
    """The override of a model, empty for most."""
    return next((override for override in _OVERRIDES if override.matches(model_type, path)), Override())
