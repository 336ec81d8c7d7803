"""Envoy's admin interface, over a Unix socket that only this user can reach."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

TIMEOUT_S = 2.0


class AdminError(Exception):
    """Envoy does not answer, or answers with an error."""


class Admin:
    """Talks to one Envoy."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def ready(self) -> bool:
        """Whether Envoy serves."""
        try:
            return await self._ask("GET", "/ready") == "LIVE\n"
        except AdminError:
            return False

    async def ports(self) -> dict[str, int]:
        """Ports of the listeners, by their names."""
        answer: Any = json.loads(await self._ask("GET", "/listeners?format=json"))
        return {
            status["name"]: status["local_address"]["socket_address"]["port_value"]
            for status in answer.get("listener_statuses", [])
        }

    async def active_requests(self) -> int:
        """Requests of callers that are under way."""
        answer: Any = json.loads(
            await self._ask("GET", "/stats?format=json&filter=^http.ingress.downstream_rq_active$")
        )
        return sum(stat.get("value", 0) for stat in answer.get("stats", []) if stat.get("name"))

    async def drain(self) -> None:
        """Take no new connections, and ask those that are open to end."""
        await self._ask("POST", "/healthcheck/fail")
        await self._ask("POST", "/drain_listeners?graceful&skip_exit")

    async def _ask(self, method: str, path: str) -> str:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(self.path)
                try:
                    head = f"{method} {path} HTTP/1.1\r\nhost: envoy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    writer.write(head.encode("ascii"))
                    answer = await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            raise AdminError(f"Envoy's admin interface does not answer: {error}") from error
        head_bytes, _, body = answer.partition(b"\r\n\r\n")
        lines = head_bytes.decode("latin-1").split("\r\n")
        if " 200 " not in f"{lines[0]} ":
            raise AdminError(f"Envoy's admin interface answers {lines[0]}")
        if any(line.lower().replace(" ", "") == "transfer-encoding:chunked" for line in lines):
            body = _dechunk(body)
        return body.decode()


def _dechunk(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.split(b";")[0] or b"0", 16)
        if not length:
            break
        whole, body = whole + body[:length], body[length + 2 :]
    return whole
