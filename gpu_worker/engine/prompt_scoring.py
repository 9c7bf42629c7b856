"""What the model made of a prompt: the logprob of each of its tokens given those before it.

The logits of one position judge the token at the next. The scheduler bounds how many positions of a step are judged,
since each costs a row of logits over the whole vocabulary.
"""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from gpu_worker.engine.sampling import Drawn
from gpu_worker.engine.scheduler import ScheduledRow

MAX_NUMBERS = 2**24  # logits at once, 64 MiB of them
LEAST_LOGPROB = -9999.0  # JSON knows no infinity


def max_num_scored_tokens(vocab_size: int) -> int:
    """Of one step, over all its rows."""
    return max(1, MAX_NUMBERS // vocab_size)


def split_scores(logits: Tensor, rows: Rows[ScheduledRow]) -> tuple[list[tuple[Drawn, ...]], Tensor]:
    """The scores of each row, and the logits of the rows that draw: (num_drawing, vocab_size).

    `logits` holds, row by row, the positions that judge the prompt, then the one that gives the next token.
    """
    if not any(row.num_scored_tokens for row in rows):
        return [()] * len(rows), logits
    scores: list[tuple[Drawn, ...]] = []
    drawing: list[int] = []
    place = 0
    for row in rows:
        scores.append(score_row(logits[place : place + row.num_scored_tokens], row))
        place += row.num_scored_tokens
        if row.needs_token:
            drawing.append(place)
            place += 1
    return scores, logits[drawing]


def score_row(logits: Tensor, row: ScheduledRow) -> tuple[Drawn, ...]:
    """`logits` is (num_scored_tokens, vocab_size), of the row's first positions."""
    first = row.start + 1
    token_ids = row.sequence.token_ids[first : first + row.num_scored_tokens]
    num_top = row.sequence.job.params.prompt_logprobs or 0
    size = max_num_scored_tokens(logits.shape[-1])
    return tuple(
        score
        for start in range(0, len(token_ids), size)
        for score in _score_tokens(logits[start : start + size], token_ids[start : start + size], num_top)
    )


def _score_tokens(logits: Tensor, token_ids: list[int], num_top: int) -> list[Drawn]:
    logprobs = logits.float().log_softmax(-1).clamp_(min=LEAST_LOGPROB)
    if not bool(torch.isfinite(logprobs).all()):
        raise ValueError("the model's logits are not finite")
    given = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]).squeeze(1).tolist()
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]))
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Drawn(token_id, logprob, top) for token_id, logprob, top in zip(token_ids, given, tops, strict=True)]
