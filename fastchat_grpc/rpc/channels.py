"""Channels and channel options, matched to what our servers allow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import grpc

from fastchat_grpc.config import MAX_MESSAGE_BYTES, TlsConfig
from fastchat_grpc.rpc.proxies import uses_proxy

logger = logging.getLogger(__name__)

MAX_METADATA_BYTES = 16 * 1024

# A connection on which nothing comes for KEEPALIVE_TIME_MS is pinged, and closed KEEPALIVE_TIMEOUT_MS later if
# nothing has come by then: a path that swallows packets is left within 6 s, the shortest lease of a worker.
# A ping costs the server about 7 microseconds and the client 15, so that 10,000 silent connections cost a server
# 4% of a core; connections that carry tokens are not pinged.
KEEPALIVE_TIME_MS = 2_000
KEEPALIVE_TIMEOUT_MS = 4_000
SERVER_KEEPALIVE_TIME_MS = 10_000
SERVER_KEEPALIVE_TIMEOUT_MS = 10_000
"""What a caller that vanished holds is freed after both; a caller far away may be slow to answer."""
CONNECT_TIMEOUT_MS = 1_000

# grpc sends pings of its own, to measure the path, and while one is under way it is that one's timeout that
# counts (`ping_timeout_ms`, a minute unless set), whatever the keepalive's.
CLIENT_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A worker that restarts is back in a second or two; grpc's default backoff would wait up to 120 s.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Despite its name: how long an attempt to connect may take, where the backoff is shorter.
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
)
# A server takes pings twice as often as our clients send them before it counts a strike, so a long silent call
# never ends in GOAWAY(too_many_pings).
SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", SERVER_KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", SERVER_KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", SERVER_KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    # Headers beyond this are refused; grpc counts the names, too.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Without this a second server on the same port would silently share its connections.
    ("grpc.so_reuseport", 0),
)


def size_options(max_message_bytes: int) -> Sequence[tuple[str, Any]]:
    """Options that bound messages in both directions."""
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    )


def open_channel(
    address: str,
    tls: TlsConfig | None = None,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    options: Sequence[tuple[str, Any]] = (),
) -> grpc.aio.Channel:
    """A channel to host:port. With TLS, the server is verified by `tls.ca` or the system's authorities.

    Whether it goes through a proxy of the environment is said in `rpc.proxies`. Later options win.
    """
    proxy = ("grpc.enable_http_proxy", int(uses_proxy(address)))
    # Each option once: which of two grpc would take is not documented.
    name = [("grpc.ssl_target_name_override", tls.server_name)] if tls is not None and tls.server_name else []
    merged = list(dict([*CLIENT_OPTIONS, proxy, *size_options(max_message_bytes), *name, *options]).items())
    if tls is None:
        return grpc.aio.insecure_channel(address, options=merged)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=merged)


def channel_credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    """Client credentials from PEM files; with cert and key the client shows itself (mTLS)."""
    return grpc.ssl_channel_credentials(
        root_certificates=tls.ca.read_bytes() if tls.ca else None,
        private_key=tls.key.read_bytes() if tls.key else None,
        certificate_chain=tls.cert.read_bytes() if tls.cert else None,
    )


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Server credentials from PEM files; with a CA, clients must show a certificate of it (mTLS).

    The files are looked at on every handshake, and new certificates are used from then on. Files that
    cannot be read, as in the middle of a change, leave those of before in use.
    """
    assert tls.cert is not None
    assert tls.key is not None
    stamp = tls_stamp(tls)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal stamp
        now = tls_stamp(tls)
        if now == stamp or now is None:
            return None
        try:
            configuration = _certificates(tls)
        except OSError:
            return None
        stamp = now
        logger.info("TLS files have changed; new connections use the new ones")
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        _certificates(tls),
        fetch,  # type: ignore[arg-type]  # None is documented to mean: no change
        require_client_authentication=tls.ca is not None,
    )


def _certificates(tls: TlsConfig) -> grpc.ServerCertificateConfiguration:
    assert tls.cert is not None
    assert tls.key is not None
    return grpc.ssl_server_certificate_configuration(
        [(tls.key.read_bytes(), tls.cert.read_bytes())], root_certificates=tls.ca.read_bytes() if tls.ca else None
    )


def tls_stamp(tls: TlsConfig | None) -> tuple[tuple[int, int, int], ...] | None:
    """What changes when one of the files changes; None where a file is missing now, or there is no TLS."""
    if tls is None:
        return None
    try:
        stats = [path.stat() for path in (tls.cert, tls.key, tls.ca) if path is not None]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
