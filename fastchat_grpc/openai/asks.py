"""What a request of the OpenAI API asks of a model that not every backend can do, told without parsing it whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastchat_grpc.core import GREEDY_TEMPERATURE, GREEDY_TOP_P, Capability
from fastchat_grpc.openai.grammar import GUIDED
from fastchat_grpc.rpc.resume import ResumeNeeds, needs_of

_GRAMMARS = ("structured_outputs", *GUIDED.values())
_PENALTIES = ("presence_penalty", "frequency_penalty")
ASKING_MEMBERS = frozenset(
    {"response_format", "tool_choice", "logprobs", "seed", "temperature", "top_p", *_PENALTIES, *_GRAMMARS}
)
"""Members that `asks_for` and `goes_on_with` look at."""


def asks_for(values: Mapping[str, Any], *, chat: bool) -> frozenset[Capability]:
    """What the request that has these members asks for. Never raises: what is wrong with them, its worker says.

    Args:
        chat: whether it is a chat completion.
    """
    found = {Capability.CHAT} if chat else set()
    if _has_grammar(values) or (chat and _forces_call(values.get("tool_choice"))):
        found.add(Capability.STRUCTURED_OUTPUT)
    # A chat says true; a text completion says how many, and 0 is a number of them.
    if (logprobs := values.get("logprobs")) is not None and logprobs is not False:
        found.add(Capability.LOGPROBS)
    if values.get("seed") is not None:
        found.add(Capability.SEED)
    return frozenset(found)


def goes_on_with(values: Mapping[str, Any]) -> ResumeNeeds:
    """What a worker must have to go on with the answer of a request that has these members. Never raises."""
    greedy = _below(values.get("temperature"), GREEDY_TEMPERATURE) or _below(values.get("top_p"), GREEDY_TOP_P)
    grammar = _has_grammar(values) or _forces_call(values.get("tool_choice"))
    return needs_of(
        seeded=values.get("seed") is not None and not greedy,
        stateful=grammar or any(map(values.get, _PENALTIES)),
    )


def _below(value: object, bound: float) -> bool:
    return isinstance(value, (int, float)) and value < bound


def _has_grammar(values: Mapping[str, Any]) -> bool:
    wanted = values.get("response_format")
    if isinstance(wanted, Mapping) and wanted.get("type") != "text":
        return True
    return any(values.get(name) is not None for name in _GRAMMARS)


def _forces_call(choice: object) -> bool:
    """A forced call is made by a grammar."""
    return choice == "required" or isinstance(choice, Mapping)
