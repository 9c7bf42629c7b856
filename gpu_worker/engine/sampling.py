"""From logits to tokens: grammar masks, one batched draw per step for any mix of parameters, and prompt logprobs.

The order for each row is: raw log-probabilities, logit bias, penalties, bans (end tokens before min_tokens,
bad_token_ids, tokens that the grammar does not allow), temperature, top-k, top-p, min-p, draw.

The draw uses the Gumbel-max trick: the token with the highest sum of scaled logit and Gumbel noise wins. A token's
noise is a hash of (seed, sequence index, output position, token id); see cpu/draws.py. A draw therefore does not depend
on the other sequences in the batch, on preemptions, or on how often the job was resumed. The last bits of the logits do
depend on the batch's shape, but they change a token no more often than they change the distribution itself.

The score of a prompt token is its logprob given the tokens before it: the logits at one position score the token at the
next. The scheduler limits how many positions are scored in a step, since each needs a row of logits over the whole
vocabulary.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domain.errors import EngineError
from gpu_worker.engine.cpu.draws import draw
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import BITS, EngineJob, Sequence, words_of


class GrammarFailed(EngineError):
    """`job` has no token left to continue with. The message is logged, so it must not quote the grammar or output."""

    def __init__(self, job: EngineJob, message: str) -> None:
        super().__init__(message)
        self.job = job


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Bit masks of the tokens that rows with a grammar may draw: `words[i]` belongs to row `rows[i]`. Valid until the
    next step."""

    rows: list[int]
    words: NDArray[np.int32]  # (len(rows), num_words), BITS tokens per word, lowest bit first

    def apply(self, logits: Tensor) -> None:
        """Set the logits of all other tokens to -inf, in place."""
        banned = self._banned(logits)
        for number, row in enumerate(self.rows):
            logits[row, : banned.shape[1]].masked_fill_(banned[number], -torch.inf)
            logits[row, banned.shape[1] :] = -torch.inf

    def _banned(self, logits: Tensor) -> Tensor:
        """Bool (num_rows, num_tokens) on the logits' device. Masks travel to a GPU packed and are unpacked there."""
        num_tokens = min(logits.shape[1], self.words.shape[1] * BITS)
        bits = bits_on_cpu(self.words) if logits.device.type == "cpu" else bits_on_device(self.words, logits.device)
        return bits[:, :num_tokens] == 0


def bits_on_cpu(words: NDArray[np.int32]) -> Tensor:
    """Unpack masks to zeros and ones, uint8 (num_rows, num_tokens). numpy has a fast routine for this."""
    return torch.from_numpy(np.unpackbits(words.view(np.uint8), axis=1, bitorder="little"))


def bits_on_device(words: NDArray[np.int32], device: torch.device) -> Tensor:
    """Like `bits_on_cpu`, but int32 and unpacked on the device."""
    shifts = torch.arange(BITS, dtype=torch.int32, device=device)
    return ((torch.from_numpy(words).to(device)[:, :, None] >> shifts) & 1).flatten(1)


def token_masks(sequences: Rows[Sequence]) -> TokenMasks | None:
    """The masks of the rows that have a grammar, without their banned tokens; None if no row has one.

    Raises GrammarFailed if a row may not draw any token.
    """
    pairs = [(row, sequence.grammar) for row, sequence in enumerate(sequences) if sequence.grammar is not None]
    if not pairs:
        return None
    rows = [row for row, _ in pairs]
    words = pairs[0][1].grammars.fill([grammar.matcher for _, grammar in pairs])
    for number, (row, grammar) in enumerate(pairs):
        sequence = sequences[row]
        if grammar.matcher.is_error():
            # llguidance's own message may quote the output, and ours is logged.
            raise GrammarFailed(sequence.job, "its structured output cannot be continued; simplify the schema")
        banned = _banned_token_ids(sequence)
        if banned:
            words[number] &= ~words_of(banned, words.shape[1] * BITS)
        if not words[number].any():
            raise GrammarFailed(sequence.job, "its other parameters ban every token that its structured output allows")
    return TokenMasks(rows, words)


def _banned_token_ids(sequence: Sequence) -> list[int]:
    ends = [] if sequence.may_end else list(sequence.job.end_token_ids)
    return [*ends, *sequence.job.params.bad_token_ids]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The result of one row. `logprob` and `top` are set if the job asks for them."""

    token_id: int | None  # None if the row only scored its prompt
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first
    prompt_scores: "tuple[Drawn, ...]" = ()  # for the row's prompt tokens from its second on, if the job asks


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[Drawn]:
    """Draw one token per row.

    `logits` is float32 (num_sequences, vocab_size). On a CPU it is overwritten; from another device it is copied.
    Raises GrammarFailed, or ValueError if the logits of some row are not finite or all banned; the caller finds that
    row by retrying with fewer rows.
    """
    masks = token_masks(sequences)  # first, because a GPU may still be computing the logits
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
    """Look only at each row's argmax, which is a NaN if the row has one: numpy's argmax is faster than torch's
    isfinite."""
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
    """Apply bias, penalties and bans to one row of logits, in place."""
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
    """One token id per row: the argmax for greedy rows, a draw for the others."""
    token_ids = logits.argmax(-1)
    drawing = [row for row, sequence in enumerate(sequences) if sequence.job.params.temperature != 0]
    if len(drawing) == len(sequences):
        token_ids = draw(logits, token_ids, sequences)
    elif drawing:
        token_ids[drawing] = draw(logits[drawing], token_ids[drawing], [sequences[row] for row in drawing])
    chosen: list[int] = token_ids.tolist()
    return chosen


MAX_NUMBERS = 2**24  # logits held at a time for scoring: 64 MiB

LEAST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot express


def max_num_scored_tokens(vocab_size: int) -> int:
    """How many prompt positions a step may score, over all its rows."""
    return max(1, MAX_NUMBERS // vocab_size)


def split_scores(logits: Tensor, rows: Rows[ScheduledRow]) -> tuple[list[tuple[Drawn, ...]], Tensor]:
    """Separate the rows' prompt scores from the logits of the rows that draw, (num_drawing, vocab_size).

    `logits` is (num_kept, vocab_size): for each row in order, the positions that score its prompt, then the position
    that predicts its next token, if it needs one.
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
    """One Drawn per scored prompt token. `logits` is (num_scored_tokens, vocab_size), at the row's first positions."""
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
