"""What every serving process does: logging, signals, one event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable

from fastchat_grpc.rpc.printable import escaped

SUPERVISED = "FASTCHAT_GRPC_SUPERVISED"
"""Set for children of `serve`: their standard input is a pipe that closes when the supervisor is gone."""

EXIT_GRACE_S = 2.0
"""Time from the end of an app to the end of its process at the latest."""

Run = Callable[[asyncio.Event], Awaitable[None]]


class LogLines(logging.Formatter):
    """Records as lines of which nobody can forge one: what others say stands in them, ids, addresses and reasons.

    Control characters are written out, and a record's further lines are indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return "\n    ".join(map(escaped, super().format(record).split("\n")))


def run_until_signalled(run: Run, log_level: str) -> None:
    """Run an app until SIGINT or SIGTERM asks it to stop; a second signal ends the process at once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=log_level.upper(), handlers=[handler])
    asyncio.run(_main(run))


async def _main(run: Run) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    if os.environ.get(SUPERVISED):
        loop.add_reader(sys.stdin.fileno(), lambda: _on_parent_gone(loop, stop))
    await run(stop)
    # What still runs in threads by now was given up, such as the loading of a model, which nothing can interrupt:
    # Python would wait for it.
    ending = threading.Timer(EXIT_GRACE_S, os._exit, (0,))
    ending.daemon = True
    ending.start()


def _on_parent_gone(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    loop.remove_reader(sys.stdin.fileno())
    stop.set()
