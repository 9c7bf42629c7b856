"""llama.cpp as a peer of the engine: continuous batches through its batch API, with as many sequences.

Needs `pip install llama-cpp-python gguf` (which compiles llama.cpp for this machine in a few minutes).
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import numpy as np

NUM_BATCHED_TOKENS = 512

_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Asked(Protocol):
    """The parts of a request that a sequence needs."""

    @property
    def number(self) -> int: ...

    @property
    def prompt(self) -> list[int]: ...

    @property
    def num_new_tokens(self) -> int: ...


@dataclass(slots=True)
class Running:
    request: Asked
    slot: int
    token_ids: list[int]  # prompt and output
    num_computed: int = 0

    @property
    def is_done(self) -> bool:
        return len(self.token_ids) == len(self.request.prompt) + self.request.num_new_tokens


class LlamaCpp:
    """A GGUF file with greedy decoding."""

    def __init__(self, file: Path, slots: int, max_model_len: int, num_threads: int) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_mmap = False
        parameters.use_extra_bufts = b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()  # see docs/engines.md
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        assert self._model is not None
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        parameters = _context_parameters(slots, max_model_len, num_threads)
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        assert self._context is not None
        self._batch = llama_cpp.llama_batch_init(NUM_BATCHED_TOKENS, 0, 1)
        self._free = list(range(slots))
        self.running: list[Running] = []

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def add(self, request: Asked) -> None:
        self.running.append(Running(request, self._free.pop(), list(request.prompt)))

    def step(self) -> list[Running]:
        """Compute a token of every decoding sequence, and chunks of prompts. Returns the sequences that got one."""
        self._batch.n_tokens = 0
        drawing: list[Running] = []
        for sequence in sorted(self.running, key=lambda s: len(s.token_ids) - s.num_computed):
            if self._put(sequence):
                drawing.append(sequence)
        status = llama_cpp.llama_decode(self._context, self._batch)
        assert status == 0, status
        for sequence, token_id in zip(drawing, self._argmax(len(drawing)), strict=True):
            sequence.token_ids.append(token_id)
            if sequence.is_done:
                self._leave(sequence)
        return drawing

    def _put(self, sequence: Running) -> bool:
        """Add as much of the sequence as there is room for. True if its last token was added."""
        batch, start = self._batch, sequence.num_computed
        stop = min(len(sequence.token_ids), start + NUM_BATCHED_TOKENS - batch.n_tokens)
        for position in range(start, stop):
            row = batch.n_tokens
            batch.token[row] = sequence.token_ids[position]
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence.slot
            batch.logits[row] = position == len(sequence.token_ids) - 1
            batch.n_tokens += 1
        sequence.num_computed = stop
        return bool(start < stop == len(sequence.token_ids))

    def _argmax(self, num_rows: int) -> list[int]:
        if not num_rows:
            return []
        address = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        best: list[int] = np.ctypeslib.as_array(address, (num_rows, self._vocab_size)).argmax(-1).tolist()
        return best

    def _leave(self, sequence: Running) -> None:
        self.running.remove(sequence)
        self._free.append(sequence.slot)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), sequence.slot, -1, -1)


def _context_parameters(slots: int, max_model_len: int, num_threads: int) -> Any:
    """The fastest settings here: one cache for all sequences, with keys and values in float16, llama.cpp's default.
    In float32, as for the other peers, it takes up to twice as long."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = slots * max_model_len
    parameters.n_seq_max = slots
    parameters.n_batch = parameters.n_ubatch = NUM_BATCHED_TOKENS
    parameters.n_threads = parameters.n_threads_batch = num_threads
    parameters.kv_unified = True
    return parameters
