"""From logits to tokens: one batched draw per step, in any mix of parameters.

Order per row: raw log-probabilities, logit bias, penalties, bans (min_tokens), temperature, top-k, top-p, min-p, draw.
Randomness is keyed by (seed, sequence index, output position): a token does not depend on who else is in the batch, on
preemption, or on how often the job was resumed.
"""

import struct
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from gpu_worker.engine.sequence import Sequence

NUM_CANDIDATES = 256  # most filters keep fewer tokens than this; the others take a full sort


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row's next token. `logprob` and `top` (token id, logprob; most likely first) are there where the job asks."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[Drawn]:
    """Draw one token per row.

    `logits` is float32 (num_sequences, vocab_size) and is overwritten in place. Raises ValueError if a row is not a
    distribution; the caller finds out which by asking for fewer rows.
    """
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise ValueError("the model's logits are not finite")
    details = _logprob_details(logits, sequences)
    raw_logprobs = torch.log_softmax(logits, -1) if details else None
    for row, sequence in enumerate(sequences):
        _adjust(logits[row], sequence)
    token_ids = _draw(logits, sequences)
    if raw_logprobs is None:
        return [Drawn(token_id) for token_id in token_ids]
    return [_with_logprobs(raw_logprobs[row], token_id, details.get(row)) for row, token_id in enumerate(token_ids)]


def uniform(seed: int, index: int, position: int) -> float:
    """A number strictly between 0 and 1, the same for the same arguments on every machine."""
    digest = blake2b(struct.pack("<qqq", seed, index, position), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 11) + 0.5) / 2**53


def _logprob_details(logits: Tensor, sequences: Rows[Sequence]) -> dict[int, int]:
    """How many alternatives each row wants, for the rows that want log-probabilities at all."""
    wanted = ((row, sequence.job.params.logprobs) for row, sequence in enumerate(sequences))
    return {row: min(num, logits.shape[-1]) for row, num in wanted if num is not None}


def _with_logprobs(row_logprobs: Tensor, token_id: int, num_top: int | None) -> Drawn:
    if num_top is None:
        return Drawn(token_id)
    values, ids = row_logprobs.topk(num_top)
    return Drawn(token_id, row_logprobs[token_id].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _adjust(row: Tensor, sequence: Sequence) -> None:
    """Bias, penalties and bans of one row, in place."""
    params = sequence.job.params
    if params.logit_bias:
        row[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(sequence.token_ids)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
        if counts:
            amounts = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
            row[list(counts)] -= params.presence_penalty + params.frequency_penalty * amounts
    if not sequence.may_end:
        row[[token_id for token_id in sequence.job.end_token_ids if token_id < row.shape[0]]] = -torch.inf


def _draw(logits: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Greedy rows take the argmax, the others a draw; neither sees the other."""
    token_ids: list[int] = logits.argmax(-1).tolist()
    plain: list[int] = []
    filtered: list[int] = []
    for row, sequence in enumerate(sequences):
        params = sequence.job.params
        if params.temperature == 0:
            continue
        is_filtered = bool(params.top_k) or (params.top_p or 1.0) < 1.0 or params.min_p > 0
        (filtered if is_filtered else plain).append(row)
    for rows, draw in ((plain, _draw_plain), (filtered, _draw_filtered)):
        if not rows:
            continue
        drawing = [sequences[row] for row in rows]
        temperatures = [_temperature(sequence) for sequence in drawing]
        scaled = logits[rows].double() / torch.tensor(temperatures, device=logits.device, dtype=torch.float64)[:, None]
        for row, token_id in zip(rows, draw(scaled, drawing), strict=True):
            token_ids[row] = token_id
    return token_ids


def _temperature(sequence: Sequence) -> float:
    temperature = sequence.job.params.temperature
    return 1.0 if temperature is None else max(temperature, 1e-4)


def _targets(sequences: Rows[Sequence], device: torch.device) -> Tensor:
    numbers = [uniform(s.job.seed, s.index, s.num_output_tokens) for s in sequences]
    return torch.tensor(numbers, device=device, dtype=torch.float64)[:, None]


def _draw_plain(scaled: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Inverse of the cumulative distribution, in order of token id."""
    cumulative = (scaled - scaled.amax(-1, keepdim=True)).exp_().cumsum(-1)
    return _invert(cumulative, _targets(sequences, scaled.device))


def _invert(cumulative: Tensor, targets: Tensor) -> list[int]:
    """The first entry at which each row reaches its share of the row's total; never one of probability 0."""
    positions = torch.searchsorted(cumulative, targets * cumulative[:, -1:])
    found: list[int] = positions.squeeze(-1).tolist()
    return found


def _draw_filtered(scaled: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Among the most likely tokens where they hold all that the filters keep, else among all of them, sorted. Both
    give the same token: the order is by probability, then by id, and what is kept is the same."""
    drawn = _draw_among(scaled, sequences, min(NUM_CANDIDATES, scaled.shape[-1]))
    missing = [row for row, token_id in enumerate(drawn) if token_id is None]
    if missing:
        again = _draw_among(scaled[missing], [sequences[row] for row in missing], scaled.shape[-1])
        for row, token_id in zip(missing, again, strict=True):
            drawn[row] = token_id
    return [token_id for token_id in drawn if token_id is not None]


def _draw_among(scaled: Tensor, sequences: Rows[Sequence], num_candidates: int) -> list[int | None]:
    """Draw from the `num_candidates` most likely tokens; None for a row whose filters may keep more than those."""
    values, ids = _most_likely(scaled, num_candidates)
    total = (scaled - values[:, :1]).exp_().sum(-1, keepdim=True)
    cumulative = (values - values[:, :1]).exp_().cumsum(-1)
    cutoffs = _cutoffs(values, cumulative, total, sequences)
    kept = values >= cutoffs
    cumulative = torch.where(kept, cumulative, 0.0).cummax(-1).values
    positions = _invert(cumulative, _targets(sequences, scaled.device))
    chosen = ids.gather(1, torch.tensor(positions, device=ids.device)[:, None]).squeeze(-1).tolist()
    if num_candidates == scaled.shape[-1]:
        return list(chosen)
    is_complete = (values[:, -1:] < cutoffs).squeeze(-1).tolist()
    for row, sequence in enumerate(sequences):
        is_complete[row] &= not num_candidates < (sequence.job.params.top_k or 0) < scaled.shape[-1]
    return [token if whole else None for token, whole in zip(chosen, is_complete, strict=True)]


def _most_likely(scaled: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Values and ids, sorted by value descending, equal values by id."""
    if num_candidates == scaled.shape[-1]:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        return values, ids
    values, ids = scaled.topk(num_candidates)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _cutoffs(values: Tensor, cumulative: Tensor, total: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """The least scaled logit that each row's filters keep. Tokens that equal it are kept too."""
    num_candidates = values.shape[-1]
    params = [sequence.job.params for sequence in sequences]
    column = {"device": values.device, "dtype": torch.float64}
    min_p = torch.tensor([p.min_p for p in params], **column)[:, None]  # type: ignore[arg-type]
    top_p = torch.tensor([1.0 if p.top_p is None else p.top_p for p in params], **column)[:, None]  # type: ignore[arg-type]
    ranks = [min(p.top_k or num_candidates, num_candidates) - 1 for p in params]
    last = torch.tensor(ranks, device=values.device)[:, None]
    has_top_k = torch.tensor([0 < (p.top_k or 0) <= num_candidates for p in params], device=values.device)[:, None]
    mass = torch.where(has_top_k, cumulative.gather(1, last), total)
    # The first token whose cumulative share reaches top_p is the last one kept.
    reached = torch.searchsorted(cumulative, top_p * mass).clamp(max=num_candidates - 1)
    by_rank = values.gather(1, torch.minimum(reached, last))
    return torch.maximum(by_rank, values[:, :1] + min_p.log())
