"""Progress bars, on standard error and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, with a bar that follows their consumption."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description, console=Console(stderr=True), transient=True)


@contextmanager
def loading_bars() -> Iterator[None]:
    """Silence the bars of transformers inside, unless standard error is a terminal."""
    from transformers.utils import logging as transformers_logging

    silence = transformers_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if silence:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
