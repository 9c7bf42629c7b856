"""A model that makes vectors only: an encoder (BERT and its family), or a decoder that was trained for it."""

import torch

from domain.catalog import ModelSpec
from domain.errors import UnsupportedParameter
from gpu_worker.engine.backends import LoadedModel, RecordStep
from gpu_worker.engine.embedding import make_lane
from gpu_worker.engine.loading import check_length, choose_device, load_model, set_threads
from gpu_worker.frames import AddJob, EmbedJob, EngineStats, StepDone


class EncoderBackend:
    def __init__(self, spec: ModelSpec) -> None:
        device = choose_device(spec)
        model = load_model(spec, device)
        if model.config.is_encoder_decoder:
            raise ValueError(f"model {spec.id!r} is an encoder and a decoder; choose one that is either")
        model.config.use_cache = False
        check_length(spec, model)
        set_threads(model)
        self._spec = spec
        self._lane = make_lane(spec, model, device)
        self._loaded = LoadedModel(device=str(device), num_cache_tokens=0)
        self._num_steps = 0

    @property
    def loaded(self) -> LoadedModel:
        return self._loaded

    @property
    def has_work(self) -> bool:
        return self._lane.has_work

    def add(self, command: AddJob) -> None:
        raise UnsupportedParameter(f"{self._spec.id} generates no text", param="model")

    def embed(self, command: EmbedJob) -> None:
        self._lane.add(command)

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        self._lane.abort(job_id, attempt, reason)

    def step(self, record: RecordStep) -> StepDone:
        self._num_steps += 1
        return self._lane.step(record, None, self.stats)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=self._num_steps,
            num_running=self._lane.num_jobs,
            num_prompt_tokens=self._lane.num_tokens,
            memory_bytes=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        )
