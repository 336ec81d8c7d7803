"""The README's examples, run as written but for the ports."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.config import BackendConfig, ListenConfig, ModelConfig, WorkerConfig
from tests.conftest import StartWorker, eventually, running_worker
from tests.e2e.gateway_site import running_site
from tests.integration.controllers import running_controller

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def block(name: str) -> str:
    """The code block after `<!-- run: name -->`."""
    found = re.search(rf"<!-- run: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no example {name}"
    return found[1]


async def shell(command: str) -> str:
    process = await asyncio.create_subprocess_shell(
        command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0, f"{command}\n{out.decode()}"
    return out.decode()


async def test_the_grpcurl_lines_run(start_worker: StartWorker) -> None:
    async with running_controller() as controller:
        app = await start_worker("smollm2-135m-instruct", controllers=(controller.address,))
        await eventually(lambda: app.registered)
        lines = block("grpcurl").replace("127.0.0.1:21001", controller.address).strip().splitlines()
        grpcurl = str(Path(sys.executable).with_name("grpcurl"))
        outputs = [await shell(line.replace("grpcurl", grpcurl, 1)) for line in lines]
    assert "fastchat_grpc.v1.ControllerService" in outputs[0]
    assert '"completion"' in outputs[2]
    assert '"text": "H"' in outputs[3]
    assert app.worker_id in outputs[4]


@pytest.mark.slow
async def test_the_curl_lines_and_the_sdk_example_run_through_the_gateway(tmp_path: Path) -> None:
    async with running_site(workers=[{"model": "smollm2-135m-instruct"}]) as site:
        lines = block("curl").replace("http://127.0.0.1:8000", site.url).strip().splitlines()
        outputs = [await shell(line.replace("curl ", "curl -sS ", 1)) for line in lines]
        script = tmp_path / "sdk.py"
        script.write_text(block("sdk").replace("http://127.0.0.1:8000", site.url))
        said = await shell(f"{sys.executable} {script}")
    assert json.loads(outputs[0])["data"][0]["id"] == "smollm2-135m-instruct"
    assert outputs[1].count("data: ") >= 4
    assert outputs[1].endswith("data: [DONE]\n\n")
    assert json.loads(outputs[2])["workers"][0]["models"][0]["name"] == "smollm2-135m-instruct"
    assert said == "Hello"


async def test_the_python_example_runs(start_worker: StartWorker, tmp_path: Path) -> None:
    async with running_controller() as controller:
        app = await start_worker("m", controllers=(controller.address,))
        await eventually(lambda: app.registered)
        script = tmp_path / "example.py"
        script.write_text(block("python").replace("127.0.0.1:21001", controller.address))
        assert await shell(f"{sys.executable} {script}") == "Hello\nThe capi\n"


async def test_the_backend_example_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("backend")
    assert len([line for line in code[code.index("class ") :].splitlines() if line.strip()]) < 40
    (tmp_path / "alphabet.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = WorkerConfig(
        backend=BackendConfig(name="alphabet:Alphabet", model=ModelConfig(path="abc")),
        listen=ListenConfig(),
        controller_addresses=(),
        drain_timeout_s=0,
    )
    async with running_worker(config) as app, AsyncClient(app.address) as client:
        result = await client.complete("x", max_new_tokens=30, stop=["z"], n=2)
        assert [choice.text for choice in result.choices] == ["abcdefghijklmnopqrstuvwxy"] * 2
        assert await client.count_tokens("four") == 4
