"""Runs the requests of the OpenAI routes as jobs: submission, matching of retries, and cancellation.

A job is cancelled when its client has disconnected and no other reader waits for it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from starlette.requests import Request

from api.model_queues import queue_headers
from api.openai.job_headers import JobHeaders, read_job_headers
from api.services import Services, caller_of
from dialects.bodies import with_body_names
from dialects.native import QueueView
from dialects.openai import PRIORITY_BY_SERVICE_TIER, spelling_of_params
from domain.errors import CeleriacError, JobNotFound, NoWorkers, StorageUnavailable
from domain.job_options import NO_TIMEOUTS, ConversationTurn, JobOptions, Timeouts
from domain.jobs import Endpoint, JobStatus, external_id
from domain.model_names import parse_model_name
from domain.requests import JobRequest
from domain.webhooks import TELLABLE_STATUSES
from metrics import labelled, requests_unserved_total
from observability import job_id_context
from storage import job_queries
from storage.job_accept import Accepted, NewJob
from storage.job_queries import JobRecord
from storage.limits import return_request
from storage.stream_channels import REDIS_OUTAGES, num_listening_processes
from tasks.known_requests import ReadyJob
from tasks.submit import CACHE_HEADER, CacheOutcome, request_hash

log = logging.getLogger(__name__)

OPENAI_VERSION = "2020-10-01"  # the only version there is; SDKs log it


def answer_headers(started: float) -> dict[str, str]:
    """The headers that OpenAI's answers have, without those of rate limits. `started` is monotonic."""
    return {
        "openai-version": OPENAI_VERSION,
        "openai-processing-ms": str(round((time.monotonic() - started) * 1000)),
    }


UNSERVED_POLL_SECONDS = 1.0

PATIENCE_SECONDS = 10.0  # beyond a start timeout, so that maintenance ends with 504 what has not started by then

UNSERVED_RETRY_SECONDS = 10.0  # when a model is served again, nobody knows, unless it is being loaded

Accept = Callable[[NewJob], Awaitable[Accepted]]


@dataclass(frozen=True, slots=True)
class Asked:
    """The job options that come from the body of a request."""

    endpoint: Endpoint
    has_stream: bool
    is_stored: bool = False  # such a job continues when its client disconnects
    service_tier: str | None = None
    metadata: dict[str, str] | None = None
    spelling: Mapping[str, str] = field(default_factory=spelling_of_params)  # the names of our fields in the body
    endpoint_body: str | None = None  # JSON, if the route needs the body again
    timeouts: Timeouts = NO_TIMEOUTS
    timeout_seconds: float | None = None  # after this nobody waits for the answer any more
    turn: ConversationTurn | None = None
    use_cache: bool | None = None
    accept: Accept | None = None  # how its job is accepted, if not in a group with others


@dataclass(frozen=True, slots=True)
class Run:
    """A job and the request that waits for it."""

    services: Services
    tenant_id: UUID
    job_id: UUID
    model_name: str  # as in the request
    model_revision: str
    priority: int
    created_at: datetime
    started: float  # monotonic: when the request arrived
    num_prompt_tokens: int
    has_keep_alive: bool = True  # while the client waits for a complete answer
    on_disconnect: Literal["cancel", "continue"] = "cancel"
    patient_until: float | None = None  # monotonic: the client has said so long it waits for the start, so for a worker
    is_replayed: bool = False  # found by its idempotency key
    is_retry_attached: bool = False  # matched to a retry without a key
    cache: CacheOutcome | None = None
    record: JobRecord | None = None  # of a hit
    queue: QueueView | None = None  # at its acceptance, if that was now

    @property
    def headers(self) -> dict[str, str]:
        headers = answer_headers(self.started) | {"x-job-id": external_id(self.job_id)}
        if self.is_replayed:
            headers["idempotent-replayed"] = "true"
        if self.is_retry_attached:
            headers["x-retry-attached"] = "true"
        if self.cache is not None:
            headers[CACHE_HEADER] = self.cache
        return headers | queue_headers(self.queue)

    def note_delivered(self) -> None:
        """The client has received the complete answer."""
        if self.record is None or self.record.job.delivered_at is None:
            self.services.note_delivered(self.job_id)

    def note_disconnected(self) -> None:
        """The client has disconnected: cancel the job after a grace period, unless another reader waits for it by
        then."""
        if self.on_disconnect == "cancel":
            self.services.spawn(self._cancel_if_alone())

    async def _cancel_if_alone(self) -> None:
        await asyncio.sleep(self.services.settings.disconnect_grace_seconds)
        if await _has_readers(self.services, self.job_id):
            return
        await self.services.cancel(self.job_id, self.tenant_id)
        log.info("cancelled a job whose client disconnected", extra={"job_id": external_id(self.job_id)})

    async def wait_until_unserved(self) -> NoWorkers:
        """As `first_unserved`, for this job."""
        return await first_unserved([self])

    async def read_token_ids(self) -> dict[int, list[int]]:
        """The output tokens of each sequence, from the job's chunks."""
        token_ids: dict[int, list[int]] = {}
        after = 0
        while chunks := await self.services.read(job_queries.read_chunks, self.job_id, after=after):
            for chunk in chunks:
                token_ids.setdefault(chunk.index, []).extend(chunk.token_ids)
            after = chunks[-1].sequence_number
        return token_ids

    async def read(self, *, with_request: bool = False) -> JobRecord:
        """Raises JobNotFound if the job was deleted meanwhile, or StorageUnavailable."""
        return await read_job(self.services, self.job_id, self.tenant_id, with_request=with_request)


def headers_of(runs: Sequence[Run]) -> dict[str, str]:
    """The headers of an answer from several jobs: those of the first job, and the ids of all."""
    headers = runs[0].headers
    if len(runs) > 1:
        headers["x-job-ids"] = ",".join(external_id(run.job_id) for run in runs)
    return headers


async def start(request: Request, generation: JobRequest, asked: Asked) -> Run:
    """Returns once the job is committed, or an existing one is found by its idempotency key or because the request is a
    retry. Raises CeleriacError, whose `param` is a field of the body."""
    [run] = await start_all(request, [generation], asked)
    return run


async def start_all(request: Request, generations: Sequence[JobRequest], asked: Asked) -> list[Run]:
    """Like `start`, for a request that takes several jobs: either all are accepted, or none is kept."""
    started = time.monotonic()
    services, tenant_id = caller_of(request)
    job_headers = read_job_headers(request.headers)
    services.slots.refuse_if_full()
    all_options = [_options(asked, job_headers, number) for number in range(len(generations))]
    start_seconds = all_options[0].start_timeout_seconds
    job_ids = await _find_retried(services, tenant_id, generations, all_options[0], job_headers)
    if job_ids:
        found = [await _found(services, tenant_id, job_id, started) for job_id in job_ids]
        runs = [replace(run, is_retry_attached=True) for run in found]
    else:
        if not asked.is_stored:
            _refuse_at_the_door(services, generations[0].model_id, is_patient=start_seconds is not None)
        runs = await _submit_all(services, tenant_id, generations, all_options, asked, started)
    job_id_context.set(external_id(runs[0].job_id))
    on_disconnect = job_headers.on_disconnect or ("continue" if asked.is_stored else "cancel")
    if on_disconnect == "cancel" and job_headers.has_keep_alive and start_seconds is None:
        return runs  # as they are made
    patient_until = None if start_seconds is None else started + start_seconds + PATIENCE_SECONDS
    return [
        replace(
            run,
            on_disconnect=on_disconnect,
            has_keep_alive=job_headers.has_keep_alive,
            patient_until=patient_until,
        )
        for run in runs
    ]


async def first_unserved(runs: Sequence[Run]) -> NoWorkers:
    """Returns once one of the jobs of a request is queued and their model has had no live worker for
    CELERIAC_NO_WORKERS_SECONDS, or is unloaded. The result is the error with which a new request would be refused."""
    services, until = runs[0].services, runs[0].patient_until
    model = parse_model_name(runs[0].model_name).id
    while True:
        await asyncio.sleep(UNSERVED_POLL_SECONDS)
        is_patient = until is not None and time.monotonic() < until
        unloaded = _unloaded(services, model)
        refusal = unloaded if unloaded is not None or is_patient else _without_worker(services, model)
        if refusal is not None and await _is_any_queued(runs):
            if unloaded is None:
                labelled(requests_unserved_total, model).inc()
            return refusal


async def _is_any_queued(runs: Sequence[Run]) -> bool:
    for run in runs:
        with suppress(StorageUnavailable, JobNotFound):
            if (await run.read()).job.status is JobStatus.QUEUED:
                return True
    return False


def _refuse_at_the_door(services: Services, model: str, *, is_patient: bool) -> None:
    """Raises NoWorkers if the model is unloaded or, unless the client is patient, has had no worker for too long. What
    a worker would serve is counted, as it leaves no job that could call for one."""
    unloaded = _unloaded(services, model)
    if unloaded is not None:
        raise unloaded
    refusal = None if is_patient else _without_worker(services, model)
    if refusal is not None:
        labelled(requests_unserved_total, model).inc()
        raise refusal


def _unloaded(services: Services, model: str) -> NoWorkers | None:
    queue = services.monitor.queues.get(model)
    if queue is None or queue.is_loaded:
        return None
    return NoWorkers(
        f"{model[:128]} was unloaded by an admin; have it loaded, or submit a job to /v1/jobs, which can wait",
        retry_after_seconds=UNSERVED_RETRY_SECONDS,
    )


def _without_worker(services: Services, model: str) -> NoWorkers | None:
    seconds = services.monitor.unserved_seconds(model)
    if seconds <= services.settings.no_workers_seconds:
        return None
    queue = services.monitor.queues.get(model)
    ready_in = None if queue is None else queue.ready_in_seconds
    return NoWorkers(
        f"no worker of {model[:128]} was seen in the last {seconds:.0f} s; retry, wait for one with the header "
        "X-Start-Timeout: 10m, or submit it to /v1/jobs",
        retry_after_seconds=UNSERVED_RETRY_SECONDS if ready_in is None else ready_in,
    )


def _options(asked: Asked, job_headers: JobHeaders, number: int) -> JobOptions:
    """The options of job `number` of the request. The keys of later jobs contain a space, which no client's key may."""
    key = job_headers.idempotency_key
    priority = (
        PRIORITY_BY_SERVICE_TIER[asked.service_tier or "auto"] if job_headers.priority is None else job_headers.priority
    )
    timeouts = asked.timeouts.or_else(job_headers.timeouts)
    return JobOptions(
        priority=priority,
        start_timeout_seconds=timeouts.start_seconds,
        run_timeout_seconds=timeouts.run_seconds,
        deadline_after_seconds=_deadline_after_seconds(asked, job_headers),
        idempotency_key=f"{key} {number}" if key is not None and number else key,
        metadata=asked.metadata or {},
        endpoint=asked.endpoint,
        is_stored=asked.is_stored,
        endpoint_body=asked.endpoint_body,
        webhook_url=job_headers.webhook_url,
        webhook_statuses=TELLABLE_STATUSES if job_headers.webhook_url is not None else (),
        turn=asked.turn,
        use_cache=asked.use_cache,
    )


def _deadline_after_seconds(asked: Asked, job_headers: JobHeaders) -> float | None:
    """A client that has sent its read timeout has no use for the answer once its retries are over, unless it asked for
    the job to go on."""
    if job_headers.cancel_after_seconds is not None:
        return job_headers.cancel_after_seconds
    if asked.timeout_seconds is not None:
        return asked.timeout_seconds
    is_kept = asked.has_stream or asked.is_stored or job_headers.on_disconnect == "continue"
    return None if is_kept or job_headers.read_timeout_seconds is None else job_headers.attach_seconds


async def _find_retried(
    services: Services,
    tenant_id: UUID,
    generations: Sequence[JobRequest],
    options: JobOptions,
    job_headers: JobHeaders,
) -> list[UUID]:
    """The jobs of the request that this one retries, without an idempotency key; empty if not every one is found, or if
    one is found twice. The SDKs send the number of retries; two intentional equal requests both send 0."""
    if job_headers.num_retries < 1 or options.idempotency_key is not None:
        return []
    found: dict[UUID, None] = {}
    for generation in generations:
        job_id = await services.read(
            job_queries.find_attachable,
            tenant_id,
            request_hash(generation, options),
            within_seconds=job_headers.attach_seconds,
        )
        if job_id is None or job_id in found:
            return []
        found[job_id] = None
    return list(found)


async def _submit_all(
    services: Services,
    tenant_id: UUID,
    generations: Sequence[JobRequest],
    all_options: Sequence[JobOptions],
    asked: Asked,
    started: float,
) -> list[Run]:
    try:
        jobs = await services.submitter.ready(tenant_id, generations, all_options)
    except CeleriacError as exc:
        raise with_body_names(exc, asked.spelling) from exc
    submissions = [
        _submit(services, job, options, started, asked.accept) for job, options in zip(jobs, all_options, strict=True)
    ]
    if len(submissions) == 1:  # without a task of its own
        outcomes: list[Run | BaseException] = [await _outcome_of(submissions[0])]
    else:
        outcomes = await asyncio.gather(*submissions, return_exceptions=True)
    runs = [outcome for outcome in outcomes if isinstance(outcome, Run)]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if not refusals:
        return runs
    for run in runs:
        if not run.is_replayed:
            services.spawn(_cancel(services, run))
    first = jobs[0].new_job
    if first.is_limited and isinstance(outcomes[0], Run) and not outcomes[0].is_replayed:
        with suppress(StorageUnavailable):
            await services.write(return_request, tenant_id, first.key_id)
    if isinstance(refusals[0], CeleriacError):
        raise with_body_names(refusals[0], asked.spelling) from refusals[0]
    raise refusals[0]


async def _outcome_of(submission: Coroutine[Any, Any, Run]) -> Run | Exception:
    try:
        return await submission
    except Exception as exc:
        return exc


async def _cancel(services: Services, run: Run) -> None:
    await services.cancel(run.job_id, run.tenant_id)


async def _submit(services: Services, job: ReadyJob, options: JobOptions, started: float, accept: Accept | None) -> Run:
    tenant_id = job.new_job.tenant_id
    submitted = await services.submitter.commit(job, options, accept)
    if not submitted.is_new:
        return replace(await _found(services, tenant_id, submitted.job_id, started), is_replayed=True)
    queue = None
    if submitted.record is None:  # it waits
        queue = services.monitor.joining(submitted)
        services.monitor.accepted(submitted.new_job)
    return Run(
        services=services,
        tenant_id=tenant_id,
        job_id=submitted.job_id,
        model_name=submitted.new_job.request.model,
        model_revision=submitted.new_job.model_revision,
        priority=submitted.new_job.priority,
        created_at=submitted.created_at,
        started=started,
        num_prompt_tokens=len(submitted.new_job.prompt_token_ids),
        cache=submitted.cache,
        record=submitted.record,
        queue=queue,
    )


async def _found(services: Services, tenant_id: UUID, job_id: UUID, started: float) -> Run:
    job = (await read_job(services, job_id, tenant_id)).job
    return Run(
        services=services,
        tenant_id=tenant_id,
        job_id=job_id,
        model_name=job.model_name,
        model_revision=job.model_revision,
        priority=job.priority,
        created_at=job.created_at,
        started=started,
        num_prompt_tokens=job.num_prompt_tokens,
    )


async def read_job(services: Services, job_id: UUID, tenant_id: UUID, **options: Any) -> JobRecord:
    """Raises JobNotFound, also for a job of another tenant, or StorageUnavailable."""
    record = await services.read(job_queries.get, job_id, tenant_id, **options)
    if record is None:
        raise JobNotFound(f"there is no job {external_id(job_id)!r}; it may have been deleted")
    return record


async def _has_readers(services: Services, job_id: UUID) -> bool:
    """Whether any API process streams the job. Without Redis that is not known, so True: the job continues."""
    if services.streams.num_readers(job_id):
        return True
    try:
        return await num_listening_processes(services.redis, job_id) > 0
    except REDIS_OUTAGES:
        return True
