"""What the picker reads of large bodies, against a whole parse of them."""

from __future__ import annotations

import asyncio
import json
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat_grpc.controller.envoy import requests
from fastchat_grpc.errors import InvalidArgument

SCALARS = st.none() | st.booleans() | st.integers() | st.text()


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [{"role": "user", "content": "x" * 200_000}], "model": "m", "stream": True},
        {"messages": [{"role": "user", "content": '\\"]}' * 30_000}], "model": "m", "stream": True},
        {"model": "other", "prompt": list(range(100_000)), "stream": True, "x": {"model": "no", "stream": False}},
        {"prompt": "\\" * 100_000, "model": '\u00e9"\\', "stream": True, "n": 1.5e3, "echo": None},
    ],
)
async def test_the_members_of_a_large_body_are_those_that_a_parser_finds(values: dict[str, Any]) -> None:
    for body in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False)):
        found = await requests.find_members(body.encode())
        assert found["model"] == values["model"]
        assert found["stream"] is True


async def test_a_name_that_is_written_with_escapes_is_the_same_name() -> None:
    """Were it not, its worker would be sent a request for another model, and be taken for another server."""
    for name in ("model", "stream", "prompt_cache_key", "structured_outputs", "guided_json"):
        written = "".join(f"\\u{ord(c):04x}" for c in name)
        body = f'{{"{name}": "first", "x": "{"y" * 100_000}", "{written}": "second", "\\ud800": 1, "{"z" * 300}": 2}}'
        assert json.loads(body)[name] == "second"
        assert await requests.find_members(body.encode()) == {name: "second"}


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_what_is_passed_over_ends_where_a_parser_says_it_ends(value: Any) -> None:
    body = json.dumps({"a": value, "model": "m", "b": value}).encode()
    assert asyncio.run(requests.find_members(body)) == {"model": "m"}


@pytest.mark.parametrize("body", [b"[]", b'{"a":', b'{"a" 1}', b'{"a": [}', b'{"a": "', b"{,}", b'{"model": "m"', b""])
async def test_a_large_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidArgument):
        await requests.find_members(body.ljust(70_000))


async def test_megabytes_of_brackets_hold_nobody_up_and_are_refused_soon() -> None:
    longest, stop = 0.0, False

    async def watch() -> None:
        nonlocal longest
        while not stop:
            began = monotonic()
            await asyncio.sleep(0)
            longest = max(longest, monotonic() - began)

    watching = asyncio.create_task(watch())
    with pytest.raises(InvalidArgument, match="at most"):
        await requests.find_members(b'{"model": "m", "prompt": [' + b"[]," * 2_700_000 + b"[]]}")
    stop = True
    await watching
    assert longest < 0.2
