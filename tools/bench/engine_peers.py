"""The peers of the engine benchmark: other servers of the same model, each started in its own environment.

An environment is made the first time it is asked for, under .venvs/NAME. Every peer answers one chat
prompt as a stream and says how many tokens came and when the first did.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tools.bench.processes import end

ENVIRONMENTS = Path(".venvs")
START_TIMEOUT_S = 300
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""The model's chat template, for a peer whose worker takes text."""
TORCH = "2.13.0"

Stream = Callable[[str, int], tuple[int, float]]
"""(prompt, tokens) -> (tokens that came, seconds to the first)."""


@contextmanager
def transformers_serve(model: Path) -> Iterator[Stream]:
    """`transformers serve --continuous-batching`."""
    python = _environment("transformers-serve", [f"torch=={TORCH}", "transformers[serving]==5.23.0"])
    port = _free_port()
    command = [str(python.with_name("transformers")), "serve", str(model), "--continuous-batching"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with _server(command, port, "/health"):
        yield lambda prompt, count: _chat(port, str(model), prompt, count, {})


@contextmanager
def vllm(model: Path) -> Iterator[Stream]:
    """vLLM on the CPU, compiled."""
    python = ENVIRONMENTS / "vllm/bin/python"
    if not python.exists():
        subprocess.run(["bash", "tools/envs/vllm.sh", str(ENVIRONMENTS / "vllm")], check=True)
    port = _free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"]
    with _server(command, port, "/health", {"VLLM_CPU_KVCACHE_SPACE": "2"}):
        yield lambda prompt, count: _chat(port, str(model), prompt, count, {"ignore_eos": True})


@contextmanager
def fastchat(model: Path) -> Iterator[Stream]:
    """FastChat's model worker, asked directly as its API server does."""
    wanted = [
        f"torch=={TORCH}",
        "fschat==0.2.36",
        "transformers<5",
        "accelerate",
        "sentencepiece",
        "protobuf",
        "fastapi",
    ]
    python = _environment("fastchat", [*wanted, "uvicorn", "psutil", "pydantic<3"])
    port = _free_port()
    command = [str(python), "-m", "fastchat.serve.model_worker", "--model-path", str(model), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-register", "--limit-worker-concurrency", "64"]
    logs = {"LOGDIR": tempfile.gettempdir()}  # by default it leaves log files where it runs
    with _server(command, port, "/worker_get_status", logs, method="POST"):
        yield lambda prompt, count: _fastchat_stream(port, prompt, count)


PEERS = {"transformers-serve": transformers_serve, "vllm": vllm, "fastchat": fastchat}
MOST_STREAMS = {"fastchat": 8}
"""Where a peer takes many minutes for more; it runs one thread per request, each a batch of one."""


def ask_all(stream: Stream, prompts: list[str], count: int) -> dict[str, float]:
    """Send all prompts at once: tokens per second in all, and the median time to the first token."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: stream(prompt, count), prompts))
    seconds = time.perf_counter() - began
    firsts = sorted(first for _, first in answers)
    return {"tokens_per_s": sum(tokens for tokens, _ in answers) / seconds, "ttft_s": firsts[len(firsts) // 2]}


def _chat(port: int, model: str, prompt: str, count: int, extra: dict[str, object]) -> tuple[int, float]:
    """One streamed chat completion of an OpenAI-compatible server; chunks are counted where it sends no usage."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": count,
        "temperature": 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }
    began, first, tokens = time.perf_counter(), 0.0, 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}")
    for line in response:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
                break
            choices = chunk.get("choices") or [{}]
            if (choices[0].get("delta") or {}).get("content"):
                tokens += 1
                first = first or time.perf_counter() - began
    connection.close()
    return tokens, first


def _fastchat_stream(port: int, prompt: str, count: int) -> tuple[int, float]:
    body = {
        "prompt": CHAT.format(prompt),
        "temperature": 0.7,
        "max_new_tokens": count,
        "stop_token_ids": [],
        "echo": False,
    }
    began, first, tokens = time.perf_counter(), 0.0, 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/worker_generate_stream", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    buffer = b""
    while chunk := response.read1(65536):
        first = first or time.perf_counter() - began
        buffer += chunk
        *whole, buffer = buffer.split(b"\0")
        for part in whole:
            tokens = json.loads(part).get("usage", {}).get("completion_tokens", tokens)
    connection.close()
    return tokens, first


@contextmanager
def _server(
    command: list[str], port: int, path: str, environment: dict[str, str] | None = None, method: str = "GET"
) -> Iterator[None]:
    log = Path(ENVIRONMENTS / "peer.log").open("w")  # noqa: SIM115
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment = {**os.environ, **offline, **(environment or {})}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        _wait(process, port, path, method)
        yield
    finally:
        end(process, 20)
        log.close()


def _wait(process: subprocess.Popen[bytes], port: int, path: str, method: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the peer ended with status {process.returncode}; see {ENVIRONMENTS}/peer.log")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request(method, path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the peer did not answer within {START_TIMEOUT_S} s; see {ENVIRONMENTS}/peer.log")


def _environment(name: str, packages: list[str]) -> Path:
    """The python of an environment with these packages, made where it is missing."""
    python = ENVIRONMENTS / name / "bin/python"
    done = ENVIRONMENTS / name / ".bench"
    if not done.exists():
        print(f"installing {name} (once)", flush=True)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENTS / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        done.touch()
    return python.absolute()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
