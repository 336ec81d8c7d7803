"""What the registry and dispatch cost: 10,000 workers of 50 models, in process and over gRPC; by size of the fleet."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from tools.bench import scale
from tools.bench.processes import Child, child, percentile, role, table

NAME = "control-plane"
HELP = "picks in process, CPU per PickWorker and Heartbeat, memory; FastChat's controller beside it"

FASTCHAT = Path(".venvs/fastchat/bin/python")
CLIENTS = 32


def run(args: list[str]) -> dict[str, object]:
    """All parts; FastChat's where its environment is there (`--fastchat` makes it)."""
    parser = argparse.ArgumentParser(prog="bench control-plane", description=HELP)
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--calls", type=int, default=10_000, help="calls of each kind over gRPC")
    parser.add_argument("--no-scale", action="store_true", help="leave the table by size of the fleet out")
    parser.add_argument("--bridge", action="store_true", help="follow the fleet for gateways, too")
    parser.add_argument("--fastchat", action="store_true", help="install FastChat into .venvs/fastchat if it is not")
    options = parser.parse_args(args)
    if options.fastchat:
        _install_fastchat()
    result: dict[str, object] = {"in_process": _in_process(options)}
    if not options.no_scale:
        result["scale"] = scale.run()
    result["over_grpc"] = _over_grpc(options)
    if FASTCHAT.exists():
        result["fastchat"] = _fastchat()
    return result


# ------------------------------------------------------------------------------- in process


def _in_process(options: argparse.Namespace) -> dict[str, object]:
    """Times of single picks and heartbeats, in microseconds."""
    from fastchat_grpc.config import DispatchMethod
    from fastchat_grpc.controller.dispatch import Dispatcher, PickRequest
    from fastchat_grpc.controller.registry import Registry
    from fastchat_grpc.core import Load

    rng = Random(1)
    names = [f"model-{i}" for i in range(options.models)]
    rows: dict[str, dict[str, float]] = {}

    def ask() -> PickRequest:
        return PickRequest(model=rng.choice(names), key=str(rng.random()))

    rows["making a request"] = _times(ask, 5_000)
    requests = itertools.cycle([ask() for _ in range(6_000)])
    for method in reversed(DispatchMethod):  # the last, and so that of the heartbeats, is the default
        registry = Registry()  # for each: a controller has one method, and keeps in order what that asks for
        workers = [registry.register(_spec(i, options.models), Load()) for i in range(options.workers)]
        registry.settle()  # as it is but for its first seconds
        dispatcher = Dispatcher(registry, method, rng)

        def pick(dispatcher: Dispatcher = dispatcher) -> None:
            dispatcher.pick(next(requests)).release()

        _times(pick, 1_000)  # a policy's index is made at its first pick
        rows[method.value] = _times(pick, 5_000)

    def beat() -> None:
        registry.heartbeat(rng.choice(workers).lease_id, Load(running=3))

    rows["heartbeat"] = _times(beat, 20_000)
    print(f"In process, {options.workers} workers of {options.models} models, microseconds:")
    table(
        ["operation", "p50", "p99", "max"], [[name, *(f"{v:.1f}" for v in row.values())] for name, row in rows.items()]
    )
    return rows


def _spec(i: int, models: int) -> Any:
    from fastchat_grpc.controller.fleet import WorkerSpec
    from fastchat_grpc.core import ModelInfo

    return WorkerSpec(
        worker_id=f"worker-{i}",
        instance_id=f"instance-{i}",
        address=f"10.0.{i // 250}.{i % 250}:21002",
        models=(ModelInfo(name=f"model-{i % models}", context_length=4096),),
    )


def _times(action: Callable[[], object], count: int) -> dict[str, float]:
    took = []
    for _ in range(count):
        started = time.perf_counter()
        action()
        took.append((time.perf_counter() - started) * 1e6)
    return {"p50": percentile(took, 0.5), "p99": percentile(took, 0.99), "max": max(took)}


# --------------------------------------------------------------------------------- over gRPC


def _over_grpc(options: argparse.Namespace) -> dict[str, float]:
    part = "controller-with-bridge" if options.bridge else "controller"
    with child(role("tools.bench.control_plane", part)) as controller:
        result = asyncio.run(_load_controller(controller, options))
    with child(role("tools.bench.control_plane", "empty")) as empty:
        result["CPU us per call of an empty grpc.aio method"] = asyncio.run(_load_empty(empty, options))
    print(f"\nOver gRPC, {options.workers} workers, {CLIENTS} clients at once:")
    table(["what", "value"], [[key, f"{value:.1f}"] for key, value in result.items()])
    return result


async def _load_controller(controller: Child, options: argparse.Namespace) -> dict[str, float]:
    from fastchat_grpc.v1 import generation_pb2
    from fastchat_grpc.v1 import registry_pb2 as pb

    empty_mb = controller.memory_mb
    async with _stub(controller.answer) as stub:
        before_s = controller.cpu_s
        leases = await _register_all(stub, options)
        register_us = (controller.cpu_s - before_s) / options.workers * 1e6
        full_mb = controller.memory_mb
        rng = Random(1)

        async def heartbeat() -> None:
            load = generation_pb2.WorkerLoad(state=generation_pb2.WORKER_STATE_SERVING, running_count=3)
            await stub.Heartbeat(pb.HeartbeatRequest(lease_id=rng.choice(leases), load=load))

        async def pick() -> None:
            await stub.PickWorker(pb.PickWorkerRequest(model=f"model-{rng.randrange(options.models)}"))

        for warm_up in (heartbeat, pick):
            await _at_once(warm_up, 1_000)
        beat_us, beat_rate = await _cpu_us(controller, heartbeat, options.calls)
        pick_us, pick_rate = await _cpu_us(controller, pick, options.calls)
    return {
        "CPU us per PickWorker": pick_us,
        "CPU us per Heartbeat": beat_us,
        "CPU us per Register": register_us,
        "PickWorker per s": pick_rate,
        "Heartbeats per s": beat_rate,
        "memory MB, empty": empty_mb,
        "memory MB, all registered": full_mb,
        "memory MB, after the calls": controller.memory_mb,
    }


async def _load_empty(server: Child, options: argparse.Namespace) -> float:
    """What grpc.aio itself costs here: the floor for any controller that is built on it."""
    from fastchat_grpc.v1 import registry_pb2 as pb

    async with _stub(server.answer) as stub:

        async def call() -> None:
            await stub.PickWorker(pb.PickWorkerRequest(model="model-1"))

        await _at_once(call, 1_000)
        return (await _cpu_us(server, call, options.calls))[0]


@asynccontextmanager
async def _stub(address: str) -> AsyncIterator[Any]:
    from fastchat_grpc.rpc.channels import open_channel
    from fastchat_grpc.v1 import registry_pb2_grpc

    async with open_channel(address) as channel:
        yield registry_pb2_grpc.ControllerServiceStub(channel)


async def _register_all(stub: Any, options: argparse.Namespace) -> list[str]:
    from fastchat_grpc.v1 import generation_pb2
    from fastchat_grpc.v1 import registry_pb2 as pb

    leases: list[str] = []
    numbers = itertools.count()

    async def register() -> None:
        i = next(numbers)
        spec = _spec(i, options.models)
        request = pb.RegisterRequest(
            worker_id=spec.worker_id,
            instance_id=spec.instance_id,
            address=spec.address,
            models=[generation_pb2.ModelInfo(name=spec.models[0].name, context_length=4096)],
            load=generation_pb2.WorkerLoad(state=generation_pb2.WORKER_STATE_SERVING),
            labels={"zone": f"z{i % 3}"},
            version="0.1.0",
        )
        leases.append((await stub.Register(request)).lease_id)

    await _at_once(register, options.workers)
    return leases


async def _at_once(action: Callable[[], Awaitable[None]], count: int) -> None:
    """So many calls, by CLIENTS callers."""

    async def caller() -> None:
        for _ in range(count // CLIENTS):
            await action()

    await asyncio.gather(*(caller() for _ in range(CLIENTS)))
    for _ in range(count % CLIENTS):
        await action()


async def _cpu_us(controller: Child, action: Callable[[], Awaitable[None]], count: int) -> tuple[float, float]:
    """CPU of the controller per call, and calls per second."""
    before, started = controller.cpu_s, time.monotonic()
    await _at_once(action, count)
    return (controller.cpu_s - before) / count * 1e6, count / (time.monotonic() - started)


async def _serve_controller(with_bridge: bool) -> None:
    from fastchat_grpc.config import ControllerConfig, LeaseConfig, ListenConfig
    from fastchat_grpc.controller.app import ControllerApp

    # Nobody beats for most of the workers here: let them live.
    lease = LeaseConfig(time_to_live_s=3600, heartbeat_interval_s=2)
    app = ControllerApp(ControllerConfig(listen=ListenConfig(port=0), lease=lease))
    if not with_bridge:
        app.bridge = None
    await app.start()
    print(f"ready {app.address}", flush=True)
    await asyncio.Event().wait()


# ---------------------------------------------------------------------------------- FastChat

_FASTCHAT_SERVER = """
import socket, sys, uvicorn
from fastchat.serve import controller as module
module.Controller.get_worker_status = lambda self, name: None
module.controller = module.Controller("shortest_queue")
probe = socket.socket(); probe.bind(("127.0.0.1", 0))
print(f"ready 127.0.0.1:{probe.getsockname()[1]}", flush=True, file=sys.__stdout__)
server = uvicorn.Server(uvicorn.Config(module.app, log_level="error"))
server.run(sockets=[probe])
"""


def _install_fastchat() -> None:
    if FASTCHAT.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(FASTCHAT.parents[1])], check=True)
    # Its controller alone: none of what it needs for models.
    needed = ["fastapi", "uvicorn", "requests", "numpy", "httpx", "pydantic"]
    subprocess.run([str(FASTCHAT), "-m", "pip", "install", "-q", *needed], check=True)
    subprocess.run([str(FASTCHAT), "-m", "pip", "install", "-q", "--no-deps", "fschat==0.2.36"], check=True)


def _fastchat() -> dict[str, object]:
    rows: dict[str, object] = {}
    for count in (8, 1000):
        # Its log is written as it ships, but not where this runs.
        with (
            TemporaryDirectory() as folder,
            child([str(FASTCHAT.absolute()), "-c", _FASTCHAT_SERVER], cwd=folder, quiet=True) as controller,
        ):
            _wait_for(controller.answer)
            for i in range(count):
                status = {"model_names": ["model-0"], "speed": 1, "queue_length": 0}
                name = f"http://10.0.{i // 250}.{i % 250}:1"
                worker = {"worker_name": name, "check_heart_beat": True, "worker_status": status, "multimodal": False}
                _post(controller.answer, "/register_worker", worker)
            rows[str(count)] = asyncio.run(_load_fastchat(controller))
    print("\nFastChat's controller, CPU microseconds per get_worker_address:")
    table(["workers", "us"], [[key, f"{value:.1f}"] for key, value in rows.items()])
    return rows


async def _load_fastchat(controller: Child) -> float:
    calls = 2_000
    host, _, port = controller.answer.partition(":")
    body = json.dumps({"model": "model-0"}).encode()
    head = f"POST /get_worker_address HTTP/1.1\r\nHost: {controller.answer}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def caller() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(calls // CLIENTS):
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
        writer.close()

    before = controller.cpu_s
    await asyncio.gather(*(caller() for _ in range(CLIENTS)))
    return (controller.cpu_s - before) / (calls // CLIENTS * CLIENTS) * 1e6


def _wait_for(address: str) -> None:
    for _ in range(200):
        try:
            _post(address, "/list_models", {})
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("FastChat's controller did not come up")


def _post(address: str, path: str, body: object) -> None:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).read()


async def _serve_empty() -> None:
    """A server whose method does nothing."""
    import grpc

    from fastchat_grpc.v1 import registry_pb2 as pb
    from fastchat_grpc.v1 import registry_pb2_grpc

    class Empty(registry_pb2_grpc.ControllerServiceServicer):
        async def PickWorker(self, request: Any, context: Any) -> Any:
            return pb.PickWorkerResponse()

    server = grpc.aio.server()
    registry_pb2_grpc.add_ControllerServiceServicer_to_server(Empty(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve_empty() if sys.argv[1] == "empty" else _serve_controller(sys.argv[1].endswith("bridge")))
