"""How tokens are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from fastchat_grpc.core.checks import require, require_int32, within
from fastchat_grpc.core.limits import INT32_MAX, INT64_MAX, INT64_MIN

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the likeliest token is taken (FastChat's rule)."""
GREEDY_TOP_P = 1e-8
"""Below this top_p the likeliest token is taken (FastChat's rule)."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.001, 1000.0
"""Logits are divided and multiplied by it; far beyond these bounds they would be no numbers any more."""


class Unset(float):
    """A number that the caller has not chosen: the contract's default, which a model's own default may replace."""

    __slots__ = ()


class UnsetInt(int):
    """As `Unset`, for a whole number."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How each next token is chosen.

    A field that nobody sets holds an `Unset` number, which computes as the contract's default and can be told
    from the same number when it was asked for: `given` names what was. `filled` puts a model's own defaults in
    the place of unset fields; a worker does that once (`worker.generation`), so a backend reads plain values and
    only says what its model's defaults are (`ModelInfo.default_sampling`).
    """

    temperature: float = Unset(1.0)
    top_p: float = Unset(1.0)
    top_k: int = UnsetInt(-1)
    min_p: float = Unset(0.0)
    repetition_penalty: float = Unset(1.0)
    presence_penalty: float = Unset(0.0)
    frequency_penalty: float = Unset(0.0)
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    fallback_seed: int | None = None
    """Seed that a relay or a client made up; see `seeded`. A backend never sees it."""

    def __post_init__(self) -> None:
        within("sampling.temperature", self.temperature, 0, 100)
        within("sampling.top_p", self.top_p, 0, 1)
        require(self.top_k >= -1, "sampling.top_k", self.top_k, "at least 1, or -1 or 0 for off")
        require_int32("sampling.top_k", self.top_k, -1)
        within("sampling.min_p", self.min_p, 0, 1)
        within("sampling.repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        within("sampling.presence_penalty", self.presence_penalty, -2, 2)
        within("sampling.frequency_penalty", self.frequency_penalty, -2, 2)
        for name in ("seed", "fallback_seed"):
            seed = getattr(self, name)
            if seed is not None:
                require(INT64_MIN <= seed <= INT64_MAX, f"sampling.{name}", seed, "a 64-bit integer")
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id <= INT32_MAX or not -100 <= bias <= 100:
                require(
                    0 <= token_id <= INT32_MAX,
                    "sampling.logit_bias",
                    f"token id {token_id}",
                    f"keyed by token ids from 0 to {INT32_MAX}",
                )
                within(f"sampling.logit_bias[{token_id}]", bias, -100, 100)

    @property
    def given(self) -> dict[str, float]:
        """The numbers that were asked for, by field. (`seed` and `logit_bias` show by themselves if they were.)"""
        return {
            name: value for name in SAMPLING_NUMBERS if not isinstance(value := getattr(self, name), Unset | UnsetInt)
        }

    def filled(self, defaults: SamplingDefaults) -> SamplingParams:
        """The same with a model's own defaults for what is unset."""
        missing = {name: value for name, value in defaults.stated.items() if name not in self.given}
        return replace(self, **missing) if missing else self

    def plain(self) -> SamplingParams:
        """The same without a trace of what was unset: in numbers that any engine can send to its processes."""
        numbers = {name: getattr(self, name) for name in SAMPLING_NUMBERS}
        return replace(self, **{name: int(x) if isinstance(x, int) else float(x) for name, x in numbers.items()})  # type: ignore[arg-type]

    def seeded(self, *, counter_based: bool) -> SamplingParams:
        """The same with its fallback seed in the place of an unset seed, or without it.

        Args:
            counter_based: whether the model's random numbers depend on seed and place alone (SEEDED_RESUME), so
                that another worker can draw them. Elsewhere a seed is refused, or slow, and of no use.
        """
        if self.fallback_seed is None:
            return self
        wanted = counter_based and self.seed is None and not self.greedy
        return replace(self, seed=self.fallback_seed if wanted else self.seed, fallback_seed=None)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_p < GREEDY_TOP_P

    @property
    def penalizes(self) -> bool:
        """Whether any penalty changes anything. A repetition_penalty below 1.0 favours what was said."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty) or bool(self.frequency_penalty)

    @property
    def scales(self) -> bool:
        """Whether the temperature changes anything."""
        return GREEDY_TEMPERATURE <= self.temperature != 1.0

    @property
    def truncates(self) -> bool:
        """Whether top-p, top-k or min-p leave anything out of what is drawn from."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a model's makers want where a caller chooses nothing (its generation_config.json). None: nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        SamplingParams(**self.stated)

    @property
    def stated(self) -> dict[str, Any]:
        """Values by field, without those that say nothing."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def yielding(self, field_path: str) -> SamplingDefaults:
        """The same without the default of a field that a backend has refused, or without any where it refused another.

        What nobody asked for must not make a request fail: not because the backend has another range, nor because
        it cannot do it together with what was asked for.
        """
        name = field_path.removeprefix("sampling.")
        return replace(self, **{name: None}) if name in self.stated else SamplingDefaults()


NO_DEFAULTS = SamplingDefaults()
"""Of a model whose makers want nothing in particular."""
SAMPLING_NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields of SamplingParams that are numbers and may be unset, in the order of the contract."""
