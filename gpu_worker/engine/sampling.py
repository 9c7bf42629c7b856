"""From logits to tokens: one batched draw per step, in any mix of parameters.

Order per row: raw log-probabilities, logit bias, penalties, bans (min_tokens, bad_token_ids, what a structured output
does not allow), temperature, top-k, top-p, min-p, draw.

A draw is the token with the highest scaled logit plus Gumbel noise, and the noise of a token is a hash of (seed,
sequence index, output position, token id). So a draw does not depend on who else is in the batch, on preemption, or on
how often the job was resumed; and the last bits of the logits, which do depend on the batch's shape, change a token no
more often than they change the distribution itself.
"""

import struct
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from gpu_worker.engine.grammar_masks import token_masks
from gpu_worker.engine.sequence import Sequence

CPU_CACHED_NUMBERS = 2**16
NUM_CANDIDATES = 256  # most filters keep fewer tokens than this; for the others all are sorted


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

    `logits` is float32 (num_sequences, vocab_size) and is overwritten in place. Raises ValueError if a row is not a
    distribution; the caller finds out which by asking for fewer rows. Raises GrammarFailed.
    """
    masks = token_masks(sequences)  # first, since a GPU is still at work on the logits
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise ValueError("the model's logits are not finite")
    num_top_by_row = {
        row: s.job.params.logprobs or 0
        for row, s in enumerate(sequences)
        if s.job.params.logprobs is not None or s.job.params.best_of is not None
    }
    raw_logprobs = {row: logits[row].log_softmax(-1) for row in num_top_by_row}
    for row, sequence in enumerate(sequences):
        _adjust(logits[row], sequence)
    if masks is not None:
        masks.apply(logits)
    token_ids = _draw(logits, sequences)
    return [
        _with_logprobs(raw_logprobs[row], token_id, num_top_by_row[row]) if row in raw_logprobs else Drawn(token_id)
        for row, token_id in enumerate(token_ids)
    ]


def _with_logprobs(logprobs: Tensor, token_id: int, num_top: int) -> Drawn:
    values, ids = logprobs.topk(min(num_top, logprobs.shape[0]))
    return Drawn(token_id, logprobs[token_id].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _adjust(row: Tensor, sequence: Sequence) -> None:
    """Bias, penalties and bans of one row, in place."""
    params = sequence.job.params
    if params.logit_bias:
        row[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(sequence.job.penalised_prompt_ids | sequence.output_counts.keys()), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    counts = sequence.output_counts
    if counts and (params.presence_penalty or params.frequency_penalty):
        amounts = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[list(counts)] -= params.presence_penalty + params.frequency_penalty * amounts
    if not sequence.may_end:
        row[[token_id for token_id in sequence.job.end_token_ids if token_id < row.shape[0]]] = -torch.inf
    if params.bad_token_ids:
        row[list(params.bad_token_ids)] = -torch.inf
        if bool(torch.isneginf(row.amax())):
            raise ValueError("every token is banned")


def _draw(logits: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Greedy rows take the argmax, the others draw, with or without a sort; none sees the others."""
    token_ids = _argmax(logits)
    plain: list[int] = []
    sorting: list[int] = []
    for row, sequence in enumerate(sequences):
        params = sequence.job.params
        if params.temperature != 0:
            (sorting if params.top_k or (params.top_p or 1.0) < 1.0 else plain).append(row)
    for rows, draw in ((plain, _draw_plain), (sorting, _draw_sorted)):
        if rows:
            drawing = [sequences[row] for row in rows]
            temperatures = _column([_temperature(sequence) for sequence in drawing], logits)
            for row, token_id in zip(rows, draw(logits[rows] / temperatures, drawing), strict=True):
                token_ids[row] = token_id
    return token_ids


def _argmax(scores: Tensor) -> list[int]:
    """Of each row. On a CPU numpy's is several times faster than torch's."""
    best: list[int] = (scores.numpy() if scores.device.type == "cpu" else scores).argmax(-1).tolist()
    return best


def _temperature(sequence: Sequence) -> float:
    temperature = sequence.job.params.temperature
    return 1.0 if temperature is None else max(temperature, 1e-4)


def _column(values: Rows[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None]


def _draw_plain(scaled: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """From the whole vocabulary but for what min-p takes away; on a CPU in pieces that its cache holds."""
    num_rows = max(1, CPU_CACHED_NUMBERS // scaled.shape[-1]) if scaled.device.type == "cpu" else len(sequences)
    starts = range(0, len(sequences), num_rows)
    pieces = [(scaled[start : start + num_rows], sequences[start : start + num_rows]) for start in starts]
    return [token_id for rows, drawing in pieces for token_id in _draw_piece(rows, drawing)]


def _draw_piece(scaled: Tensor, sequences: Rows[Sequence]) -> list[int]:
    min_p = [sequence.job.params.min_p for sequence in sequences]
    if any(min_p):
        scaled.masked_fill_(scaled < scaled.amax(-1, keepdim=True) + _column(min_p, scaled).log(), -torch.inf)
    token_ids = torch.arange(scaled.shape[-1], dtype=torch.int32, device=scaled.device)
    return _argmax(scaled.add_(gumbel_noise(token_ids[None], sequences)))


def _draw_sorted(scaled: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Among the most likely tokens where these hold all that a row's filters keep, else among all of them. Both give
    the same token, since they keep the same ones."""
    drawn = _draw_among_likely(scaled, sequences)
    missing = [row for row, token_id in enumerate(drawn) if token_id is None]
    if missing:
        again = _draw_among_all(scaled[missing], [sequences[row] for row in missing])
        for row, token_id in zip(missing, again, strict=True):
            drawn[row] = token_id
    return [token_id for token_id in drawn if token_id is not None]


def _draw_among_likely(scaled: Tensor, sequences: Rows[Sequence]) -> list[int | None]:
    """None for a row whose filters may keep more than NUM_CANDIDATES tokens."""
    vocab_size = scaled.shape[-1]
    num_candidates = min(NUM_CANDIDATES, vocab_size)
    values, ids = _most_likely(scaled, num_candidates)
    cutoffs = _cutoffs(values, scaled, sequences)
    noisy = values.masked_fill(values < cutoffs, -torch.inf).add_(gumbel_noise(ids.int(), sequences))
    best = torch.tensor(_argmax(noisy), device=ids.device)[:, None]
    chosen: list[int | None] = ids.gather(1, best).squeeze(-1).tolist()
    if num_candidates == vocab_size:
        return chosen
    least = values[:, -1:]
    is_complete: list[bool] = ((least < cutoffs) | least.isneginf()).squeeze(-1).tolist()
    for row, sequence in enumerate(sequences):
        if not is_complete[row] or num_candidates < (sequence.job.params.top_k or 0) < vocab_size:
            chosen[row] = None
    return chosen


def _most_likely(scaled: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The highest values of each row, descending, and their ids. On a CPU numpy is several times faster."""
    if scaled.device.type != "cpu":
        values, ids = scaled.topk(num_candidates)
        return values, ids
    ids = torch.from_numpy(np.argpartition(scaled.numpy(), -num_candidates, axis=-1)[:, -num_candidates:])
    values = scaled.gather(1, ids)
    order = torch.from_numpy(np.argsort(-values.numpy(), axis=-1))
    return values.gather(1, order), ids.gather(1, order)


def _draw_among_all(scaled: Tensor, sequences: Rows[Sequence]) -> list[int]:
    if scaled.device.type == "cpu":
        values = torch.from_numpy(np.sort(scaled.numpy(), axis=-1)).flip(-1)
    else:
        values = scaled.sort(dim=-1, descending=True).values
    scaled.masked_fill_(scaled < _cutoffs(values, scaled, sequences), -torch.inf)
    return _draw_plain(scaled, sequences)


def _cutoffs(values: Tensor, scaled: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """The least scaled logit that each row's filters keep; tokens that equal it are kept too. `values` are the highest
    of `scaled`, or all of them, in descending order."""
    params = [sequence.job.params for sequence in sequences]
    num_candidates, vocab_size = values.shape[-1], scaled.shape[-1]
    cumulative = (values.double() - scaled.logsumexp(-1, keepdim=True)).exp_().cumsum(-1)
    top_k = [p.top_k or vocab_size for p in params]
    last = torch.tensor([min(k, num_candidates) - 1 for k in top_k], device=values.device)[:, None]
    has_top_k = torch.tensor([k < vocab_size for k in top_k], device=values.device)[:, None]
    mass = torch.where(has_top_k, cumulative.gather(1, last), 1.0)
    # The first token whose cumulative share reaches top_p is the last one kept.
    share = _column([1.0 if p.top_p is None else p.top_p for p in params], cumulative) * mass
    reached = torch.searchsorted(cumulative, share).clamp(max=num_candidates - 1)
    by_rank = values.gather(1, torch.minimum(reached, last))
    return torch.maximum(by_rank, values[:, :1] + _column([p.min_p for p in params], values).log())


def gumbel_noise(token_ids: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Standard Gumbel noise, float32, one row per sequence; `token_ids` is int32 (num_sequences or 1, num_tokens)."""
    keys = [noise_key(s.job.seed, s.index, s.num_output_tokens) for s in sequences]
    return keyed_noise(token_ids, torch.tensor(keys, dtype=torch.int32, device=token_ids.device))


def keyed_noise(token_ids: Tensor, keys: Tensor) -> Tensor:
    """`keys` is int32 (num_sequences, 2): the noise_key of each row's draw."""
    first, second = keys.T[:, :, None]
    bits = _mix(token_ids, first, second).bitwise_and_(0x7FFFFFFF)
    return bits.float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_().log_().neg_()


def noise_key(seed: int, index: int, position: int) -> tuple[int, int]:
    """64 bits that stand for one draw, the same on every machine and in every version."""
    digest = blake2b(struct.pack("<qqq", seed, index, position), digest_size=8).digest()
    first, second = struct.unpack("<ii", digest)
    return first, second


def _mix(token_ids: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """A 32-bit integer hash (the "lowbias32" finaliser, keyed twice) in wrapping int32 arithmetic."""
    bits = (token_ids * -0x61C88647).add(first)
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(second).mul_(-0x7B935975)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))
