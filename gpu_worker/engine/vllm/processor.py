"""vLLM's logits processor that draws the tokens as all our engines do, and leaves vLLM only the choice that was made.

vLLM asks for the most likely token of every row. Rows that are not simply greedy are drawn here, by the samplers of the
transformers back end, and their logits replaced: 0 for the drawn token, -inf for all others. So every parameter means
the same with every engine, and a seeded draw depends on neither batches, preemptions nor restarts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from domain.catalog import ModelEntry
from gpu_worker.engine.families import read_end_token_ids, read_tokenizer
from gpu_worker.engine.runner import DrawAgain
from gpu_worker.engine.sampling import sample, token_masks
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import Grammars, Sequence
from gpu_worker.engine.vllm.rows import FollowedRow, draw_rows, make_row
from text.model_files import model_folder

PLAN = "celeriac"  # the key of a request's plan in its extra arguments


class OurDraws(LogitsProcessor):
    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        if model.enforce_eager:
            torch.compiler.set_stance("force_eager")  # vLLM would still compile parts of its sampler when first used
        folder = model_folder(ModelEntry(id="engine", path=model.model, revision=model.revision or "main"))
        self._tokenizer = read_tokenizer(folder)
        end_token_ids = read_end_token_ids(folder, self._tokenizer)
        vocab_size = self._vocab_size = model.get_vocab_size()
        self._grammars = Grammars(self._tokenizer, vocab_size, end_token_ids)
        self._failed_token_id = min(end_token_ids, default=0)
        self._rows: dict[int, FollowedRow] = {}
        self._sampler = (
            CpuSampler()
            if device.type == "cpu"
            else GpuSampler(vocab_size, vllm_config.scheduler_config.max_num_seqs, device)
        )

    @classmethod
    def validate_params(cls, sampling_params: object) -> None:
        """Everything was checked when the job was added."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        before = set(self._rows.values())
        process_dict_updates(self._rows, batch_update, self._make_row)
        for row in before - set(self._rows.values()):
            self._sampler.discard(row.sequence)

    def apply(self, logits: Tensor) -> Tensor:
        for row in self._rows.values():
            if not row.follow():
                self._sampler.discard(row.sequence)  # what was drawn last was not used: the prompt is still being read
        drawn_here = {number: row.sequence for number, row in self._rows.items() if row.is_drawn_by_us}
        if not drawn_here:
            return logits
        chosen = draw_rows(
            drawn_here,
            lambda numbers, sequences: self._sampler.draw(lambda: logits[numbers].float(), sequences),
            self._failed_token_id,
        )
        numbers = torch.tensor(list(chosen), device=logits.device)
        token_ids = torch.tensor(list(chosen.values()), device=logits.device)
        logits[numbers] = -torch.inf
        logits[numbers, token_ids] = 0.0
        return logits

    def _make_row(self, params: object, prompt_token_ids: list[int] | None, output: list[int]) -> FollowedRow | None:
        plan = (getattr(params, "extra_args", None) or {}).get(PLAN)
        if plan is None or prompt_token_ids is None:
            return None  # vLLM's own, while it warms up
        return make_row(plan, prompt_token_ids, output, self._tokenizer, self._grammars, self._vocab_size)


#: A copy of the logits, (num_sequences, vocab_size) in float32, which may be overwritten.
CopyLogits = Callable[[], Tensor]


class CpuSampler:
    def draw(self, copy_logits: CopyLogits, sequences: list[Sequence]) -> list[int]:
        drawn = [result.token_id for result in sample(copy_logits().numpy(), sequences)]
        return [token_id for token_id in drawn if token_id is not None]

    def discard(self, sequence: Sequence) -> None:
        """It keeps nothing."""


class GpuSampler:
    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        from gpu_worker.engine.cuda.sampler import DeviceSampler

        self._vocab_size = vocab_size
        self._sampler = DeviceSampler(vocab_size, max_num_seqs, device)

    def draw(self, copy_logits: CopyLogits, sequences: list[Sequence]) -> list[int]:
        rows = [ScheduledRow(sequence, 1) for sequence in sequences]
        while True:
            step = self._sampler.sample(copy_logits(), rows, token_masks(sequences, self._vocab_size))
            try:
                drawn = self._sampler.read(step, step.packed.cpu().numpy())
            except DrawAgain:
                self._sampler.forget()
                continue
            return [result.token_id for result in drawn if result.token_id is not None]

    def discard(self, sequence: Sequence) -> None:
        self._sampler.discard(sequence)
