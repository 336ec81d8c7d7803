"""File descriptors: a connection takes one, and the usual soft limit of 1,024 is soon reached by a fleet."""

from __future__ import annotations

import contextlib
import sys

UNLIMITED = 1 << 62


def raise_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one, as far as the system allows; returns the limit now."""
    if sys.platform == "win32":  # no such limit there
        return UNLIMITED
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Some systems call the hard limit infinite, and refuse that as a soft one.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft
