"""Members of requests that nobody knows: the caller hears of them in a header, the operator once in the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

logger = logging.getLogger(__name__)

HEADER = "x-fastchat-grpc-ignored"
_MAX_LOGGED = 256
"""Names that are remembered as logged; anybody can make up more."""
_UNFIT = re.compile(r"[^A-Za-z0-9_.:-]")


class Ignored:
    """Tells of ignored members. Values are never told: they may hold prompts."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def header(self, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Metadata that names them to the caller, a header over HTTP; nothing for no names."""
        if not names:
            return ()
        fit = [_UNFIT.sub("?", name) for name in names]
        self._log(fit)
        return ((HEADER, ", ".join(fit)),)

    def _log(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._logged]
        if new and len(self._logged) < _MAX_LOGGED:
            self._logged.update(new)
            logger.warning("requests have members that are not known and were ignored: %s", ", ".join(new))
