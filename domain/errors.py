"""The exception tree. Every class has a stable `code`, which `dialects/errors.py` maps to HTTP.

CeleriacError
├── InvalidRequest                 invalid_value: a field is invalid; the message has the value seen and the remedy
│   ├── ContextLengthExceeded      context_length_exceeded
│   ├── UnsupportedParameter       unsupported_parameter
│   ├── PreviousResponseNotFound   previous_response_not_found: there is no such response to continue
│   ├── ConversationLocked         conversation_locked: another response or change is under way; send it again
│   ├── ConnectionTooOld           websocket_connection_limit_reached: a WebSocket has been open for too long
│   ├── InvalidCursor              invalid_cursor: an invalid stream position or page cursor
│   ├── InvalidJsonLine            invalid_json_line: a line of a batch is not a JSON object
│   ├── MissingParameter           missing_required_parameter: a line of a batch lacks one of its four fields
│   ├── InvalidUrl                 invalid_url: a line of a batch is for another route than its batch
│   └── StreamingUnsupported       streaming_unsupported: a line of a batch asks for a stream
├── IdempotencyKeyReused           idempotency_key_reused: same key, different request
├── PoisonRequest                  poison_request: the same request crashed an engine recently
├── JobNotRetryable                job_not_retryable: the job has not ended, or is completed
├── RequestTooLarge                request_too_large
├── InsufficientQuota              insufficient_quota: a limit that does not pass with time
├── StorageFull                    storage_full: the disk of the database is full
├── AuthenticationFailed           invalid_api_key
├── PermissionDenied               permission_denied
├── NotFound
│   ├── ModelNotFound              model_not_found
│   ├── JobNotFound                job_not_found (also for another tenant's job)
│   ├── FileNotFound               file_not_found, likewise
│   ├── BatchNotFound              batch_not_found, likewise
│   └── ConversationNotFound       conversation_not_found, likewise
├── NotOffered                     not_implemented: an OpenAI route without a counterpart here
├── CursorExpired                  cursor_expired: the log before this position was pruned
├── Overloaded                     retry later; carries retry_after_seconds
│   ├── LimitReached               a limit of the key or tenant (docs/limits.md); the code says which one
│   │   ├── TooManyQueuedJobs          too_many_queued_jobs
│   │   ├── RequestsPerMinuteExceeded  requests_per_minute_exceeded
│   │   ├── TokensPerMinuteExceeded    tokens_per_minute_exceeded
│   │   ├── TooManyUnfinishedJobs      too_many_unfinished_jobs
│   │   ├── TooManyQueuedTokens        too_many_queued_tokens
│   │   ├── TooManyStreams             too_many_streams
│   │   └── TokenBudgetSpent           does not pass soon, so clients should not retry
│   │       ├── TokensPerDayExceeded       tokens_per_day_exceeded
│   │       └── TokensPerMonthExceeded     tokens_per_month_exceeded
│   ├── ServerOverloaded           server_is_overloaded: a limit of the server
│   ├── NoWorkers                  no_workers: no live worker serves the model
│   ├── DeadlineUnattainable       deadline_unattainable: the job would start after its deadline or start timeout
│   ├── ModelUnavailable           model_unavailable: its entry or files are invalid or cannot be loaded now
│   └── StorageUnavailable         storage_unavailable: the database does not answer
├── DeadlineExceeded               deadline_exceeded
│   ├── StartTimeoutExceeded       start_timeout_exceeded: the job was not started within its start timeout
│   └── RunTimeoutExceeded         run_timeout_exceeded: it ran for longer than its run timeout
├── JobUnreadable                  job_unreadable: what is stored of the job is not what we have written
├── JobCancelled                   job_cancelled: the job that this request waits for was cancelled
└── JobFailure                     why a job failed; stored as its JobError
    ├── EngineError                engine_error: the model could not run this sequence
    ├── WorkerLost                 worker_lost: all attempts ended with lost or crashed workers
    ├── PoisonJob                  poison_job: the job crashed an engine while it ran alone
    ├── OutOfMemory                out_of_memory: the job does not fit, even alone
    └── ModelRevisionGone          model_revision_gone: it started with a revision that is no longer served
"""

from typing import ClassVar


class ExpectedError(Exception):
    """An error whose message tells a user what to do: commands print it without a traceback."""


class CeleriacError(ExpectedError):
    """`param` names the request field at fault, if there is one."""

    code: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(CeleriacError):
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class PreviousResponseNotFound(InvalidRequest):
    code = "previous_response_not_found"


class ConversationLocked(InvalidRequest):
    code = "conversation_locked"


class ConnectionTooOld(InvalidRequest):
    code = "websocket_connection_limit_reached"


class InvalidCursor(InvalidRequest):
    code = "invalid_cursor"


class InvalidJsonLine(InvalidRequest):
    code = "invalid_json_line"


class MissingParameter(InvalidRequest):
    code = "missing_required_parameter"


class InvalidUrl(InvalidRequest):
    code = "invalid_url"


class StreamingUnsupported(InvalidRequest):
    code = "streaming_unsupported"


class IdempotencyKeyReused(CeleriacError):
    code = "idempotency_key_reused"


class PoisonRequest(CeleriacError):
    code = "poison_request"


class JobNotRetryable(CeleriacError):
    code = "job_not_retryable"


class RequestTooLarge(CeleriacError):
    code = "request_too_large"


class InsufficientQuota(CeleriacError):
    code = "insufficient_quota"


class StorageFull(CeleriacError):
    code = "storage_full"


class AuthenticationFailed(CeleriacError):
    code = "invalid_api_key"


class PermissionDenied(CeleriacError):
    code = "permission_denied"


class NotFound(CeleriacError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class JobNotFound(NotFound):
    code = "job_not_found"


class FileNotFound(NotFound):
    code = "file_not_found"


class BatchNotFound(NotFound):
    code = "batch_not_found"


class ConversationNotFound(NotFound):
    code = "conversation_not_found"


class NotOffered(CeleriacError):
    code = "not_implemented"


class CursorExpired(CeleriacError):
    code = "cursor_expired"


class Overloaded(CeleriacError):
    code = "slow_down"
    retryable = True

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_seconds = retry_after_seconds


class LimitReached(Overloaded):
    code = "limit_reached"


class TooManyQueuedJobs(LimitReached):
    code = "too_many_queued_jobs"


class RequestsPerMinuteExceeded(LimitReached):
    code = "requests_per_minute_exceeded"


class TokensPerMinuteExceeded(LimitReached):
    code = "tokens_per_minute_exceeded"


class TooManyUnfinishedJobs(LimitReached):
    code = "too_many_unfinished_jobs"


class TooManyQueuedTokens(LimitReached):
    code = "too_many_queued_tokens"


class TooManyStreams(LimitReached):
    code = "too_many_streams"


class TokenBudgetSpent(LimitReached):
    code = "token_budget_spent"
    retryable = False


class TokensPerDayExceeded(TokenBudgetSpent):
    code = "tokens_per_day_exceeded"


class TokensPerMonthExceeded(TokenBudgetSpent):
    code = "tokens_per_month_exceeded"


class ServerOverloaded(Overloaded):
    code = "server_is_overloaded"


class NoWorkers(Overloaded):
    code = "no_workers"


class DeadlineUnattainable(Overloaded):
    code = "deadline_unattainable"

    def __init__(
        self,
        message: str,
        *,
        predicted_wait_seconds: float = 0.0,
        retry_after_seconds: float = 1.0,
        param: str | None = None,
    ) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds, param=param)
        self.predicted_wait_seconds = predicted_wait_seconds


class ModelUnavailable(Overloaded):
    code = "model_unavailable"


class StorageUnavailable(Overloaded):
    code = "storage_unavailable"


class DeadlineExceeded(CeleriacError):
    code = "deadline_exceeded"


class StartTimeoutExceeded(DeadlineExceeded):
    code = "start_timeout_exceeded"


class RunTimeoutExceeded(DeadlineExceeded):
    code = "run_timeout_exceeded"


class JobUnreadable(CeleriacError):
    code = "job_unreadable"


class JobCancelled(CeleriacError):
    code = "job_cancelled"


class JobFailure(CeleriacError):
    code = "job_failed"


class EngineError(JobFailure):
    code = "engine_error"


class WorkerLost(JobFailure):
    code = "worker_lost"
    retryable = True


class PoisonJob(JobFailure):
    code = "poison_job"


class OutOfMemory(JobFailure):
    code = "out_of_memory"


class ModelRevisionGone(JobFailure):
    code = "model_revision_gone"
    retryable = True
