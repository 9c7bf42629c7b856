"""What a job is: its statuses and their allowed transitions, how it ends, what it used."""

from enum import StrEnum

from pydantic import ConfigDict

from domain.first_error import FirstErrorModel


class JobStatus(StrEnum):
    QUEUED = "queued"  # accepted, waiting in SQL; also between two attempts
    IN_PROGRESS = "in_progress"  # claimed by one GPU worker under a lease
    COMPLETED = "completed"  # the model stopped, or max_tokens was reached
    FAILED = "failed"  # a permanent error, or the retry budget is spent
    CANCELLED = "cancelled"  # asked for; partial output is kept
    EXPIRED = "expired"  # its deadline passed; partial output is kept

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATUSES


TERMINAL_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})

#: Every transition that a statement in `storage/jobs.py` may make. Terminal statuses absorb.
ALLOWED_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: TERMINAL_STATUSES - {JobStatus.COMPLETED} | {JobStatus.IN_PROGRESS},
    JobStatus.IN_PROGRESS: TERMINAL_STATUSES | {JobStatus.QUEUED},
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.EXPIRED: frozenset(),
}


class Endpoint(StrEnum):
    """Through which route a job came: what a repeated request is told apart by, and which list shows it."""

    JOBS = "jobs"
    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    EMBEDDINGS = "embeddings"
    SIMPLE = "simple"  # /generate and its like


class JobKind(StrEnum):
    GENERATION = "generation"
    EMBEDDING = "embedding"


MIN_PRIORITY = -10  # the lowest that a client may give its job
BATCH_PRIORITY = -20  # of the lines of batches: they run where nobody else wants to


class Lane(StrEnum):
    STANDARD = "standard"
    ISOLATED = "isolated"  # suspected of crashing an engine: runs alone


class AttemptOutcome(StrEnum):
    """How one attempt ended. Only the first four end the job, too, as a matter of course."""

    COMPLETED = "completed"
    FAILED = "failed"  # the engine gave the job up
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    RELEASED = "released"  # given back uncharged: the worker drained, or had to stop
    LOST = "lost"  # the lease lapsed
    CRASHED = "crashed"  # the engine died
    STALLED = "stalled"  # the lease was renewed, but no token came for too long


class FinishReason(StrEnum):
    """Why one sequence stopped."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens or the context length
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"  # the job failed; only in a result, since the stream of a failed job just ends


class Frozen(FirstErrorModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Usage(Frozen):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache


class JobError(Frozen):
    """Why a job failed, in the words of `domain.errors`: HTTP, SSE, webhook and CLI all say the same."""

    code: str
    message: str
    retryable: bool = False
