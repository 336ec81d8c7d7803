"""Callers who leave: what grpc says of a call that is over is no error of this server.

A caller may leave, or its deadline pass, at any moment, and core knows of that before the event loop does. What is
sent in between fails, and grpc.aio logs that with a traceback at ERROR, though nothing was to be done.
"""

from __future__ import annotations

import logging

from grpc._cython.cygrpc import ExecuteBatchError  # type: ignore[import-not-found]

logger = logging.getLogger(__name__)

GRPC_LOGGER = "grpc._cython.cygrpc"


def has_ended(error: BaseException | None) -> bool:
    """Whether grpc could not send or receive something because the call is over.

    Core would say the same of answers beyond its limit and of metadata that is none: `rpc.border` refuses the former,
    and `rpc.request_ids.told` makes none of the latter.
    """
    return isinstance(error, ExecuteBatchError)


class _Quiet(logging.Filter):
    """Leaves out what grpc.aio logs of calls that are over, and says it for those who debug."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and has_ended(record.exc_info[1]):
            logger.debug("a caller left before the end of its call: %s", record.getMessage())
            return False
        return True


_QUIET = _Quiet()


def be_quiet_about_ended_calls() -> None:
    """Let grpc.aio's servers log no errors for callers who leave. Safe to call twice."""
    logging.getLogger(GRPC_LOGGER).addFilter(_QUIET)
