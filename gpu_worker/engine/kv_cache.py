"""Which blocks of the key/value cache belong to which sequence: block tables, reference counts, prefix reuse.

After PagedAttention (Kwon et al. 2023). Free of torch: here a block is just a number; the tensors belong to the model
runners. Block 0 is never allocated: it pads block tables, and the padding rows of captured passes write to it.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from gpu_worker.engine.sequence import Sequence

PADDING_BLOCK = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    source: int
    destination: int


class CachePool(Protocol):
    """Which part of a cache belongs to which sequence: what the scheduler and the engine ask of it. BlockPool explains
    each method."""

    use_prefix_cache: bool

    @property
    def num_tokens(self) -> int: ...

    @property
    def usage(self) -> float: ...

    def grow(self, sequence: Sequence, num_tokens: int) -> bool: ...

    def grow_all(self, sequences: Iterable[Sequence], *, num_more_tokens: int) -> bool: ...

    def admit(self, sequence: Sequence, *, num_spare: int) -> bool: ...

    def fork(self, parent: Sequence, child: Sequence, *, num_spare: int) -> tuple[BlockCopy, ...] | None: ...

    def free(self, sequence: Sequence) -> None: ...

    def publish(self, sequence: Sequence) -> None: ...

    def forget(self, sequence: Sequence) -> list[int]: ...


class BlockPool:
    """All blocks of one model. A block without readers is free, but keeps its content and its entry in the prefix cache
    until it is reallocated, least recently used first."""

    def __init__(self, num_blocks: int, block_size: int, *, use_prefix_cache: bool = True) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.use_prefix_cache = use_prefix_cache
        self._num_readers = [0] * num_blocks
        self._free: dict[int, None] = dict.fromkeys(
            range(1, num_blocks)
        )  # least recently used first; a dict, so that a block can be removed from the middle
        self._hash_by_block: dict[int, bytes] = {}
        self._block_by_hash: dict[bytes, int] = {}

    @property
    def num_tokens(self) -> int:
        """How many have room, all sequences together."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        return 1.0 - self.num_free / max(1, self.num_blocks - 1)

    def num_blocks_for(self, num_tokens: int) -> int:
        return (num_tokens + self.block_size - 1) // self.block_size

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold `num_tokens`. If there are too few free blocks, take none and return False."""
        num_missing = self.num_blocks_for(num_tokens) - len(sequence.block_ids)
        if num_missing > self.num_free:
            return False
        sequence.block_ids.extend(self._take() for _ in range(num_missing))
        return True

    def grow_all(self, sequences: Iterable[Sequence], *, num_more_tokens: int) -> bool:
        """Extend every block table to hold `num_more_tokens` beyond its sequence's tokens. If there are too few free
        blocks, take none and return False."""
        lengths = {sequence: len(sequence.token_ids) + num_more_tokens for sequence in sequences}
        num_missing = sum(
            max(0, self.num_blocks_for(length) - len(sequence.block_ids)) for sequence, length in lengths.items()
        )
        return num_missing <= self.num_free and all(self.grow(*item) for item in lengths.items())

    def admit(self, sequence: Sequence, *, num_spare: int) -> bool:
        """Allocate blocks for all tokens of a waiting sequence, reusing cached ones for its prefix. Takes none and
        returns False unless `num_spare` blocks would stay free."""
        shared = self._find_prefix(sequence)
        num_missing = self.num_blocks_for(len(sequence.token_ids)) - len(shared)
        num_idle = sum(1 for block in shared if not self._num_readers[block])
        if num_missing + num_idle + num_spare > self.num_free:
            return False
        for block in shared:
            self._share(block)
        sequence.block_ids = shared + [self._take() for _ in range(num_missing)]
        sequence.num_published_blocks = len(shared)
        sequence.num_computed_tokens = len(shared) * self.block_size
        return True

    def fork(self, parent: Sequence, child: Sequence, *, num_spare: int) -> tuple[BlockCopy, ...] | None:
        """Let `child` reuse its parent's prompt, except for the last token, whose logits it needs. Full blocks are
        shared; a partly filled one, which both will write to, is copied.

        Returns the copies to make; None if fewer than `num_spare` blocks would stay free.
        """
        num_shared_tokens = child.num_prompt_tokens - 1
        num_full, num_partial = divmod(num_shared_tokens, self.block_size)
        num_missing = self.num_blocks_for(len(child.token_ids)) - num_full
        if num_missing + num_spare > self.num_free:
            return None
        shared = parent.block_ids[:num_full]
        for block in shared:
            self._share(block)
        child.block_ids = shared + [self._take() for _ in range(num_missing)]
        child.num_published_blocks = num_full
        child.num_computed_tokens = num_shared_tokens
        return (BlockCopy(parent.block_ids[num_full], child.block_ids[num_full]),) if num_partial else ()

    def free(self, sequence: Sequence) -> None:
        """Release the sequence's blocks, the last one first, so that the start of a prefix outlives its end."""
        for block in reversed(sequence.block_ids):
            self._num_readers[block] -= 1
            if not self._num_readers[block]:
                self._free[block] = None
        sequence.block_ids = []
        sequence.num_computed_tokens = 0

    def publish(self, sequence: Sequence) -> None:
        """Add the blocks that are full and computed to the prefix cache."""
        if not self.use_prefix_cache:
            return
        num_full = sequence.num_computed_tokens // self.block_size
        for number in range(sequence.num_published_blocks, num_full):
            digest = self._block_hash(sequence, number)
            block = sequence.block_ids[number]
            if digest not in self._block_by_hash:
                self._block_by_hash[digest] = block
                self._hash_by_block[block] = digest
        sequence.num_published_blocks = num_full

    def forget(self, sequence: Sequence) -> list[int]:
        """Remove from the prefix cache the blocks that only this sequence reads, because their content cannot be
        trusted. Returns them so that they can be wiped."""
        own = [block for block in sequence.block_ids if self._num_readers[block] == 1]
        for block in own:
            self._unpublish(block)
        return own

    def _take(self) -> int:
        block = next(iter(self._free))
        del self._free[block]
        self._unpublish(block)
        self._num_readers[block] = 1
        return block

    def _share(self, block: int) -> None:
        self._free.pop(block, None)
        self._num_readers[block] += 1

    def _unpublish(self, block: int) -> None:
        digest = self._hash_by_block.pop(block, None)
        if digest is not None:
            del self._block_by_hash[digest]

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks of the longest prefix of this sequence. At least one token is left to compute, since its
        logits are needed."""
        blocks: list[int] = []
        if not self.use_prefix_cache or sequence.is_scoring:
            return blocks
        for number in range((len(sequence.token_ids) - 1) // self.block_size):
            block = self._block_by_hash.get(self._block_hash(sequence, number))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _block_hash(self, sequence: Sequence, number: int) -> bytes:
        """Hash of block `number` and all blocks before it. Cryptographic, so that nobody can construct two prefixes
        that collide."""
        hashes = sequence.block_hashes
        while len(hashes) <= number:
            before = hashes[-1] if hashes else blake2b(sequence.job.cache_salt.encode(), digest_size=32).digest()
            start = len(hashes) * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size])
            hashes.append(blake2b(before + tokens.tobytes(), digest_size=32).digest())
        return hashes[number]
