"""One pass of llama.cpp over the scheduled rows."""

from collections.abc import Sequence as Rows

from gpu_worker.engine.kv_cache import BlockCopy
from gpu_worker.engine.llama_cpp.model import LlamaModel, NoCells
from gpu_worker.engine.runner import AtOnce, process_memory_bytes
from gpu_worker.engine.sampling import Drawn, results_of, score_tokens, split_scores
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import Sequence


class LlamaRunner(AtOnce):
    fatal_errors: tuple[type[Exception], ...] = ()
    memory_errors: tuple[type[Exception], ...] = (NoCells,)

    def __init__(self, model: LlamaModel) -> None:
        self._model = model

    def copy_blocks(self, copies: Rows[BlockCopy]) -> None:
        assert not copies, "slots are shared when they are given out"

    def wipe_blocks(self, blocks: Rows[int]) -> None:
        """Nothing: cells that are not a slot's are never read for it."""

    def discard(self, sequence: Sequence) -> None:
        """Nothing: the pool gives slots back."""

    def free_memory(self) -> None:
        """Nothing is held in reserve."""

    def memory_bytes(self) -> int:
        return process_memory_bytes()

    def run(self, rows: Rows[ScheduledRow]) -> list[Drawn | None]:
        self._model.begin()
        for row in rows:
            token_ids = row.sequence.token_ids[row.start : row.start + row.num_new_tokens]
            places = list(range(row.num_scored_tokens))
            if row.needs_token:
                places.append(row.num_new_tokens - 1)
            self._model.add(row.sequence.block_ids[0], row.start, token_ids, places)
        scores, logits = split_scores(self._model.compute(), rows, score_tokens)
        return results_of(rows, scores, logits)
