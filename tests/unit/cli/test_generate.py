"""`fastchat-grpc generate`: what it asks for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Self

import pytest
from click.testing import CliRunner

from fastchat_grpc.cli import calls
from fastchat_grpc.core import Event


class FakeClient:
    """Remembers what it was asked, and says nothing."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def generate(self, prompt: object, **options: Any) -> AsyncIterator[Event]:
        self.options = options
        return
        yield


@pytest.mark.parametrize(
    ("flags", "sampling"),
    [((), {}), (("--temperature", "0", "--top-k", "5"), {"temperature": 0.0, "top_k": 5})],
    ids=["nothing", "some"],
)
def test_what_no_flag_says_is_left_to_the_model(
    flags: tuple[str, ...], sampling: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient()

    def connect(given: dict[str, Any]) -> FakeClient:
        for name in ("address", "api_key", "api_key_file", "tls", "tls_ca", "tls_cert", "tls_key", "tls_server_name"):
            del given[name]
        return client

    monkeypatch.setattr(calls, "connect", connect)
    result = CliRunner().invoke(calls.generate, ["hi", *flags])
    assert result.exit_code == 0, result.output
    asked = {name: value for name, value in client.options.items() if name not in ("model", "max_new_tokens", "stop")}
    assert asked == sampling
