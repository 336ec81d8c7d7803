"""What the conformance suite runs on: one Target per backend.

A backend of an engine that is imported needs a model path and no more. One that talks to a server
(upstream, lightllm) gives `open`, which starts a stand-in and yields the options that lead to it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastchat_grpc.backends.capabilities import GRAMMARS, TRAITS, Feature
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.models.embedded import EMBEDDED_MODEL

CHOSEN_VARIABLE = "FASTCHAT_GRPC_TEST_BACKENDS"
"""Comma-separated names of backends, each with all of its targets; unset: of CI's targets those that are installed."""
CI_TARGETS = ("echo", "transformers", "openvino", "upstream")
VLLM_PYTHON = ".venvs/vllm/bin/python"
"""With an environment of vLLM, the upstream backend is tested against vLLM's own server too, where it is chosen."""
MODEL_VARIABLE = "FASTCHAT_GRPC_TEST_MODEL"
"""A Hugging Face folder to use instead of the embedded model."""
GGUF_VARIABLE = "FASTCHAT_GRPC_TEST_GGUF"
"""A GGUF file to use instead of the embedded model's."""


@asynccontextmanager
async def _nothing() -> AsyncIterator[dict[str, str]]:
    yield {}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A backend and a model to test it with."""

    name: str
    label: str = ""
    """Distinguishes targets of one backend; empty: its name."""
    model: Callable[[], str]
    """Path of the model; called only when the backend is tested."""
    options: Mapping[str, str] = field(default_factory=dict)
    exact: Mapping[str, object] = field(default_factory=dict)
    """Settings of the model with which it computes in float32, where it does not by itself."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Further settings of the model."""
    open: Callable[[], AbstractAsyncContextManager[dict[str, str]]] = _nothing
    """Starts what the backend talks to, and yields further options."""
    context_length: int = 512
    real: bool = True
    """A language model, with something to choose from; False for echoes and stand-ins."""
    batch_changes_text: bool = True
    """Whether a greedy text may differ, by rounding, with what else is in the batch."""
    available: Callable[[], bool] = lambda: True
    """Whether what it needs beside the backend is here."""
    fuzz_only: bool = False
    """Whether only the fuzz runs on it: the rest would be what another target of the same backend shows already."""
    max_running: int | None = None
    max_temperature: float = 100.0
    lacks: frozenset[Feature] = frozenset()
    """What this model, or what stands in for a server, cannot do though the backend can."""

    def config(self, options: Mapping[str, str], **model: object) -> BackendConfig:
        """The backend's configuration; `model` overrides fields of its ModelConfig."""
        fields = {
            "path": self.model(),
            "names": ("tested",),
            "context_length": self.context_length,
            "max_running": self.max_running,
            **self.settings,
            **model,
        }
        return BackendConfig(name=self.name, model=ModelConfig(**fields), options={**self.options, **options})  # type: ignore[arg-type]


@asynccontextmanager
async def _own_openai_api() -> AsyncIterator[dict[str, str]]:
    from tests.conformance.openai_server import KEY, openai_server

    os.environ["FASTCHAT_GRPC_TEST_UPSTREAM_KEY"] = KEY
    async with openai_server(context_length=512) as (_, url):
        yield {"url": url, "dialect": "vllm", "api_key_env": "FASTCHAT_GRPC_TEST_UPSTREAM_KEY", "embeddings": "on"}


@asynccontextmanager
async def _vllm_server() -> AsyncIterator[dict[str, str]]:
    """vLLM's own server, in its environment."""
    import httpx2

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", embedded_folder()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served", "--dtype", "float32"]
    command += ["--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", "400000000"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    silent = asyncio.subprocess.DEVNULL
    server = await asyncio.create_subprocess_exec(*command, stdout=silent, stderr=silent, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(300), httpx2.AsyncClient() as client:
            while True:
                assert server.returncode is None, "vLLM's server ended"
                with suppress(httpx2.TransportError):
                    if (await client.get(f"{url}/health")).status_code == 200:
                        break
                await asyncio.sleep(0.5)
        yield {"url": f"{url}/v1", "dialect": "vllm"}
    finally:
        if server.returncode is None:
            server.terminate()
        await server.wait()


def embedded_folder() -> str:
    """A Hugging Face folder of the embedded model."""
    if own := os.environ.get(MODEL_VARIABLE):
        return own
    from fastchat_grpc.models.embedded import embedded_model

    return str(embedded_model())


def embedded_gguf_file() -> str:
    """The embedded model as a GGUF file."""
    if own := os.environ.get(GGUF_VARIABLE):
        return own
    from fastchat_grpc.models.embedded import embedded_gguf

    return str(embedded_gguf())


# OpenVINO's default, bf16 where the processor has it, rounds so roughly that a crowd changes many texts.
EXACT = {"properties": '{"INFERENCE_PRECISION_HINT": "f32"}'}
TARGETS = {
    target.label or target.name: target
    for target in (
        Target(name="echo", model=lambda: "echo", options={"delay_ms": "1"}, real=False, batch_changes_text=False),
        Target(name="transformers", model=embedded_folder),
        Target(
            name="transformers",
            label="transformers-8bit",
            model=embedded_folder,
            settings={"load_8bit": True},
            fuzz_only=True,
        ),
        # From its GGUF file, without an export.
        Target(name="openvino", model=lambda: os.environ.get(GGUF_VARIABLE, EMBEDDED_MODEL), options=EXACT),
        Target(name="openvino", label="openvino-exported", model=embedded_folder, options=EXACT),
        Target(
            name="upstream",
            model=lambda: "served",
            open=_own_openai_api,
            real=False,
            batch_changes_text=False,
            lacks=frozenset(GRAMMARS.values()),
        ),
        Target(
            name="upstream",
            label="upstream-vllm",
            model=lambda: "served",
            open=_vllm_server,
            real=False,  # it gives no token ids, which those tests compare
            max_temperature=2.0,
            available=lambda: Path(VLLM_PYTHON).is_file(),
        ),
        Target(
            name="vllm",
            model=embedded_folder,
            # Compiling takes minutes; and vLLM would take what memory there is.
            options={"enforce_eager": "true", "kv_cache_memory_bytes": "400000000"},
            exact={"dtype": "float32"},
            max_temperature=2.0,
        ),
        # Threads that wait for each other spin, which takes minutes where other programs use the cores.
        Target(name="llama_cpp", model=embedded_gguf_file, options={"threads": "1"}),
        Target(name="mlx", model=embedded_folder),
    )
}


def chosen() -> list[Target]:
    """The targets of this run."""
    names = os.environ.get(CHOSEN_VARIABLE)
    if names:
        wanted = {name.strip() for name in names.split(",")}
        if unknown := wanted - {target.name for target in TARGETS.values()}:
            raise ValueError(f"{CHOSEN_VARIABLE}: no target for {', '.join(sorted(unknown))}")
        return [target for target in TARGETS.values() if target.name in wanted and target.available()]
    return [TARGETS[label] for label in CI_TARGETS if TRAITS[TARGETS[label].name].installed]
