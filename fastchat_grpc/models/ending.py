"""How a process ends whose model can compute no more."""

from __future__ import annotations

import logging
import os
import threading

log = logging.getLogger(__name__)

EXIT_STATUS = 70
"""EX_SOFTWARE of sysexits.h."""
GRACE_S = 2.0
"""Until a process that cannot go on ends: its requests' errors are on their way, so that callers go elsewhere."""


def end_process(reason: str) -> None:
    """End this process visibly and soon; whoever supervises it starts another."""
    log.critical("%s: this worker ends now (status %d)", reason, EXIT_STATUS)
    timer = threading.Timer(GRACE_S, os._exit, (EXIT_STATUS,))
    timer.daemon = True
    timer.start()
