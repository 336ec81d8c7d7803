"""Many short requests through one controller: `python -m tests.chaos.soak`. Memory must stay flat."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastchat_grpc.client import AsyncClient
from tests.chaos.fleet import ChaosFleet, Group, Member

CALLERS = 32
ROUNDS = 10
WARM_UP = 2
"""Rounds after which memory counts: pools and caches have filled by then."""


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process in MB, after each round."""

    name: str
    mb: tuple[float, ...]

    @property
    def grown_mb(self) -> float:
        """From the end of the warm-up to the end."""
        return self.mb[-1] - self.mb[WARM_UP - 1]


async def soak(requests: int, log: Path) -> list[Memory]:
    """Send so many requests of one short text; raises if one of them fails or answers something else."""
    echo = Group(model="echo", workers=2, backend=["--backend", "echo", "--model-path", "echo"])
    fleet = ChaosFleet(controllers=1, groups=[echo], log=log)
    rounds: list[list[float]] = []
    try:
        await fleet.start()
        async with AsyncClient(fleet.controller_addresses) as client:
            for _ in range(ROUNDS):
                await _send(client, requests // ROUNDS)
                rounds.append([_memory_mb(member) for member in fleet.members])
        await fleet.whole()
    finally:
        await fleet.stop()
    return [Memory(member.name, mb) for member, mb in zip(fleet.members, zip(*rounds, strict=True), strict=True)]


async def _send(client: AsyncClient, count: int) -> None:
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            text = f"r{number % 1000}"
            found = (await client.complete(text)).text
            assert found == text, f"asked for {text!r}, got {found!r}"

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


def _memory_mb(member: Member) -> float:
    pages = int(Path(f"/proc/{member.pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--limit-mb", type=float, default=10.0, help="growth that is taken as flat")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        grown = asyncio.run(soak(options.requests, Path(folder)))
    print(f"{options.requests} requests, none failed; resident memory in MB after each {options.requests // ROUNDS}:")
    for process in grown:
        print(f"{process.name:14}" + " ".join(f"{mb:6.1f}" for mb in process.mb))
    sys.exit(1 if any(process.grown_mb > options.limit_mb for process in grown) else 0)


if __name__ == "__main__":
    main()
