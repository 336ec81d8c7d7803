"""Many short requests through one controller: `python -m tests.chaos.soak`. Memory must stay flat."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastchat_grpc.client import AsyncClient
from tests.chaos.__main__ import backend_arguments
from tests.chaos.fleet import ChaosFleet, Member

CALLERS = 32
WARM_UP = 0.2
"""Share of the requests after which memory counts: pools and caches have filled by then."""


@dataclass(frozen=True)
class Growth:
    """Resident memory of a process in MB, after the warm-up and at the end."""

    name: str
    before_mb: float
    after_mb: float

    @property
    def grown_mb(self) -> float:
        return self.after_mb - self.before_mb


async def soak(requests: int, log: Path) -> list[Growth]:
    """Send so many requests of one short text; raises if one of them fails or answers something else."""
    fleet = ChaosFleet(controllers=1, workers=2, backend=backend_arguments(None, 0.0), log=log)
    try:
        await fleet.start()
        async with AsyncClient(fleet.controllers[0].address) as client:
            await _send(client, int(requests * WARM_UP))
            before = {member: _memory_mb(member) for member in fleet.members}
            await _send(client, requests - int(requests * WARM_UP))
        await fleet.whole()
        return [Growth(member.name, before[member], _memory_mb(member)) for member in fleet.members]
    finally:
        await fleet.stop()


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
    print(f"{options.requests} requests, none failed")
    for process in grown:
        print(f"{process.name}: {process.before_mb:.1f} MB, then {process.after_mb:.1f} MB")
    sys.exit(1 if any(process.grown_mb > options.limit_mb for process in grown) else 0)


if __name__ == "__main__":
    main()
