"""Our own dialect: the body that asks for a job, and what a job looks like from outside.

The body that asks for a job.

What a job looks like from outside: the view that is answered everywhere.

Views are built as plain dicts and dumped once; `JobView` is their published schema, which a test holds them to.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import AwareDatetime, Field, StringConstraints, TypeAdapter, model_validator

from dialects.errors import job_error_body
from dialects.openai_views import PageView, View, timestamp
from domain.ids import external_id
from domain.jobs import FinishReason, Frozen, JobKind, JobStatus, WaitingFor
from domain.requests import EmbeddingRequest, EmbeddingResult, GenerationRequest, JobOptions, JobOutput, JobRequest
from domain.webhooks import MAX_URL_BYTES
from storage.job_accept import NewJob
from storage.job_queries import JobRecord
from storage.tables import Job, JobAttempt

WEEK_SECONDS = 604_800

NO_NUL = r"^[^\u0000]*$"  # PostgreSQL finds nothing in metadata that holds one

IdempotencyKey = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,255}$")]

MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]

MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]

WebhookUrlText = Annotated[str, StringConstraints(max_length=MAX_URL_BYTES)]

TimeoutSeconds = Annotated[float, Field(gt=0, le=WEEK_SECONDS, allow_inf_nan=False)]


class JobOptionFields(Frozen):
    """What a job may be told beside its request."""

    priority: int = Field(default=0, ge=-10, le=10, description="Higher runs earlier.")
    deadline: AwareDatetime | None = Field(default=None, description="The job expires then, wherever it is.")
    start_timeout: TimeoutSeconds | None = Field(default=None, description="Seconds it may wait for its start.")
    run_timeout: TimeoutSeconds | None = Field(default=None, description="Seconds it may run once started.")
    result_ttl: int | None = Field(default=None, ge=60, le=30 * 86_400, description="Seconds it is kept once finished.")
    idempotency_key: IdempotencyKey | None = Field(default=None, description="Also a header, Idempotency-Key.")
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)
    webhook: WebhookUrlText | None = Field(default=None, description="A URL that is told of the job's end.")
    webhook_events: list[Literal["completed", "failed", "cancelled", "expired"]] = Field(
        default=["completed", "failed", "cancelled", "expired"],
        min_length=1,
        max_length=4,
        description="Which ends it is told of.",
    )

    @model_validator(mode="after")
    def _refuse_events_for_nobody(self) -> Self:
        if self.webhook is None and "webhook_events" in self.model_fields_set:
            raise ValueError("webhook_events is given without webhook; add the URL or remove it")
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
            webhook_statuses=[JobStatus(end) for end in dict.fromkeys(self.webhook_events)],
        )


class JobBody(JobOptionFields, GenerationRequest):
    """POST /v1/jobs: a generation request and the job's own options."""

    def to_request(self) -> GenerationRequest:
        return GenerationRequest.model_construct(
            model=self.model,
            prompt=self.prompt,
            messages=self.messages,
            prompt_token_ids=self.prompt_token_ids,
            tools=self.tools,
            parallel_tool_calls=self.parallel_tool_calls,
            params=self.params,
        )


class EmbeddingJobBody(JobOptionFields, EmbeddingRequest):
    """POST /v1/jobs with `inputs`: an embedding request and the job's own options."""

    def to_request(self) -> EmbeddingRequest:
        return EmbeddingRequest.model_construct(model=self.model, inputs=self.inputs, dimensions=self.dimensions)


BODY_SCHEMA = TypeAdapter(JobBody | EmbeddingJobBody).json_schema()


def body_class(body: bytes) -> type[JobBody] | type[EmbeddingJobBody]:
    """By `inputs` or `kind`; what cannot be read is left to the parser to refuse."""
    if b'"inputs"' not in body and b'"embedding"' not in body:
        return JobBody
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return JobBody
    is_embedding = isinstance(fields, dict) and fields.get("kind", "inputs" in fields) in (True, "embedding")
    return EmbeddingJobBody if is_embedding else JobBody


class QueueView(View):
    position: int | None = Field(description="Jobs of this model that run earlier under the current order.")
    eta_seconds: float | None = Field(
        description="Until its start, by the rate at which live workers drain; null where it waits for more than slots."
    )
    waiting_for: WaitingFor | None = Field(description="What keeps it from running.")


class UsageView(View):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class ChoiceView(View):
    index: int
    text: str
    finish_reason: FinishReason
    num_tokens: int
    num_reasoning_tokens: int | None = Field(description="Those up to the end of the first </think>, if there is one.")
    logprobs: list[Any] | None
    candidate: int | None = Field(description="Under best_of: the index of this choice in the stream.")
    mean_logprob: float | None = Field(description="Under best_of: what it was chosen by.")


class OutputView(View):
    text: str = Field(description="Of the first choice.")
    choices: list[ChoiceView]
    prompt_logprobs: list[Any] | None = Field(default=None, description="Where asked for: one per prompt token.")


class VectorsView(View):
    embeddings: list[str] = Field(description="One for each input, in order: little-endian float32 in base64.")
    dimensions: int


class JobErrorView(View):
    code: str
    message: str
    type: str
    retryable: bool


class UrlsView(View):
    get: str
    events: str
    output: str
    cancel: str


class AttemptView(View):
    attempt: int
    worker_id: str
    worker: str | None = Field(description="Its name, where it had reported itself.")
    started_at: datetime
    ended_at: datetime | None = Field(description="Null: it runs.")
    outcome: str | None = Field(description="completed, failed, cancelled, expired, released, lost, crashed, stalled.")
    error_code: str | None
    num_tokens: int = Field(description="Committed by this attempt.")


class JobView(View):
    """A job. `output` is there once it is terminal: whole, or partial for a cancelled or expired one."""

    id: str
    object: Literal["job"]
    kind: JobKind
    status: JobStatus
    model: str
    created_at: datetime
    started_at: datetime | None
    first_token_at: datetime | None = Field(description="When its first output was committed.")
    finished_at: datetime | None
    expires_at: datetime | None = Field(description="When a finished job is deleted.")
    deadline: datetime | None
    priority: int
    attempt: int
    worker: str | None = Field(description="The name of the worker that runs it, or ran it last.")
    queue: QueueView | None = Field(description="Only while queued.")
    cancel_requested: bool
    finish_reason: FinishReason | None = Field(description="Of the first choice. `error`: the job failed in its midst.")
    usage: UsageView | None
    output: OutputView | VectorsView | None
    error: JobErrorView | None
    metadata: dict[str, str]
    retry_of: str | None = Field(description="The ended job that this one repeats.")
    urls: UrlsView
    attempts: list[AttemptView] | None = Field(default=None, description="Only with include=attempts.")
    input: dict[str, Any] | None = Field(default=None, description="Only with include=input.")


class JobOutputView(OutputView):
    """The output alone; of a running job so far."""

    id: str
    object: Literal["job.output"]
    status: JobStatus


class DeadLetterListView(PageView):
    data: list[JobView]


class JobListView(PageView):
    data: list[JobView]


def urls_of(job_id: str) -> dict[str, str]:
    path = f"/v1/jobs/{job_id}"
    return {"get": path, "events": f"{path}/events", "output": f"{path}/output", "cancel": f"{path}/cancel"}


def new_job_view(new_job: NewJob, created_at: datetime, queue: Mapping[str, object]) -> dict[str, object]:
    """The view of a job that was accepted a moment ago, without asking for it."""
    job_id = external_id(new_job.id)
    return {
        "id": job_id,
        "object": "job",
        "kind": new_job.request.kind,
        "status": JobStatus.QUEUED.value,
        "model": new_job.request.model,
        "created_at": timestamp(created_at),
        "started_at": None,
        "first_token_at": None,
        "finished_at": None,
        "expires_at": None,
        "deadline": timestamp(new_job.deadline_at),
        "priority": new_job.priority,
        "attempt": 0,
        "worker": None,
        "queue": queue,
        "cancel_requested": False,
        "finish_reason": None,
        "usage": None,
        "output": None,
        "error": None,
        "metadata": new_job.metadata,
        "retry_of": new_job.retry_of and external_id(new_job.retry_of),
        "urls": urls_of(job_id),
    }


def job_view(record: JobRecord, queue: Mapping[str, object] | None = None) -> dict[str, object]:
    """The view of a stored job, with its input where the record holds it."""
    job, job_id = record.job, external_id(record.job.id)
    view: dict[str, object] = {
        "id": job_id,
        "object": "job",
        "kind": job.kind.value,
        "status": job.status.value,
        "model": job.model,
        "created_at": timestamp(job.created_at),
        "started_at": timestamp(job.started_at),
        "first_token_at": timestamp(job.first_token_at),
        "finished_at": timestamp(job.finished_at),
        "expires_at": timestamp(job.prune_at),
        "deadline": timestamp(job.deadline_at),
        "priority": job.priority,
        "attempt": job.attempt,
        "worker": record.worker,
        "queue": queue if job.status is JobStatus.QUEUED else None,
        "cancel_requested": job.cancel_requested_at is not None,
        "finish_reason": job.finish_reason and job.finish_reason.value,
        "usage": usage_view(job, record.result),
        "output": output_view(record.result),
        "error": job_error_body(job.error) if job.error is not None else None,
        "metadata": job.job_metadata,
        "retry_of": job.retry_of and external_id(job.retry_of),
        "urls": urls_of(job_id),
    }
    if record.request is not None:
        view["input"] = _input_view(record.request)
    return view


def attempts_view(job: Job, ended: Sequence[JobAttempt], *, worker: str | None = None) -> list[dict[str, object]]:
    """Every attempt in order; the last one without an end while the job runs, on `worker`."""
    attempts: list[dict[str, object]] = [
        {
            "attempt": one.attempt,
            "worker_id": str(one.worker_id),
            "worker": one.worker_name,
            "started_at": timestamp(one.started_at),
            "ended_at": timestamp(one.ended_at),
            "outcome": one.outcome.value,
            "error_code": one.error_code,
            "num_tokens": one.num_tokens,
        }
        for one in ended
    ]
    if job.status is JobStatus.IN_PROGRESS and len(attempts) < job.attempt:
        running = {"ended_at": None, "outcome": None, "error_code": None, "worker": worker}
        began = {"started_at": timestamp(job.attempt_started_at), "worker_id": str(job.lease_owner)}
        num_tokens = job.num_committed_tokens - job.num_tokens_at_claim
        attempts.append({"attempt": job.attempt, "num_tokens": num_tokens, **began, **running})
    return attempts


def _input_view(request: JobRequest) -> dict[str, object]:
    """With every default of the request, but messages as they were sent."""
    if isinstance(request, EmbeddingRequest):
        return request.model_dump(mode="json")
    messages = request.messages and [
        message.model_dump(mode="json", exclude_defaults=True) for message in request.messages
    ]
    view: dict[str, object] = request.model_dump(mode="json", exclude={"messages"})
    return view | {"messages": messages}


def usage_view(job: Job, result: JobOutput | None) -> dict[str, int] | None:
    """Of a started job; while it runs, by what it has committed."""
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


def output_view(result: JobOutput | None) -> dict[str, object] | None:
    if result is None:
        return None
    if isinstance(result, EmbeddingResult):
        return {"embeddings": list(result.embeddings), "dimensions": result.dimensions}
    choices = [choice.model_dump(mode="json") for choice in result.choices]
    output: dict[str, object] = {"text": result.choices[0].text if result.choices else "", "choices": choices}
    if result.prompt_logprobs is not None:
        output["prompt_logprobs"] = [entry and entry.model_dump(mode="json") for entry in result.prompt_logprobs]
    return output
