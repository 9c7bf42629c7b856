"""The body that asks for a job."""

from typing import Annotated, Literal, Self

import orjson
from pydantic import AwareDatetime, Field, StringConstraints, TypeAdapter, model_validator

from domain.embeddings import EmbeddingRequest
from domain.jobs import Frozen, JobStatus
from domain.requests import GenerationRequest
from domain.webhook_urls import MAX_URL_BYTES
from tasks.job_options import JobOptions

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
