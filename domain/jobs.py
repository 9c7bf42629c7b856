"""What a job is and how its id is written, the states of workers, why a job waits, and what a batch is.

An id is a UUID inside and in SQL, and a prefixed ULID outside (HTTP, Celery, Flower, logs): the same 128 bits in
Crockford's base 32 (https://github.com/ulid/spec), so both spellings sort by creation time. One job has the same 26
characters under every prefix: `job_01J...`, `chatcmpl-01J...`, `cmpl-01J...`, `resp_01J...`, `msg_01J...`.

Reasons for waiting follow from facts about the job and the live workers; they are never guessed.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

ULID_LENGTH = 26

SEPARATOR_BY_PREFIX = {"job": "_", "resp": "_", "msg": "_", "chatcmpl": "-", "cmpl": "-"}

# An event has the same 26 characters as its object.
SEPARATOR_BY_PREFIX_OF_OTHERS = {
    "batch": "_",
    "batch_req": "_",
    "msgbatch": "_",
    "evt": "_",
    "file": "-",
    "wh": "_",
    "whd": "_",
}

_VALUE_BY_CHARACTER = {character: value for value, character in enumerate(ALPHABET)}


def new_id() -> UUID:
    """A fresh id: milliseconds since 1970 in the upper 48 bits, 80 random ones below."""
    return UUID(int=(time.time_ns() // 1_000_000) << 80 | secrets.randbits(80))


def external_id(id_: UUID, prefix: str = "job") -> str:
    """The id as clients see it. Raises ValueError for an unknown prefix."""
    separator = SEPARATOR_BY_PREFIX.get(prefix) or SEPARATOR_BY_PREFIX_OF_OTHERS.get(prefix)
    if separator is None:
        raise ValueError(f"no id has the prefix {prefix!r}; choose one of: {', '.join(SEPARATOR_BY_PREFIX)}")
    value = id_.int
    ulid = "".join(ALPHABET[value >> shift & 31] for shift in range(5 * (ULID_LENGTH - 1), -1, -5))
    return f"{prefix}{separator}{ulid}"


def parse_id(text: str) -> UUID:
    """The job behind an external id, whatever its prefix; letters may be in either case. Raises ValueError."""
    prefix, ulid = text[:-ULID_LENGTH], text[-ULID_LENGTH:].upper()
    if SEPARATOR_BY_PREFIX.get(prefix[:-1]) != prefix[-1:] or not text.isascii():
        raise ValueError(f"{text[:64]!r} is not a job id; they look like job_01JABCDEFGHJKMNPQRSTVWXYZ0")
    return _parse_ulid(text, ulid)


def parse_id_of_other(text: str, prefix: str) -> UUID:
    """As `parse_id`, for objects other than jobs, which have exactly one prefix. Raises ValueError."""
    beginning = f"{prefix}{SEPARATOR_BY_PREFIX_OF_OTHERS[prefix]}"
    if text[:-ULID_LENGTH] != beginning or not text.isascii():
        raise ValueError(f"{text[:64]!r} is not an id of this kind; they begin with {beginning}")
    return _parse_ulid(text, text[-ULID_LENGTH:].upper())


def _parse_ulid(text: str, ulid: str) -> UUID:
    value = 0
    for character in ulid:
        digit = _VALUE_BY_CHARACTER.get(character)
        if digit is None:
            raise ValueError(f"{text[:64]!r} is not an id: {character!r} is not a character of Crockford's base 32")
        value = value << 5 | digit
    if value >= 1 << 128:
        raise ValueError(f"{text[:64]!r} is not an id: its first digit is above 7")
    return UUID(int=value)


_LIST_TYPES = ("list", "tuple", "set", "frozenset")

_NO_SCHEMAS = frozenset({"metadata", "serialization"})


def _failing_fast(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_failing_fast(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {name: part if name in _NO_SCHEMAS else _failing_fast(part) for name, part in schema.items()}
    return changed | {"fail_fast": True} if schema.get("type") in _LIST_TYPES else changed


class FirstErrorModel(BaseModel):
    """A model that stops at the first bad item of a list.

    pydantic checks every item and collects an error for each, which takes seconds and hundreds of megabytes for some
    hundred thousand items, while clients are only told of the first. This is pydantic's `FailFast`, applied to every
    list within the fields."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = _failing_fast(handler(source))
        return schema


class JobStatus(StrEnum):
    QUEUED = "queued"  # accepted, waiting in SQL; also between two attempts
    IN_PROGRESS = "in_progress"  # claimed by one GPU worker under a lease
    COMPLETED = "completed"  # the model stopped, or max_tokens was reached
    FAILED = "failed"  # a permanent error, or the retry budget is spent
    CANCELLED = "cancelled"  # on request; partial output is kept
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
    """The route through which a job came: the scope of its idempotency key and of the lists that show it."""

    JOBS = "jobs"
    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"  # Anthropic's
    EMBEDDINGS = "embeddings"
    SIMPLE = "simple"  # /generate and similar


class JobKind(StrEnum):
    GENERATION = "generation"
    EMBEDDING = "embedding"


MIN_PRIORITY = -10  # the lowest that a client may give its job

BATCH_PRIORITY = -20  # of batch lines: they run where no other job wants to


class Lane(StrEnum):
    STANDARD = "standard"
    ISOLATED = "isolated"  # suspected of crashing an engine: runs alone


class AttemptOutcome(StrEnum):
    """How one attempt ended. The first four always end the job as well."""

    COMPLETED = "completed"
    FAILED = "failed"  # the engine gave the job up
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    RELEASED = "released"  # given back without counting as a failure: the worker drained or had to stop
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
    """Why a job failed, as in `domain.errors`; the same in HTTP, SSE, webhooks and the CLI."""

    code: str
    message: str
    retryable: bool = False


class WorkerState(StrEnum):
    """Only a `ready` worker takes jobs."""

    LOADING = "loading"  # its engine is being started, or started again
    READY = "ready"
    DRAINING = "draining"  # it takes no new jobs; running ones may finish
    UNLOADED = "unloaded"  # it has no engine process and waits for a request to load its model


class WaitingFor(StrEnum):
    SLOTS = "slots"  # all slots of suitable workers are taken, or it is on its way to one
    WORKER = "worker"  # its model has no live worker
    MODEL_LOAD = "model_load"  # suitable workers are loading the model
    REVISION = "revision"  # it has output, and no worker serves the revision that made it
    ISOLATION = "isolation"  # it must run alone and waits for a gap between the others
    LIMIT = "limit"  # batches have used their share of the slots, or it just failed and will be retried soon
    PAUSE = "pause"  # an admin unloaded its model, or suitable workers are draining


#: Intended: jobs that wait for these need no attention.
IN_GOOD_ORDER = frozenset({WaitingFor.SLOTS, WaitingFor.LIMIT})


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """The facts of a queued job that decide which workers may run it, and when."""

    lane: Lane = Lane.STANDARD
    revision: str | None = None  # that made its output; None: no output yet, any revision will do
    is_held_line: bool = False  # a batch line that has not been dispatched yet
    is_delayed: bool = False  # it just failed


@dataclass(frozen=True, slots=True)
class LiveWorker:
    state: WorkerState
    revision: str | None  # None: not reported, may be any


@dataclass(frozen=True, slots=True)
class ModelService:
    """The workers that serve a model."""

    workers: Sequence[LiveWorker] = ()
    is_loaded: bool = True  # False: an admin has unloaded it
    is_batch_share_taken: bool = False


def waiting_for(job: WaitingJob, service: ModelService) -> WaitingFor:
    if not service.is_loaded:
        return WaitingFor.PAUSE
    if not service.workers:
        return WaitingFor.WORKER
    able = [one for one in service.workers if job.revision is None or one.revision in (None, job.revision)]
    if not able:
        return WaitingFor.REVISION
    states = {worker.state for worker in able}
    if WorkerState.READY not in states:
        return WaitingFor.PAUSE if states == {WorkerState.DRAINING} else WaitingFor.MODEL_LOAD
    if job.is_delayed or (job.is_held_line and service.is_batch_share_taken):
        return WaitingFor.LIMIT
    return WaitingFor.ISOLATION if job.lane is Lane.ISOLATED else WaitingFor.SLOTS


MAX_LINES = 50_000

MAX_INPUTS = 50_000  # embedding inputs, over all lines

MAX_LINE_BYTES = 1_048_576

MAX_ERRORS = 50  # reported for a refused file

PIECE_BYTES = 1_048_576  # every piece but the last has exactly this length, so a byte's piece follows from its offset


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"  # the file was refused
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"  # every line has ended; the output files are being written
    COMPLETED = "completed"
    EXPIRED = "expired"  # its window closed before its last line ended
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_BATCH_STATUSES


TERMINAL_BATCH_STATUSES = frozenset(
    {BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)


class LineOutcome(StrEnum):
    """How a line ended. Only completed ones are in the output file, all others are in the error file."""

    COMPLETED = "completed"
    FAILED = "failed"  # its job failed, or no job could be made of it
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class FileStatus(StrEnum):
    UPLOADING = "uploading"  # not visible yet
    LIVE = "live"  # of a running batch: its content is the results so far
    PROCESSED = "processed"


class BatchError(Frozen):
    """Why a file was refused; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(Frozen):
    data: tuple[BatchError, ...] = ()


class LineRefusal(Frozen):
    """Why no job was made of a line: what the endpoint would have answered."""

    status_code: int
    type: str
    code: str
    message: str
    param: str | None = None
