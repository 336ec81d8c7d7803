"""What any controller must know of a request to pick for its stream again: it travels through the gateway as JSON.

The gateway is a member of the fleet, and what it brings back is what a controller has told it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastchat_grpc.controller.envoy.requests import Asked
from fastchat_grpc.core import Capability
from fastchat_grpc.errors import FastChatError, InvalidArgument
from fastchat_grpc.openai.jsonio import dumps, parse_object
from fastchat_grpc.rpc.resume import ResumeNeeds

_KNOWN = {capability.value: capability for capability in Capability}


class Pick(NamedTuple):
    """A request that was picked for.

    Attributes:
        ticket, gateway: who knows it.
        choices: workers that are tried before the answer begins.
        events: whether its answer comes as events, which can tell of a failure.
        prefers, needs: what it asks of a model's worker to begin, and to go on.
        seeded: whether it goes on only at the backend that began.
        resumed: what the rest of an answer that began elsewhere needs to begin here.
    """

    ticket: str
    gateway: str
    model: str
    adapter: str
    key: str
    choices: int
    events: bool
    prefers: frozenset[Capability]
    needs: frozenset[Capability]
    seeded: bool
    resumed: ResumeNeeds | None

    @staticmethod
    def of(asked: Asked, ticket: str, gateway: str, choices: int, *, events: bool) -> Pick:
        """The pick of a request."""
        return Pick(
            ticket,
            gateway,
            asked.model,
            asked.adapter,
            asked.key,
            choices,
            events,
            asked.prefers,
            asked.goes_on.capabilities,
            bool(asked.goes_on.backend),
            asked.resumed,
        )

    def encode(self) -> str:
        """As JSON."""
        values: dict[str, Any] = self._asdict() | {"prefers": _names(self.prefers), "needs": _names(self.needs)}
        if self.resumed is not None:
            values["resumed"] = [_names(self.resumed.capabilities), self.resumed.fingerprint, self.resumed.backend]
        return dumps(values).decode()

    @staticmethod
    def decode(text: str) -> Pick:
        """From JSON; capabilities that are not known here are left out. Raises InvalidArgument."""
        try:
            values = parse_object(text.encode())
            resumed = values["resumed"]
            if resumed is not None:
                values["resumed"] = ResumeNeeds(_capabilities(resumed[0]), str(resumed[1]), str(resumed[2]))
            values |= {"prefers": _capabilities(values["prefers"]), "needs": _capabilities(values["needs"])}
            found = Pick(**{name: values[name] for name in Pick._fields})
            if not found.ticket or not isinstance(found.ticket, str) or not isinstance(found.choices, int):
                raise TypeError
        except (FastChatError, KeyError, IndexError, TypeError, ValueError):
            raise InvalidArgument("pick", "is not what a pick of a controller has told") from None
        return found


def _names(capabilities: frozenset[Capability]) -> list[str]:
    return sorted(capability.value for capability in capabilities)


def _capabilities(names: Any) -> frozenset[Capability]:
    return frozenset(_KNOWN[name] for name in names if name in _KNOWN)
