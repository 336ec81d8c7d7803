"""Checks of settings."""

from __future__ import annotations

from fastchat_grpc.errors import ConfigError


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


MAX_SECONDS = 1e9
"""Thirty years: who means never may say that. What is more, messages cannot carry and timers cannot wait for."""


def require_within(name: str, value: float, low: float, high: float, unit: str = "") -> None:
    """Raise ConfigError for a number that is none, or out of its range."""
    if not low <= value <= high:  # whatever is compared with what is no number is false
        raise ConfigError(f"{name} must be from {low:g} to {high:g}{unit}, got {value:g}")


def require_above(name: str, value: float, low: float, high: float, unit: str = "") -> None:
    """As `require_within`, without the lower bound itself."""
    if not low < value <= high:
        raise ConfigError(f"{name} must be above {low:g} and at most {high:g}{unit}, got {value:g}")


def require_seconds(name: str, value: float) -> None:
    """Raise ConfigError for a duration that is none."""
    require_within(name, value, 0, MAX_SECONDS, " s")


def require_some_seconds(name: str, value: float) -> None:
    require_above(name, value, 0, MAX_SECONDS, " s")
