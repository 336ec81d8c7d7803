"""The numbers that the pages promise are those that hold unless something else is set."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from fastchat_grpc.cli.fleet import COMMANDS
from fastchat_grpc.config import MAX_MESSAGE_BYTES, FailoverConfig, GatewayConfig, LeaseConfig
from fastchat_grpc.controller.leases import SURE_AFTER_LEASES
from fastchat_grpc.openai.jsonio import MAX_BODY_BYTES, MAX_CONTAINERS
from fastchat_grpc.rpc.channels import MAX_METADATA_BYTES
from fastchat_grpc.rpc.limits import CallBounds

DOCS = Path(__file__).resolve().parents[2] / "docs"
SAID = re.compile(r"`(--[a-z-]+)`(?: \(|, )([\d,]+)(?: s)?[;)]")
FLAGS = [(page.name, *found) for page in sorted(DOCS.glob("*.md")) for found in SAID.findall(page.read_text())]
LEASE = LeaseConfig()
OTHERS = [
    (
        "promises.md",
        "(heartbeat every 2 s, time to live 6 s)",
        (LEASE.heartbeat_interval_s, LEASE.time_to_live_s),
        (2, 6),
    ),
    ("promises.md", "above 1,000 heartbeats per second (2,000 workers)", LEASE.max_heartbeats_per_s, 1000),
    ("promises.md", "(262,144 tokens)", FailoverConfig().max_cached_tokens, 262_144),
    ("promises.md", "ten leases (60 s)", SURE_AFTER_LEASES * LEASE.time_to_live_s, 60),
    ("promises.md", "`wait_s` (10 s) at most", FailoverConfig().wait_s, 10),
    ("promises.md", "a fifth of the requests and 20 per second", FailoverConfig().retry_ratio, 1 / 5),
    ("promises.md", "a fifth of the requests and 20 per second", FailoverConfig().retry_reserve_per_s, 20),
    ("promises.md", "After 60 s it is told so", CallBounds().first_message_s, 60),
    ("security.md", "must come within 60 s", CallBounds().first_message_s, 60),
    ("security.md", "A JSON body has at most 16 MiB", MAX_BODY_BYTES, 16 << 20),
    ("security.md", "`--max-body-bytes` at the gateway: 8 MiB", GatewayConfig().max_body_bytes, 8 << 20),
    ("security.md", "100,000 lists and objects", MAX_CONTAINERS, 100_000),
    ("security.md", "An answer has at most 16 MiB", MAX_MESSAGE_BYTES, 16 << 20),
    ("security.md", "Metadata has at most 16 KiB", MAX_METADATA_BYTES, 16 << 10),
]


def test_numbers_of_flags_are_found() -> None:
    assert {flag for _, flag, _ in FLAGS} >= {"--max-resumes", "--failover-wait", "--max-workers", "--send-timeout"}


@pytest.mark.parametrize(("page", "flag", "number"), FLAGS)
def test_the_default_of_a_flag_is_what_the_pages_say(page: str, flag: str, number: str) -> None:
    options = [p for command in COMMANDS.values() for p in command.params if isinstance(p, click.Option)]
    defaults = {option.default for option in options if flag in option.opts}
    assert defaults == {float(number.replace(",", ""))}


@pytest.mark.parametrize(("page", "words", "found", "number"), OTHERS, ids=[words[:40] for _, words, _, _ in OTHERS])
def test_a_bound_without_a_flag_is_what_the_pages_say(page: str, words: str, found: object, number: object) -> None:
    assert words in " ".join((DOCS / page).read_text().split())
    assert found == number
