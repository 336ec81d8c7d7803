"""A whole site's metrics and health: gateway, controller and worker after requests that the test knows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, generate_latest

from fastchat_grpc.backends.base import BackendLoad, Steps
from fastchat_grpc.config import MetricsConfig
from fastchat_grpc.core import ModelInfo
from fastchat_grpc.rpc.channels import open_channel
from fastchat_grpc.worker.engine_metrics import EngineCollector
from fastchat_grpc.worker.request_metrics import RequestMetrics
from tests.conftest import eventually
from tests.e2e.gateway_site import KEY, KEYS, Site, running_gateway, running_site
from tests.e2e.processes import free_port, running_cli, wait_for_workers
from tests.scrape import fetch, scrape

METRICS = MetricsConfig(port=0)
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[Site]:
    """Two chats, one embedding, a tokenization, one refusal for want of a key, and one for an unknown model."""
    controller = {"metrics": METRICS, "api_keys": KEYS}
    async with running_site(workers=[{"metrics": METRICS}], controller=controller, metrics=METRICS, key=KEY) as site:
        for text in ("hello", "hello again"):
            assert (await site.chat(text)).status_code == 200
        body = {"model": "echo", "input": "embed me"}
        assert (await site.http.post("/v1/embeddings", json=body)).status_code == 200
        tokenized = await site.http.post("/tokenize", json={"model": "echo", "prompt": "relayed by the controller"})
        assert tokenized.status_code == 200
        assert (await site.chat(model="nobody has it")).status_code == 404
        wrong = {"authorization": "Bearer sk-wrong-key"}
        assert (await site.http.post("/v1/chat/completions", json={}, headers=wrong)).status_code == 401
        counts = site.controller.registry.counts
        await eventually(lambda: counts.attempts["good"] == 4)
        yield site


@pytest.mark.asyncio(loop_scope="module")
async def test_the_three_processes_agree_on_what_was_done(site: Site) -> None:
    controller = await scrape(site.controller.metrics_address)
    assert controller.get("fastchat_grpc_picks_total", model_name="echo", result="ok") == 4
    assert controller.get("fastchat_grpc_picks_total", model_name="other", result="model_not_found") >= 1
    assert controller.get("fastchat_grpc_attempts_total", evidence="good") == 4
    tokenize = "fastchat_grpc.v1.GenerationService/Tokenize"
    assert controller.get("grpc_client_attempt_started_total", grpc_method=tokenize) == 1
    assert controller.get("fastchat_grpc_gateways") == 1
    assert controller.get("fastchat_grpc_endpoints") == 1
    assert controller.get("fastchat_grpc_endpoints_pushed_total") >= 1
    assert controller.get("fastchat_grpc_gateway_requests") == 0
    assert controller.get("fastchat_grpc_retries_total") == controller.get("fastchat_grpc_resumes_total") == 0
    check = "envoy.service.auth.v3.Authorization/Check"
    assert controller.get("grpc_server_call_duration_seconds_count", grpc_method=check, grpc_status="OK") >= 5
    worker = await scrape(site.workers[0].metrics_address)
    assert worker.get("vllm:request_success_total", finished_reason="stop") == 2
    assert worker.get("fastchat_grpc_usage_requests_total", client="alice", model_name="echo") == 3
    made = len("hello") + 1 + len("hello again") + 1
    assert worker.get("fastchat_grpc_usage_generation_tokens_total", client="alice") == made
    assert worker.get("vllm:generation_tokens_total") == made
    gateway = await scrape(site.gateway.metrics_address)
    assert gateway.get("fastchat_grpc_envoy_up", instance="gateway") == 1
    assert gateway.get("fastchat_grpc_envoy_restarts_total") == 0
    answered = "envoy_http_downstream_rq_xx_total"  # Envoy does not say total; the parser does
    prefix = {"envoy_http_conn_manager_prefix": "ingress"}
    assert gateway.get(answered, envoy_response_code_class="2", **prefix) >= 3
    assert gateway.get(answered, envoy_response_code_class="4", **prefix) == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_the_whole_stack_is_told_in_one_place_and_only_where_asked_on_the_public_port(site: Site) -> None:
    assert (await site.http.get("/metrics")).status_code == 404
    targets = (
        ("controller", site.controller.metrics_address),
        ("worker-0", site.workers[0].metrics_address),
        ("gone", "127.0.0.1:9"),
    )
    async with (
        running_gateway(site, metrics=METRICS, metrics_targets=targets, public_metrics=True) as gateway,
        httpx2.AsyncClient(base_url=f"http://{gateway.address}", trust_env=False) as http,
    ):
        told = await scrape(gateway.metrics_address)
        assert told.get("vllm:request_success_total", instance="worker-0", finished_reason="stop") == 2
        assert told.has("fastchat_grpc_workers", instance="controller", model_name="echo")
        assert told.get("fastchat_grpc_target_up", target="worker-0") == 1
        assert told.get("fastchat_grpc_target_up", target="gone") == 0
        for instance in ("gateway", "controller", "worker-0"):
            assert told.get("process_start_time_seconds", instance=instance) > 0, instance
        public = await http.get("/metrics")
        assert public.status_code == 200
        assert 'vllm:num_requests_waiting{instance="worker-0"' in public.text
        assert public.headers["content-type"].startswith("text/plain")
        assert (await http.get("/metrics/")).status_code == 404


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
async def test_promtool_finds_nothing_against_our_names(site: Site) -> None:
    for address in (site.controller.metrics_address, site.workers[0].metrics_address):
        text = await fetch(address)
        command = ["promtool", "check", "metrics"]
        found = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, check=False)
        said = [line for line in found.stderr.decode().splitlines() if not line.startswith("vllm:")]
        assert not said, said


@pytest.mark.asyncio(loop_scope="module")
async def test_health_tells_lives_from_takes_requests_from_has_a_model(site: Site) -> None:
    for path in ("/live", "/livez", "/health", "/ready", "/readyz", "/ping", "/version"):
        assert (await site.http.get(path)).status_code == 200, path
    async with open_channel(site.controller.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        services = ("fastchat_grpc.v1.OpenAIService", "fastchat_grpc.v1.ControllerService")
        for name in ("", "liveness", "readiness", *services):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


async def test_a_site_without_a_worker_lives_and_is_not_ready() -> None:
    async with running_site(workers=[]) as site:
        assert (await site.http.get("/live")).status_code == 200
        assert (await site.http.get("/health")).status_code == 200
        assert (await site.http.get("/ready")).status_code == 503
        async with open_channel(site.controller.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answers = [
                (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
                for name in ("liveness", "readiness")
            ]
            assert answers == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
        await site.add_worker()

        async with asyncio.timeout(10):
            while (await site.http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.02)


FUNCTIONS = {"sum", "rate", "histogram_quantile", "max", "min", "avg", "count", "increase", "topk", "changes", "vector"}
WORDS = {*FUNCTIONS, "by", "on", "and", "or", "clamp_min"}
NAME = re.compile(r"(?<![\w:$.\"~])([a-zA-Z_:][\w:]*)(?=[\s{\[()/+<>=]|$)(\{[^}]*\})?")
EXPLAINED = {"vllm:lora_requests_info", "fastchat_grpc_target_up", "grpc_method", "grpc_status", "grpc_target"}
"""Of the page: labels, and what there is only where adapters are loaded, or targets are named."""


def expressions() -> list[str]:
    """Those of the board and of the rules."""
    board = json.loads((DEPLOY / "grafana" / "fleet.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    found += re.findall(r"label_values\((\w+), \w+\)", json.dumps(board["templating"]))
    rules = re.findall(
        r"expr: (?:>-\n)?((?:[^\n]*\n(?:(?=          )[^\n]*\n)*))", (DEPLOY / "prometheus" / "rules.yml").read_text()
    )
    assert len(found) > 50
    assert len(rules) > 15
    return [*found, *rules]


def used(expression: str) -> list[tuple[str, set[str]]]:
    """The metrics of an expression, each with the labels that it is asked by."""
    plain = re.sub(r"\b(?:by|on) \(([^)]*)\)", "", expression)
    grouped = {
        label.strip() for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in labels.split(",")
    }
    found = []
    for match in NAME.finditer(re.sub(r"\"[^\"]*\"", '""', plain)):
        name, selector = match.groups()
        if name not in WORDS and not name.isupper():
            found.append((name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector or "")) | (grouped - {"le"})))
    return found


@pytest.mark.asyncio(loop_scope="module")
async def test_the_board_and_the_rules_ask_for_nothing_that_is_not_told(site: Site) -> None:
    addresses = (site.controller.metrics_address, site.workers[0].metrics_address, site.gateway.metrics_address)
    texts = [(await fetch(address)).decode() for address in addresses]
    texts.append(an_engine_that_tells_all())
    told: dict[str, set[str]] = {"up": {"job"}}
    for line in "\n".join(texts).splitlines():
        if match := re.match(r"([\w:]+)(?:\{(.*)\})? ", line):
            told.setdefault(match[1], {"instance"}).update(re.findall(r'(\w+)="', match[2] or ""))
    page = (DEPLOY.parent / "docs" / "operating.md").read_text()
    for name in set(re.findall(r"`((?:vllm:|fastchat_grpc_|grpc_)\w+)", page)) - EXPLAINED:
        assert name in told or f"{name}_bucket" in told, f"docs/operating.md names {name}, which is told by nobody"
    several = ("_bucket", "_sum", "_count")
    for expression in expressions():
        asked = used(expression)
        assert asked, expression
        for name, labels in asked:
            assert name in told, f"{name} is told by nobody: {expression}"
            if len({other for other, _ in asked}) == 1 or name.endswith(several):
                assert labels <= told[name], f"{name} has no label {labels - told[name]}: {expression}"


def an_engine_that_tells_all() -> str:
    """What engines tell that the echo backend has not: a cache and steps."""
    steps = Steps(failures=1)
    steps.seconds.observe(1)
    steps.sequences.observe(1)
    steps.tokens.observe(1)
    load = BackendLoad(max_running=1, kv_cache_usage=0.5, kv_block_size=1, kv_block_count=1, preemptions=1, steps=steps)
    registry = CollectorRegistry()
    requests = RequestMetrics(registry, [ModelInfo(name="m", context_length=8)], {"m": True})
    monitor: Any = SimpleNamespace(backend_load=load)
    registry.register(EngineCollector(list(requests.engines.values()), monitor, 0))
    return generate_latest(registry).decode()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize(("what", "file"), [("rules", "rules.yml"), ("config", "scrape.yml")])
def test_promtool_takes_our_files(what: str, file: str) -> None:
    found = subprocess.run(
        ["promtool", "check", what, str(DEPLOY / "prometheus" / file)], capture_output=True, check=False
    )
    assert found.returncode == 0, found.stdout.decode() + found.stderr.decode()


async def test_serve_tells_of_all_its_parts_at_the_port_that_was_asked_for() -> None:
    controller, gateway, metrics = free_port(), free_port(), free_port()
    flags = {"--port": 0, "--controller-port": controller, "--gateway-port": gateway, "--metrics-port": metrics}
    places = [str(part) for flag in flags.items() for part in flag]
    async with running_cli("serve", "--backend", "echo", "--model-path", "echo", "--num-workers", "2", *places):
        await wait_for_workers(f"127.0.0.1:{controller}", 2)
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(OSError):
                    told = await scrape(f"127.0.0.1:{metrics}")
                    if told.has("fastchat_grpc_target_up") and told.get("fastchat_grpc_target_up") == 3:
                        break
                await asyncio.sleep(0.05)
        for instance in ("worker-0", "worker-1"):
            assert told.get("fastchat_grpc_worker_state", instance=instance, state="serving") == 1, instance
        assert told.get("fastchat_grpc_workers", instance="controller", state="ready") == 2
