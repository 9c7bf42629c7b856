"""One mask for all rows of a step that follow a grammar, and its use on the logits."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domain.errors import EngineError
from gpu_worker.engine.grammar import BITS, words_of
from gpu_worker.engine.sequence import EngineJob, Sequence


class GrammarFailed(EngineError):
    """`job` has no token that it may go on with. Says nothing of its grammar or output: it will be logged."""

    def __init__(self, job: EngineJob, message: str) -> None:
        super().__init__(message)
        self.job = job


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """`words[i]` has a bit for each token that row `rows[i]` may draw; valid until the next step."""

    rows: list[int]
    words: NDArray[np.int32]  # (num_rows, words)

    def apply(self, logits: Tensor) -> None:
        """Ban all other tokens, in place."""
        banned = self._banned(logits)
        for number, row in enumerate(self.rows):
            logits[row, : banned.shape[1]].masked_fill_(banned[number], -torch.inf)
            logits[row, banned.shape[1] :] = -torch.inf

    def _banned(self, logits: Tensor) -> Tensor:
        """Bool, (num_rows, num_tokens), on the device of the logits: to a GPU the bits travel packed."""
        num_tokens = min(logits.shape[1], self.words.shape[1] * BITS)
        bits = bits_on_cpu(self.words) if logits.device.type == "cpu" else bits_on_device(self.words, logits.device)
        return bits[:, :num_tokens] == 0


def bits_on_cpu(words: NDArray[np.int32]) -> Tensor:
    """Ones and zeros, (num_rows, num_tokens), by numpy, which has an instruction for it."""
    return torch.from_numpy(np.unpackbits(words.view(np.uint8), axis=1, bitorder="little"))


def bits_on_device(words: NDArray[np.int32], device: torch.device) -> Tensor:
    """The same, unpacked where they are used."""
    shifts = torch.arange(BITS, dtype=torch.int32, device=device)
    return ((torch.from_numpy(words).to(device)[:, :, None] >> shifts) & 1).flatten(1)


def token_masks(sequences: Rows[Sequence]) -> TokenMasks | None:
    """Of the rows with a grammar, banned tokens taken out; None if there is no such row. Raises GrammarFailed."""
    pairs = [(row, sequence.grammar) for row, sequence in enumerate(sequences) if sequence.grammar is not None]
    if not pairs:
        return None
    rows = [row for row, _ in pairs]
    words = pairs[0][1].grammars.fill([grammar.matcher for _, grammar in pairs])
    for number, (row, grammar) in enumerate(pairs):
        sequence = sequences[row]
        if grammar.matcher.is_error():
            # Its own words may quote the output, and this will be logged.
            raise GrammarFailed(sequence.job, "its structured output cannot be followed any further; simplify it")
        banned = _banned_token_ids(sequence)
        if banned:
            words[number] &= ~words_of(banned, words.shape[1] * BITS)
        if not words[number].any():
            raise GrammarFailed(sequence.job, "every token that its structured output allows here is banned")
    return TokenMasks(rows, words)


def _banned_token_ids(sequence: Sequence) -> list[int]:
    ends = [] if sequence.may_end else list(sequence.job.end_token_ids)
    return [*ends, *sequence.job.params.bad_token_ids]
