"""The scheduler alone: who runs, how much, and who must give way."""

from __future__ import annotations

from fastchat_grpc.core import GenerateRequest, OutputOptions, TokenPrompt
from fastchat_grpc.engine.kv_cache import BlockPool
from fastchat_grpc.engine.request import Request, Sequence
from fastchat_grpc.engine.scheduler import GROW_AFTER_STEPS, Scheduler, SchedulerLimits


class World:
    """A scheduler whose model takes no time: every sampled token is 7."""

    def __init__(self, blocks=64, **limits):
        self.pool = BlockPool(blocks, 4)
        self.scheduler = Scheduler(self.pool, SchedulerLimits(**{"max_running": 8, "prefill_tokens": 16, **limits}))
        self.number = 0

    def add(self, length, *, first=None, priority=0, n=1):
        self.number += 1
        prompt = [first or self.number * 1000 + i for i in range(length)]
        spec = GenerateRequest(prompt=TokenPrompt(tuple(prompt)), priority=priority, output=OutputOptions(n=n))
        request = Request(spec=spec, prompt=prompt, number=self.number)
        request.sequences = [Sequence(request=request, index=i, tokens=list(prompt), seed=0) for i in range(n)]
        request.sequences[0].followers = request.sequences[1:]
        self.scheduler.add(request.sequences[0])
        return request.sequences[0]

    def step(self):
        batch = self.scheduler.next_batch()
        if batch is None:
            return {}
        self.scheduler.commit(batch)
        for sequence in batch.sampled:
            sequence.tokens.append(7)
        return {chunk.sequence: chunk.count for chunk in batch.chunks}


def test_a_long_prompt_is_cut_and_running_streams_get_a_token_at_every_step():
    world = World()
    stream = world.add(3)
    world.step()
    long = world.add(100)
    for _ in range(6):
        assert world.step() == {stream: 1, long: 16}
    assert world.step() == {stream: 1, long: 4}
    assert world.step() == {stream: 1, long: 1}


def test_a_short_prompt_does_not_wait_for_a_long_one():
    world = World()
    long = world.add(200)
    world.step()
    short = world.add(10)
    assert world.step() == {long: 6, short: 10}
    assert short.output_length == 1


def test_prompts_are_cut_finer_where_steps_are_slow_and_coarser_again_where_they_are_not():
    world = World(prefill_tokens=64, step_seconds=0.5, blocks=200)
    world.add(600)

    def pieces(count, seconds_per_token):
        found = []
        for _ in range(count):
            batch = world.scheduler.next_batch()
            world.scheduler.commit(batch)
            world.scheduler.pace(batch, batch.chunks[0].count * seconds_per_token)
            found.append(batch.chunks[0].count)
        return found

    slow = pieces(6, 1 / 32)  # 16 tokens in half a second
    assert slow[0] == 64
    assert slow == sorted(slow, reverse=True)
    assert 16 <= slow[-1] <= 18
    assert pieces(1, 10.0) == [16]
    assert pieces(2, 10.0)[-1] <= 12
    assert pieces(3, 10.0)[-1] == 2 * 4, "two blocks at least"
    assert pieces(4, 1 / 1000)[-1] == 64


def test_many_short_prompts_do_not_stop_the_oldest():
    world = World(blocks=400, max_running=100)
    long = world.add(60)
    world.step()
    for _ in range(40):
        world.add(8)
    steps = 0
    while long.output_length == 0:
        world.step()
        steps += 1
    assert steps <= 11  # it gets at least a quarter of 16 tokens each time


def test_nobody_joins_beyond_the_slots():
    world = World(max_running=2)
    sequences = [world.add(2) for _ in range(3)]
    assert set(world.step()) == set(sequences[:2])
    world.scheduler.remove(sequences[0])
    assert set(world.step()) == set(sequences[1:])


def test_nobody_joins_without_room_for_the_whole_prompt():
    world = World(blocks=8)
    first = world.add(20)
    second = world.add(16)
    while first.output_length == 0:
        world.step()
    assert world.scheduler.waiting == [second]
    world.scheduler.remove(first)
    assert second in world.step()


def test_the_youngest_of_the_lowest_priority_gives_way():
    world = World(blocks=6, reuse_prefixes=False)
    urgent = world.add(7, priority=-1)
    old = world.add(7)
    young = world.add(7)
    world.step()
    world.step()
    assert {urgent, old, young} == set(world.scheduler.running)
    world.step()
    assert world.scheduler.waiting == [young]
    assert world.scheduler.preemptions == 1
    assert young.computed == 0
    assert young.table.blocks == []
    assert young.output_length > 0


def test_a_preempted_sequence_computes_its_prompt_and_output_again():
    world = World(blocks=6, reuse_prefixes=False)
    old, young = world.add(11), world.add(7)
    while young in world.scheduler.running or young.output_length == 0:
        world.step()
    length = len(young.tokens)
    world.scheduler.remove(old)
    assert world.step() == {young: length}
    assert len(young.tokens) == length + 1


def test_a_known_beginning_is_skipped_but_never_the_last_token():
    world = World()
    first = world.add(16, first=5)
    world.step()
    world.scheduler.remove(first)
    assert world.step() == {}
    second = world.add(16, first=5)
    assert world.step() == {second: 4}


def test_choices_join_when_the_prompt_is_done_and_share_its_full_blocks():
    world = World()
    leader = world.add(10, n=3)
    batch = world.scheduler.next_batch()
    assert [child.index for _, child in batch.forks] == [1, 2]
    assert batch.sampled == leader.request.sequences
    tables = [s.table.blocks for s in leader.request.sequences]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3


def test_choices_without_a_slot_wait_by_themselves():
    world = World(max_running=2)
    leader = world.add(10, n=3)
    world.step()
    assert world.scheduler.running == leader.request.sequences[:2]
    assert world.scheduler.waiting == leader.request.sequences[2:]


def test_steps_shrink_after_running_out_of_memory_and_grow_again():
    world = World(blocks=400)
    sequences = [world.add(4) for _ in range(8)]
    for _ in range(3):
        world.step()
    batch = world.scheduler.next_batch()
    assert world.scheduler.shrink(batch)
    assert world.scheduler.running == sequences[:4]
    assert set(world.step()) == set(sequences[:4])
    for _ in range(GROW_AFTER_STEPS):
        world.scheduler.grow()
    world.step()
    assert len(world.scheduler.running) == 8


def test_a_single_token_that_has_no_memory_cannot_shrink():
    world = World()
    world.add(4)
    world.step()
    assert not world.scheduler.shrink(world.scheduler.next_batch())


def test_whole_prompts_are_never_cut():
    world = World(whole_prompts=True, blocks=100)
    long = world.add(100)
    assert world.step() == {long: 100}


def test_removing_frees_everything():
    world = World(reuse_prefixes=False)
    sequences = [world.add(9, n=2) for _ in range(4)]
    world.step()
    world.step()
    for sequence in sequences:
        for choice in sequence.request.sequences:
            world.scheduler.remove(choice)
    assert world.pool.available == world.pool.block_count
    assert world.step() == {}
