"""The native dialect: the body of a job submission, and the views of a job.

A view is built as a plain dict and dumped once; `JobView` is its type and its published schema.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, NotRequired, Self, cast

import orjson
from pydantic import AwareDatetime, Field, StringConstraints, TypeAdapter, model_validator

from dialects.errors import JobErrorView, job_error_view
from dialects.openai_views import REFERENCE, PageView, Timestamp, View, optional_timestamp, timestamp
from domain.callbacks import CeleryCallback
from domain.job_options import JobOptions
from domain.jobs import FinishReason, Frozen, JobKind, JobStatus, WaitingFor, external_id
from domain.requests import EmbeddingRequest, EmbeddingResult, GenerationRequest, JobOutput, JobRequest
from domain.webhooks import MAX_URL_BYTES
from storage.job_accept import NewJob
from storage.job_queries import JobRecord
from storage.tables import Job, JobAttempt

WEEK_SECONDS = 604_800

NO_NUL = r"^[^\u0000]*$"  # PostgreSQL cannot search metadata that contains one

IdempotencyKey = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,255}$")]

MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]

MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]

WebhookUrlText = Annotated[str, StringConstraints(max_length=MAX_URL_BYTES)]

EndName = Literal["completed", "failed", "cancelled", "expired"]

TimeoutSeconds = Annotated[float, Field(gt=0, le=WEEK_SECONDS, allow_inf_nan=False)]


class JobOptionFields(Frozen):
    """The options of a job that are not part of its request."""

    priority: int = Field(default=0, ge=-10, le=10, description="Higher runs earlier, among the jobs of one tenant.")
    deadline: AwareDatetime | None = Field(default=None, description="The job expires at this time.")
    start_timeout: TimeoutSeconds | None = Field(
        default=None, description="How many seconds the job may wait in the queue."
    )
    run_timeout: TimeoutSeconds | None = Field(
        default=None, description="How many seconds the job may run once started."
    )
    result_ttl: int | None = Field(
        default=None, ge=60, le=30 * 86_400, description="For how many seconds the job is kept after it has ended."
    )
    idempotency_key: IdempotencyKey | None = Field(
        default=None, description="May be sent as the Idempotency-Key header instead."
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)
    webhook: WebhookUrlText | None = Field(default=None, description="A URL that is notified of the job's end.")
    use_cache: bool | None = Field(
        default=None,
        description="true: an earlier answer will do even if the output is random; false: the job must run.",
    )
    celery: CeleryCallback | None = Field(default=None, description="A Celery message that is sent at the job's end.")
    webhook_events: tuple[EndName, ...] = Field(  # pydantic would copy a list for each body that leaves it out
        default=("completed", "failed", "cancelled", "expired"),
        min_length=1,
        max_length=4,
        description="Which final statuses it is notified of.",
    )

    @model_validator(mode="after")
    def _refuse_events_for_nobody(self) -> Self:
        if self.webhook is None and "webhook_events" in self.model_fields_set:
            raise ValueError("webhook_events is set but webhook is not; add webhook, or remove webhook_events")
        return self

    @model_validator(mode="after")
    def _one_destination(self) -> Self:
        if self.webhook is not None and self.celery is not None:
            raise ValueError("webhook and celery are both set; send only one of them")
        return self

    def to_options(self, idempotency_key: str | None) -> JobOptions:
        return JobOptions(
            priority=self.priority,
            deadline_at=self.deadline,
            start_timeout_seconds=self.start_timeout,
            run_timeout_seconds=self.run_timeout,
            result_ttl_seconds=self.result_ttl,
            idempotency_key=idempotency_key,
            metadata=self.metadata,
            webhook_url=self.webhook,
            callback=self.celery,
            use_cache=self.use_cache,
            webhook_statuses=_statuses_of(self.webhook_events),
        )


@lru_cache(maxsize=512)  # of at most four names
def _statuses_of(ends: tuple[EndName, ...]) -> tuple[JobStatus, ...]:
    return tuple(JobStatus(end) for end in dict.fromkeys(ends))


class JobBody(JobOptionFields, GenerationRequest):
    """POST /v1/jobs: a generation request and the options of the job."""

    def to_request(self) -> GenerationRequest:
        return GenerationRequest.model_construct(
            model=self.model,
            prompt=self.prompt,
            messages=self.messages,
            prompt_token_ids=self.prompt_token_ids,
            tools=self.tools,
            parallel_tool_calls=self.parallel_tool_calls,
            continue_final_message=self.continue_final_message,
            reasoning_effort=self.reasoning_effort,
            chat_template_kwargs=self.chat_template_kwargs,
            params=self.params,
        )


class EmbeddingJobBody(JobOptionFields, EmbeddingRequest):
    """POST /v1/jobs with `inputs`: an embedding request and the options of the job."""

    def to_request(self) -> EmbeddingRequest:
        return EmbeddingRequest.model_construct(
            model=self.model,
            inputs=self.inputs,
            queries=self.queries,
            dimensions=self.dimensions,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
        )


def _body_schema() -> dict[str, Any]:
    """`model` may be left out: the route fills it in."""
    schema = TypeAdapter(JobBody | EmbeddingJobBody).json_schema(ref_template=REFERENCE)
    for body in (JobBody, EmbeddingJobBody):
        schema["$defs"][body.__name__]["required"].remove("model")
    return schema


BODY_SCHEMA = _body_schema()


def body_class(body: bytes) -> type[JobBody] | type[EmbeddingJobBody]:
    """The class for a body, by its `kind` or by whether it has `inputs`. Malformed bodies are left to the parser."""
    if b'"inputs"' not in body and b'"embedding"' not in body:
        return JobBody
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return JobBody
    is_embedding = isinstance(fields, dict) and fields.get("kind", "inputs" in fields) in (True, "embedding")
    return EmbeddingJobBody if is_embedding else JobBody


class QueueView(View):
    position: Annotated[
        int | None, Field(description="How many jobs of this model are ahead of it in the current order.")
    ]
    is_estimate: Annotated[bool, Field(description="Whether the position is estimated, as the queue is long.")]
    eta_seconds: Annotated[
        float | None,
        Field(
            description="Estimated time until it starts, the median; null if it waits for neither a slot nor a load."
        ),
    ]
    eta_p90_seconds: Annotated[float | None, Field(description="Nine of ten such jobs have started by then.")]
    end_eta_seconds: Annotated[float | None, Field(description="Estimated time until it ends, the median.")]
    end_eta_p90_seconds: Annotated[float | None, Field(description="Nine of ten such jobs have ended by then.")]
    waiting_for: Annotated[WaitingFor | None, Field(description="Why it is not running yet.")]
    load_percent: Annotated[
        int | None, Field(description="How far its model has been loaded; null if it is not being loaded or unknown.")
    ]


class UsageView(View):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class PartialChoiceView(View):
    """A choice of a running job: what is committed so far."""

    index: int
    text: str
    finish_reason: Annotated[FinishReason | None, Field(description="Null while it is still running.")]
    num_tokens: int


class ChoiceView(PartialChoiceView):
    num_reasoning_tokens: Annotated[
        int | None, Field(description="Tokens up to the end of the first </think>, if there is one.")
    ]
    stop_string: Annotated[str | None, Field(description="That ended it; no part of its text.")]
    logprobs: list[Any] | None
    candidate: Annotated[int | None, Field(description="With best_of: the index of this choice in the stream.")]
    mean_logprob: Annotated[float | None, Field(description="With best_of: the mean logprob by which it was chosen.")]


class OutputView(View):
    text: Annotated[str, Field(description="The text of the first choice.")]
    choices: Sequence[ChoiceView | PartialChoiceView]
    prompt_logprobs: NotRequired[Annotated[list[Any] | None, Field(description="One per prompt token, if requested.")]]


class VectorsView(View):
    embeddings: Annotated[
        list[str], Field(description="One per input, in order: little-endian float32 numbers in base64.")
    ]
    dimensions: int


class UrlsView(View):
    get: str
    events: str
    output: str
    cancel: str


class AttemptView(View):
    attempt: int
    worker_id: str
    worker: Annotated[str | None, Field(description="The worker's name; null if it had not registered.")]
    started_at: Timestamp
    ended_at: Annotated[Timestamp | None, Field(description="Null while it runs.")]
    outcome: Annotated[
        str | None, Field(description="completed, failed, cancelled, expired, released, lost, crashed, stalled.")
    ]
    error_code: str | None
    num_tokens: Annotated[int, Field(description="How many tokens this attempt committed.")]


class JobView(View):
    """A job. A job that has ended has `output`: complete, or partial if it was cancelled or has expired."""

    id: str
    object: Literal["job"]
    kind: JobKind
    status: JobStatus
    model: str
    created_at: Timestamp
    started_at: Timestamp | None
    first_token_at: Annotated[Timestamp | None, Field(description="When the first output was committed.")]
    finished_at: Timestamp | None
    expires_at: Annotated[Timestamp | None, Field(description="When the job is deleted; null until it has ended.")]
    deadline: Annotated[Timestamp | None, Field(description="As it was asked for.")]
    start_timeout: Annotated[float | None, Field(description="Seconds, likewise.")]
    run_timeout: Annotated[float | None, Field(description="Seconds, likewise.")]
    priority: int
    attempt: int
    worker: Annotated[str | None, Field(description="The name of the worker that runs it, or ran it last.")]
    queue: Annotated[QueueView | None, Field(description="Only while queued.")]
    cancel_requested: bool
    finish_reason: Annotated[
        FinishReason | None, Field(description="That of the first choice; `error` if the job failed.")
    ]
    usage: UsageView | None
    output: OutputView | VectorsView | None
    error: JobErrorView | None
    metadata: dict[str, str]
    retry_of: Annotated[str | None, Field(description="The ended job that this one repeats.")]
    cached: Annotated[bool, Field(description="Whether its output is that of an earlier job.")]
    urls: UrlsView
    attempts: NotRequired[Annotated[list[AttemptView] | None, Field(description="Only with include=attempts.")]]
    input: NotRequired[Annotated[dict[str, Any] | None, Field(description="Only with include=input.")]]


class JobOutputView(OutputView):
    """Only the output; of a running job, the output so far."""

    id: str
    object: Literal["job.output"]
    status: JobStatus


class JobVectorsView(View):
    """The same of an embedding job, which has no vectors before its end."""

    id: str
    object: Literal["job.output"]
    status: JobStatus
    embeddings: NotRequired[
        Annotated[list[str], Field(description="One per input, in order: little-endian float32 numbers in base64.")]
    ]
    dimensions: NotRequired[int]


class DeadLetterListView(PageView):
    data: list[JobView]


class JobListView(PageView):
    data: list[JobView]


_NULLS: dict[str, object] = dict.fromkeys(name for name in JobView.__annotations__ if name in JobView.__required_keys__)


def urls_of(job_id: str) -> UrlsView:
    path = f"/v1/jobs/{job_id}"
    return {"get": path, "events": f"{path}/events", "output": f"{path}/output", "cancel": f"{path}/cancel"}


def new_job_view(new_job: NewJob, created_at: datetime, queue: QueueView) -> JobView:
    """The view of a job that was just accepted, built without a query: fields that it does not have yet are null."""
    job_id = external_id(new_job.id)
    known = {
        "id": job_id,
        "object": "job",
        "kind": new_job.request.kind,
        "status": JobStatus.QUEUED,
        "model": new_job.request.model,
        "created_at": timestamp(created_at),
        "deadline": optional_timestamp(new_job.deadline_at),
        "start_timeout": new_job.start_timeout_seconds,
        "run_timeout": new_job.run_timeout_seconds,
        "priority": new_job.priority,
        "attempt": 0,
        "queue": queue,
        "cancel_requested": False,
        "metadata": new_job.metadata,
        "retry_of": new_job.retry_of and external_id(new_job.retry_of),
        "cached": False,
        "urls": urls_of(job_id),
    }
    return cast(JobView, _NULLS | known)


def job_view(record: JobRecord, queue: QueueView | None = None) -> JobView:
    """The view of a stored job, with its input if `record` includes the request."""
    job, job_id = record.job, external_id(record.job.id)
    view: JobView = {
        "id": job_id,
        "object": "job",
        "kind": job.kind,
        "status": job.status,
        "model": job.model_name,
        "created_at": timestamp(job.created_at),
        "started_at": optional_timestamp(job.started_at),
        "first_token_at": optional_timestamp(job.first_token_at),
        "finished_at": optional_timestamp(job.finished_at),
        "expires_at": optional_timestamp(job.prune_at),
        "deadline": optional_timestamp(job.asked_deadline_at),
        "start_timeout": _start_timeout(job),
        "run_timeout": job.run_timeout_seconds,
        "priority": job.priority,
        "attempt": job.attempt,
        "worker": record.worker,
        "queue": queue if job.status is JobStatus.QUEUED else None,
        "cancel_requested": job.cancel_requested_at is not None,
        "finish_reason": job.finish_reason,
        "usage": usage_view(job, record.result),
        "output": output_view(record.result),
        "error": None if job.error is None else job_error_view(job.error),
        "metadata": job.job_metadata,
        "retry_of": None if job.retry_of is None else external_id(job.retry_of),
        "cached": job.answered_by is not None,
        "urls": urls_of(job_id),
    }
    if record.request is not None:
        view["input"] = _input_view(record.request)
    return view


def _start_timeout(job: Job) -> float | None:
    """Both times are those of the statement that accepted the job."""
    return None if job.start_deadline_at is None else (job.start_deadline_at - job.created_at).total_seconds()


def attempts_view(job: Job, ended: Sequence[JobAttempt], *, worker: str | None = None) -> list[AttemptView]:
    """Every attempt in order; while the job runs (on `worker`), the last one has no end."""
    attempts: list[AttemptView] = [
        {
            "attempt": one.attempt,
            "worker_id": str(one.worker_id),
            "worker": one.worker_name,
            "started_at": timestamp(one.started_at),
            "ended_at": optional_timestamp(one.ended_at),
            "outcome": one.outcome.value,
            "error_code": one.error_code,
            "num_tokens": one.num_tokens,
        }
        for one in ended
    ]
    if job.status is JobStatus.IN_PROGRESS and len(attempts) < job.attempt:
        assert job.attempt_started_at is not None
        attempts.append(
            {
                "attempt": job.attempt,
                "worker_id": str(job.lease_owner),
                "worker": worker,
                "started_at": timestamp(job.attempt_started_at),
                "ended_at": None,
                "outcome": None,
                "error_code": None,
                "num_tokens": job.num_committed_tokens - job.num_tokens_at_claim,
            }
        )
    return attempts


def _input_view(request: JobRequest) -> dict[str, object]:
    """The request with all defaults, but messages as they were sent."""
    if isinstance(request, EmbeddingRequest):
        return request.model_dump(mode="json")
    messages = request.messages and [
        message.model_dump(mode="json", exclude_defaults=True) for message in request.messages
    ]
    view: dict[str, object] = request.model_dump(mode="json", exclude={"messages"})
    return view | {"messages": messages}


def usage_view(job: Job, result: JobOutput | None) -> UsageView | None:
    """The usage of a job that has started; while it runs, that of its committed output."""
    if result is not None:
        usage = result.usage
        prompt, completion, cached = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
    elif job.started_at is not None:
        prompt, completion, cached = job.num_prompt_tokens, job.num_committed_tokens, 0
    else:
        return None
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "cached_tokens": cached,
    }


def output_view(result: JobOutput | None) -> OutputView | VectorsView | None:
    if result is None:
        return None
    if isinstance(result, EmbeddingResult):
        return {"embeddings": list(result.embeddings), "dimensions": result.dimensions}
    choices: list[ChoiceView] = [cast(ChoiceView, choice.model_dump(mode="json")) for choice in result.choices]
    output: OutputView = {"text": result.choices[0].text if result.choices else "", "choices": choices}
    if result.prompt_logprobs is not None:
        output["prompt_logprobs"] = [entry and entry.model_dump(mode="json") for entry in result.prompt_logprobs]
    return output
