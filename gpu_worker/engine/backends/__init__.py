"""What an engine process runs its model with: the Backend protocol, and every implementation by name.

A back end belongs to one thread and knows neither sockets nor SQL. Its class is imported when it is asked for, so that
a worker with one back end needs the libraries of no other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol, cast

from domain.catalog import ModelSpec
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, StepDone


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What is known once the model is loaded."""

    device: str
    num_cache_tokens: int


@dataclass(frozen=True, slots=True)
class StepMember:
    """A job that takes part in the step at hand; the flight recorder keeps these in case the step is the last one."""

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
        """Let the job join at a coming step. Raises a CeleriacError (EngineError, ...) if it can never run; the caller
        then reports it, and nothing of the job stays behind. A (job_id, attempt) is added once."""

    def embed(self, command: EmbedJob) -> None:
        """As `add`, for vectors; refuses where the model makes none."""

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        """Take the job out before the next step; a job that is not here has just ended and is ignored.

        With a `reason`, that step's outputs hold one final output for each sequence that had not ended; without, they
        hold nothing of the job.
        """

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say; True while the outputs of an abort are due."""

    def step(self, record: RecordStep) -> StepDone:
        """One iteration: admit, run the model, sample; the outputs of all sequences, final ones included.

        `record` is called after admission and before the model runs, with every job whose step is under way: of this
        step, and of the next one where that is launched already. A job that
        cannot go on is reported in `failures` and leaves; an exception that escapes ends the process.
        """

    def stats(self) -> EngineStats: ...


CLASS_BY_BACKEND: dict[str, tuple[str, str]] = {
    "encoder": ("gpu_worker.engine.backends.encoder", "EncoderBackend"),
    "fake": ("gpu_worker.engine.backends.fake", "FakeBackend"),
    "transformers": ("gpu_worker.engine.backends.transformers", "TransformersBackend"),
}


def import_backend(spec: ModelSpec) -> type[Backend]:
    """The class that `spec` names, with what it needs imported. Raises KeyError for a name that is not registered."""
    is_encoder = spec.task == "embedding" and spec.backend == "transformers"
    module_name, class_name = CLASS_BY_BACKEND["encoder" if is_encoder else spec.backend]
    return cast(type[Backend], getattr(import_module(module_name), class_name))
