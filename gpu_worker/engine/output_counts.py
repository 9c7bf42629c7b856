"""How often each token is in a sequence's output, kept on the device for the sequences with a penalty.

The host's counts are the truth; a row is made from them when its sequence first draws, and then counts along, so that
a step can be launched before the host knows the token of the step before.
"""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from gpu_worker.engine.sequence import Sequence

FIRST_CAPACITY = 4


class OutputCounts:
    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._row_by_sequence: dict[Sequence, int] = {}
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.is_in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def rows_of(self, sequences: Rows[Sequence]) -> list[int]:
        """The row of each, counted up to its last committed token at least."""
        return [self._row_of(sequence) for sequence in sequences]

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """`rows` and `token_ids` are int64 (num_sequences,)."""
        ones = torch.ones_like(token_ids, dtype=torch.int32)
        self.counts.index_put_((rows, token_ids), ones, accumulate=True)

    def release(self, sequence: Sequence) -> None:
        self._row_by_sequence.pop(sequence, None)

    def reset(self) -> None:
        """After a failure: what was counted may never be committed."""
        self._row_by_sequence.clear()

    def _row_of(self, sequence: Sequence) -> int:
        row = self._row_by_sequence.get(sequence)
        if row is None:
            taken = set(self._row_by_sequence.values())
            row = next(row for row in range(len(taken) + 1) if row not in taken)
            self._reserve(row + 1)
            self._write(row, sequence)
            self._row_by_sequence[sequence] = row
        return row

    def _reserve(self, num_rows: int) -> None:
        capacity = max(FIRST_CAPACITY, len(self.counts))
        while capacity < num_rows:
            capacity *= 2
        num_more = capacity - len(self.counts)
        if num_more:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(num_more, self._vocab_size)])
            self.is_in_prompt = torch.cat([self.is_in_prompt, self.is_in_prompt.new_zeros(num_more, self._vocab_size)])

    def _write(self, row: int, sequence: Sequence) -> None:
        self.counts[row] = 0
        self.is_in_prompt[row] = False
        if sequence.output_counts:
            ids, amounts = (self._ints(values) for values in zip(*sequence.output_counts.items(), strict=True))
            self.counts[row, ids] = amounts.int()
        if sequence.job.penalised_prompt_ids:
            self.is_in_prompt[row, self._ints(sequence.job.penalised_prompt_ids)] = True

    def _ints(self, values: "Rows[int] | frozenset[int]") -> Tensor:
        return torch.tensor(list(values), device=self._device)
