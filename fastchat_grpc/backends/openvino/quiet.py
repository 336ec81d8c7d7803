"""OpenVINO's Python package, kept from sending usage data."""

from __future__ import annotations

import sys


def forbid_telemetry() -> None:
    """Call before the first `import openvino`, which would send an event to Intel, by a forked process.

    That process holds copies of this one's pipes, and can hang, as OpenVINO's threads run when it is forked: a
    parent that waits for the end of a pipe would then wait for ever. OpenVINO runs without the package that sends.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes its import fail
