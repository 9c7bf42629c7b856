"""Which of llama.cpp's sequences belongs to which of ours, and how much room they have in its cache.

llama.cpp keeps keys and values in cells, each of which may belong to several of its sequences; here these are called
slots. A slot keeps its tokens after its sequence has left, until it or its cells are needed: a text that begins with
the same tokens takes the slot over, or shares the cells of a slot in use.

A step looks at all cells in use, so kept ones are not free: no more slots are filled than sequences may run at once,
except for beginnings of texts that were interrupted, and are likely to come back.

The count of cells is cautious: shared ones count for each slot.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.kv_cache import BlockCopy
from gpu_worker.engine.sequence import Sequence

SPARE_CELLS = 16  # left free for each running sequence at an admission
MAX_TURNS = 4  # an interrupted text is awaited for so many admissions per slot


class SlotMemory(Protocol):
    """What llama.cpp does with its cells."""

    def truncate(self, slot: int, num_tokens: int) -> None:
        """Leave the first tokens of the slot only."""

    def share(self, source: int, destination: int, num_tokens: int) -> None:
        """Give the source's first tokens to an empty slot, too."""


@dataclass(slots=True)
class Slot:
    number: int
    user: Sequence | None = None
    num_cells: int = 0  # reserved by the user, or taken by what is kept
    kept: list[int] = field(default_factory=list)  # tokens of the last user, if there is no user now
    salt: str = ""
    is_awaited: bool = False  # the last user was interrupted, and is likely to come back
    last_use: int = 0

    def tokens(self) -> list[int]:
        return self.kept if self.user is None else self.user.token_ids[: self.user.num_computed_tokens]

    def begins_with(self, token_id: int) -> bool:
        """Most slots do not, which spares a comparison of thousands of tokens."""
        tokens = self.kept if self.user is None else self.user.token_ids
        return bool(tokens) and tokens[0] == token_id


class SlotPool:
    """As kv_cache.py's BlockPool is to the scheduler; a sequence's only block id is its slot."""

    def __init__(
        self, memory: SlotMemory, *, num_at_once: int, num_slots: int, num_cells: int, can_share: bool
    ) -> None:
        """`num_at_once` sequences run at most. `can_share` is False for models with a state that cannot be cut
        (recurrent ones)."""
        self._num_at_once = num_at_once
        self._num_cells = num_cells
        self.use_prefix_cache = can_share
        self._memory = memory
        self._slots = [Slot(number) for number in range(num_slots)]
        self._num_uses = 0

    @property
    def num_tokens(self) -> int:
        return self._num_cells

    @property
    def usage(self) -> float:
        return sum(slot.num_cells for slot in self._slots if slot.user is not None) / self._num_cells

    def admit(self, sequence: Sequence, *, num_spare: int) -> bool:
        """Give a waiting sequence a slot and cells for all its tokens, on the longest beginning that is there."""
        if all(slot.user is not None for slot in self._slots):
            return False
        source, num_shared = self._longest_prefix(sequence)
        slot = source if source is not None and source.user is None else self._least_missed()
        if not self._make_room(len(sequence.token_ids) - slot.num_cells + num_spare * SPARE_CELLS, keep=slot):
            return False
        if source is slot:
            self._memory.truncate(slot.number, num_shared)
        else:
            self._memory.truncate(slot.number, 0)
            if source is not None:
                self._memory.share(source.number, slot.number, num_shared)
        self._take(slot, sequence, num_shared)
        return True

    def fork(self, parent: Sequence, child: Sequence, *, num_spare: int) -> tuple[BlockCopy, ...] | None:
        """Start `child` on its parent's prompt, except for the last token. None if there is no room."""
        if all(slot.user is not None for slot in self._slots):
            return None
        slot = self._least_missed()
        if not self._make_room(len(child.token_ids) - slot.num_cells + num_spare * SPARE_CELLS, keep=slot):
            return None
        num_shared = child.num_prompt_tokens - 1
        self._memory.truncate(slot.number, 0)
        if num_shared:
            self._memory.share(parent.block_ids[0], slot.number, num_shared)
        self._take(slot, child, num_shared)
        return ()

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        slot = self._slot_of(sequence)
        if not self._make_room(num_tokens - slot.num_cells, keep=slot):
            return False
        slot.num_cells = max(slot.num_cells, num_tokens)
        return True

    def grow_all(self, sequences: Iterable[Sequence], *, num_more_tokens: int) -> bool:
        """Nothing runs ahead here."""
        return False

    def free(self, sequence: Sequence) -> None:
        if not sequence.block_ids:
            return
        slot = self._slot_of(sequence)
        slot.user = None
        slot.kept = sequence.token_ids[: sequence.num_computed_tokens] if self.use_prefix_cache else []
        slot.salt = sequence.job.cache_salt
        slot.is_awaited = bool(slot.kept) and not sequence.is_finished
        slot.last_use = self._num_uses
        slot.num_cells = len(slot.kept)
        self._memory.truncate(slot.number, len(slot.kept))
        sequence.block_ids = []
        sequence.num_computed_tokens = 0

    def publish(self, sequence: Sequence) -> None:
        """Nothing: what a slot has computed can be found at once."""

    def forget(self, sequence: Sequence) -> list[int]:
        """What the sequence has computed cannot be trusted, and is not to be found any more."""
        if sequence.block_ids:
            sequence.num_computed_tokens = 0
        return []

    def _slot_of(self, sequence: Sequence) -> Slot:
        return self._slots[sequence.block_ids[0]]

    def _least_missed(self) -> Slot:
        """The free slot that a text without a beginning of its own takes."""
        for slot in self._slots:
            if self._num_uses - slot.last_use > MAX_TURNS * len(self._slots):
                slot.is_awaited = False
        free = sorted((slot for slot in self._slots if slot.user is None), key=lambda slot: slot.last_use)
        empty = [slot for slot in free if not slot.kept]
        done = [slot for slot in free if slot.kept and not slot.is_awaited]
        num_running = len(self._slots) - len(free)
        if empty and (not done or num_running + len(done) < self._num_at_once):
            return empty[0]
        num_surplus = max(0, num_running + len(done) - self._num_at_once)  # they were awaited in vain
        for slot in done[1 : 1 + num_surplus]:
            self._empty(slot)
        return (done or free)[0]

    def _empty(self, slot: Slot) -> None:
        slot.kept, slot.num_cells, slot.is_awaited = [], 0, False
        self._memory.truncate(slot.number, 0)

    def _take(self, slot: Slot, sequence: Sequence, num_shared: int) -> None:
        self._num_uses += 1
        slot.user, slot.kept, slot.salt, slot.last_use = sequence, [], sequence.job.cache_salt, self._num_uses
        slot.num_cells = len(sequence.token_ids)
        slot.is_awaited = False
        sequence.block_ids = [slot.number]
        sequence.num_computed_tokens = num_shared

    def _longest_prefix(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """At least one token is left to compute: its logits are needed."""
        if not self.use_prefix_cache or sequence.is_scoring:
            return None, 0
        wanted = np.array(sequence.token_ids[:-1], np.int64)
        found: tuple[Slot | None, int] = None, 0
        for slot in self._slots:
            if slot.salt == sequence.job.cache_salt and slot.begins_with(sequence.token_ids[0]):
                num_common = _num_common(wanted, np.array(slot.tokens(), np.int64))
                if num_common > found[1]:
                    found = slot, num_common
        return found

    def _make_room(self, num_more: int, *, keep: Slot) -> bool:
        """Whether so many more cells can be had; kept tokens of other slots give way, the oldest first."""
        num_left = self._num_cells - sum(slot.num_cells for slot in self._slots)
        num_idle = sum(slot.num_cells for slot in self._slots if slot.user is None and slot is not keep)
        if num_more > num_left + num_idle:
            return False
        idle = [slot for slot in self._slots if slot.user is None and slot is not keep and slot.num_cells]
        for slot in sorted(idle, key=lambda slot: (slot.is_awaited, slot.last_use)):
            if num_more <= num_left:
                break
            num_left += slot.num_cells
            self._empty(slot)
        return True


def _num_common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
