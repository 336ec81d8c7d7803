"""Clients of the OpenAI API that live in environments of their own, unchanged, against the bridge.

    tools/envs/clients.sh .venvs/clients     LiteLLM
    tools/envs/vllm.sh .venvs/vllm           vLLM, whose benchmark client is used here

Without such an environment its test is skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.e2e.gateway_site import KEY, KEYS, running_site

pytestmark = pytest.mark.slow

VENVS = Path(__file__).resolve().parents[2] / ".venvs"
LITELLM = VENVS / "clients" / "bin" / "python"
VLLM = VENVS / "vllm" / "bin" / "vllm"
TOKENIZER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastchat_grpc" / "models"

SCRIPT = """
import asyncio, json, sys
import litellm
url, key = sys.argv[1:]
base = {"model": "openai/echo", "api_base": url, "api_key": key}
user = [{"role": "user", "content": "hello"}]
tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
call = [{"role": "user", "content": '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'}]
found = {}
found["whole"] = litellm.completion(messages=user, **base).choices[0].message.content
chunks = litellm.completion(messages=user, stream=True, stream_options={"include_usage": True}, **base)
found["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
found["tool"] = litellm.completion(messages=call, tools=[tool], **base).choices[0].message.tool_calls[0].function.name
async def later():
    return (await litellm.acompletion(messages=user, **base)).usage.completion_tokens
found["async"] = asyncio.run(later())
found["vectors"] = len(litellm.embedding(input=["a", "b"], encoding_format="float", **base).data)
try:
    litellm.completion(messages=user, **{**base, "model": "openai/nope"})
except litellm.NotFoundError:
    found["missing"] = True
try:
    litellm.completion(messages=user, **{**base, "api_key": "sk-wrong"})
except litellm.AuthenticationError:
    found["stranger"] = True
print("FOUND " + json.dumps(found))
"""


@pytest.mark.skipif(not LITELLM.exists(), reason="no environment .venvs/clients (tools/envs/clients.sh)")
async def test_litellm_chats_streams_calls_and_embeds() -> None:
    async with running_site(controller={"api_keys": KEYS}, key=KEY) as site:
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
        process = await asyncio.create_subprocess_exec(
            *(str(LITELLM), "-c", SCRIPT, f"{site.url}/v1", KEY),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 110)
        lines = [line for line in out.decode().splitlines() if line.startswith("FOUND ")]
        assert lines, out.decode()[-2000:]
        assert json.loads(lines[0].removeprefix("FOUND ")) == {
            "whole": "hello",
            "stream": "hello",
            "tool": "weather",
            "async": 6,
            "vectors": 2,
            "missing": True,
            "stranger": True,
        }


def _tokenizer() -> Path | None:
    found = sorted(TOKENIZER.glob("smollm2-135m-instruct*/tokenizer.json"))
    return found[-1].parent if found else None


@pytest.mark.timeout(300)
@pytest.mark.skipif(not VLLM.exists(), reason="no environment .venvs/vllm (tools/envs/vllm.sh)")
@pytest.mark.skipif(_tokenizer() is None, reason="the embedded model is not in the cache")
@pytest.mark.parametrize(("backend", "path"), [("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")])
async def test_vllms_benchmark_client_finishes_every_request(backend: str, path: str, tmp_path: Path) -> None:
    async with running_site() as site:
        arguments = ["bench", "serve", "--backend", backend, "--base-url", site.url, "--endpoint", path]
        arguments += ["--model", "echo", "--tokenizer", str(_tokenizer()), "--dataset-name", "random"]
        arguments += ["--random-input-len", "32", "--random-output-len", "16", "--num-prompts", "8", "--ignore-eos"]
        arguments += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
        process = await asyncio.create_subprocess_exec(
            str(VLLM),
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu"},
        )
        out, _ = await asyncio.wait_for(process.communicate(), 280)
        assert (tmp_path / "result.json").exists(), out.decode()[-2000:]
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["completed"] == 8
        assert result["total_output_tokens"] > 0
