"""The back end that runs GGUF files by llama.cpp, with our scheduler, sampler and detokenizer; see docs/engines.md."""

from pathlib import Path

from tokenizers import Tokenizer

from domain.catalog import ModelSpec
from domain.errors import UnsupportedParameter
from gpu_worker.engine.backends import LoadedModel, RecordStep
from gpu_worker.engine.detokenizer import with_visible_reasoning
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.families import turn_end_token_ids
from gpu_worker.engine.llama_cpp.model import LlamaModel
from gpu_worker.engine.llama_cpp.runner import LlamaRunner
from gpu_worker.engine.llama_cpp.slots import SlotPool
from gpu_worker.engine.sampling import max_num_scored_tokens
from gpu_worker.engine.scheduler import ModelLimits, Scheduler
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, StepDone
from text.model_files import eos_token_ids, gguf_file, model_folder, read_json_file
from text.tokenizers import load_tokenizer, special_tokens_of


class LlamaCppBackend:
    def __init__(self, spec: ModelSpec) -> None:
        folder = model_folder(spec)
        tokenizer = _load_tokenizer(folder)
        model = LlamaModel(spec, gguf_file(folder))
        model.refuse_other_tokenizer(tokenizer)
        limits = ModelLimits(model.vocab_size, spec.max_model_len, _end_token_ids(folder, tokenizer, model))
        pool = SlotPool(model, num_slots=spec.max_num_seqs, num_cells=model.num_cells, can_share=model.can_cut)
        scheduler = Scheduler(
            pool,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_num_scored_tokens=max_num_scored_tokens(model.vocab_size),
            can_fork=model.can_cut,
        )
        self._engine = Engine(scheduler=scheduler, runner=LlamaRunner(model), tokenizer=tokenizer, limits=limits)
        self._loaded = LoadedModel(device=model.device, num_cache_tokens=model.num_cells)

    @property
    def loaded(self) -> LoadedModel:
        return self._loaded

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def add(self, command: AddJob) -> None:
        self._engine.add(command)

    def embed(self, command: EmbedJob) -> None:
        raise UnsupportedParameter("backend llama_cpp does not support embeddings", param="model")

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        self._engine.abort(job_id, attempt, reason)

    def step(self, record: RecordStep) -> StepDone:
        return self._engine.step(record)

    def stats(self) -> EngineStats:
        return self._engine.stats()


def _load_tokenizer(folder: Path) -> Tokenizer:
    """Load it as the API does: the API turns text into token ids, and this process turns them into text."""
    config = read_json_file(folder / "tokenizer_config.json")
    special_tokens = special_tokens_of(read_json_file(folder / "special_tokens_map.json") | config)
    return with_visible_reasoning(load_tokenizer(folder, config, special_tokens))


def _end_token_ids(folder: Path, tokenizer: Tokenizer, model: LlamaModel) -> frozenset[int]:
    config = read_json_file(folder / "config.json")
    named = eos_token_ids(read_json_file(folder / "generation_config.json"), config)
    turn_ends = turn_end_token_ids(str(config.get("model_type")), tokenizer)
    return frozenset(named) | turn_ends | model.end_token_ids()
