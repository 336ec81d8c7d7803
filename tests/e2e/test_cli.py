"""The command line as a person uses it: real processes, echo backend."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from fastchat_grpc.client import AsyncClient
from fastchat_grpc.core import Delta
from fastchat_grpc.worker.app import WorkerApp
from tests.e2e.processes import free_port, run_cli, running_cli, wait_for_answer, wait_for_workers

ECHO = ("--backend", "echo", "--model-path", "echo")


QUIET = ("--log-level", "warning")


def one_line(stderr: str) -> str:
    """The only line of an error; fails if there are more, or a traceback."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("worker", "--no-such-flag"), "No such option '--no-such-flag'. (see fastchat-grpc worker --help)"),
        (("worker", "--port", "99999"), "--port must be from 0 to 65535, got 99999"),
        (("worker", *ECHO, "--stream-interval", "0"), "--stream-interval must be at least 1, got 0"),
        (("worker", *ECHO, "--limit-worker-concurrency", "0"), "--limit-worker-concurrency must be at least 1, got 0"),
        (("worker", *ECHO, "--device", "tpu"), "--device must be one of"),
        (("worker", *ECHO, "--controller-address", "nowhere"), "address must look like host:port, got 'nowhere'"),
        (("worker", *ECHO, "--host", "0.0.0.0", "--controller-address", "ctl:1"), "set --worker-address host:port"),
        (
            ("worker", *ECHO, "--backend-option", "speed=9", "--no-register"),
            "has no option 'speed'; its options: delay_ms",
        ),
        (("worker", "--backend", "nope", "--no-register"), "--backend must be one of"),
        (("worker", "--gpus", "a,b"), "'a,b' is not a comma-separated list of numbers"),
        (("controller", "--dispatch-method", "random"), "'random' is not one of"),
        (("nonsense",), "No such command 'nonsense'."),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
async def test_a_wrong_flag_is_one_line_that_says_what_to_do(arguments: tuple[str, ...], said: str) -> None:
    status, out, err = await run_cli(*arguments)
    assert status == 2
    assert out == ""
    assert said in one_line(err)


async def test_a_missing_model_folder_is_one_line(tmp_path: Path) -> None:
    status, _, err = await run_cli(
        "worker", *QUIET, "--no-register", "--port", "0", "--model-path", str(tmp_path / "nope")
    )
    assert status == 2
    assert str(tmp_path / "nope") in one_line(err)


async def test_a_broken_model_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    status, _, err = await run_cli("worker", *QUIET, "--no-register", "--port", "0", "--model-path", str(tmp_path))
    assert status == 2
    assert str(tmp_path) in one_line(err)


async def test_a_port_in_use_is_one_line(worker: WorkerApp) -> None:
    port = worker.address.rpartition(":")[2]
    status, _, err = await run_cli("worker", *ECHO, "--no-register", "--port", port)
    assert status == 2
    assert f"cannot listen on 127.0.0.1:{port}" in one_line(err)
    status, _, err = await run_cli("controller", "--port", port)
    assert status == 2
    assert f"cannot listen on 127.0.0.1:{port}" in one_line(err)
    free = {"--controller-port": str(free_port()), "--port": "0", "--gateway-port": "0"}
    for flag in free:
        ports = [text for pair in {**free, flag: port}.items() for text in pair]
        status, _, err = await run_cli("serve", *ECHO, "--gateway", *ports)
        assert status == 2
        assert f"cannot listen on 127.0.0.1:{port}: " in one_line(err)
        assert err.strip().endswith(f"choose another {flag}")


async def test_generate_streams_to_the_terminal(worker: WorkerApp) -> None:
    status, out, err = await run_cli("generate", "Hello there", "--address", worker.address, "--stats")
    assert (status, out) == (0, "Hello there\n")
    assert "tokens/s, time to first token" in err
    at = ("--controller-address", worker.address)
    status, out, _ = await run_cli("generate", "-", "--plain", *at, stdin="from a pipe")
    assert (status, out) == (0, "from a pipe\n")


async def test_generate_says_errors_in_one_line(worker: WorkerApp) -> None:
    status, _, err = await run_cli("generate", "x", "--address", worker.address, "--model", "nope")
    assert status == 1
    assert "model 'nope' is not served here; served: echo" in one_line(err)
    status, _, err = await run_cli("generate", "x", "--address", worker.address, "--temperature", "-1")
    assert status == 1
    assert "sampling.temperature: must be from 0 to 100, got -1" in one_line(err)
    status, _, err = await run_cli("generate", "x", "--address", f"127.0.0.1:{free_port()}")
    assert status == 1
    assert "start a controller with workers by fastchat-grpc serve" in one_line(err)


async def test_backends_are_listed_with_what_they_refuse() -> None:
    status, out, err = await run_cli("backends")
    assert status == 0, err
    assert "echo" in out
    assert "transformers" in out
    assert "LoRA" in out


async def test_a_new_key_opens_a_controller_that_asks_for_keys(tmp_path: Path) -> None:
    status, key, line = await run_cli("new-key", "alice")
    assert status == 0
    file = tmp_path / "keys"
    file.write_text(line)
    assert key.strip() not in line
    port = free_port()
    address = f"127.0.0.1:{port}"
    async with running_cli("controller", "--port", str(port), "--insecure-join", "--api-key-file", str(file)):
        async with asyncio.timeout(20):
            while (await run_cli("models", "--address", address, "--api-key", key.strip()))[0] != 0:
                await asyncio.sleep(0.1)
        status, _, err = await run_cli("models", "--address", address, "--api-key", "sk-wrong-key")
        assert status == 1
        assert "key" in one_line(err)
    status, _, err = await run_cli("new-key", "a name")
    assert status == 2
    assert "must be 1 to 64 letters" in one_line(err)


async def test_models_and_workers_are_listed() -> None:
    port = free_port()
    controller = f"127.0.0.1:{port}"
    worker_id = "[fd00::1]" + "w" * 30 + "[/x]"  # which rich would take for markup
    async with running_cli("controller", "--port", str(port)):
        worker = (
            "worker",
            *ECHO,
            "--model-names",
            "a,b",
            "--port",
            "0",
            "--controller-address",
            controller,
            "--worker-id",
            worker_id,
        )
        async with running_cli(*worker):
            await wait_for_workers(controller)
            status, out, err = await run_cli("models", "--address", controller)
            assert status == 0, err
            assert [line.split()[0] for line in out.splitlines()] == ["model", "a", "b"]
            status, out, err = await run_cli("workers", "--address", controller)
            assert status == 0, err
            assert "a, b" in out
            assert "serving" in out
            assert worker_id in out
            assert "…" not in out  # an id is copied to `drain` from here


async def test_a_worker_without_its_controller_serves_and_joins_when_it_comes() -> None:
    controller_port, worker_port = free_port(), free_port()
    controller = f"127.0.0.1:{controller_port}"
    arguments = ("worker", *ECHO, "--port", str(worker_port), "--controller-address", controller)
    async with running_cli(*arguments):
        await wait_for_answer(f"127.0.0.1:{worker_port}")
        async with running_cli("controller", "--port", str(controller_port)):
            await wait_for_workers(controller, timeout_s=20)


async def test_sigterm_lets_streams_end_and_exits_cleanly() -> None:
    port = free_port()
    slow = ("--backend-option", "delay_ms=20")
    async with running_cli("worker", *ECHO, "--no-register", "--port", str(port), *slow) as process:
        await wait_for_answer(f"127.0.0.1:{port}")
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            events = client.generate("x" * 50, stream_interval=1)
            await anext(events)
            process.send_signal(signal.SIGTERM)
            rest = [event async for event in events]
        assert len(rest) == 51, "49 bytes, the end of sequence, and the completion"
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_serve_restarts_what_crashes_and_stops_all_on_interrupt() -> None:
    controller_port, worker_port = free_port(), free_port()
    controller = f"127.0.0.1:{controller_port}"
    arguments = ("--port", str(worker_port), "--controller-port", str(controller_port), "--no-gateway")
    async with running_cli("serve", *ECHO, *arguments) as process:
        await wait_for_workers(controller)
        children = child_pids(process.pid)
        assert len(children) == 2
        before = await instance_of_the_worker(controller)
        os.kill(next(pid for command, pid in children.items() if " worker " in command), signal.SIGKILL)
        async with asyncio.timeout(30):
            while await instance_of_the_worker(controller) in (before, ""):
                await asyncio.sleep(0.05)
        children = child_pids(process.pid)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


async def test_children_of_a_killed_supervisor_end_by_themselves() -> None:
    controller_port, worker_port = free_port(), free_port()
    arguments = ("--port", str(worker_port), "--controller-port", str(controller_port), "--no-gateway")
    async with running_cli("serve", *ECHO, *arguments) as process:
        await wait_for_workers(f"127.0.0.1:{controller_port}")
        children = child_pids(process.pid).values()
        process.kill()
        async with asyncio.timeout(20):
            while any(Path(f"/proc/{pid}").exists() for pid in children):
                await asyncio.sleep(0.05)


async def test_serve_starts_two_models_from_a_file(tmp_path: Path) -> None:
    controller_port = free_port()
    file = tmp_path / "fleet.yaml"
    file.write_text(f"""\
gateway: false
port: 0
controller: {{port: {controller_port}}}
worker: {{backend: echo}}
workers:
  - model_path: alpha
    label: {{zone: east}}
  - model_path: beta
    model_names: [beta, gamma]
""")
    controller = f"127.0.0.1:{controller_port}"
    async with running_cli("serve", "-f", str(file)), AsyncClient(controller) as client:
        await wait_for_workers(controller, 2)
        assert {model.model.name for model in await client.models()} == {"alpha", "beta", "gamma"}
        assert (
            "".join([event.text async for event in client.generate("hi", model="beta") if isinstance(event, Delta)])
            == "hi"
        )


async def test_serve_says_once_what_can_never_start() -> None:
    status, _, err = await run_cli("serve", "--backend", "nope", "--port", "0", "--controller-port", str(free_port()))
    assert status == 2
    assert "--backend must be one of" in err
    assert "Traceback" not in err


def child_pids(pid: int) -> dict[str, int]:
    """Children of a process: their command lines and ids."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if Path(f"/proc/{pid}").exists() else []:
        command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        found[command] = int(child)
    return found


async def instance_of_the_worker(controller: str) -> str:
    """Instance id of the only worker; empty while there is none."""
    async with AsyncClient(controller, timeout_s=5) as client:
        workers = await client.workers()
    return workers[0].instance_id if workers else ""
