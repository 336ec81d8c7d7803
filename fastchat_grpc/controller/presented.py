"""How workers present themselves, and what callers ask of them: checked before the registry sees any of it.

Whoever may register is not thereby trusted with the log, the memory or the arithmetic of the controller.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fastchat_grpc.config import MAX_WEIGHT, split_address
from fastchat_grpc.controller.fleet import WorkerSpec
from fastchat_grpc.core import Capability, ModelInfo
from fastchat_grpc.errors import ConfigError, InvalidArgument
from fastchat_grpc.rpc import convert
from fastchat_grpc.rpc.printable import printable
from fastchat_grpc.v1 import generation_pb2, registry_pb2

MAX_ID_LENGTH = 128
MAX_MODELS = 16_384
"""Names of one worker. A child controller registers those of its whole fleet: 100 models with 100 adapters each."""
MAX_LABELS = 32
MAX_LABEL_LENGTH = 256
MAX_CAPABILITIES = 64
"""Values of one list of capabilities: those of this version and many to come."""
MAX_EXCLUDED = 1024
_IDENTITIES = ("fingerprint", "tokenizer_fingerprint")
_NAMES = ("base_model", "backend", "revision", "quantization")
_COUNTS = ("context_length", "embedding_size", "vocabulary_size", "max_output_length")


def spec_from_pb(request: registry_pb2.RegisterRequest) -> WorkerSpec:
    """Check and convert how a worker presents itself. Raises InvalidArgument with field, value and limit."""
    for name in ("worker_id", "instance_id"):
        _check_text(name, getattr(request, name), 1, MAX_ID_LENGTH)
    _check_text("version", request.version, 0, MAX_LABEL_LENGTH)
    return WorkerSpec(
        worker_id=request.worker_id,
        instance_id=request.instance_id,
        address=_address(request.address),
        models=_models(request.models),
        weight=_weight(request.weight) if request.HasField("weight") else 1.0,
        labels=_labels(request.labels),
        check_heartbeat=request.check_heartbeat if request.HasField("check_heartbeat") else True,
        version=request.version,
    )


def capabilities_asked(numbers: Sequence[int]) -> frozenset[Capability]:
    """The capabilities that a caller asks for. Raises InvalidArgument for one that this version does not know.

    A worker may say more of itself than its controller knows; what is asked for must be understood.
    """
    if not numbers:
        return frozenset()
    if len(numbers) > MAX_CAPABILITIES:
        raise InvalidArgument("capabilities", f"must be at most {MAX_CAPABILITIES}, got {len(numbers)}")
    return frozenset(convert.capability_from_pb(number, f"capabilities[{i}]") for i, number in enumerate(numbers))


def excluded(worker_ids: Sequence[str]) -> frozenset[str]:
    """Workers that a caller does not want. Raises InvalidArgument for too many of them."""
    if len(worker_ids) > MAX_EXCLUDED:
        raise InvalidArgument("excluded_worker_ids", f"must be at most {MAX_EXCLUDED}, got {len(worker_ids)}")
    return frozenset(worker_ids)


def _address(address: str) -> str:
    """An address at which others reach the worker."""
    try:
        host, port = split_address(address)
    except ConfigError as error:
        raise InvalidArgument("address", printable(str(error))) from None
    if port == 0:
        raise InvalidArgument("address", "must have a port from 1 to 65535, got 0")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        if not _may_be_name(host):
            raise InvalidArgument(
                "address", f"must have an IP address or a name, got {address[:MAX_LABEL_LENGTH]!r}"
            ) from None
        return address
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_unspecified or ip.is_multicast or str(ip) == "255.255.255.255":
        raise InvalidArgument("address", f"must be one at which the worker is reached, got {address}")
    return address


def _may_be_name(host: str) -> bool:
    """Whether it may be a name of the DNS (RFC 1123): what ends in a number is an IPv4 address, or nothing."""
    labels = host.removesuffix(".").split(".")
    return len(host) <= 253 and not labels[-1].isdigit() and all(0 < len(label) <= 63 for label in labels)


def _models(messages: Sequence[generation_pb2.ModelInfo]) -> tuple[ModelInfo, ...]:
    if not 1 <= len(messages) <= MAX_MODELS:
        raise InvalidArgument("models", f"must hold 1 to {MAX_MODELS} models, got {len(messages)}")
    models = tuple(_model(message, f"models[{i}]") for i, message in enumerate(messages))
    names = Counter(model.name for model in models)
    if len(names) < len(models):
        raise InvalidArgument("models", f"must have different names, got {names.most_common(1)[0][0]!r} twice")
    return models


def _model(message: generation_pb2.ModelInfo, path: str) -> ModelInfo:
    _check_text(f"{path}.name", message.name, 1, MAX_LABEL_LENGTH)
    for names, most in ((_NAMES, MAX_LABEL_LENGTH), (_IDENTITIES, MAX_ID_LENGTH)):
        for name in names:
            _check_text(f"{path}.{name}", getattr(message, name), 0, most)
    for name in _COUNTS:
        if (value := getattr(message, name)) < 0:
            raise InvalidArgument(f"{path}.{name}", f"must be at least 0, got {value}")
    if len(message.capabilities) > MAX_CAPABILITIES:
        raise InvalidArgument(
            f"{path}.capabilities", f"must be at most {MAX_CAPABILITIES}, got {len(message.capabilities)}"
        )
    return convert.model_from_pb(message)


def _weight(weight: float) -> float:
    if not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
        raise InvalidArgument("weight", f"must be above 0 and at most {MAX_WEIGHT:g}, got {weight:g}")
    return weight


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    if len(labels) > MAX_LABELS:
        raise InvalidArgument("labels", f"must be at most {MAX_LABELS}, got {len(labels)}")
    for key, value in labels.items():
        _check_text("labels key", key, 1, MAX_LABEL_LENGTH)
        _check_text(f"labels[{key}]", value, 0, MAX_LABEL_LENGTH)
    return dict(labels)


def _check_text(field: str, value: str, low: int, high: int) -> None:
    if not low <= len(value) <= high:
        raise InvalidArgument(field, f"must be {low} to {high} characters long, got {len(value)}")
    if not value.isprintable():
        raise InvalidArgument(field, f"must hold no line breaks and other control characters, got '{printable(value)}'")
