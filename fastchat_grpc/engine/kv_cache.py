"""Who owns which block of the KV cache. Accounting alone: the tensors belong to the model runner.

The cache is a pool of blocks of a fixed number of tokens. A sequence holds a table of blocks; a full
block of a prompt or an output may be shared by all sequences that begin with the same tokens. Blocks
that nobody holds keep their contents, found by their tokens, until their space is needed (least
recently used first). The engine thread owns the pool, so it needs no lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

ROOT = 0
"""The node that every prefix starts from."""


class BlockPool:
    """Blocks by reference count, and an exact index of their contents.

    A node is the identity of a prefix: a parent node and the tokens of one more block. Keys hold the
    tokens themselves, so that no hash collision can mix two conversations. Node numbers are never used
    again, so what follows an evicted block can no longer be found and ages out by itself.
    """

    def __init__(self, block_count: int, block_size: int) -> None:
        self.block_count = block_count
        self.block_size = block_size
        self._free: deque[int] = deque(range(block_count))
        self._references = [0] * block_count
        self._idle: OrderedDict[int, None] = OrderedDict()  # indexed, referenced by nobody; oldest first
        self._nodes: dict[tuple[int, Hashable], tuple[int, int]] = {}  # (parent, tokens) -> (node, block)
        self._key_of: dict[int, tuple[int, Hashable]] = {}  # indexed block -> its key
        self._next_node = ROOT + 1

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def usage(self) -> float:
        """Part of the blocks that sequences hold, 0 to 1."""
        return 1 - self.available / self.block_count

    def blocks_for(self, token_count: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-token_count // self.block_size)

    def allocate(self) -> int:
        """Take a block with undefined contents. The caller has checked `available`."""
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._nodes[self._key_of.pop(block)]
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Hold a block once more."""
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks. The last ones become the first to be reused: prefixes last longest."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    # Used next: memory of blocks that were never used is not taken before it is needed.
                    self._free.appendleft(block)

    def match(self, token_ids: Sequence[int], salt: Hashable) -> list[tuple[int, int]]:
        """The longest known prefix as (node, block) pairs, oldest first. Takes no reference."""
        found: list[tuple[int, int]] = []
        node = ROOT
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            entry = self._nodes.get(self._key(node, token_ids, start, salt))
            if entry is None:
                break
            found.append(entry)
            node = entry[0]
        return found

    def publish(self, parent: int, token_ids: Sequence[int], start: int, salt: Hashable, block: int) -> int:
        """Make a full block findable by its tokens; returns its node. A known prefix keeps its first block."""
        key = self._key(parent, token_ids, start, salt)
        entry = self._nodes.get(key)
        if entry is None:
            entry = (self._next_node, block)
            self._next_node += 1
            self._nodes[key] = entry
            self._key_of[block] = key
        return entry[0]

    def _key(self, parent: int, token_ids: Sequence[int], start: int, salt: Hashable) -> tuple[int, Hashable]:
        content = tuple(token_ids[start : start + self.block_size])
        # What changes keys and values beside the tokens, such as an adapter, parts the trees at the root.
        return parent, (salt, content) if parent == ROOT else content


class BlockTable:
    """Blocks of one sequence, in order, and how many of them are in the index."""

    __slots__ = ("blocks", "node", "published")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.published = 0
        self.node = ROOT

    def clear(self) -> None:
        """Forget everything; the pool has been told."""
        self.blocks = []
        self.published = 0
        self.node = ROOT
