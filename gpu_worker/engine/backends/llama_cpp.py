"""The back end that runs GGUF files by llama.cpp, with our scheduler, sampler and detokenizer; see docs/engines.md."""

from domain.catalog import ModelSpec
from domain.errors import UnsupportedParameter
from gpu_worker.engine.backends import LoadedModel, RecordStep
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.families import read_end_token_ids, read_tokenizer
from gpu_worker.engine.llama_cpp.model import LlamaModel
from gpu_worker.engine.llama_cpp.runner import LlamaRunner
from gpu_worker.engine.llama_cpp.slots import SlotPool
from gpu_worker.engine.sampling import max_num_scored_tokens
from gpu_worker.engine.scheduler import ModelLimits, Scheduler
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, StepDone
from text.model_files import gguf_file, model_folder


class LlamaCppBackend:
    def __init__(self, spec: ModelSpec) -> None:
        folder = model_folder(spec)
        tokenizer = read_tokenizer(folder)
        model = LlamaModel(spec, gguf_file(folder))
        model.refuse_other_tokenizer(tokenizer)
        end_token_ids = read_end_token_ids(folder, tokenizer) | model.end_token_ids()
        limits = ModelLimits(model.vocab_size, spec.max_model_len, end_token_ids)
        pool = SlotPool(
            model,
            num_at_once=spec.max_num_seqs,
            num_slots=model.num_slots,
            num_cells=model.num_cells,
            can_share=model.can_cut,
        )
        scheduler = Scheduler(
            pool,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_num_scored_tokens=max_num_scored_tokens(model.vocab_size),
            can_fork=model.can_cut,
        )
        self._engine = Engine(scheduler=scheduler, runner=LlamaRunner(model), tokenizer=tokenizer, limits=limits)
        self._loaded = LoadedModel(model.device, model.num_cells, keeps_prefixes=pool.use_prefix_cache)

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
