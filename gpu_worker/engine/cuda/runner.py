"""One forward pass on a CUDA device, asynchronous to the host.

`launch` queues a whole step on the device and returns: two copies of inputs, the pass, the draws, and one copy back.
`collect` waits for that last copy, the only wait in a step. A step of decodes alone replays a captured graph, and may
start from the previous step's draws, which are still on the device.

The host still has to wait in these cases: a sequence with penalties joins (its counts are written), there is structured
output (a mask depends on the previous token), prompts are scored, blocks are copied or wiped, or a model that is not
captured waits for the device by itself.

The input tensors keep their addresses on the device, so that a captured pass finds the numbers of each step in the same
place. The rows of a pass are first the decodes, one token each, then the prompt chunks.
"""

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpu_worker.engine.cuda.attention import DeviceAttention, DeviceContext, LayerCache, RowGroup, Span
from gpu_worker.engine.cuda.graphs import DecodeGraphs
from gpu_worker.engine.cuda.sampler import DeviceSampler, SampledStep
from gpu_worker.engine.kv_cache import PADDING_BLOCK, BlockCopy
from gpu_worker.engine.lora import Adapters
from gpu_worker.engine.sampling import Drawn, split_scores, token_masks
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.torch_runner import TorchErrors, score_tokens

NUM_STAGES = 2  # staging buffers: the host fills one while the device may still be reading the other

FROM_HOST = -1


@dataclass(frozen=True, slots=True)
class PassTensors:
    """The inputs of a pass: views of two flat buffers, at addresses that depend only on `num_tokens` and `num_rows`."""

    token_ids: Tensor  # int64 (num_tokens,)
    positions: Tensor  # int64 (num_tokens,)
    slots: Tensor  # int64 (num_tokens,): where each token's key and value go
    sources: Tensor  # int32 (num_rows,): index of the row's token among the last step's draws, or FROM_HOST
    lengths: Tensor  # int32 (num_rows,): tokens of each sequence, the new ones included
    starts: Tensor  # int32 (num_rows + 1,): row i consists of the pass's tokens starts[i]..starts[i + 1]
    key_starts: Tensor  # int32 (num_rows + 1,): cumulative lengths of the sequences
    block_tables: Tensor  # int32 (num_rows, max_blocks), padded with the padding block


@dataclass(frozen=True, slots=True)
class FlatBuffers:
    wide: Tensor  # int64
    narrow: Tensor  # int32

    def lay_out(self, num_tokens: int, num_rows: int, max_blocks: int) -> PassTensors:
        token_ids, positions, slots = self.wide[: 3 * num_tokens].view(3, num_tokens)
        sizes = [num_rows, num_rows, num_rows + 1, num_rows + 1, num_rows * max_blocks]
        parts = torch.split(self.narrow[: sum(sizes)], sizes)
        sources, lengths, starts, key_starts = parts[:4]
        table = parts[4].view(num_rows, max_blocks)
        return PassTensors(token_ids, positions, slots, sources, lengths, starts, key_starts, table)


class PassInputs:
    """The inputs of passes with up to `max_tokens` tokens of `max_rows` sequences with `max_blocks` blocks each."""

    def __init__(self, max_tokens: int, max_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._max_blocks = max_blocks
        self._block_size = block_size
        wide, narrow = 3 * max_tokens, 4 * max_rows + 2 + max_rows * max_blocks
        self._on_device = FlatBuffers(
            torch.zeros(wide, dtype=torch.int64, device=device), torch.zeros(narrow, dtype=torch.int32, device=device)
        )
        is_pinned = device.type == "cuda"
        self._stages = [
            FlatBuffers(
                torch.zeros(wide, dtype=torch.int64, pin_memory=is_pinned),
                torch.zeros(narrow, dtype=torch.int32, pin_memory=is_pinned),
            )
            for _ in range(NUM_STAGES)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_STAGES
        self._turn = 0

    def tensors(self, num_tokens: int, num_rows: int) -> PassTensors:
        """Views of the buffers on the device."""
        return self._on_device.lay_out(num_tokens, num_rows, self._max_blocks)

    def load(self, rows: Rows[ScheduledRow], sources: Rows[int], *, num_padding_rows: int = 0) -> PassTensors:
        """Start copying the inputs of `rows`, which must have decodes first, to the device. Padding rows follow; each
        has one token, which is in the padding block."""
        self._turn = (self._turn + 1) % NUM_STAGES
        self._wait_for_stage()
        num_rows = len(rows) + num_padding_rows
        num_tokens = sum(row.num_new_tokens for row in rows) + num_padding_rows
        stage = self._stages[self._turn]
        host = stage.lay_out(num_tokens, num_rows, self._max_blocks)
        self._fill(host, rows, sources, num_padding_rows)
        self._copy(stage, 3 * num_tokens, 4 * num_rows + 2 + num_rows * self._max_blocks)
        return self.tensors(num_tokens, num_rows)

    def _wait_for_stage(self) -> None:
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()  # recorded two steps ago, so this does not actually wait

    def _copy(self, stage: FlatBuffers, num_wide: int, num_narrow: int) -> None:
        self._on_device.wide[:num_wide].copy_(stage.wide[:num_wide], non_blocking=True)
        self._on_device.narrow[:num_narrow].copy_(stage.narrow[:num_narrow], non_blocking=True)
        if self._on_device.wide.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._turn] = event

    def _fill(self, host: PassTensors, rows: Rows[ScheduledRow], sources: Rows[int], num_padding_rows: int) -> None:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for row, source in zip(rows, sources, strict=True):
            start, stop = row.start, row.start + row.num_new_tokens
            token_ids += row.sequence.token_ids[start:stop] if source == FROM_HOST else [0]
            positions += range(start, stop)
            slots += self._slots(row.sequence.block_ids, start, stop)
        padding = [0] * num_padding_rows
        host.token_ids.numpy()[:] = token_ids + padding
        host.positions.numpy()[:] = positions + padding
        host.slots.numpy()[:] = slots + [PADDING_BLOCK * self._block_size] * num_padding_rows
        host.sources.numpy()[:] = [*sources, *[FROM_HOST] * num_padding_rows]
        self._fill_rows(host, rows, num_padding_rows)

    def _fill_rows(self, host: PassTensors, rows: Rows[ScheduledRow], num_padding_rows: int) -> None:
        num_new = [row.num_new_tokens for row in rows] + [1] * num_padding_rows
        lengths = [row.start + row.num_new_tokens for row in rows] + [1] * num_padding_rows
        host.lengths.numpy()[:] = lengths
        for starts, counts in ((host.starts.numpy(), num_new), (host.key_starts.numpy(), lengths)):
            starts[0] = 0
            starts[1:] = counts
            starts.cumsum(out=starts)
        tables = host.block_tables.numpy()
        tables[:] = PADDING_BLOCK
        for table, row, length in zip(tables, rows, lengths, strict=False):
            blocks = row.sequence.block_ids[: -(-length // self._block_size)]
            table[: len(blocks)] = blocks

    def _slots(self, block_ids: list[int], start: int, stop: int) -> list[int]:
        size = self._block_size
        return [block_ids[position // size] * size + position % size for position in range(start, stop)]


@dataclass(frozen=True, slots=True)
class PassLimits:
    max_tokens: int  # per pass
    max_rows: int
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class LaunchedPass:
    """A step queued on the device. `numbers` are the positions, among the launched rows, of those that draw, in the
    order of their draws."""

    num_rows: int
    numbers: list[int]
    scores: dict[int, tuple[Drawn, ...]]  # prompt scores, by position among the launched rows
    sampled: SampledStep | None = None
    packed: Tensor | None = None  # the draws on the host, valid once `is_done` has happened
    is_done: torch.cuda.Event | None = None


class DeviceRunner(TorchErrors):
    """Runs passes on one device. With `runs_ahead` False, every step waits for the previous step's draws; this exists
    to measure the difference."""

    def __init__(
        self,
        model: Any,
        layers: list[LayerCache],
        block_size: int,
        device: torch.device,
        attention: DeviceAttention,
        limits: PassLimits,
        adapters: Adapters,
        *,
        runs_ahead: bool = True,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._layers = layers
        self._block_size = block_size
        self._device = device
        self._attention = attention
        self._limits = limits
        self._runs_ahead = runs_ahead
        self.graphs = DecodeGraphs()
        max_blocks = -(-limits.max_model_len // block_size)
        self._inputs = PassInputs(limits.max_tokens, limits.max_rows, max_blocks, block_size, device)
        self._sampler = DeviceSampler(limits.vocab_size, limits.max_rows, device)
        self._draw_by_sequence: dict[Sequence, int] = {}  # index into the sampler's token_ids, for the last launch

    def copy_blocks(self, copies: Rows[BlockCopy]) -> None:
        if not copies:
            return
        sources = torch.tensor([copy.source for copy in copies], device=self._device)
        destinations = torch.tensor([copy.destination for copy in copies], device=self._device)
        for cache in self._caches():
            cache[destinations] = cache[sources]

    def wipe_blocks(self, blocks: Rows[int]) -> None:
        """Zero blocks that may contain infinities or NaNs: a kernel that masks by multiplication would spread them."""
        for cache in self._caches():
            cache[list(blocks)] = 0

    def _caches(self) -> list[Tensor]:
        """The keys and values of all layers, viewed by block."""
        caches = [cache for layer in self._layers for cache in (layer.keys, layer.values)]
        return [cache.view(-1, self._block_size, *cache.shape[1:]) for cache in caches]

    def discard(self, sequence: Sequence) -> None:
        self._sampler.discard(sequence)
        self._draw_by_sequence.pop(sequence, None)

    def can_run_ahead(self, rows: Rows[ScheduledRow]) -> bool:
        return self._runs_ahead and not any(_needs_host(row.sequence) for row in rows)

    @torch.inference_mode()
    def launch(self, rows: Rows[ScheduledRow]) -> LaunchedPass:
        try:
            return self._launch(rows)
        except Exception:
            self._sampler.forget()
            raise

    def collect(self, launched: LaunchedPass) -> list[Drawn | None]:
        try:
            drawn = iter(self._read(launched))
        except Exception:
            self._sampler.forget()
            raise
        results: dict[int, Drawn] = {number: next(drawn) for number in launched.numbers}
        for number, scores in launched.scores.items():
            results[number] = replace(results.get(number, Drawn(None)), prompt_scores=scores)
        return [results.get(number) for number in range(launched.num_rows)]

    def _launch(self, rows: Rows[ScheduledRow]) -> LaunchedPass:
        decodes = [number for number, row in enumerate(rows) if row.num_new_tokens == 1]
        prefills = [number for number, row in enumerate(rows) if row.num_new_tokens > 1]
        numbers = [number for number in decodes + prefills if rows[number].needs_token]
        ordered = [rows[number] for number in decodes + prefills]
        all_scores, logits = split_scores(self._forward(ordered, len(decodes)), ordered, score_tokens)
        scores = {number: row for number, row in zip(decodes + prefills, all_scores, strict=True) if row}
        drawing = [rows[number] for number in numbers]
        self._draw_by_sequence = {row.sequence: place for place, row in enumerate(drawing)}
        if not drawing:
            return LaunchedPass(len(rows), numbers, scores)
        # While the device is computing the logits.
        masks = token_masks([row.sequence for row in drawing], logits.shape[-1])
        sampled = self._sampler.sample(logits, drawing, masks)
        packed, is_done = self._copy_home(sampled.packed)
        return LaunchedPass(len(rows), numbers, scores, sampled, packed, is_done)

    def _copy_home(self, packed: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._device.type != "cuda":
            return packed, None
        home = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        home.copy_(packed, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return home, event

    def _read(self, launched: LaunchedPass) -> list[Drawn]:
        if launched.sampled is None or launched.packed is None:
            return []
        if launched.is_done is not None:
            launched.is_done.synchronize()
        return self._sampler.read(launched.sampled, launched.packed.numpy())

    def _forward(self, rows: Rows[ScheduledRow], num_decodes: int) -> Tensor:
        """Float32 logits, (num_kept, vocab_size): for each row in order, the positions that score its prompt, then its
        last position if it needs a token. The caller may overwrite them."""
        sources = [self._draw_by_sequence[row.sequence] if row.is_ahead else FROM_HOST for row in rows]
        is_decoding = num_decodes == len(rows) and all(row.needs_token for row in rows)
        has_adapters = any(row.sequence.job.adapter is not None for row in rows)  # graphs are captured without
        size = self.graphs.size_for(len(rows)) if is_decoding and not has_adapters else None
        if size is not None:
            self._inputs.load(rows, sources, num_padding_rows=size - len(rows))
            return self.graphs.replay(size)[: len(rows)]
        tensors = self._inputs.load(rows, sources)
        with self._adapters.applied(rows, self._device):
            if is_decoding:
                return self._decode(tensors, max(row.start + 1 for row in rows))
            return self._mixed(tensors, rows, num_decodes)

    def decode_pass(self, num_rows: int) -> Callable[[], Tensor]:
        """The pass to capture. It reads whatever the inputs contain when it is replayed, and supports rows of any
        length. For the capture, the inputs are padding."""
        tensors = self._inputs.load([], [], num_padding_rows=num_rows)
        return lambda: self._decode(tensors, self._limits.max_model_len)

    def trial_pass(self) -> Tensor:
        """Run the largest possible pass over an empty cache, to find out how much memory must be left free for it."""
        num_rows = self._limits.max_rows
        num_each = max(1, self._limits.max_tokens // num_rows)
        tensors = self._inputs.tensors(num_rows * num_each, num_rows)
        for starts in (tensors.starts, tensors.key_starts):
            starts.copy_(torch.arange(num_rows + 1, device=self._device) * num_each)
        tensors.lengths.fill_(num_each)
        spans = tuple(Span(row, row * num_each, (row + 1) * num_each, 0) for row in range(num_rows))
        group = _group(tensors, 0, num_rows, 0, num_rows * num_each, num_each, num_each)
        ends = [span.stop - 1 for span in spans]
        scores = self._run_model(tensors, tensors.token_ids, ends, self._context(tensors, prefills=group, spans=spans))
        return scores.log_softmax(-1).add_(scores)  # needs about as much memory at a time as the draws

    def _decode(self, tensors: PassTensors, max_length: int) -> Tensor:
        sources = tensors.sources.long()
        drawn = self._sampler.token_ids.index_select(0, sources.clamp(min=0))
        token_ids = torch.where(sources == FROM_HOST, tensors.token_ids, drawn)
        num_rows = len(token_ids)
        group = _group(tensors, 0, num_rows, 0, num_rows, 1, max_length)
        return self._run_model(tensors, token_ids, None, self._context(tensors, decodes=group))

    def _mixed(self, tensors: PassTensors, rows: Rows[ScheduledRow], num_decodes: int) -> Tensor:
        kept, spans = _kept_and_spans(rows, num_decodes)
        longest = max(row.start + row.num_new_tokens for row in rows)
        most_new = max(row.num_new_tokens for row in rows)
        num_tokens, num_rows = len(tensors.token_ids), len(rows)
        context = self._context(
            tensors,
            decodes=_group(tensors, 0, num_decodes, 0, num_decodes, 1, longest) if num_decodes else None,
            prefills=_group(tensors, num_decodes, num_rows, num_decodes, num_tokens, most_new, longest)
            if num_decodes < num_rows
            else None,
            spans=spans,
        )
        return self._run_model(tensors, tensors.token_ids, kept, context)

    def _run_model(
        self, tensors: PassTensors, token_ids: Tensor, ends: list[int] | None, context: DeviceContext
    ) -> Tensor:
        """Float32 logits at the pass's tokens `ends`, or at all tokens if None."""
        output = self._model(
            input_ids=token_ids[None],
            position_ids=tensors.positions[None],
            use_cache=False,
            logits_to_keep=0 if ends is None else self._to_device(ends),
            ctx=context,
        )
        logits: Tensor = output.logits[0]
        return logits.float()

    def _to_device(self, values: list[int]) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.int64)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _context(
        self,
        tensors: PassTensors,
        *,
        decodes: RowGroup | None = None,
        prefills: RowGroup | None = None,
        spans: tuple[Span, ...] = (),
    ) -> DeviceContext:
        return DeviceContext(self._attention, self._layers, self._block_size, tensors.slots, decodes, prefills, spans)


def _needs_host(sequence: Sequence) -> bool:
    """Whether its next draw depends on something that only the host can compute: the mask of its grammar or bans."""
    return sequence.job.params.structured_output is not None or sequence.job.bans.needs_mask


def _group(
    tensors: PassTensors, row_start: int, row_stop: int, token_start: int, token_stop: int, most_new: int, longest: int
) -> RowGroup:
    rows, edges = slice(row_start, row_stop), slice(row_start, row_stop + 1)
    starts, key_starts = tensors.starts[edges], tensors.key_starts[edges]
    return RowGroup(
        token_start=token_start,
        token_stop=token_stop,
        starts=starts - starts[:1],
        key_starts=key_starts - key_starts[:1],
        lengths=tensors.lengths[rows],
        block_tables=tensors.block_tables[rows],
        max_new_tokens=most_new,
        max_length=longest,
    )


def _kept_and_spans(rows: Rows[ScheduledRow], num_decodes: int) -> tuple[list[int], tuple[Span, ...]]:
    """The positions in the pass whose logits are needed, and the prompt chunks."""
    kept: list[int] = []
    spans: list[Span] = []
    start = 0
    for number, row in enumerate(rows):
        stop = start + row.num_new_tokens
        kept += range(start, start + row.num_scored_tokens)
        if row.needs_token:
            kept.append(stop - 1)
        if number >= num_decodes:
            spans.append(Span(number - num_decodes, start, stop, row.start))
        start = stop
    return kept, tuple(spans)
