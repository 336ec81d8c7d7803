"""Whatever callers send: an answer in the 400s that says what is wrong, and never a 500. Nothing reaches the engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e.gateway_site import Site, running_site

pytestmark = pytest.mark.slow

BASE = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
DEEP = b'{"model": "echo", "messages": ' + b"[" * 2000 + b"]" * 2000 + b"}"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
UNCOMPILABLE = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
BAD: list[tuple[str, bytes | dict[str, Any], str]] = [
    ("invalid JSON", b'{"model": ', "body"),
    ("nothing", b"", "body"),
    ("a list", b"[]", "body"),
    ("invalid UTF-8", b'{"model": "\xff\xfe"}', "body"),
    ("half a surrogate", b'{"model": "\\ud800"}', "body"),
    ("not a number", b'{"temperature": NaN}', "body"),
    ("deep nesting", DEEP, "body"),
    ("a wrong type", {"temperature": "hot"}, "temperature"),
    ("no messages", {"messages": []}, "messages"),
    ("an image for a text model", {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    ("n too large", {"n": 1000}, "n"),
    ("a field of other servers", {"max_new_tokens": 5}, "max_new_tokens"),
    ("an unsupported field", {"functions": [{}]}, "functions"),
    ("a grammar that the model cannot follow", {"response_format": UNCOMPILABLE}, "response_format.json_schema.schema"),
    ("too many tokens of prompt", {"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
    ("a token that is none", {"stop_token_ids": [99999]}, "stop_token_ids"),
    ("a bias of a token that is none", {"logit_bias": {"99999": 1}}, "logit_bias"),
    ("two tools of one name", {"tools": [TOOL] * 2}, "tools[1].function.name"),
]


@pytest.mark.parametrize("mode", ["direct", "relay"])
async def test_bad_requests_name_the_field_and_reach_no_engine(mode: str) -> None:
    async with running_site(mode) as site:
        for what, request, field in BAD:
            body = request if isinstance(request, bytes) else json.dumps({**BASE, **request}).encode()
            reply = await site.http.post(
                "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            assert reply.status_code == 400, (what, reply.text)
            error = reply.json()["error"]
            assert error["type"] == "invalid_request_error", what
            assert (error["param"] or "").startswith(field), (what, error)
            assert len(error["message"]) < 400, what
        assert sum(worker._generation.output_tokens for worker in site.workers) == 0
        assert (await site.chat()).status_code == 200
        for stream in (False, True):
            reply = await site.chat(session_id="x", stream=stream)
            assert (reply.status_code, reply.headers["x-fastchat-grpc-ignored"]) == (200, "session_id")


# ---------------------------------------------------------------------------------------- fuzz

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = """
    model messages prompt input tokens prompts max_tokens max_completion_tokens temperature top_p top_k min_p n stop
    seed logprobs top_logprobs stream stream_options response_format tools tool_choice user metadata echo logit_bias
    presence_penalty frequency_penalty repetition_penalty stop_token_ids ignore_eos min_tokens encoding_format
    dimensions truncate_prompt_tokens priority request_id structured_outputs guided_json guided_regex guided_choice
    chat_template_kwargs continue_final_message add_generation_prompt skip_special_tokens prompt_cache_key suffix
    best_of reasoning_effort parallel_tool_calls
"""
FIELDS = st.sampled_from(NAMES.split())
NUMBERS = [0, 1, 2, -1, 0.5, 1e300, 2**31, 2**63, 2**70]
TEXTS = ["", "x", "echo", "auto", "required", "\x00", "\u2028", "😀"]
OBJECTS = [{}, {"type": "text"}, {"type": "json_object"}, {"include_usage": True}, {"5": 1.0}]
LISTS: list[Any] = [[], [1], ["a", "b"], [[1, 2]]]
LIKELY = st.sampled_from([*NUMBERS, *TEXTS, *OBJECTS, *LISTS, True, False, None])
PATHS = {
    "/v1/chat/completions": BASE,
    "/v1/completions": {"model": "echo", "prompt": "hi", "max_tokens": 3},
    "/v1/embeddings": {"model": "echo", "input": "hi"},
    "/tokenize": {"model": "echo", "prompt": "hi"},
    "/detokenize": {"model": "echo", "tokens": [97]},
    "/api/v1/token_check": {"prompts": [{"model": "echo", "prompt": "hi", "max_tokens": 3}]},
    "/v1/generate": {"model": "echo", "prompt": "hi", "stopping": {"max_new_tokens": 3}},
}


def check(reply: httpx2.Response, sent: object) -> None:
    """An answer, or an error in OpenAI's shape that is the caller's fault."""
    assert reply.status_code == 200 or 400 <= reply.status_code < 500, (reply.status_code, reply.text, sent)
    if reply.status_code != 200:
        error = reply.json()["error"]
        assert error["message"], sent
        assert set(error) == {"message", "type", "param", "code"}, sent


@pytest.mark.timeout(300)
async def test_no_json_makes_a_500() -> None:
    async with running_site() as site:
        await asyncio.to_thread(_fuzz_json, site)


def _fuzz_json(site: Site) -> None:
    with httpx2.Client(base_url=site.url, timeout=20, trust_env=False) as http:

        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(st.sampled_from(sorted(PATHS)), st.dictionaries(FIELDS | st.text(max_size=6), LIKELY | JSON, max_size=4))
        def fuzz(path: str, changes: dict[str, Any]) -> None:
            body = {**PATHS[path], **changes}
            check(http.post(path, json=body), (path, changes))

        fuzz()


@pytest.mark.timeout(300)
async def test_no_bytes_make_a_500() -> None:
    async with running_site() as site:
        await asyncio.to_thread(_fuzz_bytes, site)


def _fuzz_bytes(site: Site) -> None:
    valid = json.dumps(BASE).encode()
    with httpx2.Client(base_url=site.url, timeout=20, trust_env=False) as http:

        @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(
            st.sampled_from(sorted(PATHS)),
            st.binary(max_size=60) | st.integers(0, len(valid)).map(lambda n: valid[:n]),
            st.sampled_from(
                ["application/json", "text/plain", "application/x-www-form-urlencoded", "application/grpc"]
            ),
        )
        def fuzz(path: str, body: bytes, kind: str) -> None:
            reply = http.post(path, content=body, headers={"content-type": kind})
            if kind != "application/grpc":  # answered as gRPC: status 200, and the error in the trailers
                check(reply, (path, body, kind))
            assert reply.status_code < 500

        fuzz()
