"""The synchronous client beside the asynchronous one."""

from __future__ import annotations

import inspect
import threading

import pytest

from fastchat_grpc.client import AsyncClient, Client
from fastchat_grpc.errors import ConfigError


def surface(cls: type) -> dict[str, list[tuple[str, object, object]]]:
    """Public methods and the constructor: names, kinds and defaults of their parameters."""
    return {
        name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    assert surface(Client) == surface(AsyncClient)


def test_a_client_that_cannot_be_made_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        with pytest.raises(ConfigError):
            Client("no-port")
    assert set(threading.enumerate()) <= before
