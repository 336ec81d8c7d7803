"""What the relay benchmark measures: each target starts its processes, and says which of them are the relay."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / ".venvs"
MOCK = Path(__file__).with_name("relay_mock.py")
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """A running relay: where it listens, and the processes whose CPU time is its cost."""

    port: int
    pids: tuple[int, ...]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(*command: str, log: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process in the background; its words go to a file that is shown when it fails."""
    with tempfile.NamedTemporaryFile(prefix="relay-", suffix=".log") as words:
        running = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE if not log else words, stderr=words, env=environment()
        )
        try:
            yield running
        except BaseException:
            print(Path(words.name).read_text(errors="replace")[-1500:], file=sys.stderr)
            raise
        finally:
            running.terminate()
            try:
                running.wait(5)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def environment() -> dict[str, str]:
    # FastChat writes logs into LOGDIR, by default the working directory.
    quiet = {"LOGDIR": tempfile.gettempdir(), "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **quiet, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def mock(kind: str, *arguments: str, python: str = sys.executable) -> Iterator[tuple[int, int]]:
    """A worker of relay_mock.py: its port and its process id."""
    with process(python, str(MOCK), kind, *arguments) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        if not line:
            raise RuntimeError(f"the mock worker {kind} did not start")
        yield int(line), running.pid


def wait_for(port: int, path: str = "/v1/models", word: str = "mock") -> None:
    """Return when a path answers 200 with a word in it."""
    ends = time.monotonic() + READY_S
    while time.monotonic() < ends:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
                if word in answer.read().decode():
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise RuntimeError(f"port {port} did not become ready")


# ----------------------------------------------------------------------------------- targets


@contextmanager
def nothing() -> Iterator[Target]:
    """The mock worker itself: the floor of every time."""
    with mock("http") as (port, _):
        yield Target(port, ())


@contextmanager
def ours(mode: str, *, resume: bool = False) -> Iterator[Target]:
    """Our gateway in one of its modes: Envoy, and the controller where there is one.

    Args:
        resume: whether answers outlive their workers; in direct mode alone.
    """
    with ExitStack() as stack:
        pids: list[int] = []
        controller = f"127.0.0.1:{free_port()}"
        if mode != "sidecar":
            command = ("-m", "fastchat_grpc", "controller", "--port", controller.rpartition(":")[2])
            pids.append(stack.enter_context(process(sys.executable, *command, log="x")).pid)
        worker, _ = stack.enter_context(mock("ours", *([controller] if mode != "sidecar" else [])))
        port = free_port()
        code = (
            "import asyncio, sys\n"
            "from fastchat_grpc.config import GatewayConfig, GatewayMode\n"
            "from fastchat_grpc.gateway.app import GatewayApp\n"
            "async def main(mode, port, controller, worker, resume):\n"
            "    app = GatewayApp(GatewayConfig(mode=GatewayMode(mode), port=int(port), concurrency=1,\n"
            "        controller_addresses=(controller,), worker_address=worker, resume=resume == 'yes'))\n"
            "    await app.start()\n"
            "    print(app.pid, flush=True)\n"
            "    await asyncio.Event().wait()\n"
            "asyncio.run(main(*sys.argv[1:]))\n"
        )
        arguments = (mode, str(port), controller, f"127.0.0.1:{worker}", "yes" if resume else "no")
        gateway = stack.enter_context(process(sys.executable, "-c", code, *arguments))
        assert gateway.stdout is not None
        pids.append(int(gateway.stdout.readline() or 0))
        wait_for(port)
        yield Target(port, tuple(pids))


@contextmanager
def plain_envoy() -> Iterator[Target]:
    """Envoy as an ordinary HTTP proxy before a worker that speaks OpenAI's API itself."""
    from fastchat_grpc.gateway.binary import find_envoy
    from fastchat_grpc.gateway.shape import extension, socket_address

    with mock("http") as (worker, _), tempfile.NamedTemporaryFile("w", suffix=".json") as settings:
        port = free_port()
        route = {"match": {"prefix": "/"}, "route": {"cluster": "worker", "timeout": "0s"}}
        manager = extension(
            "envoy.filters.network.http_connection_manager",
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            stat_prefix="plain",
            route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            http_filters=[extension("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router")],
        )
        endpoint = {"endpoint": {"address": socket_address("127.0.0.1", worker)}}
        tree = {
            "static_resources": {
                "listeners": [
                    {"address": socket_address("127.0.0.1", port), "filter_chains": [{"filters": [manager]}]}
                ],
                "clusters": [
                    {
                        "name": "worker",
                        "type": "STATIC",
                        "load_assignment": {"cluster_name": "worker", "endpoints": [{"lb_endpoints": [endpoint]}]},
                    }
                ],
            }
        }
        json.dump(tree, settings)
        settings.flush()
        command = (str(find_envoy()), "-c", settings.name, "--use-dynamic-base-id", "--concurrency", "1", "-l", "error")
        with process(*command, log="x") as envoy:
            wait_for(port)
            yield Target(port, (envoy.pid,))


@contextmanager
def smg(kind: str) -> Iterator[Target]:
    """SMG's router, before a worker that speaks gRPC or HTTP."""
    python = _environment("smg", "smg==1.13.0", "smg-grpc-proto==0.4.28", "grpcio")
    model = tokenizer_folder()
    token_id = _token_id(model)
    with mock(*(("smg", model, str(token_id)) if kind == "grpc" else ("http",)), python=python) as (worker, _):
        port = free_port()
        url = f"{'grpc' if kind == 'grpc' else 'http'}://127.0.0.1:{worker}"
        command = [str(Path(python).with_name("smg")), "launch", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--worker-urls", url, "--policy", "round_robin", "--log-level", "warn"]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        command += ["--model-path", model, *(["--backend", "vllm"] if kind == "grpc" else [])]
        with process(*command, log="x") as router:
            wait_for(port, word="data")
            time.sleep(2)
            yield Target(port, (router.pid,))


@contextmanager
def fastchat() -> Iterator[Target]:
    """FastChat's API server and its controller."""
    packages = ("fastapi<0.100", "pydantic<2", "uvicorn<0.30", "shortuuid", "tiktoken", "aiohttp", "httpx", "requests")
    python = _environment("fastchat-api", *packages, "numpy", without_dependencies="fschat==0.2.36")
    with ExitStack() as stack:
        controller, port = free_port(), free_port()
        where = ("--host", "127.0.0.1", "--port")
        first = stack.enter_context(
            process(python, "-m", "fastchat.serve.controller", *where, str(controller), log="x")
        )
        _wait_open(controller)
        url = f"http://127.0.0.1:{controller}"
        stack.enter_context(mock("fastchat", url))
        command = (python, "-m", "fastchat.serve.openai_api_server", *where, str(port), "--controller-address", url)
        second = stack.enter_context(process(*command, log="x"))
        wait_for(port)
        yield Target(port, (first.pid, second.pid))


TARGETS: dict[str, Callable[[], object]] = {
    "mock alone": nothing,
    "ours direct --no-resume": lambda: ours("direct"),
    "ours direct": lambda: ours("direct", resume=True),
    "ours relay": lambda: ours("relay"),
    "ours sidecar": lambda: ours("sidecar"),
    "plain Envoy (HTTP)": plain_envoy,
    "SMG gRPC": lambda: smg("grpc"),
    "SMG HTTP": lambda: smg("http"),
    "FastChat": fastchat,
}


def _environment(name: str, *packages: str, without_dependencies: str = "") -> str:
    """Python of a peer's own environment, made the first time it is asked for."""
    folder = VENVS / name
    python = folder / "bin" / "python"
    if not (folder / ".relay-ready").exists():
        print(f"installing {name} into {folder.relative_to(ROOT)} ...", flush=True)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        if without_dependencies:
            subprocess.run([*pip, "--no-deps", without_dependencies], check=True)
        subprocess.run([*pip, *packages], check=True)
        (folder / ".relay-ready").touch()
    return str(python)


def tokenizer_folder() -> str:
    """A folder with a tokenizer, for relays that turn tokens into text themselves."""
    from fastchat_grpc.models.embedded import embedded_model

    return str(embedded_model())


def _token_id(folder: str) -> int:
    vocabulary = json.loads(Path(folder, "tokenizer.json").read_text())["model"]["vocab"]
    return int(vocabulary["Ġhello"])


def _wait_open(port: int) -> None:
    ends = time.monotonic() + READY_S
    while time.monotonic() < ends:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"port {port} did not open")
