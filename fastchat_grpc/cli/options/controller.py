"""Flags of a controller."""

from __future__ import annotations

import re
from typing import Any

import click

from fastchat_grpc.cli.credentials import (
    FILE,
    client_tls,
    group,
    join_token,
    join_token_options,
    join_tokens,
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
from fastchat_grpc.cli.options.types import CommaList
from fastchat_grpc.config import (
    ApiKeyConfig,
    ControllerConfig,
    DispatchMethod,
    FailoverConfig,
    LeaseConfig,
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
    metrics_options,
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
        metrics=metrics_config(flags),
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
