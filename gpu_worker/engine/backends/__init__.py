"""Back ends, which run the model in an engine process: the Backend protocol, and all implementations by name.

A back end is used by one thread and does no I/O with the worker or the database. Its class is imported on demand, so
that a worker needs only the libraries of its own back end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol, cast

from domain.catalog import ModelSpec
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, StepDone


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Facts that are known once the model is loaded."""

    device: str
    num_cache_tokens: int
    keeps_prefixes: bool = False  # whether a text whose beginning was computed before goes on from there


@dataclass(frozen=True, slots=True)
class StepMember:
    """A job that takes part in a step. The flight recorder keeps these, in case the engine dies in the step."""

    job_id: str
    attempt: int
    phase: Literal["prefill", "decode"]


RecordStep = Callable[[Sequence[StepMember]], None]


class Backend(Protocol):
    """One loaded model and its running batch."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load the model; may take minutes."""

    @property
    def loaded(self) -> LoadedModel: ...

    def add(self, command: AddJob) -> None:
        """Let the job join the batch at a later step. The same (job_id, attempt) must not be added twice.

        Raises a CeleriacError if the job can never run. The back end then keeps nothing of it; the caller reports it.
        """

    def embed(self, command: EmbedJob) -> None:
        """Like `add`, for an embedding job. Raises UnsupportedParameter if the model cannot make embeddings."""

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        """Remove the job before the next step. A job that is not here has just ended, and is ignored.

        With a `reason`, the next step's outputs include a final output for each sequence that had not ended. If
        `reason` is empty, they include nothing of the job.
        """

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to report, such as the final outputs of an aborted job."""

    def step(self, record: RecordStep) -> StepDone:
        """One iteration: admit, run the model, sample. Returns the outputs of all sequences, final ones included.

        `record` is called after admission and before the model runs, with every job in this step, and in the next one
        if that is launched ahead. A job that cannot continue is reported in `failures` and removed. An exception that
        escapes ends the process.
        """

    def stats(self) -> EngineStats: ...


CLASS_BY_BACKEND: dict[str, tuple[str, str]] = {
    "encoder": ("gpu_worker.engine.backends.encoder", "EncoderBackend"),
    "fake": ("gpu_worker.engine.backends.fake", "FakeBackend"),
    "llama_cpp": ("gpu_worker.engine.backends.llama_cpp", "LlamaCppBackend"),
    "remote": ("gpu_worker.engine.backends.remote", "RemoteBackend"),
    "transformers": ("gpu_worker.engine.backends.transformers", "TransformersBackend"),
    "vllm": ("gpu_worker.engine.backends.vllm", "VllmBackend"),
}


def import_backend(spec: ModelSpec) -> type[Backend]:
    """Import the class that `spec.backend` names. Raises KeyError for a name that is not registered."""
    is_encoder = spec.task != "generation" and spec.backend == "transformers"
    module_name, class_name = CLASS_BY_BACKEND["encoder" if is_encoder else spec.backend]
    return cast(type[Backend], getattr(import_module(module_name), class_name))
