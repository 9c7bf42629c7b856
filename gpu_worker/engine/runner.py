"""One forward pass over the scheduled rows: the protocol of all model runners, and the slowest, most general of them.

SequentialRunner serves models whose attention cannot be replaced (custom attention code, recurrent state), on any
device: one pass per sequence, with transformers' own cache. The fast runners are in cpu/runner.py and cuda/runner.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gpu_worker.engine.kv_cache import BlockCopy
from gpu_worker.engine.sampling import Drawn, sample, score_row
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import Sequence


class DrawAgain(Exception):
    """Some rows' filters keep more tokens than the sampler considered. Launch the same rows again: the sampler will
    then use a method without this limit."""


class ModelRunner(Protocol):
    def copy_blocks(self, copies: Rows[BlockCopy]) -> None:
        """Copy the keys and values of whole blocks, in all layers, before the next launch reads them."""

    def wipe_blocks(self, blocks: Rows[int]) -> None:
        """Zero blocks whose content may not be finite."""

    def launch(self, rows: Rows[ScheduledRow]) -> Any:
        """Start computing the rows. Pass the result to `collect`, or drop it.

        Does not change any sequence, and may be repeated, for all the rows or some of them, with the same result.
        Raises whatever the model raises.
        """

    def collect(self, launched: Any) -> list[Drawn | None]:
        """Wait for the step and return its draws: one entry per row, in order, None for rows that need no token.

        Raises DrawAgain, GrammarFailed, or whatever the model raises; the whole step is lost then.
        """

    def can_run_ahead(self, rows: Rows[ScheduledRow]) -> bool:
        """Whether the step after `rows`, which were launched last, may be launched before they are collected."""

    def free_memory(self) -> None:
        """Return cached memory to the device, which has run out of it."""

    def discard(self, sequence: Sequence) -> None:
        """Forget what is kept for the sequence: it has ended, or its computed tokens are no longer valid."""


class AtOnce(ABC):
    """A runner without overlap between host and device: `launch` does nothing and `collect` does all the work."""

    @abstractmethod
    def run(self, rows: Rows[ScheduledRow]) -> list[Drawn | None]: ...

    def launch(self, rows: Rows[ScheduledRow]) -> Rows[ScheduledRow]:
        return rows

    def collect(self, launched: Rows[ScheduledRow]) -> list[Drawn | None]:
        return self.run(launched)

    def can_run_ahead(self, rows: Rows[ScheduledRow]) -> bool:
        return False

    def free_memory(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def results_of(rows: Rows[ScheduledRow], scores: Rows[tuple[Drawn, ...]], logits: Tensor) -> list[Drawn | None]:
    """Draw a token for each row that needs one and attach the rows' prompt scores. `logits` is (num_drawing,
    vocab_size), for those rows only."""
    drawing = [row.sequence for row in rows if row.needs_token]
    drawn = iter(sample(logits, drawing) if drawing else ())
    results = [next(drawn) if row.needs_token else None for row in rows]
    return [
        replace(result or Drawn(None), prompt_scores=scored) if scored else result
        for result, scored in zip(results, scores, strict=True)
    ]


#: Argument and output names that transformers models use for their cache or recurrent state, apart from the usual one.
STATE_NAMES = ("cache", "state")


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A model's cache or recurrent state after the first `num_tokens` tokens of a sequence."""

    num_tokens: int
    arguments: dict[str, Any]


class SequentialRunner(AtOnce):
    """Runs any causal language model of transformers correctly, one sequence at a time, with the inputs that generate()
    would pass. Prompts cannot be chunked, shared or forked, so the scheduler is configured not to."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._state_by_sequence: dict[Sequence, SequenceState] = {}

    def copy_blocks(self, copies: Rows[BlockCopy]) -> None:
        assert not copies

    def wipe_blocks(self, blocks: Rows[int]) -> None:
        """Does nothing: sequences share no memory."""

    def discard(self, sequence: Sequence) -> None:
        self._state_by_sequence.pop(sequence, None)

    @torch.inference_mode()
    def run(self, rows: Rows[ScheduledRow]) -> list[Drawn | None]:
        scores: list[tuple[Drawn, ...]] = []
        ends: list[Tensor] = []
        for row in rows:
            logits = self._forward(row.sequence)
            scores.append(score_row(logits[: row.num_scored_tokens], row) if row.num_scored_tokens else ())
            if row.needs_token:
                ends.append(logits[-1:].float())
        return results_of(rows, scores, torch.cat(ends) if ends else torch.empty(0))

    def _forward(self, sequence: Sequence) -> Tensor:
        """Logits of the sequence's new tokens, or of all its tokens if it had to start over: (num_tokens, vocab_size).
        A sequence whose prompt is scored always starts over, unless all its tokens are new."""
        state = self._state_by_sequence.pop(sequence, None)
        if state is None or state.num_tokens != sequence.num_computed_tokens:
            # There is no state, or a failed attempt at this step has advanced it too far: start over.
            state = SequenceState(0, {})
        num_tokens = len(sequence.token_ids)
        inputs = self._model.prepare_inputs_for_generation(
            torch.tensor([sequence.token_ids], device=self._device),
            attention_mask=torch.ones(1, num_tokens, dtype=torch.int64, device=self._device),
            position_ids=torch.arange(num_tokens, device=self._device)[None],
            next_sequence_length=num_tokens - state.num_tokens,
            is_first_iteration=not state.num_tokens,
            use_cache=True,
            **state.arguments,
        )
        output = self._model(**inputs)
        arguments = {name: output[name] for name in STATE_NAMES if output.get(name) is not None}
        if arguments:
            self._state_by_sequence[sequence] = SequenceState(num_tokens, arguments)
        logits: Tensor = output.logits[0]
        return logits
