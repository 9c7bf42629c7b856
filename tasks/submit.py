"""Job submission: prepare the request, check its options, have the job accepted, then ring for a worker.

Every route that makes a job uses `Submitter.submit`. A batch line is prepared and made (`make_job`) in the same way and
accepted by its batch, so a job means the same wherever it comes from. Resubmitting a job that has ended makes a new
job, which names the old one and has the same request and defaults.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal
from uuid import UUID

import orjson
from pydantic import BaseModel

from domain.callbacks import URL_PREFIX, CeleryCallback, refusal_of_queue
from domain.errors import (
    CeleriacError,
    DeadlineUnattainable,
    IdempotencyKeyReused,
    InvalidRequest,
    PoisonRequest,
    UnsupportedParameter,
)
from domain.eta import Eta
from domain.job_options import JobOptions, deadline_of, refuse_impossible_deadline
from domain.jobs import JobStatus, Lane, external_id, new_id
from domain.limits import ClientCall, is_limited_context, note_standing
from domain.requests import EmbeddingRequest, GenerationRequest, JobRequest, SamplingParams
from domain.webhooks import BadWebhookUrl
from metrics import labelled, response_cache_total
from observability import key_id_context, note_submitted, request_id_context, traceparent_context
from settings import Settings
from storage.job_accept import Accepted, AcceptOutcome, NewJob
from storage.job_queries import JobRecord
from tasks import job_log
from tasks.accept import GroupAcceptor
from tasks.answer_keys import answer_key
from tasks.known_requests import KnownRequests, ReadyJob, ReadyRequest
from tasks.prepare import RequestPreparer
from tasks.webhook_http import TargetGuard
from text.models import ModelView, ModelViews

CacheOutcome = Literal["hit", "miss"]

CACHE_HEADER = "x-celeriac-cache"  # in answers: the outcome, if the response cache was asked


def request_hash(request: JobRequest, options: JobOptions) -> bytes:
    """Equal for submissions that may share an idempotency key: covers everything requested, before defaults and
    seed."""
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
    if options.turn is not None:
        # Its conversation may have grown between a request and its retry, so what counts is what the client wrote.
        asked |= {"messages": None, "conversation": str(options.turn.conversation_id), "body": options.endpoint_body}
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest()


def _dump(part: BaseModel) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_defaults=True)


def fingerprint(model_revision: str, prompt_token_ids: Sequence[int], request: JobRequest) -> bytes:
    """Equal for requests that are the same for an engine, so that a request that crashes engines is recognised when it
    is sent again. Uses the requested seed, not a drawn one."""
    asked: list[object] = [model_revision, list(prompt_token_ids)]
    if isinstance(request, EmbeddingRequest):
        asked += ["embedding", request.dimensions]
    else:
        asked += [] if request.adapter is None else [request.adapter]
        asked += [request.params.model_dump(mode="json"), _schema_text(request.params)]
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest()


def _asked(request: JobRequest) -> dict[str, object]:
    if isinstance(request, EmbeddingRequest):
        return request.model_dump(mode="json")
    # Only where they are given, so that the hashes of older requests stay as they are.
    newer = ("continue_final_message", "reasoning_effort", "chat_template_kwargs")
    given: dict[str, object] = {name: value for name in newer if (value := getattr(request, name))}
    return given | {
        "model": request.model,
        "prompt": request.prompt,
        "messages": request.messages and [_dump(message) for message in request.messages],
        "tools": [orjson.dumps(_dump(tool)).decode() for tool in request.tools],  # as text, so that the order counts
        "parallel_tool_calls": request.parallel_tool_calls,
        "prompt_token_ids": request.prompt_token_ids,
        "params": request.params.model_dump(mode="json"),
        "schema_order": _schema_text(request.params),
    }


def _schema_text(params: SamplingParams) -> str | None:
    """The schema as text, because the order of its properties matters: it is that of the output."""
    output = params.structured_output
    if output is None or (output.json_schema is None and output.calls is None):
        return None
    if output.calls is None:
        return orjson.dumps(output.json_schema).decode()
    return orjson.dumps([output.json_schema, output.calls.model_dump(mode="json")]).decode()


@dataclass(frozen=True, slots=True)
class Submitted:
    """`job_id` is that of an earlier job if the idempotency key was used for the same request before."""

    job_id: UUID
    is_new: bool
    created_at: datetime
    new_job: NewJob
    cache: CacheOutcome | None = None  # None: the response cache was not asked
    record: JobRecord | None = None  # of a hit: the completed job, with its request
    num_queued: int | None = None  # jobs of its tenant that wait, this one included; None: not known


class Submitter:
    """Turns validated requests into committed jobs."""

    def __init__(
        self,
        settings: Settings,
        views: ModelViews,
        acceptor: GroupAcceptor,
        *,
        ring: Callable[[str, UUID], None],
        estimate: Callable[[NewJob], Eta | None] = lambda new_job: None,
    ) -> None:
        """`ring(model id, job id)` is called after each accept other than the acceptor's, which rings itself; it must
        return at once and never raise. `estimate` says when a job would start and end, or None if that cannot be
        told."""
        self._settings = settings
        self._views = views
        self._acceptor = acceptor
        self._ring = ring
        self._estimate = estimate
        self._preparer = RequestPreparer(views)
        self._known = KnownRequests()
        self._webhook_guard = TargetGuard(settings)

    async def submit(
        self,
        tenant_id: UUID,
        request: JobRequest,
        options: JobOptions,
        accept: Callable[[NewJob], Awaitable[Accepted]] | None = None,
    ) -> Submitted:
        """Returns once the job is committed: by `accept`, or else in a group with others. Raises the CeleriacError that
        says why it was not."""
        return await self.commit(await self._ready(tenant_id, request, options), options, accept)

    async def ready(
        self, tenant_id: UUID, requests: Sequence[JobRequest], all_options: Sequence[JobOptions]
    ) -> list[ReadyJob]:
        """The jobs of one call, each to be passed to `commit`. Raises the CeleriacError that says what is wrong."""
        if len(requests) == 1:
            return [await self._ready(tenant_id, requests[0], all_options[0])]
        preparing = [self._ready(tenant_id, *one) for one in zip(requests, all_options, strict=True)]
        outcomes = await asyncio.gather(*preparing, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        jobs = [outcome for outcome in outcomes if isinstance(outcome, ReadyJob)]
        cost = sum(job.new_job.cost for job in jobs)
        calls = [ClientCall(number, len(jobs), cost) for number in range(len(jobs))]
        return [job._replace(new_job=replace(job.new_job, call=call)) for job, call in zip(jobs, calls, strict=True)]

    async def _ready(self, tenant_id: UUID, request: JobRequest, options: JobOptions) -> ReadyJob:
        view = self._views.get(request.model)
        with counting_refusals(view.spec.id):
            new_job = await self._prepare(tenant_id, request, options, view)
            return ReadyJob(with_estimate(new_job, self._estimate), request, view)

    async def commit(
        self,
        job: ReadyJob,
        options: JobOptions,
        accept: Callable[[NewJob], Awaitable[Accepted]] | None = None,
    ) -> Submitted:
        """Like `submit`, for a job that is ready."""
        new_job = job.new_job
        with counting_refusals(new_job.request.model_id):
            note_submitted(external_id(new_job.id))
            accepted = await (self._acceptor.accept(new_job) if accept is None else self.accept_alone(new_job, accept))
            if accepted.job_id != new_job.id:
                note_submitted(external_id(accepted.job_id))
            note_standing(accepted.standing)
            if accepted.outcome is AcceptOutcome.UNATTAINABLE:
                raise unattainable(new_job)
            raise_refusal(accepted, options)
        submitted = self.conclude(new_job, accepted)
        if submitted.record is not None:
            self._known.note(job, options)
        return submitted

    async def accept_alone(self, new_job: NewJob, accept: Callable[[NewJob], Awaitable[Accepted]]) -> Accepted:
        """Accept a job by a commit of its own, and let workers know of it."""
        accepted = await accept(new_job)
        if accepted.is_queued:
            self._ring(new_job.request.model_id, new_job.id)
        return accepted

    def conclude(self, new_job: NewJob, accepted: Accepted) -> Submitted:
        """Call after the commit: logs and counts the submission."""
        is_new = accepted.outcome is AcceptOutcome.ACCEPTED
        if is_new and accepted.record is not None:
            job_log.answered(new_job)
        elif is_new:
            job_log.accepted(new_job)
        else:
            job_log.submitted(new_job.request.model_id, accepted.outcome.value)
        cache: CacheOutcome | None = None
        if is_new and new_job.answer_key is not None:
            cache = "miss" if accepted.record is None else "hit"
            labelled(response_cache_total, new_job.request.model_id, cache).inc()
        created_at = accepted.created_at or datetime.now(UTC)
        return Submitted(accepted.job_id, is_new, created_at, new_job, cache, accepted.record, accepted.num_queued)

    async def prepare(self, tenant_id: UUID, request: JobRequest, options: JobOptions) -> NewJob:
        """The job to be accepted, all limits checked; nothing is committed. Raises the CeleriacError that says what is
        wrong."""
        return await self._prepare(tenant_id, request, options, self._views.get(request.model))

    async def _prepare(self, tenant_id: UUID, request: JobRequest, options: JobOptions, view: ModelView) -> NewJob:
        refuse_impossible_deadline(options)
        webhook_url = await self._check_webhook(options.webhook_url) or self._check_callback(options.callback)
        make = partial(make_job, tenant_id, options, view, settings=self._settings, webhook_url=webhook_url)
        again = self._known.find_again(view, request, options)
        if again is not None:
            return make(again.ready, asked=again.asked, written=again.written)
        asked = request_hash(request, options)
        ready = self._known.find(view, tenant_id, (asked, options.use_cache))
        if ready is None or not ready.is_same_again:
            known_ids = None if ready is None else ready.prepared.prompt_token_ids
            prepared = await self._preparer.prepare(request, tenant_id, view, known_ids)
            ready = ReadyRequest(
                prepared,
                fingerprint(view.revision, prepared.prompt_token_ids, request),
                answer_key(request, options, view, prepared, self._settings),
            )
        return make(ready, asked=asked)

    async def _check_webhook(self, url: str | None) -> str | None:
        """The URL in its stored form. Raises InvalidRequest."""
        try:
            return None if url is None else str(await self._webhook_guard.check(url))
        except BadWebhookUrl as exc:
            raise InvalidRequest(f"webhook: {exc}", param="webhook") from None

    def _check_callback(self, callback: CeleryCallback | None) -> str | None:
        """Its destination among the deliveries. Raises InvalidRequest."""
        if callback is None:
            return None
        if self._settings.callback_broker_url is None:
            raise UnsupportedParameter(
                "celery is set, but this installation sends no callbacks; set CELERIAC_CALLBACK_BROKER_URL for the API "
                "and maintenance, or leave celery out",
                param="celery",
            )
        if refusal := refusal_of_queue(callback.queue, self._settings.callback_queues.split(",")):
            raise InvalidRequest(refusal, param="celery.queue")
        return URL_PREFIX + callback.queue

    def prepare_grammars(self) -> None:
        """Start the models' grammar compilers in the background. Call it again when the models change."""
        self._preparer.prepare_grammars()

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """The number of tokens of a prompt, without submitting it. Raises the CeleriacError that says why it is
        invalid."""
        return len(await self.encode_prompt(request))

    async def encode_prompt(self, request: GenerationRequest) -> list[int]:
        """The tokens of a prompt, without submitting it. Raises the CeleriacError that says why it is invalid."""
        return await self._preparer.encode_prompt(request)

    async def encode_text(self, model: str, text: str) -> list[int]:
        """The tokens of a text alone, without the special tokens that begin or end a prompt."""
        return await self._preparer.encode_text(model, text)

    async def aclose(self) -> None:
        await self._preparer.aclose()


@contextmanager
def counting_refusals(model: str) -> Iterator[None]:
    """Count refused submissions, for known models only, as clients could make up any number of names."""
    try:
        yield
    except CeleriacError as exc:
        job_log.submitted(model, exc.code)
        raise


def make_job(
    tenant_id: UUID,
    options: JobOptions,
    view: ModelView,
    ready: ReadyRequest,
    *,
    settings: Settings,
    asked: bytes,
    webhook_url: str | None = None,
    written: bytes | None = None,
) -> NewJob:
    """`ready` is what was made of the request that was received, and `asked` its `request_hash`."""
    prepared = ready.prepared
    return NewJob(
        id=new_id(),
        tenant_id=tenant_id,
        request=prepared.request,
        prompt_token_ids=prepared.prompt_token_ids,
        input_lengths=prepared.input_lengths,
        model_revision=view.revision,
        max_tokens=prepared.max_tokens,
        seed=prepared.seed,
        max_failures=settings.max_failures,
        result_ttl_seconds=options.result_ttl_seconds or settings.result_ttl_seconds,
        request_hash=asked,
        fingerprint=ready.fingerprint,
        idempotency_key=options.idempotency_key,
        priority=options.priority,
        deadline_at=deadline_of(options),
        start_timeout_seconds=options.start_timeout_seconds,
        run_timeout_seconds=options.run_timeout_seconds,
        metadata=options.metadata,
        webhook_url=webhook_url,
        webhook_statuses=options.webhook_statuses,
        callback=options.callback,
        endpoint=options.endpoint,
        is_stored=options.is_stored,
        endpoint_body=options.endpoint_body,
        request_id=request_id_context.get(),
        traceparent=traceparent_context.get(),
        key_id=key_id_context.get(),
        is_limited=is_limited_context.get(),
        answer_key=ready.answer_key,
        written=written,
    )


def with_estimate(new_job: NewJob, estimate: Callable[[NewJob], Eta | None]) -> NewJob:
    """The job with the estimate of its start. If even nine of ten such jobs would start too late, it must not be
    accepted, unless it was before, or its answer may be known, so that it would not wait."""
    estimated = estimate(new_job)
    if estimated is None:
        return new_job
    limits = [new_job.start_timeout_seconds] if new_job.start_timeout_seconds is not None else []
    if new_job.deadline_at is not None:
        limits.append((new_job.deadline_at - datetime.now(UTC)).total_seconds())
    is_late = estimated.is_trustworthy and bool(limits) and estimated.start.p10 > min(limits)
    is_hopeless = is_late and new_job.answer_key is None
    return replace(new_job, eta=estimated, hopeless_seconds=estimated.start.p50 if is_hopeless else None)


def unattainable(new_job: NewJob) -> DeadlineUnattainable:
    """Why a hopeless job was refused."""
    wait = new_job.hopeless_seconds or 0.0
    limit = new_job.start_timeout_seconds
    left = None if new_job.deadline_at is None else (new_job.deadline_at - datetime.now(UTC)).total_seconds()
    is_start = limit is not None and (left is None or limit <= left)
    name, seconds = ("start_timeout", limit or 0.0) if is_start else ("deadline", left or 0.0)
    return DeadlineUnattainable(
        f"{name} is in {max(seconds, 0.0):.1f} s, and the job would wait for about {wait:.1f} s; send a later one, or "
        "retry when the queue is shorter",
        predicted_wait_seconds=wait,
        retry_after_seconds=max(wait - seconds, 1.0),
        param=name,
    )


def raise_refusal(accepted: Accepted, options: JobOptions) -> None:
    if accepted.outcome is AcceptOutcome.KEY_REUSED:
        raise IdempotencyKeyReused(
            "this idempotency key was already used for a different request; send the same request again or use a new "
            "key",
            param="idempotency_key",
        )
    if accepted.outcome is AcceptOutcome.POISON:
        raise PoisonRequest(
            "the same request crashed an engine within the last day, so it is not run again for now; change the prompt "
            "or params, or replay its dead letter with allow_poison",
            param="prompt",
        )
    if accepted.refusal is not None:
        raise accepted.refusal


@dataclass(frozen=True, slots=True)
class Resubmission:
    verb: Literal["retry", "replay"]
    keeps_output: bool = False  # continue after the committed output if its model revision is still served
    is_poison_allowed: bool = False  # if so, the job runs alone


async def resubmit(
    submitter: Submitter,
    record: JobRecord,
    how: Resubmission,
    accept: Callable[[NewJob, bool], Awaitable[Accepted]],
) -> Submitted:
    """Returns once the new job is committed, or the one that an earlier call made. `record` is that of a job that has
    ended, with its request; `accept(new_job, keeps_output)` commits the new one. The old job's deadline is not carried
    over, as it has usually passed. Raises the CeleriacError that says why the job was not accepted."""
    assert record.request is not None
    old = record.job
    options = JobOptions(
        priority=old.priority,
        run_timeout_seconds=old.run_timeout_seconds,
        result_ttl_seconds=old.result_ttl_seconds,
        # Contains spaces, which clients' keys cannot, so only a repeated call finds this job.
        idempotency_key=f"{how.verb} of {external_id(old.id)}",
        metadata=old.job_metadata,
        endpoint=old.endpoint,
        is_stored=old.is_stored,
    )
    with counting_refusals(old.model):
        new_job = replace(
            await submitter.prepare(old.tenant_id, record.request, options),
            retry_of=old.id,
            lane=Lane.ISOLATED if how.is_poison_allowed else Lane.STANDARD,
            written=None,
            # A Celery task has been continued by the old job's end, once and for all.
            webhook_url=None if (old.webhook_url or "").startswith(URL_PREFIX) else old.webhook_url,
            webhook_statuses=[JobStatus(status) for status in old.webhook_statuses or ()],
        )
        accepted = await submitter.accept_alone(new_job, lambda job: accept(job, how.keeps_output))
        note_standing(accepted.standing)
        raise_refusal(accepted, options)
    return submitter.conclude(new_job, accepted)
