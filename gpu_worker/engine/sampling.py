"""From logits to tokens: grammar masks, one batched draw per step for any mix of parameters, and prompt logprobs.

The order for each row is: raw log-probabilities, logit bias, penalties, bans (end tokens before min_tokens,
bans.py, tokens that the grammar does not allow), temperature, top-k, top-p, min-p, draw.

The draw uses the Gumbel-max trick: the token with the highest sum of scaled logit and Gumbel noise wins. A token's
noise is a hash of (seed, sequence index, output position, token id); see cpu/draws.py. A draw therefore does not depend
on the other sequences in the batch, on preemptions, or on how often the job was resumed. The last bits of the logits do
depend on the batch's shape, but they change a token no more often than they change the distribution itself.

The score of a prompt is the logprob of each of its tokens given those before it: the logits of one position score the
token at the next. The scheduler limits how many positions are scored in a step, since each needs a row of logits over
over the whole vocabulary.

Free of torch, since every engine on a CPU samples here, those in environments of their own, too. On a GPU
cuda/sampler.py draws, and scoring.py scores.
"""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domain.errors import EngineError
from gpu_worker.engine.bans import BITS, words_of
from gpu_worker.engine.cpu.draws import draw
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import EngineJob, Grammar, Sequence
from text.tokenizers import TokenTable, as_text


class GrammarFailed(EngineError):
    """`job` has no token left to continue with. The message is logged, so it must not quote the grammar or output."""

    def __init__(self, job: EngineJob, message: str) -> None:
        super().__init__(message)
        self.job = job


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Bit masks of the tokens that masked rows may draw: `words[i]` belongs to row `rows[i]`. Valid until the
    next step."""

    rows: list[int]
    words: NDArray[np.int32]  # (len(rows), num_words), BITS tokens per word, lowest bit first

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Ban all other tokens, in place."""
        allowed = unpacked(self.words)[:, : logits.shape[1]].view(np.bool_)
        num_tokens = allowed.shape[1]
        for number, row in enumerate(self.rows):
            logits[row, :num_tokens][~allowed[number]] = -np.inf
            logits[row, num_tokens:] = -np.inf


def unpacked(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Ones and zeros, (num_rows, num_tokens)."""
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")


def token_masks(sequences: Rows[Sequence], vocab_size: int) -> TokenMasks | None:
    """The masks of the masked rows, without their banned tokens; None if there are no such rows.

    Raises GrammarFailed if a row may not draw any token.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence.is_masked]
    if not rows:
        return None
    words = np.repeat(_whole_vocabulary(vocab_size)[None], len(rows), axis=0)
    _keep_grammatical(words, [sequences[row].grammar for row in rows])
    for number, row in enumerate(rows):
        sequence = sequences[row]
        if sequence.grammar is not None and sequence.grammar.matcher.is_error():
            # llguidance's own message may quote the output, and ours is logged.
            raise GrammarFailed(sequence.job, "its structured output cannot be continued; simplify the schema")
        _keep_unbanned(words[number], sequence)
        if not words[number].any():
            raise GrammarFailed(sequence.job, nothing_left(sequence))
    return TokenMasks(rows, words)


def nothing_left(sequence: Sequence) -> str:
    if sequence.grammar is None:
        return "its parameters ban every token that could come next"
    return "its other parameters ban every token that its structured output allows"


@lru_cache(maxsize=4)
def _whole_vocabulary(vocab_size: int) -> NDArray[np.int32]:
    return words_of(range(vocab_size), vocab_size)


def _keep_grammatical(words: NDArray[np.int32], grammars: Rows[Grammar | None]) -> None:
    """Clear the bits of all tokens that a row's grammar does not allow."""
    pairs = [(number, grammar) for number, grammar in enumerate(grammars) if grammar is not None]
    if not pairs:
        return
    allowed = pairs[0][1].grammars.fill([grammar.matcher for _, grammar in pairs])
    width = min(allowed.shape[1], words.shape[1])
    numbers = [number for number, _ in pairs]
    words[numbers, :width] &= allowed[:, :width]
    words[numbers, width:] = 0


def _keep_unbanned(row: NDArray[np.int32], sequence: Sequence) -> None:
    allowed = sequence.job.bans.allowed
    if allowed is not None:
        row[: len(allowed)] &= allowed[: len(row)]
        row[len(allowed) :] = 0
    banned = [token_id for token_id in sequence.banned_token_ids() if token_id < len(row) * BITS]
    if banned:
        row &= ~words_of(banned, len(row) * BITS)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The result of one row. `logprob` and `top` are set if the job asks for them."""

    token_id: int | None  # None if the row only scored its prompt
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first
    prompt_scores: "tuple[Drawn, ...]" = ()  # for the row's prompt tokens from its second on, if the job asks


def sample(logits: NDArray[np.float32], sequences: Rows[Sequence]) -> list[Drawn]:
    """Draw one token per row.

    `logits` is (num_sequences, vocab_size) and is overwritten. Raises GrammarFailed, or ValueError if a row is not a
    distribution; the caller finds out which one by trying fewer rows.
    """
    masks = token_masks(sequences, logits.shape[-1])
    if not _is_finite(logits):
        raise ValueError("the model's logits are not finite")
    num_top_by_row = {
        row: s.job.params.logprobs or 0
        for row, s in enumerate(sequences)
        if s.job.params.logprobs is not None or s.job.params.best_of is not None
    }
    raw_logprobs = {row: log_softmax(logits[row]) for row in num_top_by_row}
    for row, sequence in enumerate(sequences):
        if is_adjusted(sequence):
            _adjust(logits[row], sequence)
    if masks is not None:
        masks.apply(logits)
    token_ids = _draw(logits, sequences)
    return [
        _with_logprobs(raw_logprobs[row], token_id, num_top_by_row[row]) if row in raw_logprobs else Drawn(token_id)
        for row, token_id in enumerate(token_ids)
    ]


def _is_finite(logits: NDArray[np.float32]) -> bool:
    """By each row's argmax, which points at a NaN if there is one, and is faster than looking at all."""
    return bool(np.isfinite(logits[range(len(logits)), logits.argmax(-1)]).all())


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    logprobs: NDArray[np.float32] = logits - logits.max(-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    return logprobs


def _with_logprobs(logprobs: NDArray[np.float32], token_id: int, num_top: int) -> Drawn:
    return Drawn(token_id, float(logprobs[token_id]), _top(logprobs, num_top))


def _top(logprobs: NDArray[np.float32], num_top: int) -> tuple[tuple[int, float], ...]:
    """The most likely tokens of one row; of equal ones those with the lower ids come first."""
    if not num_top:
        return ()
    least = np.partition(logprobs, -num_top)[-num_top] if num_top < len(logprobs) else -np.inf
    ids = np.flatnonzero(logprobs >= least)
    ids = ids[np.argsort(-logprobs[ids], kind="stable")][:num_top]
    return tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))


def is_adjusted(sequence: Sequence) -> bool:
    """Whether bias, penalties or bans may change the next token."""
    params = sequence.job.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or sequence.job.bans
        or not sequence.may_end
    )


def _adjust(row: NDArray[np.float32], sequence: Sequence) -> None:
    """Bias, penalties and bans of one row, in place."""
    params = sequence.job.params
    if params.logit_bias:
        row[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if params.repetition_penalty != 1.0:
        seen = list(sequence.job.penalised_prompt_ids | sequence.output_counts.keys())
        values, penalty = row[seen], np.float32(params.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    counts = sequence.output_counts
    if counts and (params.presence_penalty or params.frequency_penalty):
        amounts = np.array(list(counts.values()), np.float32)
        row[list(counts)] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * amounts
    if not sequence.may_end:
        row[[token_id for token_id in sequence.job.end_token_ids if token_id < len(row)]] = -np.inf
    if sequence.job.bans.token_ids:
        row[list(sequence.job.bans.token_ids)] = -np.inf
        if np.isneginf(row.max()):
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


#: Scores tokens by the logits before them, which are (num_tokens, vocab_size); with as many of the most likely ones.
def describe(tokens: TokenTable, sequence: Sequence, place: int, drawn: Drawn) -> dict[str, object]:
    """The token at position `place` of the sequence, as a dumped TokenLogprob."""
    assert drawn.token_id is not None
    has_text_before = any(map(tokens.shows, islice(sequence.token_ids, place)))
    bytes_of = tokens.bytes_of if has_text_before else tokens.first_bytes_of
    top = [(token_id, bytes_of(token_id), logprob) for token_id, logprob in drawn.top]
    token = bytes_of(drawn.token_id)
    is_shown = tokens.shows(drawn.token_id) or not sequence.job.params.skip_special_tokens
    return {
        "token": as_text(token),
        "token_id": drawn.token_id,
        "logprob": drawn.logprob,
        "bytes": tuple(token) if is_shown else (),
        "top": [(token_id, as_text(other), logprob) for token_id, other, logprob in top],
        "top_bytes": [tuple(other) for _, other, _ in top],
    }


ScoreTokens = Callable[[Any, list[int], int], list[Drawn]]


def split_scores(
    logits: Any, rows: Rows[ScheduledRow], score_tokens: ScoreTokens
) -> tuple[list[tuple[Drawn, ...]], Any]:
    """The scores of each row, and the logits of the rows that draw: (num_drawing, vocab_size).

    `logits` holds, row by row, the positions that judge the prompt, then the one that gives the next token. It is an
    array of numpy or a tensor, and so is the result.
    """
    if not any(row.num_scored_tokens for row in rows):
        return [()] * len(rows), logits
    scores: list[tuple[Drawn, ...]] = []
    drawing: list[int] = []
    place = 0
    for row in rows:
        scores.append(score_row(logits[place : place + row.num_scored_tokens], row, score_tokens))
        place += row.num_scored_tokens
        if row.needs_token:
            drawing.append(place)
            place += 1
    return scores, logits[drawing]


def score_row(logits: Any, row: ScheduledRow, score_tokens: ScoreTokens) -> tuple[Drawn, ...]:
    """`logits` is (num_scored_tokens, vocab_size), of the row's first positions."""
    first = row.start + 1
    token_ids = row.sequence.token_ids[first : first + row.num_scored_tokens]
    num_top = row.sequence.job.params.prompt_logprobs or 0
    size = max_num_scored_tokens(logits.shape[-1])
    return tuple(
        score
        for start in range(0, len(token_ids), size)
        for score in score_tokens(logits[start : start + size], token_ids[start : start + size], num_top)
    )


def score_tokens(logits: NDArray[np.float32], token_ids: list[int], num_top: int) -> list[Drawn]:
    logprobs = np.maximum(log_softmax(logits), np.float32(LEAST_LOGPROB))
    if not np.isfinite(logprobs).all():
        raise ValueError("the model's logits are not finite")
    return [_with_logprobs(row, token_id, num_top) for row, token_id in zip(logprobs, token_ids, strict=True)]


def results_of(
    rows: Rows[ScheduledRow], scores: Rows[tuple[Drawn, ...]], logits: NDArray[np.float32]
) -> list[Drawn | None]:
    """Draw for the rows that need a token; `logits` are theirs, (num_drawing, vocab_size)."""
    drawing = [row.sequence for row in rows if row.needs_token]
    drawn = iter(sample(logits, drawing) if drawing else ())
    results = [next(drawn) if row.needs_token else None for row in rows]
    return [
        replace(result or Drawn(None), prompt_scores=scored) if scored else result
        for result, scored in zip(results, scores, strict=True)
    ]
