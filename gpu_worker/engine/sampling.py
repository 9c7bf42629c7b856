"""From logits to tokens: one batched draw per step, in any mix of parameters.

Order per row: raw log-probabilities, logit bias, penalties, bans (min_tokens, bad_token_ids, what a structured output
does not allow), temperature, top-k, top-p, min-p, draw.

A draw is the token with the highest scaled logit plus Gumbel noise, and the noise of a token is a hash of (seed,
sequence index, output position, token id): see noise.py. So a draw does not depend on who else is in the batch, on
preemption, or on how often the job was resumed; and the last bits of the logits, which do depend on the batch's shape,
change a token no more often than they change the distribution itself.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.engine.grammar_masks import token_masks
from gpu_worker.engine.host_draws import draw
from gpu_worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row's next token, None where it only scored its prompt. `logprob` and `top` (token id, logprob; most likely
    first) are there where the job asks."""

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt_scores: "tuple[Drawn, ...]" = ()  # of the prompt tokens from the row's second on, where the job asks


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[Drawn]:
    """Draw one token per row.

    `logits` is float32 (num_sequences, vocab_size); on a CPU it is overwritten in place, from elsewhere it is fetched.
    Raises ValueError if a row is not a distribution; the caller finds out which by asking for fewer rows. Raises
    GrammarFailed.
    """
    masks = token_masks(sequences)  # first, since a GPU is still at work on the logits
    logits = logits.cpu()
    if not _is_finite(logits.numpy()):
        raise ValueError("the model's logits are not finite")
    num_top_by_row = {
        row: s.job.params.logprobs or 0
        for row, s in enumerate(sequences)
        if s.job.params.logprobs is not None or s.job.params.best_of is not None
    }
    raw_logprobs = {row: logits[row].log_softmax(-1) for row in num_top_by_row}
    for row, sequence in enumerate(sequences):
        if _is_adjusted(sequence):
            _adjust(logits[row], sequence)
    if masks is not None:
        masks.apply(logits)
    token_ids = _draw(logits.numpy(), sequences)
    return [
        _with_logprobs(raw_logprobs[row], token_id, num_top_by_row[row]) if row in raw_logprobs else Drawn(token_id)
        for row, token_id in enumerate(token_ids)
    ]


def _is_finite(logits: NDArray[np.float32]) -> bool:
    """By each row's greatest, which is nan where there is one: numpy finds a place faster than torch a value."""
    return bool(np.isfinite(logits[range(len(logits)), logits.argmax(-1)]).all())


def _with_logprobs(logprobs: Tensor, token_id: int, num_top: int) -> Drawn:
    values, ids = logprobs.topk(min(num_top, logprobs.shape[0]))
    return Drawn(token_id, logprobs[token_id].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _is_adjusted(sequence: Sequence) -> bool:
    params = sequence.job.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.bad_token_ids
        or not sequence.may_end
    )


def _adjust(row: Tensor, sequence: Sequence) -> None:
    """Bias, penalties and bans of one row, in place."""
    params = sequence.job.params
    if params.logit_bias:
        row[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(sequence.job.penalised_prompt_ids | sequence.output_counts.keys()))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    counts = sequence.output_counts
    if counts and (params.presence_penalty or params.frequency_penalty):
        amounts = torch.tensor(list(counts.values()), dtype=row.dtype)
        row[list(counts)] -= params.presence_penalty + params.frequency_penalty * amounts
    if not sequence.may_end:
        row[[token_id for token_id in sequence.job.end_token_ids if token_id < row.shape[0]]] = -torch.inf
    if params.bad_token_ids:
        row[list(params.bad_token_ids)] = -torch.inf
        if bool(torch.isneginf(row.amax())):
            raise ValueError("every token is banned")


def _draw(logits: NDArray[np.float32], sequences: Rows[Sequence]) -> list[int]:
    """Greedy rows take the argmax, the others draw; none sees the others."""
    token_ids = logits.argmax(-1)
    drawing = [row for row, sequence in enumerate(sequences) if sequence.job.params.temperature != 0]
    if len(drawing) == len(sequences):
        token_ids = draw(logits, token_ids, sequences)
    elif drawing:
        token_ids[drawing] = draw(logits[drawing], token_ids[drawing], [sequences[row] for row in drawing])
    chosen: list[int] = token_ids.tolist()
    return chosen
