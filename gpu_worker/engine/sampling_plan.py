"""The sampling parameters of one batch as tensors on its device, made when the batch's composition changes."""

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from domain.requests import SamplingParams
from gpu_worker.engine.host_draws import LEAST_TEMPERATURE
from gpu_worker.engine.sequence import Sequence

NUM_CANDIDATES = 256  # most filters keep fewer tokens than this; for the others all are sorted


@dataclass(frozen=True, slots=True)
class SparseTerms:
    """Numbers for single logits, each with its row and token."""

    rows: Tensor  # int64 (num_terms,)
    token_ids: Tensor  # int64 (num_terms,)
    values: Tensor  # float32 (num_terms,)


@dataclass(frozen=True, slots=True)
class Penalties:
    rows: Tensor  # int64 (num_penalised,)
    repetition: Tensor  # float32 (num_penalised, 1), and so the others
    presence: Tensor
    frequency: Tensor
    sequences: Rows[Sequence]


@dataclass(frozen=True, slots=True)
class DrawGroup:
    """Rows that draw in the same way. Columns are (num_rows, 1)."""

    rows: Tensor  # int64 (num_rows,)
    temperature: Tensor
    top_k: Tensor  # int64; the vocabulary's size where it is off
    top_p: Tensor  # float64
    log_min_p: Tensor  # -inf where it is off
    has_min_p: bool


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    sequences: Rows[Sequence]
    bias: SparseTerms | None
    bans: SparseTerms | None  # -inf for good
    ends: SparseTerms | None  # values: the output position from which the token may be drawn
    penalties: Penalties | None
    whole: DrawGroup | None  # from the whole vocabulary
    likely: DrawGroup | None  # among the most likely tokens, NUM_CANDIDATES of them
    sorted: DrawGroup | None  # among those that a sort of the vocabulary leaves
    logprob_rows: Tensor | None  # int64 (num_asking,)
    num_top_logprobs: int  # the most that any row asks for


def make_plan(
    sequences: Rows[Sequence], wide: Iterable[Sequence], vocab_size: int, device: torch.device
) -> SamplingPlan:
    """`wide` are those whose filters were found to keep more than NUM_CANDIDATES tokens."""
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
        bans=maker.terms(lambda s: ((token_id, -math.inf) for token_id in s.job.params.bad_token_ids)),
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
        """From pinned memory, which the copy does not wait for; the allocator keeps it until the copy is done."""
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
