"""Several models in one worker."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.backends import registry
from fastchat_grpc.backends.base import Backend
from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import BackendConfig, ListenConfig, ModelConfig, WorkerConfig
from fastchat_grpc.core import Delta, EmbedRequest, GenerateRequest, StopConditions, TextPrompt
from fastchat_grpc.errors import ConfigError, ModelNotFound
from tests.conftest import running_worker

TWO = """
[[models]]
backend = "echo"
path = "first"
context_length = 100

[[models]]
backend = "echo"
path = "second"
names = ["second", "also"]
context_length = 200
options = { delay_ms = "5" }
"""


def config(folder: Path, content: str = TWO, **model: Any) -> BackendConfig:
    file = folder / "models.toml"
    file.write_text(content)
    return BackendConfig(name="multi", model=ModelConfig(path=str(file), **model))


async def text(backend: Backend, model: str, prompt: str = "hello") -> str:
    request = GenerateRequest(prompt=TextPrompt(prompt), model=model)
    async with aclosing(backend.generate(request)) as events:
        return "".join([event.text async for event in events if isinstance(event, Delta)])


async def test_each_model_is_served_under_its_names_with_its_own_settings(tmp_path: Path) -> None:
    backend = registry.create(config(tmp_path))
    infos = {info.name: info.context_length for info in await backend.start()}
    assert infos == {"first": 100, "second": 200, "also": 200}
    assert await asyncio.gather(text(backend, "first"), text(backend, "also", "x")) == ["hello", "x"]
    assert await backend.tokenize("second", TextPrompt("ab")) == [97, 98]
    assert await backend.detokenize("first", [97]) == "a"
    assert backend.chat_template("also")
    assert (await backend.embed(EmbedRequest(inputs=("a",), model="first"))).prompt_tokens == 1
    with pytest.raises(ModelNotFound):
        await text(backend, "third")
    await backend.close()
    await backend.close()


async def test_all_models_share_one_budget(tmp_path: Path) -> None:
    worker = WorkerConfig(backend=config(tmp_path, max_running=2), listen=ListenConfig(port=0), controller_addresses=())
    async with running_worker(worker) as app, AsyncClient(app.address) as client:
        long = StopConditions(max_new_tokens=90, ignore_eos=True)
        requests = [
            GenerateRequest(prompt=TextPrompt("abc"), model=model, stopping=long)
            for model in ("first", "second", "also", "second")
        ]
        running = [asyncio.create_task(_drain(client, request)) for request in requests]
        async with asyncio.timeout(10):
            while True:
                load = app._monitor.load()
                assert load.running <= 2
                if (load.running, load.waiting) == (2, 2):
                    break
                await asyncio.sleep(0.001)
        await asyncio.gather(*running)


async def _drain(client: AsyncClient, request: GenerateRequest) -> None:
    async for _ in client.stream(request):
        pass


async def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    backend = registry.create(config(tmp_path, TWO.replace('"also"', '"first"')))
    with pytest.raises(ConfigError, match="two models are named first"):
        await backend.start()
    await backend.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold"),
        ("[[models]]\nbackend = 'echo'", "needs a path"),
        ("[[models]]\npath = 'a'\ncolour = 'red'", "no field 'colour'"),
        ("[[models]]\npath = 'a'\nnames = 'a'", "a list of strings"),
        ("[[models]]\npath = 'a'\nnum_gpus = true", "a whole number"),
        ("[[models]]\npath = 'a'\nbackend = 'multi'", "cannot hold another"),
        ("[[models]]\npath = 'a'\nbackend = 'none'", "--backend must be one of"),
        ("[[models]]\npath = 'a'\ncontext_length = 1", "--context-length"),
        ("not toml", "not a TOML file"),
        ("[[models]]\npath = 'a'\n[other]", "nothing else"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_place(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as failed:
        registry.create(config(tmp_path, content))
    assert "\n" not in str(failed.value)


def test_a_missing_file_is_said() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        registry.create(BackendConfig(name="multi", model=ModelConfig(path="/no/such.toml")))
