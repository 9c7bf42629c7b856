"""The slow runner, for models whose attention cannot be replaced (own attention code, recurrent state), on any device.

One pass per sequence, with a cache of transformers' own. The fast ones are in cpu/runner.py and cuda/runner.py.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_worker.engine.kv_cache import BlockCopy
from gpu_worker.engine.lora import Adapters
from gpu_worker.engine.sampling import Drawn, results_of, score_row
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.torch_runner import TorchAtOnce, score_tokens

#: The names under which models of transformers take and return what they remember of a sequence.
STATE_NAMES = ("cache", "state")


@dataclass(frozen=True, slots=True)
class SequenceState:
    """What a model remembers of one sequence's first `num_tokens` tokens."""

    num_tokens: int
    arguments: dict[str, Any]


class SequentialRunner(TorchAtOnce):
    """Runs any causal language model of transformers correctly, one sequence at a time, with the inputs that generate()
    gives it. Prompts are not chunked, shared or forked: the scheduler is told so."""

    def __init__(self, model: Any, device: torch.device, adapters: Adapters) -> None:
        self._model = model
        self._adapters = adapters
        self._device = device
        self._state_by_sequence: dict[Sequence, SequenceState] = {}

    def copy_blocks(self, copies: Rows[BlockCopy]) -> None:
        assert not copies

    def wipe_blocks(self, blocks: Rows[int]) -> None:
        """Nothing: no memory is shared."""

    def discard(self, sequence: Sequence) -> None:
        self._state_by_sequence.pop(sequence, None)

    @torch.inference_mode()
    def run(self, rows: Rows[ScheduledRow]) -> list[Drawn | None]:
        scores: list[tuple[Drawn, ...]] = []
        ends: list[Tensor] = []
        for row in rows:
            with self._adapters.applied_alone(row.sequence.job.adapter):
                logits = self._forward(row.sequence)
            scores.append(
                score_row(logits[: row.num_scored_tokens], row, score_tokens) if row.num_scored_tokens else ()
            )
            if row.needs_token:
                ends.append(logits[-1:].float())
        return results_of(rows, scores, (torch.cat(ends) if ends else torch.empty(0)).cpu().numpy())

    def _forward(self, sequence: Sequence) -> Tensor:
        """Logits of the sequence's new tokens, and of those before them if it had to start over: (any, vocab_size). A
        sequence whose prompt is scored always starts over, unless all its tokens are new."""
        state = self._state_by_sequence.pop(sequence, None)
        if state is None or state.num_tokens != sequence.num_computed_tokens:
            # Nothing is remembered, or an earlier try of this step got further than was counted: start over.
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
