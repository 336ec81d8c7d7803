"""Which failures a device recovers from, and what to do where it does not."""

from __future__ import annotations

import logging
import os
import threading

import torch

log = logging.getLogger(__name__)

EXIT_STATUS = 70
"""EX_SOFTWARE of sysexits.h."""
GRACE_S = 2.0
"""Until a process that cannot go on ends: its requests' errors are on their way, so that callers go elsewhere."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error)


def is_broken(device: torch.device) -> bool:
    """Whether a device computes nothing any more, as a GPU after an illegal access, until its process ends."""
    try:
        return bool((torch.ones(2, device=device) + 1).sum().item() != 4.0)
    except Exception as error:
        return not is_out_of_memory(error)


def end_process(reason: str) -> None:
    """End this process visibly and soon; whoever supervises it starts another."""
    log.critical("%s: this worker ends now (status %d)", reason, EXIT_STATUS)
    timer = threading.Timer(GRACE_S, os._exit, (EXIT_STATUS,))
    timer.daemon = True
    timer.start()
