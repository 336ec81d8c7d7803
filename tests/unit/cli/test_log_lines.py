"""What processes write to their logs: nobody whose words stand in it forges a line."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from fastchat_grpc.cli.process import LogLines

FORGED = "w\n2026-01-01 00:00:00,000 ERROR root: forged\r\x1b[2J\u2028\u202e"


def lines(message: str, *arguments: object, **record: object) -> str:
    made = logging.LogRecord("name", logging.INFO, "", 1, message, arguments, record.get("exc_info"))  # type: ignore[arg-type]
    return LogLines("%(levelname)s %(name)s: %(message)s").format(made)


@pytest.mark.parametrize("place", ["worker %s registered", "controller %s; still trying", "%s"])
def test_text_of_others_begins_no_line_and_moves_no_cursor(place: str) -> None:
    first, *more = lines(place, FORGED).split("\n")
    assert first.startswith("INFO name: ")
    assert all(line.startswith("    ") for line in more)
    assert all(line.isprintable() for line in (first, *more))
    assert "forged" in "".join(more), "nothing is left out"


def test_neither_does_the_text_of_an_error() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        first, *more = lines("it failed", exc_info=sys.exc_info()).split("\n")
    assert first == "INFO name: it failed"
    assert len(more) > 3
    assert all(line.startswith("    ") and line.isprintable() for line in more)


PROCESS = """
import logging, sys
from fastchat_grpc.cli.process import run_until_signalled

async def run(stop):
    logging.getLogger("name").warning("worker %s", sys.argv[1])

run_until_signalled(run, "warning")
"""


def test_every_process_writes_its_log_so() -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS, FORGED], capture_output=True, check=True, timeout=60)
    told = done.stderr.decode()
    assert "WARNING name: worker w\n    2026-01-01" in told
    assert "\x1b" not in told
    assert "\r" not in told
