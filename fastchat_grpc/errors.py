"""Domain errors: one class each, with the gRPC status code and the reason that callers see.

Code below the RPC border raises these; `fastchat_grpc.rpc.status` alone turns them into
statuses (and back). Messages are written for the person who made the mistake: they name the
field, the value and the limit, and never quote prompts, outputs or secrets.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import ClassVar


class Code(enum.IntEnum):
    """Canonical gRPC status codes (grpc/doc/statuscodes.md), kept here so that the core needs no grpc."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class FastChatError(Exception):
    """Base of all errors that may reach a caller.

    Attributes:
        code: status code of the RPC.
        reason: stable UPPER_SNAKE_CASE identifier, sent as google.rpc.ErrorInfo.reason.
        metadata: facts about this occurrence, sent as google.rpc.ErrorInfo.metadata.
        retry_after_s: seconds after which a retry may succeed, or None; sent as google.rpc.RetryInfo.
    """

    code: ClassVar[Code] = Code.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InvalidArgument(FastChatError):
    """A field of the request is missing, malformed or out of range. `field` is its path, such as `sampling.top_p`."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, description: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{field}: {description}" if field else description, metadata=metadata)
        self.field = field
        self.description = description


class UnsupportedField(InvalidArgument):
    """The backend cannot honour a field; it refuses rather than ignores it."""

    reason = "UNSUPPORTED_FIELD"


class PromptTooLong(InvalidArgument):
    """The prompt leaves no room for an output in the model's context."""

    reason = "PROMPT_TOO_LONG"

    def __init__(self, field: str, token_count: int, context_length: int, *, at_least: bool = False) -> None:
        super().__init__(
            field,
            f"the prompt has {'at least ' if at_least else ''}{token_count} tokens, but the context of "
            f"{context_length} tokens must hold the prompt and at least one new token; shorten the prompt or set "
            "truncate_prompt_tokens",
            metadata={"prompt_token_count": str(token_count), "context_length": str(context_length)},
        )
        self.token_count = token_count
        self.context_length = context_length


class ModelNotFound(FastChatError):
    """No model of that name is, or was lately, served here."""

    code = Code.NOT_FOUND
    reason = "MODEL_NOT_FOUND"


class AdapterNotFound(FastChatError):
    """No LoRA adapter of that name is loaded."""

    code = Code.NOT_FOUND
    reason = "ADAPTER_NOT_FOUND"


class ModelDiffers(FastChatError):
    """A generation that another worker began cannot go on here: the model of that name has other weights."""

    code = Code.FAILED_PRECONDITION
    reason = "MODEL_DIFFERS"


class WorkerNotFound(FastChatError):
    """No worker of that id is registered."""

    code = Code.NOT_FOUND
    reason = "WORKER_NOT_FOUND"


class LeaseNotFound(FastChatError):
    """The lease is unknown, expired, or was replaced by a newer instance; the worker must register again."""

    code = Code.NOT_FOUND
    reason = "LEASE_NOT_FOUND"


class InstanceReplaced(FastChatError):
    """Another process has registered under this worker's id since; two must not share one."""

    code = Code.ALREADY_EXISTS
    reason = "INSTANCE_REPLACED"


class WorkerIdInUse(FastChatError):
    """The worker that has this id is another process, and it answers at its address."""

    code = Code.ALREADY_EXISTS
    reason = "WORKER_ID_IN_USE"


class FleetFull(FastChatError):
    """The controller holds as many workers as it may."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "FLEET_FULL"


class RelayLoop(FastChatError):
    """Controllers relay to each other in a circle."""

    code = Code.FAILED_PRECONDITION
    reason = "RELAY_LOOP"


class NoLiveWorker(FastChatError):
    """The model is known, but no worker serves it now."""

    code = Code.UNAVAILABLE
    reason = "NO_LIVE_WORKER"


class WorkerUnavailable(FastChatError):
    """A worker could not be reached, or went away."""

    code = Code.UNAVAILABLE
    reason = "WORKER_UNAVAILABLE"


class NotResumable(WorkerUnavailable):
    """A stream lost its worker, and none of those left can go on with it; the message says why."""

    reason = "NOT_RESUMABLE"


class FailoverExhausted(FastChatError):
    """So many workers failed on this request that it is not tried on yet another: it may be what breaks them."""

    code = Code.UNAVAILABLE
    reason = "FAILOVER_EXHAUSTED"


class Starting(FastChatError):
    """The server is loading its model, or does not know its fleet yet; try elsewhere, or later."""

    code = Code.UNAVAILABLE
    reason = "STARTING"


class Draining(FastChatError):
    """The server finishes what it has and takes nothing new; try elsewhere."""

    code = Code.UNAVAILABLE
    reason = "DRAINING"


class QueueFull(FastChatError):
    """The worker has no free slot and its queue is full; retry later or elsewhere."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class OutOfMemory(FastChatError):
    """The device has too little memory for this request, even alone."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "OUT_OF_MEMORY"


class AnswerTooLarge(FastChatError):
    """The answer does not fit a message; asking for less at a time helps, and asking again does not."""

    code = Code.INVALID_ARGUMENT
    reason = "ANSWER_TOO_LARGE"


class Cancelled(FastChatError):
    """The call was given up: by its caller, or because its connection was closed."""

    code = Code.CANCELLED
    reason = "CANCELLED"


class ClientClosed(FastChatError):
    """The client was closed by its owner while a call ran."""

    code = Code.ABORTED
    reason = "CLIENT_CLOSED"


class DeadlineExceeded(FastChatError):
    """The caller's deadline passed before the request was done."""

    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class ReaderTooSlow(FastChatError):
    """The caller did not read what was generated, so the request was ended to free its slot."""

    code = Code.DEADLINE_EXCEEDED
    reason = "READER_TOO_SLOW"

    @classmethod
    def after(cls, unread_s: float) -> ReaderTooSlow:
        """The error for what lay unread so many seconds."""
        return cls(
            f"what was generated was not read for {unread_s:.0f} s (--send-timeout), so the request was ended to free "
            "its slot"
        )


class RequestLate(FastChatError):
    """The caller began a call and did not send its request in time."""

    code = Code.DEADLINE_EXCEEDED
    reason = "REQUEST_LATE"


class TooManyCalls(FastChatError):
    """This caller, or the server in all, has too many calls open; end some, or retry later."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_CALLS"


class Unauthenticated(FastChatError):
    """The credentials are missing or wrong."""

    code = Code.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(FastChatError):
    """The caller is known but may not do this."""

    code = Code.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class NotSupported(FastChatError):
    """The model or backend lacks the capability as a whole, such as embeddings."""

    code = Code.UNIMPLEMENTED
    reason = "NOT_SUPPORTED"


class BackendFailed(FastChatError):
    """The engine failed on this request; the message says how, without its content."""

    code = Code.INTERNAL
    reason = "BACKEND_FAILED"


class ConfigError(Exception):
    """A setting is wrong. The message is one line that says what to do; raised before anything starts."""


class ModelLoadError(ConfigError):
    """The model cannot be loaded: missing, broken, or unsupported on this machine."""
