"""The one door for jobs: resolve the model, count the prompt, check the bounds, settle every default, accept, dispatch.

Every API and the command line come through `Submitter.submit`, so a job means the same wherever it came from.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson
from pydantic import BaseModel

from domain.embeddings import EmbeddingRequest
from domain.errors import (
    CeleriacError,
    IdempotencyKeyReused,
    InvalidRequest,
    PoisonRequest,
    TooManyQueuedJobs,
)
from domain.ids import new_id
from domain.jobs import Endpoint, JobStatus
from domain.kinds import JobRequest
from domain.requests import GenerationRequest, SamplingParams
from domain.webhook_urls import BadWebhookUrl
from domain.webhooks import TELLABLE_STATUSES
from observability import jobs_submitted_total, labelled, llm_requests_total, prompt_tokens_total
from settings import Settings
from storage.jobs_accept import Accepted, AcceptOutcome, NewJob, QueueRoom
from tasks.embed import refuse_unembeddable
from tasks.grammar_gate import GrammarGate
from tasks.group_accept import GroupAcceptor
from tasks.models import ModelView, ModelViews
from tasks.settle import Settled, refuse_ungenerable, settle_embedding, settle_generation
from tasks.tokenizing import TokenizingPool
from tasks.webhook_guard import TargetGuard

MAX_DEADLINE_AHEAD = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class JobOptions:
    """A job's knobs beside its request."""

    priority: int = 0
    deadline_at: datetime | None = None
    start_timeout_seconds: float | None = None
    run_timeout_seconds: float | None = None
    result_ttl_seconds: int | None = None  # None: the installation's
    idempotency_key: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    webhook_url: str | None = None  # told of the ends in webhook_statuses
    webhook_statuses: Sequence[JobStatus] = TELLABLE_STATUSES
    deadline_after_seconds: float | None = None  # since the accept; no part of what a repeated request must share
    endpoint: Endpoint = Endpoint.JOBS
    is_stored: bool = False
    endpoint_body: str | None = None  # JSON, kept beside the request for the route that shows it again


@dataclass(frozen=True, slots=True)
class Submitted:
    """`job_id` is an earlier job's where the idempotency key was used before for the same request."""

    job_id: UUID
    is_new: bool
    created_at: datetime
    new_job: NewJob
    room: QueueRoom | None = None  # None where the job is an earlier one


class Submitter:
    """Everything between a validated request and a committed job."""

    def __init__(
        self,
        settings: Settings,
        views: ModelViews,
        acceptor: GroupAcceptor,
        *,
        dispatch_soon: Callable[[str], None],
    ) -> None:
        """`dispatch_soon(model id)` is called after each accept; it must return at once and never raise."""
        self._settings = settings
        self._views = views
        self._acceptor = acceptor
        self._dispatch_soon = dispatch_soon
        self._tokenizing = TokenizingPool()
        self._grammar_gate = GrammarGate()
        self._webhook_guard = TargetGuard(settings)

    async def submit(self, tenant_id: UUID, request: JobRequest, options: JobOptions) -> Submitted:
        """Returns once the job is committed. Raises the CeleriacError that says why not."""
        view = self._views.get(request.model)
        try:
            new_job = await self.prepare(tenant_id, request, options)
            accepted = await self._acceptor.accept(new_job)
            raise_refusal(accepted, options)
        except CeleriacError as exc:
            labelled(jobs_submitted_total, view.spec.id, exc.code).inc()
            raise
        labelled(jobs_submitted_total, view.spec.id, accepted.outcome.value).inc()
        is_new = accepted.outcome is AcceptOutcome.ACCEPTED
        if is_new:
            self.announce(new_job)
        return Submitted(accepted.job_id, is_new, accepted.created_at or datetime.now(UTC), new_job, accepted.room)

    def announce(self, new_job: NewJob) -> None:
        """A job was committed: count it and have it dispatched."""
        model = new_job.request.model
        labelled(llm_requests_total, model).inc()
        labelled(prompt_tokens_total, model).inc(len(new_job.prompt_token_ids))
        self._dispatch_soon(model)

    async def prepare(self, tenant_id: UUID, request: JobRequest, options: JobOptions) -> NewJob:
        """Everything settled and every bound checked; nothing is committed. Raises the CeleriacError that says why
        not."""
        view = self._views.get(request.model)
        refuse_impossible_deadline(options)
        webhook_url = await self._check_webhook(options.webhook_url)
        settled = await self._settle(request, view)
        params = _params_of(settled.request)
        if params is not None and params.structured_output is not None:
            await self._grammar_gate.check(view, params.structured_output)
        return make_job(tenant_id, request, options, view, settled, settings=self._settings, webhook_url=webhook_url)

    async def _settle(self, request: JobRequest, view: ModelView) -> Settled:
        if isinstance(request, EmbeddingRequest):
            refuse_unembeddable(request, view)
            return settle_embedding(request, view, await self._tokenizing.encode_inputs(view, request))
        refuse_ungenerable(view)
        return settle_generation(request, view, await self._tokenizing.encode(view, request))

    async def _check_webhook(self, url: str | None) -> str | None:
        """As it is stored. Raises InvalidRequest."""
        try:
            return None if url is None else str(await self._webhook_guard.check(url))
        except BadWebhookUrl as exc:
            raise InvalidRequest(f"webhook: {exc}", param="webhook") from None

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """Of a request that is not submitted. Raises the CeleriacError that says why it cannot be."""
        return len(await self._tokenizing.encode(self._views.get(request.model), request))

    async def aclose(self) -> None:
        self._tokenizing.close()
        await self._grammar_gate.aclose()


def make_job(
    tenant_id: UUID,
    request: JobRequest,
    options: JobOptions,
    view: ModelView,
    settled: Settled,
    *,
    settings: Settings,
    webhook_url: str | None = None,
) -> NewJob:
    """`request` is what was asked, `settled` what became of it."""
    return NewJob(
        id=new_id(),
        tenant_id=tenant_id,
        request=settled.request,
        prompt_token_ids=settled.prompt_token_ids,
        input_lengths=settled.input_lengths,
        model_revision=view.revision,
        max_tokens=settled.max_tokens,
        seed=settled.seed,
        max_failures=settings.max_failures,
        result_ttl_seconds=options.result_ttl_seconds or settings.result_ttl_seconds,
        request_hash=request_hash(request, options),
        fingerprint=fingerprint(view.revision, settled.prompt_token_ids, request),
        idempotency_key=options.idempotency_key,
        priority=options.priority,
        deadline_at=deadline_of(options),
        start_timeout_seconds=options.start_timeout_seconds,
        run_timeout_seconds=options.run_timeout_seconds,
        metadata=options.metadata,
        webhook_url=webhook_url,
        webhook_statuses=options.webhook_statuses,
        endpoint=options.endpoint,
        is_stored=options.is_stored,
        endpoint_body=options.endpoint_body,
    )


def _params_of(request: JobRequest) -> SamplingParams | None:
    return request.params if isinstance(request, GenerationRequest) else None


def refuse_impossible_deadline(options: JobOptions) -> None:
    if options.deadline_at is None:
        return
    now = datetime.now(UTC)
    if not now < options.deadline_at < now + MAX_DEADLINE_AHEAD:
        raise InvalidRequest(
            f"deadline is {options.deadline_at.isoformat()}; name a time to come within {MAX_DEADLINE_AHEAD.days} days",
            param="deadline",
        )


def deadline_of(options: JobOptions) -> datetime | None:
    """The earlier of the two that may be given."""
    if options.deadline_after_seconds is None:
        return options.deadline_at
    relative = datetime.now(UTC) + timedelta(seconds=options.deadline_after_seconds)
    return relative if options.deadline_at is None else min(relative, options.deadline_at)


def request_hash(request: JobRequest, options: JobOptions) -> bytes:
    """What two submissions under one idempotency key must share: all that was asked for, before defaults and seed."""
    asked = _asked(request) | {
        "options": [
            options.priority,
            options.deadline_at,
            options.start_timeout_seconds,
            options.run_timeout_seconds,
            options.result_ttl_seconds,
            options.metadata,
        ],
        "endpoint": [options.endpoint, options.is_stored],
        "webhook": options.webhook_url and [options.webhook_url, *options.webhook_statuses],
    }
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest()


def _dump(part: BaseModel) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_defaults=True)


def fingerprint(model_revision: str, prompt_token_ids: Sequence[int], request: JobRequest) -> bytes:
    """What makes a request the same to an engine: by this a poisonous one is known again. The seed is that which was
    asked for, not one that was drawn."""
    asked: list[object] = [model_revision, list(prompt_token_ids)]
    if isinstance(request, EmbeddingRequest):
        asked += ["embedding", request.dimensions]
    else:
        asked += [request.params.model_dump(mode="json"), _schema_text(request.params)]
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest()


def _asked(request: JobRequest) -> dict[str, object]:
    if isinstance(request, EmbeddingRequest):
        return request.model_dump(mode="json")
    return {
        "model": request.model,
        "prompt": request.prompt,
        "messages": request.messages and [_dump(message) for message in request.messages],
        "tools": [orjson.dumps(_dump(tool)).decode() for tool in request.tools],  # as text: the order is seen, too
        "parallel_tool_calls": request.parallel_tool_calls,
        "prompt_token_ids": request.prompt_token_ids,
        "params": request.params.model_dump(mode="json"),
        "schema_order": _schema_text(request.params),
    }


def _schema_text(params: SamplingParams) -> str | None:
    """The order of a schema's properties, which sorted keys hide, is the order of the output."""
    schema = params.structured_output and params.structured_output.json_schema
    return orjson.dumps(schema).decode() if schema is not None else None


def raise_refusal(accepted: Accepted, options: JobOptions) -> None:
    if accepted.outcome is AcceptOutcome.KEY_REUSED:
        raise IdempotencyKeyReused(
            "this idempotency key came before with another request; send the same request again or use a new key",
            param="idempotency_key",
        )
    if accepted.outcome is AcceptOutcome.POISON:
        raise PoisonRequest(
            "the same request crashed an engine within the last day and is not run again until then; change the "
            "prompt or params, or replay its dead letter with allow_poison",
            param="prompt",
        )
    if accepted.outcome is AcceptOutcome.TOO_MANY_QUEUED:
        raise TooManyQueuedJobs(
            "your queue is full: as many jobs as you may have are waiting; retry when some are done",
            retry_after_seconds=5,
        )
