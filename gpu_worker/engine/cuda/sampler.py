"""The draws of sampling.py, computed on the device, so that one copy at the end brings all results to the host.

The definition, the order and the noise are the same. But where sampling.py looks at intermediate results to choose a
cheaper method, here the method of each row is chosen beforehand. If it turns out to be insufficient for a row, the
result is flagged and the step is drawn again with another method.

A batch's sampling parameters are tensors that are rebuilt whenever the batch changes. For sequences with a penalty, the
device counts how often each output token occurs. The host's counts are authoritative: a row is filled from them when
its sequence first draws. From then on the device counts as well, so that a step can be launched before the host knows
the previous step's tokens.
"""

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from domain.requests import SamplingParams
from gpu_worker.engine.cpu.draws import LEAST_TEMPERATURE, noise_key
from gpu_worker.engine.cuda.masks import apply_masks
from gpu_worker.engine.cuda.noise import keyed_noise
from gpu_worker.engine.runner import DrawAgain
from gpu_worker.engine.sampling import Drawn, TokenMasks
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import Sequence

FIRST_CAPACITY = 4


class OutputCounts:
    """Output token counts on the device, int32 (num_rows, vocab_size), one row per sequence with a penalty."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._row_by_sequence: dict[Sequence, int] = {}
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.is_in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def rows_of(self, sequences: Rows[Sequence]) -> list[int]:
        """Each sequence's row. Its counts include at least all committed tokens."""
        return [self._row_of(sequence) for sequence in sequences]

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """Count one more token per row. `rows` and `token_ids` are int64 (num_sequences,)."""
        ones = torch.ones_like(token_ids, dtype=torch.int32)
        self.counts.index_put_((rows, token_ids), ones, accumulate=True)

    def discard(self, sequence: Sequence) -> None:
        self._row_by_sequence.pop(sequence, None)

    def reset(self) -> None:
        """Drop all counts after a failure, since counted tokens may never be committed."""
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


NUM_CANDIDATES = 256  # most filters keep fewer tokens than this; otherwise the whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class SparseTerms:
    """Values for individual logits, each with its row and token id."""

    rows: Tensor  # int64 (num_terms,)
    token_ids: Tensor  # int64 (num_terms,)
    values: Tensor  # float32 (num_terms,)


@dataclass(frozen=True, slots=True)
class Penalties:
    rows: Tensor  # int64 (num_penalised,)
    repetition: Tensor  # float32 (num_penalised, 1), like the next two
    presence: Tensor
    frequency: Tensor
    sequences: Rows[Sequence]


@dataclass(frozen=True, slots=True)
class DrawGroup:
    """Rows that draw with the same method. Tensors are (num_rows, 1) unless stated otherwise."""

    rows: Tensor  # int64 (num_rows,)
    temperature: Tensor
    top_k: Tensor  # int64; the vocabulary's size if off
    top_p: Tensor  # float64
    log_min_p: Tensor  # -inf if off
    has_min_p: bool


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    sequences: Rows[Sequence]
    bias: SparseTerms | None
    bans: SparseTerms | None  # values are always -inf
    ends: SparseTerms | None  # values are the output positions from which the token may be drawn
    penalties: Penalties | None
    whole: DrawGroup | None  # rows with at most min-p: draw from the whole vocabulary
    likely: DrawGroup | None  # rows that filter the NUM_CANDIDATES most likely tokens
    sorted: DrawGroup | None  # rows that sort and filter the whole vocabulary
    logprob_rows: Tensor | None  # int64 (num_asking,): rows that ask for logprobs
    num_top_logprobs: int  # the largest number that any row asks for


def make_plan(
    sequences: Rows[Sequence], wide: Iterable[Sequence], vocab_size: int, device: torch.device
) -> SamplingPlan:
    """Choose each row's method and build the tensors. `wide` are sequences whose filters have turned out to keep more
    than NUM_CANDIDATES tokens."""
    maker = _Maker(sequences, vocab_size, device)
    params = [sequence.job.params for sequence in sequences]
    drawing = [row for row, p in enumerate(params) if p.temperature != 0]
    filtered = {row for row in drawing if params[row].top_k or (params[row].top_p or 1.0) < 1.0}
    is_wide = set(wide)
    by_sort = {row for row in filtered if sequences[row] in is_wide or _keeps_many(params[row], vocab_size)}
    asking = [row for row, sequence in enumerate(sequences) if asks_logprobs(sequence)]
    return SamplingPlan(
        sequences=sequences,
        bias=maker.terms(lambda s: s.job.params.logit_bias.items()),
        bans=maker.terms(lambda s: ((token_id, -math.inf) for token_id in s.job.bans.token_ids)),
        ends=maker.terms(lambda s: _late_ends(s, vocab_size)),
        penalties=maker.penalties(),
        whole=maker.group([row for row in drawing if row not in filtered]),
        likely=maker.group([row for row in drawing if row in filtered - by_sort]),
        sorted=maker.group([row for row in drawing if row in by_sort]),
        logprob_rows=maker.ints(asking) if asking else None,
        num_top_logprobs=min(vocab_size, max((params[row].logprobs or 0 for row in asking), default=0)),
    )


def asks_logprobs(sequence: Sequence) -> bool:
    params = sequence.job.params
    return params.logprobs is not None or params.best_of is not None


def _keeps_many(params: SamplingParams, vocab_size: int) -> bool:
    return NUM_CANDIDATES < (params.top_k or 0) < vocab_size


def _late_ends(sequence: Sequence, vocab_size: int) -> list[tuple[int, float]]:
    min_tokens = sequence.job.params.min_tokens
    ends = [token_id for token_id in sequence.job.end_token_ids if token_id < vocab_size]
    return [(token_id, float(min_tokens)) for token_id in ends] if min_tokens else []


class _Maker:
    def __init__(self, sequences: Rows[Sequence], vocab_size: int, device: torch.device) -> None:
        self._sequences = sequences
        self._params = [sequence.job.params for sequence in sequences]
        self._vocab_size = vocab_size
        self._device = device

    def ints(self, values: Rows[int]) -> Tensor:
        return self._to_device(torch.tensor(values, dtype=torch.int64))

    def column(self, values: Rows[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._to_device(torch.tensor(values, dtype=dtype))[:, None]

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy asynchronously from pinned memory, which the allocator does not reuse until the copy is done."""
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def terms(self, of_sequence: Callable[[Sequence], Iterable[tuple[int, float]]]) -> SparseTerms | None:
        triples = [
            (row, token_id, value) for row, s in enumerate(self._sequences) for token_id, value in of_sequence(s)
        ]
        if not triples:
            return None
        rows, token_ids, values = zip(*triples, strict=True)
        return SparseTerms(self.ints(rows), self.ints(token_ids), self.column(values)[:, 0])

    def penalties(self) -> Penalties | None:
        rows = [
            row
            for row, p in enumerate(self._params)
            if p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
        ]
        if not rows:
            return None
        return Penalties(
            rows=self.ints(rows),
            repetition=self.column([self._params[row].repetition_penalty for row in rows]),
            presence=self.column([self._params[row].presence_penalty for row in rows]),
            frequency=self.column([self._params[row].frequency_penalty for row in rows]),
            sequences=[self._sequences[row] for row in rows],
        )

    def group(self, rows: Rows[int]) -> DrawGroup | None:
        if not rows:
            return None
        params = [self._params[row] for row in rows]
        temperatures = [1.0 if p.temperature is None else max(p.temperature, LEAST_TEMPERATURE) for p in params]
        return DrawGroup(
            rows=self.ints(rows),
            temperature=self.column(temperatures),
            top_k=self.ints([min(p.top_k or self._vocab_size, self._vocab_size) for p in params])[:, None],
            top_p=self.column([1.0 if p.top_p is None else p.top_p for p in params], torch.float64),
            log_min_p=self.column([math.log(p.min_p) if p.min_p else -math.inf for p in params]),
            has_min_p=any(p.min_p for p in params),
        )


IS_FINITE, IS_COMPLETE = 1, 2


@dataclass(frozen=True, slots=True)
class SampledStep:
    """A step's results on the device. `packed` is one int32 vector: token ids, flags, and for rows that ask for them
    the token's logprob, the ids of the most likely tokens, and their logprobs. Floats are stored as their bits."""

    plan: SamplingPlan
    packed: Tensor


class DeviceSampler:
    """Draws tokens on the device. `token_ids`, int64 (max_num_seqs,), holds the last step's draws, in the order of its
    rows, for the next step to start from."""

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._vocabulary = torch.arange(vocab_size, dtype=torch.int32, device=device)[None]
        self._plan: SamplingPlan | None = None
        self._wide: set[Sequence] = set()
        self._counts = OutputCounts(vocab_size, device)
        self.token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def discard(self, sequence: Sequence) -> None:
        self._wide.discard(sequence)
        self._counts.discard(sequence)

    def forget(self) -> None:
        """Call when a step has failed or was dropped: the next one rebuilds the plan and the counts."""
        self._plan = None
        self._counts.reset()

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Rows[ScheduledRow], masks: TokenMasks | None = None) -> SampledStep:
        """Queue the draws of `rows`. `logits` is float32 (num_rows, vocab_size) and is overwritten."""
        plan = self._plan_for([row.sequence for row in rows])
        keys, positions = self._step_numbers(rows)
        is_finite = logits.amax(-1).isfinite()
        asking = plan.logprob_rows
        raw_logprobs = None if asking is None else logits[asking].log_softmax(-1)
        is_finite &= self._adjust(logits, plan, positions)
        if masks is not None:
            apply_masks(masks, logits)
        token_ids = logits.argmax(-1)
        is_complete = torch.ones_like(is_finite)
        self._draw(logits, plan, keys, token_ids, is_complete)
        self.token_ids[: len(rows)] = token_ids
        if plan.penalties is not None:
            count_rows = self._count_rows(plan.penalties)
            self._counts.add(count_rows, token_ids[plan.penalties.rows])
        flags = is_finite.int() * IS_FINITE + is_complete.int() * IS_COMPLETE
        packed = [token_ids.int(), flags]
        if raw_logprobs is not None and asking is not None:
            packed += _logprob_parts(raw_logprobs, token_ids[asking], plan.num_top_logprobs)
        return SampledStep(plan, torch.cat(packed))

    def read(self, step: SampledStep, packed: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> list[Drawn]:
        """Unpack a step's results; `packed` is its vector, copied to the host.

        Raises ValueError if a row's logits are not finite or all banned, and DrawAgain if some rows need another
        method. In both cases the whole step must be repeated.
        """
        num_rows = len(step.plan.sequences)
        token_ids, flags = packed[:num_rows].tolist(), packed[num_rows : 2 * num_rows]
        if not (flags & IS_FINITE).all():
            raise ValueError("the model's logits are not finite, or every token is banned")
        if not (flags & IS_COMPLETE).all():
            self._wide.update(step.plan.sequences[row] for row in np.flatnonzero(flags & IS_COMPLETE == 0).tolist())
            self._plan = None
            raise DrawAgain
        logprobs = _read_logprobs(step.plan, packed[2 * num_rows :])
        return [Drawn(token_id, *logprobs.get(row, ())) for row, token_id in enumerate(token_ids)]

    def _plan_for(self, sequences: Rows[Sequence]) -> SamplingPlan:
        if self._plan is None or self._plan.sequences != sequences:
            self._plan = make_plan(sequences, self._wide, self._vocab_size, self._device)
        return self._plan

    def _step_numbers(self, rows: Rows[ScheduledRow]) -> tuple[Tensor, Tensor]:
        """The rows' noise keys, int32 (num_rows, 2), and output positions, float32 (num_rows,)."""
        positions = [row.num_output_tokens for row in rows]
        keys = [noise_key(r.sequence.job.seed, r.sequence.index, p) for r, p in zip(rows, positions, strict=True)]
        numbers = torch.tensor([(*key, position) for key, position in zip(keys, positions, strict=True)]).int()
        if self._device.type == "cuda":
            numbers = numbers.pin_memory()
        numbers = numbers.to(self._device, non_blocking=True)
        return numbers[:, :2], numbers[:, 2].float()

    def _adjust(self, logits: Tensor, plan: SamplingPlan, positions: Tensor) -> Tensor:
        """Apply bias, penalties and bans in place. Returns, bool (num_rows,), whether each row has a token left."""
        if plan.bias is not None:
            _add(logits, plan.bias, plan.bias.values)
        if plan.penalties is not None:
            self._penalise(logits, plan.penalties)
        if plan.ends is not None:
            is_early = positions[plan.ends.rows] < plan.ends.values
            _add(logits, plan.ends, torch.where(is_early, -torch.inf, 0.0))
        if plan.bans is not None:
            _add(logits, plan.bans, plan.bans.values)
        return logits.amax(-1).isfinite() if plan.bans or plan.ends else torch.ones_like(positions, dtype=torch.bool)

    def _count_rows(self, penalties: Penalties) -> Tensor:
        rows = torch.tensor(self._counts.rows_of(penalties.sequences))
        if self._device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self._device, non_blocking=True)

    def _penalise(self, logits: Tensor, penalties: Penalties) -> None:
        count_rows = self._count_rows(penalties)
        counts, is_in_prompt = self._counts.counts[count_rows], self._counts.is_in_prompt[count_rows]
        values = logits[penalties.rows]
        is_seen = is_in_prompt | (counts > 0)
        repeated = torch.where(values > 0, values / penalties.repetition, values * penalties.repetition)
        values = torch.where(is_seen, repeated, values)
        values -= torch.where(counts > 0, penalties.presence + penalties.frequency * counts, 0.0)
        logits[penalties.rows] = values

    def _draw(self, logits: Tensor, plan: SamplingPlan, keys: Tensor, token_ids: Tensor, is_complete: Tensor) -> None:
        """Overwrite the entries of `token_ids` for rows that draw; greedy rows keep their most likely token. Clears the
        entries of `is_complete` whose row needs another method."""
        if plan.whole is not None:
            token_ids[plan.whole.rows] = self._draw_whole(logits[plan.whole.rows], plan.whole, keys)
        if plan.likely is not None:
            drawn, complete = self._draw_likely(logits[plan.likely.rows], plan.likely, keys)
            token_ids[plan.likely.rows] = drawn
            is_complete[plan.likely.rows] = complete
        if plan.sorted is not None:
            token_ids[plan.sorted.rows] = self._draw_sorted(logits[plan.sorted.rows], plan.sorted, keys)

    def _draw_whole(self, logits: Tensor, group: DrawGroup, keys: Tensor) -> Tensor:
        scaled = logits / group.temperature
        if group.has_min_p:
            scaled.masked_fill_(scaled < scaled.amax(-1, keepdim=True) + group.log_min_p, -torch.inf)
        return scaled.add_(keyed_noise(self._vocabulary, keys[group.rows])).argmax(-1)

    def _draw_likely(self, logits: Tensor, group: DrawGroup, keys: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / group.temperature
        num_candidates = min(NUM_CANDIDATES, self._vocab_size)
        values, ids = scaled.topk(num_candidates)
        cutoffs = _cutoffs(values, scaled, group)
        noisy = values.masked_fill(values < cutoffs, -torch.inf).add_(keyed_noise(ids.int(), keys[group.rows]))
        drawn = ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
        if num_candidates == self._vocab_size:
            return drawn, torch.ones_like(drawn, dtype=torch.bool)
        least = values[:, -1:]
        return drawn, ((least < cutoffs) | least.isneginf()).squeeze(-1)

    def _draw_sorted(self, logits: Tensor, group: DrawGroup, keys: Tensor) -> Tensor:
        scaled = logits / group.temperature
        cutoffs = _cutoffs(scaled.sort(dim=-1, descending=True).values, scaled, group)
        scaled.masked_fill_(scaled < cutoffs, -torch.inf)
        return scaled.add_(keyed_noise(self._vocabulary, keys[group.rows])).argmax(-1)


def _add(logits: Tensor, terms: SparseTerms, values: Tensor) -> None:
    logits.index_put_((terms.rows, terms.token_ids), values, accumulate=True)


def _cutoffs(values: Tensor, scaled: Tensor, group: DrawGroup) -> Tensor:
    """The lowest scaled logit that each row's filters keep."""
    num_candidates, vocab_size = values.shape[-1], scaled.shape[-1]
    cumulative = (values.double() - scaled.logsumexp(-1, keepdim=True)).exp_().cumsum(-1)
    last = group.top_k.clamp(max=num_candidates) - 1
    mass = torch.where(group.top_k < vocab_size, cumulative.gather(1, last), 1.0)
    reached = torch.searchsorted(cumulative, group.top_p * mass).clamp(max=num_candidates - 1)
    by_rank = values.gather(1, torch.minimum(reached, last))
    return torch.maximum(by_rank, values[:, :1] + group.log_min_p)


def _logprob_parts(logprobs: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    values, ids = logprobs.topk(num_top)
    chosen = logprobs.gather(1, token_ids[:, None])
    return [chosen.view(torch.int32).flatten(), ids.int().flatten(), values.view(torch.int32).flatten()]


def _read_logprobs(
    plan: SamplingPlan, packed: "np.ndarray[tuple[int], np.dtype[np.int32]]"
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """By row number: the logprob of its token, and the most likely tokens with their logprobs."""
    num_tops = {row: s.job.params.logprobs or 0 for row, s in enumerate(plan.sequences) if asks_logprobs(s)}
    asking = list(num_tops)
    count, width = len(asking), plan.num_top_logprobs
    chosen = packed[:count].view(np.float32).tolist()
    ids = packed[count : count * (1 + width)].reshape(count, width).tolist()
    values = packed[count * (1 + width) :].view(np.float32).reshape(count, width).tolist()
    tops = [tuple(zip(i, v, strict=True))[: num_tops[row]] for row, i, v in zip(asking, ids, values, strict=True)]
    return {row: (chosen[number], tops[number]) for number, row in enumerate(asking)}
