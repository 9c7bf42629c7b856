"""A GGUF file in llama.cpp, through the low-level functions of llama-cpp-python (llama.h explains each).

Its own words about a failure are kept, since its functions only return nothing then.
"""

import ctypes
import logging
from collections import deque
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from domain.catalog import ModelSpec
from gpu_worker.engine import load_progress
from gpu_worker.engine.host_cpus import num_usable_cpus
from gpu_worker.engine.host_memory import available_bytes

log = logging.getLogger(__name__)

CACHE_SHARE = 0.25  # of the memory that is left: there may be other workers
BYTES_BY_CACHE_TYPE = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
NUM_FROM_CACHE_TYPE = {
    "f32": lib.GGML_TYPE_F32,
    "f16": lib.GGML_TYPE_F16,
    "q8_0": lib.GGML_TYPE_Q8_0,
    "q4_0": lib.GGML_TYPE_Q4_0,
}
VISIBLE_SPACE = "\u2581"  # as SentencePiece writes a space
WARNING, ERROR = 3, 4  # of ggml_log_level; more is the rest of a line

_last_words: deque[str] = deque(maxlen=3)


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_words(level: int, text: bytes, _: Any) -> None:
    if level in (WARNING, ERROR) and (words := text.decode(errors="replace").strip()):
        _last_words.append(words)
        log.warning("llama.cpp: %s", words[:300])


@lib.llama_progress_callback  # type: ignore[untyped-decorator]
def _tell_progress(share: float, _: Any) -> bool:
    load_progress.report(share)
    return True  # False would end the load


class DecodeFailed(Exception):
    """llama.cpp did not compute a batch."""


class NoCells(DecodeFailed):
    """There was no room in the cache for the batch."""


class LlamaModel:
    """One model and one context, whose cells all its slots share."""

    def __init__(self, spec: ModelSpec, file: Path) -> None:
        """Raises ValueError if the file cannot be served."""
        lib.llama_log_set(_keep_words, None)
        lib.llama_backend_init()
        options = spec.llama_cpp
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = options.n_gpu_layers if lib.llama_supports_gpu_offload() else 0
        parameters.progress_callback = _tell_progress
        parameters.use_extra_bufts = not _has_amx() if options.repack is None else options.repack
        self._model = lib.llama_model_load_from_file(str(file).encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {file.name}: {'; '.join(_last_words) or 'it does not say why'}")
        if lib.llama_model_has_encoder(self._model) or lib.llama_model_is_diffusion(self._model):
            raise ValueError(f"{file.name} is not a decoder, which is all that backend llama_cpp serves")
        length = lib.llama_model_n_ctx_train(self._model)
        if spec.max_model_len > length:
            raise ValueError(
                f"max_model_len of model {spec.id!r} is {spec.max_model_len}, but it was made for {length}; lower it"
            )
        self.device = "gpu" if parameters.n_gpu_layers else "cpu"
        self.can_cut = not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self._vocab))
        self.num_cells = self._count_cells(spec)
        self.num_slots = self._count_slots(spec)
        self.max_batch = spec.max_num_batched_tokens + spec.max_num_seqs  # a step with decodes may exceed its budget
        self._context = lib.llama_init_from_model(self._model, self._context_parameters(spec))
        if not self._context:
            raise ValueError(f"llama.cpp has no room for {self.num_cells} tokens: {'; '.join(_last_words)}")
        self._memory = lib.llama_get_memory(self._context)
        self._lengths = [0] * self.num_slots  # tokens of each slot in the cache; -1 if that is unknown
        self._batch = LlamaBatch(self.max_batch)

    def end_token_ids(self) -> frozenset[int]:
        """What the file declares as the end of a text or a turn."""
        if lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            return frozenset()
        return frozenset(token for token in range(self.vocab_size) if lib.llama_vocab_is_eog(self._vocab, token))

    def refuse_other_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless each token has the same name in tokenizer.json as in the file. Some files of Gemma
        write the spaces of some tokens as such."""
        if lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            return
        for token_id in range(min(self.vocab_size, tokenizer.get_vocab_size())):
            ours = tokenizer.id_to_token(token_id)
            theirs = lib.llama_vocab_get_text(self._vocab, token_id).decode(errors="replace")
            if ours is not None and ours.replace(VISIBLE_SPACE, " ") != theirs.replace(VISIBLE_SPACE, " "):
                raise ValueError(
                    f"tokenizer.json calls token {token_id} {ours!r}, but the GGUF file {theirs!r}; they do not belong "
                    "together, so pull the model again"
                )

    def truncate(self, slot: int, num_tokens: int) -> None:
        if self._lengths[slot] == num_tokens:
            return
        self._lengths[slot] = -1
        if not lib.llama_memory_seq_rm(self._memory, slot, num_tokens or -1, -1):
            raise DecodeFailed(f"the model cannot forget what follows token {num_tokens}")
        self._lengths[slot] = num_tokens

    def share(self, source: int, destination: int, num_tokens: int) -> None:
        lib.llama_memory_seq_cp(self._memory, source, destination, 0, num_tokens)
        self._lengths[destination] = num_tokens

    def begin(self) -> None:
        """Begin a new batch."""
        self._batch.clear()

    def add(self, slot: int, start: int, token_ids: list[int], wanted: list[int]) -> None:
        """Put the tokens at `start` of the slot into the batch; `wanted` are the places among them, ascending, whose
        logits `compute` returns."""
        self.truncate(slot, start)
        self._batch.add(slot, start, token_ids, wanted)

    def compute(self) -> NDArray[np.float32]:
        """Run the batch: (num_wanted, vocab_size), valid until the next. Raises DecodeFailed."""
        batch = self._batch
        for slot in batch.ends:
            self._lengths[slot] = -1  # until it is known to have succeeded
        status = lib.llama_decode(self._context, batch.fields)
        if status == 1:
            raise NoCells("llama.cpp has no room for the batch in its cache")
        if status:
            raise DecodeFailed(f"llama.cpp could not compute a batch: {status}; {'; '.join(_last_words)}")
        for slot, end in batch.ends.items():
            self._lengths[slot] = end
        if not batch.num_wanted:
            return np.empty((0, self.vocab_size), np.float32)
        address = ctypes.cast(lib.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        logits: NDArray[np.float32] = np.ctypeslib.as_array(address, (batch.num_wanted, self.vocab_size))
        return logits

    def _count_slots(self, spec: ModelSpec) -> int:
        """As many again as may run, so that those that run do not drive out what has ended or was paused. A state that
        cannot be cut is never found again."""
        if not self.can_cut:
            return spec.max_num_seqs
        return max(spec.max_num_seqs, min(2 * spec.max_num_seqs, int(lib.llama_max_parallel_sequences())))

    def _count_cells(self, spec: ModelSpec) -> int:
        """kv_cache_tokens if set; else as many as all sequences could use, within a share of the memory left."""
        if spec.kv_cache_tokens is not None:
            num_cells = spec.kv_cache_tokens
        else:
            head_size = lib.llama_model_n_embd(self._model) // lib.llama_model_n_head(self._model)
            num_values = 2 * lib.llama_model_n_layer(self._model) * lib.llama_model_n_head_kv(self._model) * head_size
            room = available_bytes() * CACHE_SHARE / (num_values * BYTES_BY_CACHE_TYPE[spec.llama_cpp.cache_type])
            num_cells = min(spec.max_num_seqs * spec.max_model_len, int(room))
        if num_cells < spec.max_model_len:
            raise ValueError(
                f"the cache of model {spec.id!r} has room for {num_cells} tokens, but max_model_len is "
                f"{spec.max_model_len}; lower max_model_len, raise kv_cache_tokens, or free memory"
            )
        return num_cells

    def _context_parameters(self, spec: ModelSpec) -> Any:
        """One cache for all slots, so that they can share beginnings."""
        options = spec.llama_cpp
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = self.num_cells
        parameters.n_seq_max = self.num_slots
        parameters.n_batch = self.max_batch
        parameters.n_ubatch = min(options.n_ubatch, self.max_batch)
        parameters.n_threads = parameters.n_threads_batch = options.n_threads or num_usable_cpus()
        parameters.type_k = parameters.type_v = NUM_FROM_CACHE_TYPE[options.cache_type]
        parameters.kv_unified = True
        parameters.swa_full = True  # or a sliding window's beginning could not be shared
        return parameters


def _has_amx() -> bool:
    """Whether llama.cpp was compiled to use AMX, which some virtual machines announce but do not run."""
    return b"AMX_INT8 = 1" in lib.llama_print_system_info()


class LlamaBatch:
    """The arrays of one llama_batch, filled by slices."""

    def __init__(self, max_tokens: int) -> None:
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros(max_tokens, np.int32)
        self._num_slots = np.ones(max_tokens, np.int32)
        self._slot_addresses = self._slots.ctypes.data + 4 * np.arange(max_tokens, dtype=np.uint64)
        self._is_wanted = np.zeros(max_tokens, np.int8)
        self.ends: dict[int, int] = {}  # how long each slot is afterwards
        self.num_wanted = 0
        self.fields = lib.llama_batch(
            0,
            _pointer(self._token_ids, lib.llama_token),
            None,
            _pointer(self._positions, lib.llama_pos),
            _pointer(self._num_slots, ctypes.c_int32),
            _pointer(self._slot_addresses, ctypes.POINTER(lib.llama_seq_id)),
            _pointer(self._is_wanted, ctypes.c_int8),
        )

    def add(self, slot: int, start: int, token_ids: list[int], wanted: list[int]) -> None:
        first = self.fields.n_tokens
        end = first + len(token_ids)
        self._token_ids[first:end] = token_ids
        self._positions[first:end] = np.arange(start, start + len(token_ids))
        self._slots[first:end] = slot
        self._is_wanted[first:end] = 0
        self._is_wanted[first:end][wanted] = 1
        self.num_wanted += len(wanted)
        self.fields.n_tokens = end
        self.ends[slot] = start + len(token_ids)

    def clear(self) -> None:
        self.fields.n_tokens = self.num_wanted = 0
        self.ends = {}


def _pointer(array: "NDArray[Any]", kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
