"""The one door for jobs: resolve the model, count the prompt, check the bounds, fill in defaults, accept, dispatch.

Every API and the command line come through `Submitter.submit`, so a job means the same wherever it came from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from domain.errors import (
    CeleriacError,
    IdempotencyKeyReused,
    InvalidRequest,
    PoisonRequest,
    TooManyQueuedJobs,
)
from domain.ids import external_id, new_id
from domain.kinds import JobRequest
from domain.requests import GenerationRequest
from domain.webhook_urls import BadWebhookUrl
from observability import (
    jobs_submitted_total,
    labelled,
    llm_requests_total,
    note_submitted,
    prompt_tokens_total,
    request_id_context,
)
from settings import Settings
from storage.jobs_accept import Accepted, AcceptOutcome, NewJob, QueueRoom
from tasks import job_log
from tasks.group_accept import GroupAcceptor
from tasks.job_options import JobOptions, deadline_of, refuse_impossible_deadline
from tasks.models import ModelView, ModelViews
from tasks.request_hashes import fingerprint, request_hash
from tasks.settle import PreparedRequest
from tasks.settler import RequestPreparer
from tasks.webhook_guard import TargetGuard


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
        self._preparer = RequestPreparer(views)
        self._webhook_guard = TargetGuard(settings)

    async def submit(self, tenant_id: UUID, request: JobRequest, options: JobOptions) -> Submitted:
        """Returns once the job is committed. Raises the CeleriacError that says why not."""
        view = self._views.get(request.model)
        try:
            new_job = await self.prepare(tenant_id, request, options)
            note_submitted(external_id(new_job.id))
            accepted = await self._acceptor.accept(new_job)
            note_submitted(external_id(accepted.job_id))
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
        """A job was committed: tell of it, and have it dispatched."""
        tell_accepted(new_job)
        self._dispatch_soon(new_job.request.model)

    async def prepare(self, tenant_id: UUID, request: JobRequest, options: JobOptions) -> NewJob:
        """The job to accept, every bound checked; nothing is committed. Raises the CeleriacError that says why not."""
        view = self._views.get(request.model)
        refuse_impossible_deadline(options)
        webhook_url = await self._check_webhook(options.webhook_url)
        prepared = await self._preparer.prepare(request, tenant_id)
        return make_job(tenant_id, request, options, view, prepared, settings=self._settings, webhook_url=webhook_url)

    async def _check_webhook(self, url: str | None) -> str | None:
        """As it is stored. Raises InvalidRequest."""
        try:
            return None if url is None else str(await self._webhook_guard.check(url))
        except BadWebhookUrl as exc:
            raise InvalidRequest(f"webhook: {exc}", param="webhook") from None

    def prepare_grammars(self) -> None:
        """Start preparing in the background what the models' grammars need. Call it again when models have changed."""
        self._preparer.prepare_grammars()

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """Of a request that is not submitted. Raises the CeleriacError that says why it cannot be."""
        return await self._preparer.count_prompt_tokens(request)

    async def aclose(self) -> None:
        await self._preparer.aclose()


def tell_accepted(new_job: NewJob) -> None:
    """To the log and the metrics. Whoever commits a job calls this."""
    job_log.accepted(new_job)
    model = new_job.request.model
    labelled(llm_requests_total, model).inc()
    labelled(prompt_tokens_total, model).inc(len(new_job.prompt_token_ids))


def make_job(
    tenant_id: UUID,
    request: JobRequest,
    options: JobOptions,
    view: ModelView,
    prepared: PreparedRequest,
    *,
    settings: Settings,
    webhook_url: str | None = None,
) -> NewJob:
    """`request` is as it was asked for, `prepared` has every default filled in."""
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
        request_hash=request_hash(request, options),
        fingerprint=fingerprint(view.revision, prepared.prompt_token_ids, request),
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
        request_id=request_id_context.get(),
    )


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
