"""The upstream backend's own options, and what it learns of its server."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastchat_grpc.config import BackendConfig
from fastchat_grpc.errors import ConfigError, InvalidArgument

logger = logging.getLogger(__name__)

DIALECTS = ("openai", "vllm")
OPTIONS = frozenset({"url", "model", "dialect", "api_key_env", "timeout_s", "embeddings"})
_THOUGHTS = re.compile(r"reasoning_content|messages.*\breasoning\b")
DEFAULT_KEY_VARIABLE = "FASTCHAT_GRPC_UPSTREAM_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The backend's own options."""

    url: str
    """Address of the API, up to and with /v1."""
    model: str
    """The server's name of the model; empty: its only one."""
    dialect: str
    api_key: str | None
    timeout_s: float
    """Longest silence of the server, also before its first byte."""
    embeddings: bool

    @classmethod
    def parse(cls, config: BackendConfig) -> Options:
        """The options of `--backend-option`. Raises ConfigError."""
        config.refuse_unknown_options(OPTIONS)
        given = config.options
        url = given.get("url", "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigError("backend upstream needs --backend-option url=http://host:port/v1")
        dialect = given.get("dialect", "openai")
        if dialect not in DIALECTS:
            raise ConfigError(f"--backend-option dialect must be one of {', '.join(DIALECTS)}, got {dialect}")
        embeddings = given.get("embeddings", "off")
        if embeddings not in ("on", "off"):
            raise ConfigError(f"--backend-option embeddings must be on or off, got {embeddings}")
        return cls(
            url=url,
            model=given.get("model", ""),
            dialect=dialect,
            api_key=_api_key(given),
            timeout_s=_seconds(given.get("timeout_s", "120")),
            embeddings=embeddings == "on",
        )

    @property
    def vllm(self) -> bool:
        """Whether the server takes vLLM's additions."""
        return self.dialect == "vllm"


@dataclass(slots=True)
class Habits:
    """How the server wants what every server takes in its own way. Learned from its refusals, and kept."""

    limit_name: str = "max_tokens"
    """Of chats: every server takes this name, save OpenAI's reasoning models, which want max_completion_tokens."""
    stream_options: bool = True
    """Whether usage may be asked for; without, tokens are counted by pieces of text."""
    n: bool = True
    """Whether one request may have several choices, whose prompt is then paid for once."""
    reasoning: bool = True
    """Whether messages may say what the assistant thought before them."""

    def learn(self, error: InvalidArgument, body: Mapping[str, Any]) -> bool:
        """Whether a refusal was about one of these, and the request may be sent again in another way.

        What counts is what this request had: others may have been refused meanwhile for the same.
        """
        said = f"{error.field} {error.description}"
        messages = body.get("messages")
        if messages is not None and "max_tokens" in body and "max_completion_tokens" in said:
            self.limit_name = "max_completion_tokens"
        elif "stream_options" in body and "stream_options" in said:
            self.stream_options = False
        elif body.get("n", 1) > 1 and error.field == "output.n":
            self.n = False
        elif _THOUGHTS.search(said) and any("reasoning_content" in message for message in messages or ()):
            self.reasoning = False
        else:
            return False
        logger.info("the upstream server wants requests otherwise: %s", self)
        return True


def _api_key(options: Mapping[str, str]) -> str | None:
    """The key, from the environment alone: command lines can be read by others. Raises ConfigError."""
    name = options.get("api_key_env")
    if name is not None and name not in os.environ:
        raise ConfigError(f"--backend-option api_key_env: the environment has no variable {name}")
    return os.environ.get(name or DEFAULT_KEY_VARIABLE)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 86400:
        raise ConfigError(f"--backend-option timeout_s must be a number of seconds above 0, got {text}")
    return value
