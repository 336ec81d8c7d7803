"""Usage of a request, summed over its choices."""

from __future__ import annotations

from typing import Any

from fastchat_grpc.core import Usage


class Tally:
    """Tokens of all choices. The prompt of a generation counts once, however many choices it has."""

    def __init__(self, choices_per_prompt: int, *, without_output: bool = False) -> None:
        self._per_prompt = choices_per_prompt
        self._without_output = without_output
        self._latest: dict[int, Usage] = {}

    def note(self, index: int, usage: Usage) -> None:
        """Take a choice's usage so far."""
        self._latest[index] = usage

    def render(self) -> dict[str, Any]:
        """The usage object of a reply."""
        prompts: dict[int, Usage] = {}
        for index, usage in self._latest.items():
            prompts.setdefault(index // self._per_prompt, usage)
        prompt = sum(usage.prompt_tokens for usage in prompts.values())
        cached = sum(usage.cached_tokens for usage in prompts.values())
        completion = 0 if self._without_output else sum(usage.completion_tokens for usage in self._latest.values())
        rendered: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if reasoning := sum(usage.reasoning_tokens for usage in self._latest.values()):
            rendered["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return rendered
