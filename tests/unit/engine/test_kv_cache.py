"""Accounting of the KV cache's blocks."""

import random

import pytest

from fastchat_grpc.engine.kv_cache import ROOT, BlockPool


def publish(pool, tokens, salt=""):
    """Allocate and publish the full blocks of a text; returns them."""
    blocks, node = [], ROOT
    for start in range(0, len(tokens) - pool.block_size + 1, pool.block_size):
        block = pool.allocate()
        node = pool.publish(node, tokens, start, salt, block)
        blocks.append(block)
    return blocks


def matched(pool, tokens, salt=""):
    return [block for _, block in pool.match(tokens, salt)]


def test_released_blocks_are_found_again_by_their_tokens():
    pool = BlockPool(8, 4)
    tokens = list(range(12))
    blocks = publish(pool, tokens)
    pool.release(blocks)
    assert pool.available == 8
    assert matched(pool, tokens) == blocks
    assert matched(pool, [*tokens[:8], 99, 98, 97, 96]) == blocks[:2]
    assert matched(pool, [99, *tokens]) == []
    assert matched(pool, tokens[:7]) == blocks[:1]


def test_equal_tokens_after_different_beginnings_are_different_blocks():
    pool = BlockPool(8, 2)
    publish(pool, [1, 2, 5, 6])
    second = publish(pool, [3, 4, 5, 6])
    assert matched(pool, [3, 4, 5, 6]) == second


def test_an_adapter_has_prefixes_of_its_own():
    pool = BlockPool(8, 2)
    publish(pool, [1, 2, 3, 4], salt="a")
    assert matched(pool, [1, 2, 3, 4], salt="b") == []


def test_the_least_recently_used_prefix_makes_room_from_its_end():
    pool = BlockPool(4, 1)
    first = publish(pool, [1, 2])
    pool.release(first)
    second = publish(pool, [5, 6])
    pool.release(second)
    assert pool.allocate() == first[1]
    assert matched(pool, [1, 2]) == first[:1]
    assert matched(pool, [5, 6]) == second


def test_a_shared_block_stays_until_its_last_holder_lets_go():
    pool = BlockPool(2, 1)
    block = pool.allocate()
    pool.share(block)
    pool.release([block])
    assert pool.available == 1
    pool.release([block])
    assert pool.available == 2


def test_blocks_that_were_never_used_are_used_last():
    """Their memory is not taken before there is need."""
    pool = BlockPool(1000, 16)
    used = set()
    for _ in range(300):
        blocks = [pool.allocate() for _ in range(3)]
        used |= set(blocks)
        pool.release(blocks)
    assert used == {0, 1, 2}


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_lost_or_held_twice_in_a_random_life(seed):
    rng = random.Random(seed)
    pool = BlockPool(16, 2)
    held = []
    for _ in range(300):
        if rng.random() < 0.5 and pool.available >= 4:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
            known = pool.match(tokens, "")
            for _, block in known:
                pool.share(block)
            blocks = [block for _, block in known]
            node = known[-1][0] if known else ROOT
            for start in range(len(known) * 2, len(tokens), 2):
                block = pool.allocate()
                assert all(block not in others for others in (blocks, *held))
                blocks.append(block)
                if start + 2 <= len(tokens):
                    node = pool.publish(node, tokens, start, "", block)
            held.append(blocks)
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        in_use = {block for blocks in held for block in blocks}
        assert pool.available == 16 - len(in_use)
