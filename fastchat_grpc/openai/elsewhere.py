"""Members that other servers add to the API, and this one has not or calls otherwise.

Ignored, each would be missed in the answer. So it is refused, with the name to use instead where there is one, unless
its value is the one that changes nothing: clients that talk to many servers send all of them, with the values that turn
them off, and one setting under the name that each server has for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastchat_grpc.openai.fields import Fields

_OURS: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "random_seed": "seed",
    "truncate": "truncate_prompt_tokens",
    "grammar": "structured_outputs",
    "ebnf": "structured_outputs",
    "regex": "structured_outputs",
    "json_schema": "response_format",
    "format": "response_format",
    "think": "enable_thinking",
    "reasoning": "reasoning_effort",
    "lora_path": "the adapter's name as model",
}
_HARMLESS: Mapping[str, object] = {
    "use_beam_search": False,
    "num_beams": 1,
    "length_penalty": 1,
    "typical_p": 1,
    "tfs_z": 1,
    "top_a": 0,
    "mirostat": 0,
    "mirostat_mode": 0,
    "xtc_probability": 0,
    "dry_multiplier": 0,
    "dynatemp_range": 0,
    "watermark": False,
    "safe_prompt": False,
}
"""Ways to sample and the like, each with the value that turns it off."""


def refuse_elsewhere(fields: Fields) -> None:
    """Raise UnsupportedField for the first of them that would change the answer."""
    for name, ours in _OURS.items():
        fields.unsupported(name, "", [], fields.peek(ours), hint=f"use {ours}")
    for name, harmless in _HARMLESS.items():
        fields.unsupported(name, harmless)
    fields.unsupported("repeat_penalty", 1, fields.peek("repetition_penalty"), hint="use repetition_penalty")
    fields.unsupported("do_sample", True, fields.peek("temperature") != 0, hint="use temperature: 0")
    fields.unsupported("top_n_sigma", -1, 0)
    fields.unsupported("no_stop_trim", False, hint="use include_stop_str_in_output")
    fields.unsupported("options", {}, hint="use the members of this API")
    for name in ("stop_regex", "thinking_token_budget", "custom_logit_processor"):
        fields.unsupported(name)
