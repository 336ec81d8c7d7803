"""The ring: the same keys go to the same members, evenly, and few of them move when members come and go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fastchat_grpc.controller.ring import BITS, PROBES, Ring, affinity, points, probes


@dataclass(frozen=True)
class Member:
    name: str

    @property
    def affinity(self) -> int:
        return affinity(self.name)


def members(count: int) -> list[Member]:
    return [Member(f"worker-{i}") for i in range(count)]


def home(ring: Ring[Member], key: str) -> Member:
    return next(ring.nearest(key))[1]


KEYS = [f"key {i}" for i in range(2000)]


def test_the_order_is_that_of_the_shortest_way_from_any_of_the_keys_points() -> None:
    everybody = members(30)
    for key in KEYS[:50]:
        wanted = sorted(
            everybody,
            key=lambda member: min(
                (point - probe) % (1 << BITS) for point in points(member.affinity) for probe in probes(key)
            ),
        )
        assert [member for _, member in Ring(everybody).nearest(key)] == wanted


def test_each_member_comes_once_however_few_there_are() -> None:
    for count in (0, 1, 2, PROBES + 5):
        found = [member for _, member in Ring(members(count)).nearest("key")]
        assert sorted(found, key=lambda member: member.name) == sorted(members(count), key=lambda member: member.name)


def test_it_is_the_same_ring_in_whatever_order_members_came() -> None:
    everybody = members(25)
    at_once, one_by_one = Ring(everybody[:20]), Ring[Member]()
    for member in reversed(everybody):
        one_by_one.add(member)
    for member in everybody[20:]:
        one_by_one.discard(member)
    assert [home(at_once, key) for key in KEYS] == [home(one_by_one, key) for key in KEYS]


def test_who_leaves_gives_up_its_own_keys_alone_and_who_comes_takes_keys_to_itself_alone() -> None:
    everybody = members(20)
    ring = Ring(everybody)
    before = {key: home(ring, key) for key in KEYS}
    gone, new = everybody[7], Member("new")
    ring.discard(gone)
    assert all(home(ring, key) is owner for key, owner in before.items() if owner != gone)
    ring.add(new)
    assert {home(ring, key) for key in KEYS if home(ring, key) != before[key] and before[key] != gone} == {new}


def test_keys_are_spread_evenly() -> None:
    count, keys = 50, 20_000
    ring = Ring(members(count))
    shares = Counter(home(ring, f"k{i}") for i in range(keys))
    assert max(shares.values()) < 1.35 * keys / count
    assert min(shares.values()) > 0.6 * keys / count


def test_a_key_may_be_any_text() -> None:
    assert len(probes("\ud800")) == len(set(probes("\ud800"))) == PROBES
