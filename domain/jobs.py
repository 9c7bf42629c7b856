"""The states of jobs, attempts, workers and batches; ids; and why a queued job waits.

Internally and in SQL an id is a UUID; externally (HTTP, Celery, Flower, logs) it is a prefixed ULID: the same 128 bits
in Crockford's base 32 (https://github.com/ulid/spec). Both forms sort by creation time. A job has the same 26
characters with every prefix: `job_01J...`, `chatcmpl-01J...`, `cmpl-01J...`, `resp_01J...`,
`msg_01J...`.

Reasons for waiting are derived from facts about the job and the live workers, never guessed.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

ULID_LENGTH = 26

SEPARATOR_BY_PREFIX = {"job": "_", "resp": "_", "msg": "_", "chatcmpl": "-", "cmpl": "-", "rerank": "-", "score": "-"}

# An event has the same 26 characters as the object that it is about.
SEPARATOR_BY_PREFIX_OF_OTHERS = {
    "audit": "_",
    "batch": "_",
    "batch_req": "_",
    "conv": "_",
    "erasure": "_",
    "msgbatch": "_",
    "evt": "_",
    "file": "-",
    "wh": "_",
    "whd": "_",
}

_PAIRS = [first + second for first in ALPHABET for second in ALPHABET]  # two characters at a time: half of the steps

_SHIFTS = range(5 * (ULID_LENGTH - 2), -1, -10)

_VALUE_BY_CHARACTER = {character: value for value, character in enumerate(ALPHABET)}


def new_id() -> UUID:
    """A new id: milliseconds since 1970 in the upper 48 bits, 80 random bits below."""
    return UUID(int=(time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big"))


def first_id(seconds: float) -> UUID:
    """Before all ids that are drawn from this time on, in seconds since 1970."""
    return UUID(int=min(max(0, int(seconds * 1000)), 2**48 - 1) << 80)


def external_id(id_: UUID, prefix: str = "job") -> str:
    """The external form of an id. Raises ValueError for an unknown prefix."""
    separator = SEPARATOR_BY_PREFIX.get(prefix) or SEPARATOR_BY_PREFIX_OF_OTHERS.get(prefix)
    if separator is None:
        raise ValueError(f"no id has the prefix {prefix!r}; choose one of: {', '.join(SEPARATOR_BY_PREFIX)}")
    return f"{prefix}{separator}{_ulid(id_)}"


@lru_cache(maxsize=1024)  # a request writes the id of its job five times
def _ulid(id_: UUID) -> str:
    value = id_.int
    return "".join([_PAIRS[value >> shift & 1023] for shift in _SHIFTS])


def parse_id(text: str) -> UUID:
    """The job's id from its external form with any prefix, letters in either case. Raises ValueError."""
    prefix, ulid = text[:-ULID_LENGTH], text[-ULID_LENGTH:].upper()
    if SEPARATOR_BY_PREFIX.get(prefix[:-1]) != prefix[-1:] or not text.isascii():
        raise ValueError(f"{text[:64]!r} is not a job id; job ids look like job_01JABCDEFGHJKMNPQRSTVWXYZ0")
    return _parse_ulid(text, ulid)


def parse_id_of_other(text: str, prefix: str) -> UUID:
    """Like `parse_id`, for objects other than jobs, which have exactly one prefix. Raises ValueError."""
    beginning = f"{prefix}{SEPARATOR_BY_PREFIX_OF_OTHERS[prefix]}"
    if text[:-ULID_LENGTH] != beginning or not text.isascii():
        raise ValueError(f"{text[:64]!r} is not an id of this kind; such ids begin with {beginning}")
    return _parse_ulid(text, text[-ULID_LENGTH:].upper())


def _parse_ulid(text: str, ulid: str) -> UUID:
    value = 0
    for character in ulid:
        digit = _VALUE_BY_CHARACTER.get(character)
        if digit is None:
            raise ValueError(f"{text[:64]!r} is not an id: {character!r} is not a character of Crockford's base 32")
        value = value << 5 | digit
    if value >= 1 << 128:
        raise ValueError(f"{text[:64]!r} is not an id: its first character must be 0 to 7")
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
    """A model whose validation stops at the first invalid item of a list.

    By default pydantic collects an error for every item, which takes seconds and hundreds of megabytes for some hundred
    thousand items, while clients are told only the first. This applies pydantic's `FailFast` to every list in the
    fields."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = _failing_fast(handler(source))
        return schema


class JobStatus(StrEnum):
    QUEUED = "queued"  # accepted, waiting in SQL; also between two attempts
    IN_PROGRESS = "in_progress"  # claimed by one GPU worker under a lease
    COMPLETED = "completed"  # the model stopped, or max_tokens was reached
    FAILED = "failed"  # a permanent error, or too many failed attempts
    CANCELLED = "cancelled"  # on request; partial output is kept
    EXPIRED = "expired"  # its deadline passed; partial output is kept

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATUSES


TERMINAL_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})

#: Every transition that a statement in `storage/jobs.py` may make. Terminal statuses are final.
ALLOWED_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: TERMINAL_STATUSES - {JobStatus.COMPLETED} | {JobStatus.IN_PROGRESS},
    JobStatus.IN_PROGRESS: TERMINAL_STATUSES | {JobStatus.QUEUED},
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.EXPIRED: frozenset(),
}


class Endpoint(StrEnum):
    """The route through which a job was submitted: the scope of its idempotency key and of the lists that show it."""

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


MIN_PRIORITY = -10  # the lowest that a client may request

BATCH_PRIORITY = -20  # of batch lines, which yield to all other jobs at first


class Lane(StrEnum):
    STANDARD = "standard"
    ISOLATED = "isolated"  # suspected of crashing an engine: runs alone


class AttemptOutcome(StrEnum):
    """How one attempt ended. The first four always end the job as well."""

    COMPLETED = "completed"
    FAILED = "failed"  # the engine reported a permanent error
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    RELEASED = "released"  # returned to the queue, not as a failure: the worker drained or had to stop
    LOST = "lost"  # the lease expired
    CRASHED = "crashed"  # the engine died
    STALLED = "stalled"  # the lease was renewed, but no token came for too long


class FinishReason(StrEnum):
    """Why one sequence stopped."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens or the context length
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"  # the job failed; never in a chunk, as the stream of a failed job just ends


class Frozen(FirstErrorModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Usage(Frozen):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache


class JobError(Frozen):
    """Why a job failed. `code` is one of `domain.errors`; the same everywhere: in HTTP, SSE and the CLI."""

    code: str
    message: str
    retryable: bool = False


class WorkerState(StrEnum):
    """Only a `ready` worker takes jobs."""

    LOADING = "loading"  # its engine is being started, or started again, or waits for its remote server
    READY = "ready"
    DRAINING = "draining"  # it takes no new jobs; running ones may finish
    UNLOADED = "unloaded"  # it has no engine process and waits for an order to load its model
    STANDBY = "standby"  # it serves other models at present, and loads this one once jobs wait for it


class WaitingFor(StrEnum):
    SLOTS = "slots"  # a slot: those of suitable workers are taken, or the job is on its way to one
    WORKER = "worker"  # its model has no live worker
    MODEL_LOAD = "model_load"  # suitable workers load the model, or will once there is room, or their server is away
    REVISION = "revision"  # it has output, and no worker serves the revision that made it
    ISOLATION = "isolation"  # it must run alone and waits for a gap between the others
    LIMIT = "limit"  # batches have used their share of the slots, or it just failed and will be retried soon
    SAME_REQUEST = "same_request"  # another job that asks for the same, whose output it gets
    TURN = "turn"  # it was paused, since it is another tenant's turn; it continues by itself
    PAUSE = "pause"  # an admin unloaded its model, or suitable workers are draining


#: Normal reasons, which need no attention.
IN_GOOD_ORDER = frozenset({WaitingFor.SLOTS, WaitingFor.TURN, WaitingFor.LIMIT, WaitingFor.SAME_REQUEST})


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """The facts of a queued job that decide which workers may run it, and when."""

    lane: Lane = Lane.STANDARD
    revision: str | None = None  # the one that made its output; None: no output yet, so any revision will do
    is_held_line: bool = False  # a batch line that has not been dispatched yet
    is_delayed: bool = False  # it just failed
    is_following: bool = False  # it gets another job's output
    is_paused: bool = False  # it had to leave its slot to another tenant


@dataclass(frozen=True, slots=True)
class LiveWorker:
    state: WorkerState
    revision: str | None  # None: not reported, so it may be any


@dataclass(frozen=True, slots=True)
class ModelService:
    """The workers that serve a model."""

    workers: Sequence[LiveWorker] = ()
    is_loaded: bool = True  # False: an admin has unloaded it
    is_batch_share_taken: bool = False


def waiting_for(job: WaitingJob, service: ModelService) -> WaitingFor:
    """What the job waits for; the first reason that applies."""
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
    if job.is_following:
        return WaitingFor.SAME_REQUEST
    if job.is_delayed or (job.is_held_line and service.is_batch_share_taken):
        return WaitingFor.LIMIT
    if job.lane is Lane.ISOLATED:
        return WaitingFor.ISOLATION
    return WaitingFor.TURN if job.is_paused else WaitingFor.SLOTS


MAX_LINES = 50_000  # of a batch

MAX_INPUTS = 50_000  # embedding inputs, over all lines

MAX_LINE_BYTES = 1_048_576

MAX_ERRORS = 50  # reported for a refused file

PIECE_BYTES = 1_048_576  # exactly, for every piece but the last, so that an offset tells the piece


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"  # the file was refused
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"  # every line has ended; the output files are being written
    COMPLETED = "completed"
    EXPIRED = "expired"  # its completion window ended before its last line
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_BATCH_STATUSES


TERMINAL_BATCH_STATUSES = frozenset(
    {BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)


class LineOutcome(StrEnum):
    """How a line ended. Completed lines are in the output file, all others in the error file."""

    COMPLETED = "completed"
    FAILED = "failed"  # its job failed, or the line was refused
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class FileStatus(StrEnum):
    UPLOADING = "uploading"  # not visible yet
    LIVE = "live"  # the output of a running batch: its content is the results so far
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
    """Why a line was refused: the error that its route would have answered with."""

    status_code: int
    type: str
    code: str
    message: str
    param: str | None = None
