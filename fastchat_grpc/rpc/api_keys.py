"""API keys: who may ask for generations. One check for HTTP and gRPC alike, made by the controller.

Keys are kept as SHA-256 digests; in memory they are hashed once more under a secret of this process, so
that the time of a look-up tells nothing about them. Keys are random and long, so one fast hash is enough.
Logs and metrics have the name of a key, never the key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from fastchat_grpc.config import ApiKeyConfig
from fastchat_grpc.errors import ConfigError, Unauthenticated

logger = logging.getLogger(__name__)

PREFIX = "sk-"
RELOAD_S = 1.0
"""A changed key file is noticed within this time."""
HEADERS = ("authorization", "x-api-key", "api-key")
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.@-]{1,64})\s+sha256:(?P<digest>[0-9a-fA-F]{64})(?:\s+(?P<role>user|admin))?")


def new_key() -> str:
    """A new random key."""
    return PREFIX + secrets.token_urlsafe(32)


def key_line(name: str, key: str, *, admin: bool = False) -> str:
    """The line of a key file that admits a key. Raises ConfigError for a name that cannot stand there."""
    line = f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}" + (" admin" if admin else "")
    if _LINE.fullmatch(line) is None:
        raise ConfigError(f"a key's name must be 1 to 64 letters, digits and _.@-, got {name!r}")
    return line


class ApiKeys:
    """The keys that are admitted. Without any, everybody is."""

    def __init__(self, config: ApiKeyConfig) -> None:
        self._secret = secrets.token_bytes(32)
        self._file = config.file
        self._given = {self._index(hashlib.sha256(key.encode()).digest()): name for name, key in config.keys}
        self._names: dict[bytes, str] = dict(self._given)
        self._given_admins = config.admins
        self._admins = config.admins
        self._stamp: tuple[int, int] | None = None
        self._look_at = 0.0
        self.uses: Counter[str] = Counter()
        """Accepted requests by the name of the key."""
        self._required = bool(config.keys) or config.file is not None
        if self._file is not None:
            self._load(self._file)

    @property
    def required(self) -> bool:
        """Whether a key is asked for."""
        return self._required

    def check(self, headers: Iterable[tuple[str, Any]]) -> str:
        """Name of the caller's key; empty where none is asked for. Raises Unauthenticated."""
        if not self._required:
            return ""
        self._reload()
        key = _shown(headers)
        if not key:
            raise Unauthenticated("an API key is required: send authorization: Bearer <key>, or x-api-key: <key>")
        name = self._names.get(self._index(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()))
        if name is None:
            raise Unauthenticated("the API key is wrong or has been withdrawn")
        self.uses[name] += 1
        return name

    def is_admin(self, name: str) -> bool:
        """Whether the caller with this name may see and move workers."""
        return name in self._admins

    def _index(self, digest: bytes) -> bytes:
        # Whoever tries keys cannot know these, so comparing them in variable time gives nothing away.
        return hmac.digest(self._secret, digest, "sha256")

    def _reload(self) -> None:
        if self._file is None or monotonic() < self._look_at:
            return
        try:
            self._load(self._file)
        except ConfigError as error:  # keep the keys that were good
            logger.error("API keys not reloaded: %s", error)
            self._look_at = monotonic() + RELOAD_S

    def _load(self, path: Path) -> None:
        self._look_at = monotonic() + RELOAD_S
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"API key file {path} cannot be read: {error}") from error
        names = dict(self._given)
        admins = set(self._given_admins)
        users = set(self._given.values()) - admins
        for number, line in enumerate(text.splitlines(), 1):
            line = line.split("#", 1)[0].strip()
            if not line:
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise ConfigError(
                    f"API key file {path}, line {number}: must be NAME sha256:DIGEST [admin] (64 hex digits)"
                )
            names[self._index(bytes.fromhex(match["digest"]))] = match["name"]
            (admins if match["role"] == "admin" else users).add(match["name"])
        if both := admins & users:
            raise ConfigError(f"API key file {path}: {min(both)} is both an admin and a user; give each a name")
        self._names, self._admins, self._stamp = names, frozenset(admins), stamp


def _shown(headers: Iterable[tuple[str, Any]]) -> str:
    """The key that a request shows, by the first of HEADERS that it has."""
    found = {key: value for key, value in headers if key in HEADERS and isinstance(value, str)}
    if authorization := found.get("authorization", "").strip():
        scheme, _, token = authorization.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""
    return (found.get("x-api-key") or found.get("api-key") or "").strip()
